"""From a request's bytes to the canonical request: every parameter is honoured or refused by name."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.protocol import GenerationRequest, GrammarSpec, SamplingParams
from mlx_serving.api.body import parse
from mlx_serving.api.schemas import _NEUTRAL, ChatCompletionRequest, chat_decoder, to_generation_request
from mlx_serving.errors import InvalidRequest, ServingError, UnsupportedParameter

USER = {"role": "user", "content": "hi"}


def _read(**fields: Any) -> GenerationRequest:
    body = {"model": "m", "messages": [USER], **fields}
    return to_generation_request(parse(json.dumps(body).encode(), chat_decoder), "id", "")


def _refusal(**fields: Any) -> tuple[str | None, str]:
    with pytest.raises(InvalidRequest) as caught:
        _read(**fields)
    return caught.value.param, caught.value.code


# Each parameter with a value, and what it must become. A parameter missing here fails the test below this table.
HONOURED: dict[str, tuple[Any, dict[str, Any]]] = {
    "model": ("other", {"model": "other"}),
    "messages": ([{"role": "system", "content": "s"}, USER], {"messages": ({"role": "system", "content": "s"}, USER)}),
    "n": (3, {"n": 3}),
    "max_tokens": (7, {"max_tokens": 7}),
    "max_completion_tokens": (7, {"max_tokens": 7}),
    "min_tokens": (2, {"min_tokens": 2}),
    "temperature": (0, {"sampling": SamplingParams(temperature=0)}),
    "top_p": (0.5, {"sampling": SamplingParams(top_p=0.5)}),
    "top_k": (5, {"sampling": SamplingParams(top_k=5)}),
    "min_p": (0.1, {"sampling": SamplingParams(min_p=0.1)}),
    "seed": (-5, {"sampling": SamplingParams(seed=-5)}),
    "presence_penalty": (1.5, {"sampling": SamplingParams(presence_penalty=1.5)}),
    "frequency_penalty": (-1.5, {"sampling": SamplingParams(frequency_penalty=-1.5)}),
    "repetition_penalty": (1.2, {"sampling": SamplingParams(repetition_penalty=1.2)}),
    "logit_bias": ({"5": -100}, {"sampling": SamplingParams(logit_bias={5: -100.0})}),
    "stop": (["a", "b"], {"stop": ("a", "b")}),
    "stop_token_ids": ([4], {"stop_token_ids": (4,)}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "priority": (2, {"priority": 2}),
    "queue_timeout": (1.5, {"timeout_s": 1.5}),
    "logprobs": (True, {"logprobs": 0}),
    "response_format": ({"type": "json_object"}, {"grammar": GrammarSpec(kind="json_object")}),
    "structured_outputs": (
        {"regex": "a+"},
        {"grammar": GrammarSpec(kind="regex", value="a+", param="structured_outputs")},
    ),
    "tools": (
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        {"tools": ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},)},
    ),
    "chat_template_kwargs": ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}),
}
# Looked at by the view, or documented to have no effect on the answer.
ELSEWHERE = {
    "top_logprobs",
    "stream",
    "stream_options",
    "tool_choice",
    "parallel_tool_calls",
    "user",
    "safety_identifier",
}


@pytest.mark.parametrize("name", HONOURED)
def test_parameter_reaches_the_canonical_request(name: str) -> None:
    value, expected = HONOURED[name]
    plain = _read()

    assert _read(**{name: value}) == msgspec.structs.replace(plain, **expected)


def test_every_known_parameter_is_honoured_or_refused() -> None:
    names = {field.name for field in msgspec.structs.fields(ChatCompletionRequest)}

    assert names == set(HONOURED) | ELSEWHERE | set(_NEUTRAL)


@pytest.mark.parametrize("name", _NEUTRAL)
def test_unsupported_parameter_is_refused_by_name(name: str) -> None:
    assert _refusal(**{name: {"some": "value"}}) == (name, "unsupported_parameter")


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in _NEUTRAL.items() for value in values])
def test_value_that_asks_for_nothing_is_accepted(name: str, value: Any) -> None:
    assert _read(**{name: value}) == _read()


def test_null_is_the_same_as_leaving_out() -> None:
    names = {field.name for field in msgspec.structs.fields(ChatCompletionRequest)} - {"model", "messages"}

    assert _read(**dict.fromkeys(names)) == _read()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"unknown": 1}, "unknown"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
        ({"messages": [{**USER, "odd": 1}]}, "messages[0].odd"),
        ({"messages": [{**USER, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}]}, "messages[0].tool_calls"),
        ({"messages": [{**USER, "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"tools": [{"type": "function", "function": {"name": "bad name"}}]}, "tools[0].function.name"),
        ({"model": ""}, "model"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 2}, "min_tokens"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"priority": 11}, "priority"),
        ({"queue_timeout": 0}, "queue_timeout"),
    ],
)
def test_bad_value_is_refused_by_field(fields: dict[str, Any], param: str) -> None:
    assert _refusal(**fields)[0] == param


def test_number_beyond_every_type_is_refused_by_field() -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}],"chat_template_kwargs":{"a":[1,{"b":1e999}]}}'

    with pytest.raises(InvalidRequest) as caught:
        to_generation_request(parse(body, chat_decoder), "id", "")

    assert caught.value.param is not None
    assert caught.value.param.startswith("chat_template_kwargs")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b"null", "body"),
        (b'{"model":"m"}', "messages"),
        (b'{"messages":[{"role":"user","content":"a\xff"}],"model":"m"}', "messages[0].content"),
        (b'{"messages":[{"role":"user","content":"a"}],"temperature":NaN}', "temperature"),
        (b'{"messages":[{"role":"user","content":"a"}],"top_p":-Infinity}', "top_p"),
        (b"[" * 100_000, "body"),
        (b'{"tools":' + b"[" * 100_000, "tools[0]"),
    ],
)
def test_malformed_body_is_refused(body: bytes, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(body, chat_decoder)

    assert caught.value.param == param


@given(st.binary(max_size=200) | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(json.dumps))
@settings(deadline=None, max_examples=300)
def test_no_body_raises_anything_but_a_serving_error(body: bytes | str) -> None:
    raw = body.encode() if isinstance(body, str) else body
    try:
        to_generation_request(parse(raw, chat_decoder), "id", "")
    except ServingError as error:
        assert 400 <= error.status < 500


def test_developer_is_system_and_text_parts_are_joined() -> None:
    messages = [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, USER]

    assert _read(messages=messages).messages == ({"role": "system", "content": "ab"}, USER)


def test_tool_conversation_is_passed_on() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]

    assert _read(messages=messages).messages == (
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    )


def test_tool_choice_none_leaves_the_tools_out() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]

    assert _read(tools=tools, tool_choice="none").tools == ()
    with pytest.raises(UnsupportedParameter):
        _read(tools=tools, tool_choice={"type": "function", "function": {"name": "f"}})


def test_default_model_is_taken_when_none_is_named() -> None:
    body = parse(json.dumps({"messages": [USER]}).encode(), chat_decoder)

    assert to_generation_request(body, "id", "fallback").model == "fallback"


def test_json_schema_becomes_a_grammar_that_names_its_field() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    grammar = _read(response_format=wanted).grammar

    assert grammar is not None
    assert (grammar.kind, json.loads(grammar.value)) == ("json_schema", schema)
    assert grammar.param == "response_format.json_schema.schema"


def test_plain_text_format_asks_for_nothing() -> None:
    assert _read(response_format={"type": "text"}) == _read()
