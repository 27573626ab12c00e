"""Chat completions in OpenAI's format, read back by OpenAI's own types."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from inference.protocol import Delta, Finished, ToolCall, Usage
from mlx_serving.api.chat_format import ChunkFormatter, WholeAnswer
from mlx_serving.errors import WorkerLost

TEXT = 'quote " newline \n emoji 🙂 \u2028 </script>'
EVENTS = [
    Delta("id", 0, 0, TEXT, (1,)),
    Delta("id", 1, 1, "", (2,)),
    Delta("id", 2, 1, "", (3,), "tool_calls", (ToolCall(0, "call_1", "f", '{"a": 1}'),)),
    Delta("id", 3, 0, "end", (4,), "stop"),
]
FINISHED = Finished("id", 4, Usage(5, 4, 2))


def _events(raw: bytes) -> list[Any]:
    assert raw.endswith(b"\n\n")
    lines = raw.decode().removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) if line != "data: [DONE]" else "[DONE]" for line in lines]


@pytest.mark.parametrize("include_usage", [False, True])
def test_stream_has_openais_form(include_usage: bool) -> None:
    formatter = ChunkFormatter("chatcmpl-1", "m", 123, 2, include_usage=include_usage)
    raw = formatter.start() + b"".join(map(formatter.delta, EVENTS)) + formatter.finish(FINISHED)
    *chunks, done = _events(raw)
    parsed = [ChatCompletionChunk.model_validate(chunk) for chunk in chunks]

    assert done == "[DONE]"
    texts = {0: "", 1: ""}
    reasons = {}
    for chunk in parsed:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert texts == {0: TEXT + "end", 1: ""}
    assert reasons == {0: "stop", 1: "tool_calls"}
    usages = [chunk.usage for chunk in parsed if chunk.usage]
    assert [usage.total_tokens for usage in usages] == ([9] if include_usage else [])
    assert all("usage" in chunk for chunk in chunks) is include_usage


def test_tokens_without_text_make_no_chunk() -> None:
    formatter = ChunkFormatter("chatcmpl-1", "m", 123, 1, include_usage=False)

    assert formatter.delta(Delta("id", 0, 0, "", (1,))) == b""


def test_failure_in_mid_stream_is_an_error_event() -> None:
    formatter = ChunkFormatter("chatcmpl-1", "m", 123, 1, include_usage=False)
    (event,) = _events(formatter.error(WorkerLost("gone")))

    assert event["error"]["code"] == "worker_lost"
    assert event["error"]["message"] == "gone"


def test_whole_answer_has_openais_form() -> None:
    answer = WholeAnswer(2)
    for event in [*EVENTS, FINISHED]:
        answer.add(event)
    parsed = ChatCompletion.model_validate_json(answer.encode("chatcmpl-1", "m", 123))

    assert parsed.choices[0].message.content == TEXT + "end"
    assert parsed.choices[1].message.content is None
    calls = parsed.choices[1].message.tool_calls
    assert calls is not None
    assert calls[0].function.arguments == '{"a": 1}'  # type: ignore[union-attr]  # the other member is custom tools
    assert parsed.usage is not None
    assert parsed.usage.prompt_tokens_details is not None
    assert parsed.usage.prompt_tokens_details.cached_tokens == 2
