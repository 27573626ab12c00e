"""Parameters that chat and plain completions share, as types, and their translation into the canonical request.

Every parameter is honoured or refused by name: an unknown one by the decoder, a known one that is not offered by
`refuse_unsupported`. Nothing is dropped silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from inference.protocol import GrammarKind, GrammarSpec, SamplingParams

from ..errors import InvalidRequest, UnsupportedParameter
from .body import check_free_form

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
_MAX_PRIORITY = 10
_STRUCTURED = "structured_outputs"


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An object in which an unknown field is an error."""


class StreamOptions(Strict, frozen=True):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class StructuredOutputs(Strict, frozen=True):
    """vLLM's form of a grammar: exactly one field is set."""

    json: dict[str, Any] | None = None
    """A JSON schema."""
    regex: Annotated[str, Meta(min_length=1)] | None = None
    choice: Annotated[list[str], Meta(min_length=1)] | None = None
    grammar: Annotated[str, Meta(min_length=1)] | None = None
    """In llguidance's dialect of Lark."""


class GenerationFields(Strict, frozen=True, kw_only=True):
    """OpenAI's parameters, and the extensions that MLX and vLLM servers share."""

    model: Annotated[str, Meta(max_length=200)] = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=_MAX_CHOICES)] | None = None
    max_tokens: Limit | None = None
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
    priority: Annotated[int, Meta(ge=-_MAX_PRIORITY, le=_MAX_PRIORITY)] | None = None
    """Higher runs earlier; each step counts like ten seconds of waiting."""
    queue_timeout: Annotated[float, Meta(gt=0, le=86400)] | None = None
    """Seconds after which a request that still waits for its turn is failed."""
    structured_outputs: StructuredOutputs | None = None
    """What the output has to look like, beside `response_format`."""
    user: str | None = None
    """Names the client's own user; it has no effect on the answer."""
    safety_identifier: str | None = None
    """As `user`."""


def refuse_unsupported(body: GenerationFields, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse known parameters that are not offered.

    Args:
        body: the request.
        neutral: their names, each with the values that ask for nothing and are accepted.

    Raises:
        UnsupportedParameter: one has another value.
    """
    for name, accepted in neutral.items():
        value = getattr(body, name)
        # `in` would take False for 0.
        if value is not None and not any(value == item and type(value) is type(item) for item in accepted):
            raise UnsupportedParameter(f"{name} with this value is not supported", param=name)


def structured_grammar(wanted: StructuredOutputs | None) -> GrammarSpec | None:
    """Return the grammar that `structured_outputs` asks for.

    Raises:
        InvalidRequest: not exactly one field is set.
    """
    if wanted is None:
        return None
    texts: dict[GrammarKind, str | None] = {
        "json_schema": None if wanted.json is None else encode_json(wanted.json, "structured_outputs.json"),
        "regex": wanted.regex,
        "choice": None if wanted.choice is None else msgspec.json.encode(wanted.choice).decode(),
        "lark": wanted.grammar,
    }
    found = [GrammarSpec(kind=kind, value=text, param=_STRUCTURED) for kind, text in texts.items() if text is not None]
    if len(found) != 1:
        raise InvalidRequest("structured_outputs takes exactly one of json, regex, choice, grammar", param=_STRUCTURED)
    return found[0]


def encode_json(value: dict[str, Any], path: str) -> str:
    """Return a free-form object as JSON text.

    Raises:
        InvalidRequest: see `check_free_form`.
    """
    check_free_form(value, path)
    return msgspec.json.encode(value).decode()


def common_fields(
    body: GenerationFields, default_model: str, max_tokens: int | None, grammar: GrammarSpec | None = None
) -> dict[str, Any]:
    """Return the fields of the canonical request that do not depend on the endpoint.

    Args:
        body: the request.
        default_model: taken when it names no model.
        max_tokens: the limit on generated tokens, as the endpoint understands it.
        grammar: what the endpoint's own parameters say of the output.

    Raises:
        InvalidRequest: parameters contradict each other; `param` names one.
    """
    model = body.model or default_model
    if not model:
        raise InvalidRequest("missing required parameter: model", param="model")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only allowed with stream", param="stream_options")
    if body.min_tokens and max_tokens is not None and body.min_tokens > max_tokens:
        raise InvalidRequest("min_tokens is more than max_tokens", param="min_tokens")
    structured = structured_grammar(body.structured_outputs)
    if structured is not None and grammar is not None:
        raise InvalidRequest("structured_outputs and response_format exclude each other", param=_STRUCTURED)
    grammar = grammar or structured
    if grammar is not None and (body.ignore_eos or body.min_tokens):
        name = "ignore_eos" if body.ignore_eos else "min_tokens"
        raise InvalidRequest(f"{name} is not allowed with {grammar.param}", param=name)
    return {
        "model": model,
        "grammar": grammar,
        "sampling": _sampling(body),
        "n": body.n or 1,
        "max_tokens": max_tokens,
        "min_tokens": body.min_tokens or 0,
        "stop": (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "ignore_eos": bool(body.ignore_eos),
        "priority": body.priority or 0,
        "timeout_s": body.queue_timeout,
    }


def _sampling(body: GenerationFields) -> SamplingParams:
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
