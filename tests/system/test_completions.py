"""Plain completions, log probabilities and structured output, by the official `openai` client over a real port."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.system.api_fixtures import ON_DAPHNE
from tests.system.deployments import Site

pytestmark = ON_DAPHNE

PROMPT = "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "17 + 25 = 42"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
def client(site: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{site.base_url}/v1", api_key="none", max_retries=0) as made:
        yield made


def _complete(client: openai.OpenAI, site: Site, prompt: Any = PROMPT, **fields: Any) -> Any:
    return client.completions.create(model=site.model, prompt=prompt, **{"temperature": 0, "max_tokens": 30, **fields})


def _chat(client: openai.OpenAI, site: Site, text: str, **fields: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=site.model, messages=messages, **{"temperature": 0, **fields})


def test_prompt_goes_on_as_text(client: openai.OpenAI, site: Site) -> None:
    answer = _complete(client, site)

    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (ANSWER, "stop")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_default_length_is_openais(client: openai.OpenAI, site: Site) -> None:
    answer = client.completions.create(model=site.model, prompt=PROMPT, extra_body={"ignore_eos": True})

    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_echo_gives_the_prompt_first(client: openai.OpenAI, site: Site) -> None:
    assert _complete(client, site, echo=True).choices[0].text == PROMPT + ANSWER
    chunks = list(_complete(client, site, echo=True, stream=True))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == PROMPT + ANSWER


def test_several_prompts_give_numbered_choices(client: openai.OpenAI, site: Site) -> None:
    other = PROMPT.replace("17 + 25", "6 * 7")
    answer = _complete(client, site, [PROMPT, other], n=2)

    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [ANSWER, ANSWER, "6 * 7 = 42", "6 * 7 = 42"]
    texts = dict.fromkeys(range(4), "")
    for chunk in _complete(client, site, [PROMPT, other], n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == [choice.text for choice in answer.choices]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": 6}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_field_is_refused_by_its_name(
    client: openai.OpenAI, site: Site, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        _complete(client, site, **fields)

    assert raised.value.param == param


def test_log_probabilities_of_a_completion_fit_its_text(client: openai.OpenAI, site: Site) -> None:
    choice = _complete(client, site, logprobs=2).choices[0]

    # The end of the sequence is a token without visible text.
    assert "".join(choice.logprobs.tokens[:-1]) == ANSWER
    assert all(value <= 0 for value in choice.logprobs.token_logprobs)
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
    assert choice.logprobs.text_offset[:3] == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat_fit_its_text(client: openai.OpenAI, site: Site, stream: bool) -> None:
    answer = _chat(client, site, "What is 17 + 25?", logprobs=True, top_logprobs=3, stream=stream)
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    content = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]

    assert "".join(entry.token for entry in content[:-1]) == ANSWER
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
        assert bytes(entry.bytes).decode() == entry.token


@pytest.mark.parametrize("temperature", [0, 1])
def test_answer_satisfies_its_schema(client: openai.OpenAI, site: Site, temperature: int) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = _chat(
        client, site, "Anna is 31 years old.", response_format=wanted, temperature=temperature, seed=1, max_tokens=300
    )
    person = json.loads(answer.choices[0].message.content)

    assert answer.choices[0].finish_reason == "stop"
    assert set(person) == {"name", "age"}
    assert isinstance(person["age"], int)


def test_json_object_is_an_object(client: openai.OpenAI, site: Site) -> None:
    text = "Answer in JSON with keys name and age: Anna is 31 years old."
    answer = _chat(client, site, text, response_format={"type": "json_object"})

    assert json.loads(answer.choices[0].message.content) == {"name": "Anna", "age": 31}


@pytest.mark.parametrize(
    ("wanted", "pattern"), [({"choice": ["yes", "no"]}, "yes|no"), ({"regex": "[0-9]{3}-[a-c]+x"}, "[0-9]{3}-[a-c]+x")]
)
def test_structured_output_matches(client: openai.OpenAI, site: Site, wanted: dict[str, Any], pattern: str) -> None:
    answer = _chat(client, site, "Go on", extra_body={"structured_outputs": wanted}, temperature=1, seed=2, n=3)

    assert all(re.fullmatch(pattern, choice.message.content) for choice in answer.choices)


@pytest.mark.parametrize(
    "schema", [{"type": "string", "not": {"const": "x"}}, {"type": "nonsense"}], ids=["unsupported", "invalid"]
)
def test_schema_that_cannot_be_enforced_is_refused(client: openai.OpenAI, site: Site, schema: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as raised:
        _chat(client, site, "Hi", response_format=wanted)

    assert raised.value.param == "response_format.json_schema.schema"
