"""From a canonical request to token ids: chat template, tokenizer, and the checks that need the model's limits.

Runs on the server's one preparation thread, never on the event loop and never on the engine thread.
"""

from __future__ import annotations

import json
from typing import Any

import jinja2

from .grammar import BadGrammar, Matcher
from .loading import LoadedModel
from .protocol import RESERVED_TEMPLATE_VARIABLES, FailureCode, GenerationRequest
from .running import PreparedRequest


class BadPrompt(Exception):
    """The request does not fit this model.

    Attributes:
        code: the protocol's failure code.
        param: the request's field at fault.
    """

    def __init__(self, code: FailureCode, message: str, param: str | None) -> None:
        super().__init__(message)
        self.code: FailureCode = code
        self.param = param


def prompt_size(request: GenerationRequest) -> int:
    """Return about how many characters a request's prompt has."""
    if request.messages is None:
        return len(request.prompt or ())
    return sum(len(message.get("content") or "") for message in request.messages)


def prepare(loaded: LoadedModel, request: GenerationRequest) -> PreparedRequest:
    """Return the request with its prompt as token ids.

    Raises:
        BadPrompt: the prompt is empty or too long, the template refuses it, or a token id does not exist.
    """
    _check_token_ids(request, loaded.info.vocab_size)
    param = "messages" if request.messages is not None else "prompt"
    limit = loaded.info.context_length
    prompt = _render(loaded, request) if request.messages is not None else request.prompt or ()
    # Tokenising megabytes only to refuse them would hold up everybody else's prompts.
    if isinstance(prompt, str) and len(prompt) > limit * loaded.longest_token:
        message = f"the prompt has {len(prompt)} characters; this model's context length is {limit} tokens"
        raise BadPrompt("context_length_exceeded", message, param)
    ids = loaded.encode(prompt, special=request.messages is None) if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise BadPrompt("invalid_request", "the prompt is empty", param)
    left = limit - len(ids)
    if left < 1:
        message = f"the prompt has {len(ids)} tokens; this model's context length is {limit} tokens"
        raise BadPrompt("context_length_exceeded", message, param)
    if request.min_tokens > left:
        message = f"only {left} tokens are left of this model's context length of {limit}"
        raise BadPrompt("context_length_exceeded", message, "min_tokens")
    if request.max_tokens is not None and request.max_tokens > left:
        message = (
            f"this model's context length is {limit} tokens; the prompt has {len(ids)} "
            f"and {request.max_tokens} were asked for as output"
        )
        raise BadPrompt("context_length_exceeded", message, "max_tokens")
    text = ""
    if request.echo:
        text = request.prompt if isinstance(request.prompt, str) else str(loaded.tokenizer.decode(ids))
    new_tokens = left if request.max_tokens is None else request.max_tokens
    return PreparedRequest(request, tuple(ids), new_tokens, text, _matchers(loaded, request))


def _matchers(loaded: LoadedModel, request: GenerationRequest) -> tuple[Matcher, ...]:
    if request.grammar is None:
        return ()
    try:
        grammar = loaded.grammars.compile(request.grammar)
    except BadGrammar as error:
        raise BadPrompt("invalid_request", str(error), request.grammar.param) from error
    # Made here and not on the engine thread, where a giant schema would hold up every row.
    return tuple(grammar.matcher() for _ in range(request.n))


def _render(loaded: LoadedModel, request: GenerationRequest) -> str:
    """Return the conversation as text, by the model's chat template."""
    tokenizer = loaded.tokenizer
    if not tokenizer.has_chat_template:
        raise BadPrompt("invalid_request", "this model has no chat template", "messages")
    if request.tools and loaded.tool_syntax is None:
        raise BadPrompt("invalid_request", "this model's tool calls cannot be parsed", "tools")
    for name in request.chat_template_kwargs:
        if name in RESERVED_TEMPLATE_VARIABLES:
            param = f"chat_template_kwargs.{name}"
            raise BadPrompt("invalid_request", f"{name} is not a variable of the chat template", param)
    try:
        text: str = tokenizer.apply_chat_template(
            [_for_template(message) for message in request.messages or ()],
            tools=list(request.tools) or None,
            add_generation_prompt=True,
            tokenize=False,
            **request.chat_template_kwargs,
        )
    except BadPrompt:
        raise
    # A template is a program of the model's maker: it may fail in any way on input that it does not expect.
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        message = f"the model's chat template refuses these messages: {error}"
        raise BadPrompt("invalid_request", message, "messages") from error
    return text


def _for_template(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message as templates expect it: the arguments of earlier tool calls as objects, not as JSON text."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    parsed = []
    for call in calls:
        function = dict(call["function"])
        try:
            function["arguments"] = json.loads(function.get("arguments") or "{}")
        except ValueError as error:
            raise BadPrompt("invalid_request", f"tool call arguments are not JSON: {error}", "messages") from error
        parsed.append({**call, "function": function})
    return {**message, "tool_calls": parsed}


def _check_token_ids(request: GenerationRequest, vocab_size: int) -> None:
    prompt = request.prompt if isinstance(request.prompt, tuple) else ()
    for param, ids in (
        ("prompt", prompt),
        ("stop_token_ids", request.stop_token_ids),
        ("logit_bias", request.sampling.logit_bias),
    ):
        for token in ids:
            if not 0 <= token < vocab_size:
                raise BadPrompt("invalid_request", f"there is no token {token}; the vocabulary has {vocab_size}", param)
