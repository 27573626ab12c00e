"""What clients send, as types, and its translation into the canonical request.

Every parameter is honoured or refused by name: an unknown one by the decoder, a known one that is not offered by
`_refuse_unsupported`. Nothing is dropped silently.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from inference.protocol import GenerationRequest, SamplingParams

from ..errors import InvalidRequest, UnsupportedParameter
from .body import check_free_form, parse_arguments

_MAX_CHOICES = 128
_MAX_STOPS = 16
_INT64 = 2**63
_INT32_MAX = 2**31 - 1
_MAX_TOKEN_DIGITS = 10
_GREEDY_BELOW = 1e-5
"""A lower temperature would divide by zero in the engine's float32."""

StopText = Annotated[str, Meta(min_length=1)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Limit = Annotated[int, Meta(ge=1, le=_INT32_MAX)]
TokenId = Annotated[int, Meta(ge=0, le=_INT32_MAX)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An object in which an unknown field is an error."""


class TextPart(_Strict, frozen=True):
    """A part of a message's content. Other kinds than text are refused by their `type`."""

    type: Literal["text"]
    text: str


class FunctionCall(_Strict, frozen=True):
    """The function of an earlier tool call."""

    name: str
    arguments: str = "{}"


class MessageToolCall(_Strict, frozen=True):
    """A tool call that the assistant made earlier in the conversation."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None


class ChatMessage(_Strict, frozen=True):
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


class FunctionDefinition(_Strict, frozen=True):
    """A function that the model may call."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(_Strict, frozen=True):
    """A tool that the model may call. Only functions are known."""

    type: Literal["function"]
    function: FunctionDefinition


class StreamOptions(_Strict, frozen=True):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatCompletionRequest(_Strict, frozen=True):
    """The body of POST /v1/chat/completions: OpenAI's parameters and the extensions that MLX and vLLM servers share."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    model: Annotated[str, Meta(max_length=200)] = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=_MAX_CHOICES)] | None = None
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=_INT32_MAX)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_INT32_MAX)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-_INT64, le=_INT64 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    logit_bias: dict[str, Bias] | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=_MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=_MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    user: str | None = None
    """Names the client's own user; it has no effect on the answer."""
    safety_identifier: str | None = None
    """As `user`."""
    logprobs: Any = None
    top_logprobs: Any = None
    response_format: Any = None
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
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
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


# What Transformers' `apply_chat_template` takes for itself: a client must not replace the template, which is a program,
# nor what is made of its output.
_NOT_TEMPLATE_VARIABLES = frozenset(
    (
        "self",
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    )
)


def _refuse_unsupported(body: ChatCompletionRequest) -> None:
    for name, neutral in _NEUTRAL.items():
        value = getattr(body, name)
        # `in` would take False for 0.
        if value is not None and not any(value == item and type(value) is type(item) for item in neutral):
            raise UnsupportedParameter(f"{name} with this value is not supported", param=name)


def to_generation_request(body: ChatCompletionRequest, request_id: str, default_model: str) -> GenerationRequest:
    """Return the canonical request for a chat completion.

    Raises:
        InvalidRequest: parameters contradict each other or are not supported; `param` names one.
    """
    _refuse_unsupported(body)
    model = body.model or default_model
    if not model:
        raise InvalidRequest("missing required parameter: model", param="model")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only allowed with stream", param="stream_options")
    max_tokens = _max_tokens(body)
    if body.min_tokens and max_tokens is not None and body.min_tokens > max_tokens:
        raise InvalidRequest("min_tokens is more than max_tokens", param="min_tokens")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return GenerationRequest(
        request_id=request_id,
        model=model,
        messages=tuple(_message(at, message) for at, message in enumerate(body.messages)),
        tools=_tools(body),
        chat_template_kwargs=_template_kwargs(body.chat_template_kwargs or {}),
        sampling=_sampling(body),
        n=body.n or 1,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        stop=stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
    )


def _max_tokens(body: ChatCompletionRequest) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest("max_tokens and max_completion_tokens contradict each other", param="max_tokens")
    return new if new is not None else old


def _sampling(body: ChatCompletionRequest) -> SamplingParams:
    default = SamplingParams()
    bias: dict[int, float] = {}
    for token, value in (body.logit_bias or {}).items():
        if not token.isascii() or not token.isdigit() or len(token) > _MAX_TOKEN_DIGITS:
            raise InvalidRequest("the keys of logit_bias must be token ids", param="logit_bias")
        bias[int(token)] = value
    temperature = default.temperature if body.temperature is None else body.temperature
    return SamplingParams(
        temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
        top_p=default.top_p if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        seed=body.seed,
        repetition_penalty=default.repetition_penalty if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=bias,
    )


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
        if name in _NOT_TEMPLATE_VARIABLES:
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
