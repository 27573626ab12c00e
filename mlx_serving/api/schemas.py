"""What clients send to the chat endpoint, as types, and its translation into the canonical request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from inference.protocol import RESERVED_TEMPLATE_VARIABLES, GenerationRequest, GrammarSpec

from ..errors import InvalidRequest, UnsupportedParameter
from .body import check_free_form, parse_arguments
from .parameters import GenerationFields, Limit, Strict, common_fields, encode_json, refuse_unsupported

MAX_TOP_LOGPROBS = 20


class TextPart(Strict, frozen=True):
    """A part of a message's content. Other kinds than text are refused by their `type`."""

    type: Literal["text"]
    text: str


class FunctionCall(Strict, frozen=True):
    """The function of an earlier tool call."""

    name: str
    arguments: str = "{}"


class MessageToolCall(Strict, frozen=True):
    """A tool call that the assistant made earlier in the conversation."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None


class ChatMessage(Strict, frozen=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    refusal: Literal[None] = None
    audio: Literal[None] = None
    function_call: Literal[None] = None
    annotations: list[Any] | None = None


class FunctionDefinition(Strict, frozen=True):
    """A function that the model may call."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Strict, frozen=True):
    """A tool that the model may call. Only functions are known."""

    type: Literal["function"]
    function: FunctionDefinition


class JsonSchema(Strict, frozen=True):
    """A schema that the answer has to satisfy."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    """A schema is always enforced."""


class ResponseFormat(Strict, frozen=True):
    """What the answer has to look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatCompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Limit | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    service_tier: Any = None
    store: Any = None
    metadata: Any = None
    functions: Any = None
    function_call: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    prompt_cache_key: Any = None


chat_decoder = msgspec.json.Decoder(ChatCompletionRequest)

# Known parameters of OpenAI's API that are not offered, with the values that ask for nothing and are accepted.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
    "functions": ([],),
    "function_call": ("none",),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "prompt_cache_key": (),
}


def to_generation_request(body: ChatCompletionRequest, request_id: str, default_model: str) -> GenerationRequest:
    """Return the canonical request for a chat completion.

    Raises:
        InvalidRequest: parameters contradict each other or are not supported; `param` names one.
    """
    refuse_unsupported(body, _NEUTRAL)
    return GenerationRequest(
        request_id=request_id,
        messages=tuple(_message(at, message) for at, message in enumerate(body.messages)),
        tools=_tools(body),
        chat_template_kwargs=_template_kwargs(body.chat_template_kwargs or {}),
        logprobs=_logprobs(body),
        **common_fields(body, default_model, _max_tokens(body), _grammar(body)),
    )


def _grammar(body: ChatCompletionRequest) -> GrammarSpec | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if body.tools and body.tool_choice != "none":
        raise UnsupportedParameter("response_format cannot be combined with tools", param="response_format")
    if wanted.type == "json_object":
        return GrammarSpec(kind="json_object")
    if wanted.json_schema is None:
        param = "response_format.json_schema"
        raise InvalidRequest(f"missing required parameter: {param}", param=param)
    path = "response_format.json_schema.schema"
    return GrammarSpec(kind="json_schema", value=encode_json(wanted.json_schema.schema, path), param=path)


def _logprobs(body: ChatCompletionRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequest("top_logprobs is only allowed with logprobs", param="top_logprobs")
    return None


def _max_tokens(body: ChatCompletionRequest) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest("max_tokens and max_completion_tokens contradict each other", param="max_tokens")
    return new if new is not None else old


def _tools(body: ChatCompletionRequest) -> tuple[dict[str, Any], ...]:
    if body.tool_choice not in (None, "none", "auto"):
        raise UnsupportedParameter("only the tool choices 'auto' and 'none' are supported", param="tool_choice")
    if body.tool_choice == "auto" and not body.tools:
        raise InvalidRequest("tool_choice is only allowed with tools", param="tool_choice")
    if body.parallel_tool_calls is not None and not body.tools:
        raise InvalidRequest("parallel_tool_calls is only allowed with tools", param="parallel_tool_calls")
    if body.parallel_tool_calls is False:
        raise UnsupportedParameter("parallel_tool_calls cannot be switched off", param="parallel_tool_calls")
    for at, tool in enumerate(body.tools or ()):
        check_free_form(tool.function.parameters, f"tools[{at}].function.parameters")
    if body.tool_choice == "none":
        return ()
    return tuple(
        {"type": "function", "function": _without_none(msgspec.structs.asdict(tool.function))}
        for tool in body.tools or ()
    )


def _template_kwargs(variables: dict[str, Any]) -> dict[str, Any]:
    for name in variables:
        if name in RESERVED_TEMPLATE_VARIABLES:
            param = f"chat_template_kwargs.{name}"
            raise UnsupportedParameter(f"{param} is not a variable of the chat template", param=param)
    check_free_form(variables, "chat_template_kwargs")
    return variables


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _message(at: int, message: ChatMessage) -> dict[str, Any]:
    """Return a message as chat templates expect it: text content, and only the fields that are set."""
    where = f"messages[{at}]"
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest("only the assistant makes tool calls", param=f"{where}.tool_calls")
    if message.tool_call_id is not None and message.role != "tool":
        raise InvalidRequest("tool_call_id belongs to the role tool", param=f"{where}.tool_call_id")
    if message.content is None and not message.tool_calls:
        raise InvalidRequest(f"missing required parameter: {where}.content", param=f"{where}.content")
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    fields: dict[str, Any] = {
        # "developer" is OpenAI's newer word for "system"; templates know the older one.
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
    }
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    for call_at, call in enumerate(message.tool_calls or ()):
        parse_arguments(call.function.arguments, f"{where}.tool_calls[{call_at}].function.arguments")
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "type": call.type, "function": msgspec.structs.asdict(call.function)}
            for call in message.tool_calls
        ]
    return fields
