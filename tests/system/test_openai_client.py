"""The official `openai` client against a real server: what it sends, and what it makes of the answers and errors."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer

from inference.demo_model import MODEL_PATH
from inference.demo_model.questions import CHECKS
from tests.system.api_fixtures import ON_DAPHNE
from tests.system.deployments import DEMO_MODEL, PATIENCE_S, Site

pytestmark = ON_DAPHNE

GUIDE = "Write a long guide to operating mlx-serving"
WEATHER = next(check for check in CHECKS if check.mode == "tools")
UNDECIDED = {str(token): 100 for token in range(300, 500)}
"""A logit bias that leaves the model with many tokens that it finds about as unlikely as each other."""

PLAIN = [check for check in CHECKS if check.mode == "exact" and not check.tools]


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def client(site: Site) -> Iterator[openai.OpenAI]:
    options = {"base_url": f"{site.base_url}/v1", "api_key": "unused", "max_retries": 0, "timeout": PATIENCE_S}
    with openai.OpenAI(**options) as made:
        yield made


@pytest.fixture
async def async_client(site: Site) -> AsyncIterator[openai.AsyncOpenAI]:
    options = {"base_url": f"{site.base_url}/v1", "api_key": "unused", "max_retries": 0, "timeout": PATIENCE_S}
    async with openai.AsyncOpenAI(**options) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_PATH / "tokenizer.json"))


def complete(client: openai.OpenAI, text: str = GUIDE, **fields: Any) -> Any:
    """Return a completion, greedy unless the fields say otherwise."""
    return client.chat.completions.create(**{"model": DEMO_MODEL, "messages": user(text), "temperature": 0, **fields})


def collect(chunks: Any) -> tuple[dict[int, str], dict[int, str], list[Any]]:
    """Return what a stream says: texts and finish reasons by choice, and its usages."""
    texts: dict[int, str] = defaultdict(str)
    reasons: dict[int, str] = {}
    usages = []
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                assert choice.index not in reasons, "a choice ends once"
                reasons[choice.index] = choice.finish_reason
        if chunk.usage:
            assert not chunk.choices, "the chunk with the usage has no choices"
            usages.append(chunk.usage)
    return texts, reasons, [counted(usage) for usage in usages]


def counted(usage: Any) -> tuple[int, int, int]:
    """Return what a usage counts, without how much of the prompt was cached: that depends on what ran before."""
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


# --- plain ------------------------------------------------------------------------------------------------------------


def test_the_sync_client_gets_the_right_answer(client: openai.OpenAI) -> None:
    answers = {check.expected: complete(client, messages=list(check.messages)) for check in PLAIN[:6]}
    assert {expected: answer.choices[0].message.content for expected, answer in answers.items()} == {
        expected: expected for expected in answers
    }
    assert {answer.choices[0].finish_reason for answer in answers.values()} == {"stop"}


async def test_the_async_client_gets_the_right_answer(async_client: openai.AsyncOpenAI) -> None:
    check = PLAIN[0]
    answer = await async_client.chat.completions.create(model=DEMO_MODEL, messages=list(check.messages), temperature=0)
    assert answer.choices[0].message.content == check.expected
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same_as_a_whole_answer(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=60)
    texts, reasons, usages = collect(
        complete(client, max_tokens=60, stream=True, stream_options={"include_usage": True})
    )
    assert texts == {0: whole.choices[0].message.content}
    assert reasons == {0: whole.choices[0].finish_reason}
    assert usages == [counted(whole.usage)]


async def test_the_async_client_streams(async_client: openai.AsyncOpenAI) -> None:
    check = next(check for check in PLAIN if check.ability == "unicode")
    stream = await async_client.chat.completions.create(
        model=DEMO_MODEL, messages=list(check.messages), temperature=0, stream=True
    )
    chunks = [chunk async for chunk in stream]
    texts, reasons, usages = collect(chunks)
    assert texts == {0: check.expected}
    assert reasons == {0: "stop"}
    assert usages == [], "nobody asked for it"
    assert len(chunks) > 4, "it came in pieces"
    assert len({chunk.id for chunk in chunks}) == 1


# --- several choices --------------------------------------------------------------------------------------------------


def test_choices_of_a_stream_keep_their_index(client: openai.OpenAI) -> None:
    fields = {"n": 3, "temperature": 1, "seed": 7, "max_tokens": 24, "logit_bias": UNDECIDED}
    whole = complete(client, "Tell me a story", **fields)
    texts, reasons, usages = collect(
        complete(client, "Tell me a story", **fields, stream=True, stream_options={"include_usage": True})
    )
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert len(set(texts.values())) > 1, "each choice has a seed of its own"
    assert usages == [counted(whole.usage)]
    prompt_tokens = complete(client, "Tell me a story", max_tokens=1).usage.prompt_tokens
    assert whole.usage.prompt_tokens == prompt_tokens, "the prompt is counted once"


# --- where an answer ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_is_not_shown(client: openai.OpenAI, stream: bool) -> None:
    full = complete(client, max_tokens=60).choices[0].message.content
    # From the middle of one word to the middle of another, so that no single token holds it.
    at = full.index(" ", 40)
    stop = full[at - 2 : at + 4]
    cut = full[: full.index(stop)]
    answer = complete(client, max_tokens=60, stop=["never said", stop], stream=stream)
    if stream:
        texts, reasons, _ = collect(answer)
    else:
        (choice,) = answer.choices
        texts, reasons = {0: choice.message.content}, {0: choice.finish_reason}
    assert (texts, reasons) == ({0: cut}, {0: "stop"})


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_limit_on_tokens_is_kept_and_told(client: openai.OpenAI, name: str) -> None:
    answer = complete(client, **{name: 9})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 9


def test_an_answer_that_ends_by_itself_counts_its_last_token(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = complete(client, "What is 17 + 25?")
    assert answer.choices[0].finish_reason == "stop"
    shown = tokenizer.encode(answer.choices[0].message.content).ids
    assert answer.usage.completion_tokens >= len(shown) + 1


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_answer_again(client: openai.OpenAI) -> None:
    def sampled(seed: int) -> str:
        fields = {"temperature": 1, "max_tokens": 24, "seed": seed, "logit_bias": UNDECIDED}
        return complete(client, "Tell me a story", **fields).choices[0].message.content

    assert sampled(11) == sampled(11)
    assert len({sampled(seed) for seed in (11, 12, 13, 14)}) > 1


def test_logit_bias_forces_a_token(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    token = tokenizer.encode("yes").ids[0]
    answer = complete(client, max_tokens=5, logit_bias={str(token): 100})
    assert answer.choices[0].message.content == tokenizer.decode([token] * 5)


def test_logit_bias_forbids_a_token(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    usual = complete(client, max_tokens=1).choices[0].message.content
    (token,) = (at for text, at in tokenizer.get_vocab().items() if tokenizer.decode([at]) == usual and text)
    answer = complete(client, max_tokens=1, logit_bias={str(token): -100})
    assert answer.choices[0].message.content != usual


# --- tools ------------------------------------------------------------------------------------------------------------


def test_a_tool_is_called_and_its_result_used(client: openai.OpenAI) -> None:
    question: list[Any] = list(WEATHER.messages)
    asked = complete(client, messages=question, tools=list(WEATHER.tools)).choices[0]
    assert asked.finish_reason == "tool_calls"
    (call,) = asked.message.tool_calls
    calls = [{"name": call.function.name, "arguments": json.loads(call.function.arguments)}]
    assert calls == json.loads(WEATHER.expected)
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21, "condition": "sunny"}'}
    told = complete(client, messages=[*question, asked.message, result], tools=list(WEATHER.tools)).choices[0]
    assert told.finish_reason == "stop"
    assert told.message.content == "The temperature is 21 and the condition is sunny."


def test_a_streamed_tool_call_is_whole_and_shows_no_markup(client: openai.OpenAI) -> None:
    stream = complete(client, messages=list(WEATHER.messages), tools=list(WEATHER.tools), stream=True)
    calls: dict[int, dict[str, str]] = defaultdict(lambda: {"id": "", "name": "", "arguments": ""})
    content, reasons = "", []
    for chunk in stream:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
        for part in choice.delta.tool_calls or ():
            calls[part.index]["id"] += part.id or ""
            calls[part.index]["name"] += part.function.name or ""
            calls[part.index]["arguments"] += part.function.arguments or ""
    assert reasons == ["tool_calls"]
    assert content == ""
    assert list(calls) == [0]
    assert calls[0]["id"].startswith("call_")
    got = [{"name": call["name"], "arguments": json.loads(call["arguments"])} for call in calls.values()]
    assert got == json.loads(WEATHER.expected)


def test_tool_choice_none_keeps_tools_from_the_model(client: openai.OpenAI) -> None:
    answer = complete(
        client, messages=list(WEATHER.messages), tools=list(WEATHER.tools), tool_choice="none", max_tokens=30
    ).choices[0]
    assert answer.finish_reason != "tool_calls"
    assert answer.message.tool_calls is None


# --- models and errors ------------------------------------------------------------------------------------------------


def test_models_are_listed_and_described(client: openai.OpenAI) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == [DEMO_MODEL]
    assert client.models.retrieve(DEMO_MODEL) == listed[0]


@pytest.mark.parametrize(
    ("fields", "error", "code", "param"),
    [
        ({"model": "no-such-model"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_request", "temperature"),
        ({"messages": []}, openai.BadRequestError, "invalid_request", "messages"),
        ({"store": True}, openai.BadRequestError, "unsupported_parameter", "store"),
        ({"max_tokens": 9999}, openai.BadRequestError, "context_length_exceeded", "max_tokens"),
        ({"messages": user("word " * 9000)}, openai.BadRequestError, "context_length_exceeded", "messages"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_raised_as_the_clients_own(
    client: openai.OpenAI,
    fields: dict[str, Any],
    error: type[openai.APIStatusError],
    code: str,
    param: str,
    stream: bool,
) -> None:
    with pytest.raises(error) as raised:
        complete(client, "Hi", **fields, stream=stream)
    assert (raised.value.code, raised.value.param) == (code, param)


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("no-such-model")
    assert raised.value.code == "model_not_found"


def test_answers_name_their_request_and_their_worker(site: Site) -> None:
    body = {"model": DEMO_MODEL, "messages": user("Hi"), "max_tokens": 1}
    response = httpx.post(f"{site.base_url}/v1/chat/completions", json=body, timeout=PATIENCE_S)
    assert response.headers["X-Request-Id"] == response.json()["id"]
    workers = {row["id"] for row in site.deployment.workers("ready")}
    assert response.headers["X-MLX-Worker"] in workers
