"""What clients send to the plain completions endpoint, as types, and its translation into canonical requests."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from inference.protocol import GenerationRequest

from ..errors import InvalidRequest, UnsupportedParameter
from .parameters import GenerationFields, TokenId, common_fields, refuse_unsupported

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for this endpoint."""

_MAX_PROMPTS = 64
_MAX_LOGPROBS = 5

Tokens = Annotated[list[TokenId], Meta(min_length=1)]


class CompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: str | list[str | TokenId | Tokens]
    """A text, several texts, token ids, or several lists of token ids."""
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=_MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None
    suffix: str | None = None


completion_decoder = msgspec.json.Decoder(CompletionRequest)

_NEUTRAL: dict[str, tuple[Any, ...]] = {"suffix": ("",)}


def to_generation_requests(body: CompletionRequest, request_id: str, default_model: str) -> list[GenerationRequest]:
    """Return the canonical requests of a completion request, one for each prompt.

    Raises:
        InvalidRequest: parameters contradict each other or are not supported; `param` names one.
    """
    refuse_unsupported(body, _NEUTRAL)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise UnsupportedParameter("best_of must equal n", param="best_of")
    if body.echo and body.logprobs is not None:
        raise UnsupportedParameter("echo cannot be combined with logprobs", param="echo")
    fields = common_fields(body, default_model, DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens)
    return [
        GenerationRequest(
            request_id=f"{request_id}-{at}" if at else request_id,
            prompt=prompt,
            echo=bool(body.echo),
            logprobs=body.logprobs,
            **fields,
        )
        for at, prompt in enumerate(_prompts(body.prompt))
    ]


def _prompts(prompt: str | list[Any]) -> list[str | tuple[int, ...]]:
    """Return the prompts in a value that may be one or several, as text or as token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("prompt is empty", param="prompt")
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise InvalidRequest("prompt mixes texts and token ids", param="prompt")
    if kinds == {int}:
        return [tuple(prompt)]
    if len(prompt) > _MAX_PROMPTS:
        raise InvalidRequest(f"prompt holds more than {_MAX_PROMPTS} prompts", param="prompt")
    return [item if isinstance(item, str) else tuple(item) for item in prompt]
