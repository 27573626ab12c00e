"""Chat completions in OpenAI's format: the chunks of a stream and the whole answer.

The parts of a chunk that never change within a stream are encoded once; for each delta only its text is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from inference.protocol import Delta, Finished, RequestEvent, TokenLogprob, ToolCall, Usage

from ..errors import ServingError
from .errors import error_bytes

SYSTEM_FINGERPRINT = "mlx-serving"
DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.encode


def usage_object(usage: Usage) -> dict[str, Any]:
    """Return the `usage` object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def tool_call_object(call: ToolCall) -> dict[str, Any]:
    """Return a tool call as it stands in a message."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def logprobs_object(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return the `logprobs` object of the chat endpoint."""

    def token(text: str, value: float) -> dict[str, Any]:
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    content = [
        {**token(entry.text, entry.logprob), "top_logprobs": [token(text, value) for _, text, value in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class ChunkFormatter:
    """Formats one stream of server-sent events."""

    def __init__(self, request_id: str, model: str, created: int, choices: int, *, include_usage: bool) -> None:
        head = _encode(
            {
                "id": request_id,
                "object": "chat.completion.chunk",
                "created": created,
                "model": model,
                "system_fingerprint": SYSTEM_FINGERPRINT,
            }
        )
        self._include_usage = include_usage
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._choices = choices
        self._text_head = [self._head + b'{"index":%d,"delta":{"content":' % index for index in range(choices)]
        self._text_tail = b'},"logprobs":null,"finish_reason":null}' + self._tail

    def start(self) -> bytes:
        """Return the first chunk of every choice, which names the role."""
        return b"".join(
            self._choice({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
            for index in range(self._choices)
        )

    def delta(self, delta: Delta) -> bytes:
        """Return the chunks for a delta: empty when it holds tokens without visible text."""
        parts: list[bytes] = []
        if delta.logprobs:
            choice = {"index": delta.index, "delta": {"content": delta.text}, "finish_reason": None}
            parts.append(self._choice(choice, logprobs_object(delta.logprobs)))
        elif delta.text:
            parts.append(self._text_head[delta.index] + _encode(delta.text) + self._text_tail)
        for call in delta.tool_calls:
            entry = {"index": call.index, **tool_call_object(call)}
            parts.append(self._choice({"index": delta.index, "delta": {"tool_calls": [entry]}, "finish_reason": None}))
        if delta.finish_reason is not None:
            parts.append(self._choice({"index": delta.index, "delta": {}, "finish_reason": delta.finish_reason}))
        return b"".join(parts)

    def finish(self, finished: Finished) -> bytes:
        """Return the end of the stream."""
        if not self._include_usage:
            return DONE
        usage = _encode(usage_object(finished.usage))
        return self._head + b'],"usage":' + usage + b"}\n\n" + DONE

    def error(self, error: ServingError) -> bytes:
        """Return the event that ends a stream which failed after it had begun."""
        return _event(error_bytes(error))

    def _choice(self, choice: dict[str, Any], logprobs: dict[str, Any] | None = None) -> bytes:
        return self._head + _encode({**choice, "logprobs": logprobs}) + self._tail


class WholeAnswer:
    """Collects the events of a request that is answered at once."""

    def __init__(self, choices: int) -> None:
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self._calls: list[list[ToolCall]] = [[] for _ in range(choices)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(choices)]
        self._reasons: list[str | None] = [None] * choices
        self._usage = Usage(0, 0)

    def add(self, event: RequestEvent) -> None:
        """Take the next event."""
        if isinstance(event, Delta):
            self._texts[event.index].append(event.text)
            self._calls[event.index].extend(event.tool_calls)
            self._logprobs[event.index].extend(event.logprobs)
            self._reasons[event.index] = event.finish_reason or self._reasons[event.index]
        elif isinstance(event, Finished):
            self._usage = event.usage

    def encode(self, request_id: str, model: str, created: int) -> bytes:
        """Return the JSON body of the answer."""
        return _encode(
            {
                "id": request_id,
                "object": "chat.completion",
                "created": created,
                "model": model,
                "system_fingerprint": SYSTEM_FINGERPRINT,
                "choices": [self._choice(index) for index in range(len(self._texts))],
                "usage": usage_object(self._usage),
            }
        )

    def _choice(self, index: int) -> dict[str, Any]:
        text = "".join(self._texts[index])
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._calls[index]:
            message["content"] = text or None
            message["tool_calls"] = [tool_call_object(call) for call in self._calls[index]]
        logprobs = logprobs_object(self._logprobs[index]) if self._logprobs[index] else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self._reasons[index]}
