"""Plain completions in OpenAI's format: the chunks of a stream and the whole answer.

A request with several prompts is several requests inside; their choices are numbered one after the other.
"""

from __future__ import annotations

from typing import Any

import msgspec

from inference.protocol import Accepted, Delta, Finished, RequestEvent, TokenLogprob, Usage

from ..errors import ServingError
from .chat_format import DONE, SYSTEM_FINGERPRINT, usage_object
from .errors import error_bytes

_encode = msgspec.json.encode


def sum_usage(usages: list[Usage]) -> Usage:
    """Return the usage of several requests together."""
    return Usage(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages),
    )


def logprobs_object(entries: list[TokenLogprob], offset: int) -> dict[str, Any]:
    """Return the `logprobs` object of this endpoint.

    Args:
        entries: one for each token.
        offset: characters of the text before the first of them.
    """
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.text)
    return {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{text: value for _, text, value in entry.top} for entry in entries],
        "text_offset": offsets,
    }


class CompletionFormatter:
    """Formats the stream of a request with `prompts` prompts and `choices` choices for each."""

    def __init__(self, request_id: str, model: str, created: int, choices: int, *, include_usage: bool) -> None:
        self._common = {
            "id": request_id,
            "object": "text_completion",
            "created": created,
            "model": model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        head = _encode(self._common)
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._include_usage = include_usage
        self._choices = choices
        self._usages: list[Usage] = []
        self._shown: dict[int, int] = {}

    def event(self, prompt: int, event: RequestEvent) -> bytes:
        """Return the chunks for an event of one of the prompts."""
        if isinstance(event, Accepted) and event.prompt_text:
            first = prompt * self._choices
            return b"".join(self._chunk(first + index, event.prompt_text) for index in range(self._choices))
        if isinstance(event, Delta) and (event.text or event.logprobs or event.finish_reason is not None):
            return self._chunk(prompt * self._choices + event.index, event.text, event.logprobs, event.finish_reason)
        if isinstance(event, Finished):
            self._usages.append(event.usage)
        return b""

    def finish(self) -> bytes:
        """Return the end of the stream."""
        if not self._include_usage:
            return DONE
        usage = _encode(usage_object(sum_usage(self._usages)))
        return self._head + b'],"usage":' + usage + b"}\n\n" + DONE

    def error(self, error: ServingError) -> bytes:
        """Return the event that ends a stream which failed after it had begun."""
        return b"data: " + error_bytes(error) + b"\n\n"

    def _chunk(
        self, index: int, text: str, logprobs: tuple[TokenLogprob, ...] = (), finish_reason: str | None = None
    ) -> bytes:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
        if logprobs:
            choice["logprobs"] = logprobs_object(list(logprobs), self._shown.get(index, 0))
        self._shown[index] = self._shown.get(index, 0) + len(text)
        return self._head + _encode(choice) + self._tail


class WholeCompletion:
    """Collects the events of a request that is answered at once."""

    def __init__(self, prompts: int, choices: int) -> None:
        self._choices = choices
        total = prompts * choices
        self._texts: list[list[str]] = [[] for _ in range(total)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(total)]
        self._reasons: list[str | None] = [None] * total
        self._usages: list[Usage] = []

    def add(self, prompt: int, event: RequestEvent) -> None:
        """Take the next event of one of the prompts."""
        first = prompt * self._choices
        if isinstance(event, Accepted):
            for index in range(self._choices):
                self._texts[first + index].append(event.prompt_text)
        elif isinstance(event, Delta):
            self._texts[first + event.index].append(event.text)
            self._logprobs[first + event.index].extend(event.logprobs)
            self._reasons[first + event.index] = event.finish_reason or self._reasons[first + event.index]
        elif isinstance(event, Finished):
            self._usages.append(event.usage)

    def encode(self, request_id: str, model: str, created: int, *, logprobs: bool) -> bytes:
        """Return the JSON body of the answer."""
        choices = [
            {
                "index": index,
                "text": "".join(texts),
                "logprobs": logprobs_object(self._logprobs[index], 0) if logprobs else None,
                "finish_reason": self._reasons[index],
            }
            for index, texts in enumerate(self._texts)
        ]
        return _encode(
            {
                "id": request_id,
                "object": "text_completion",
                "created": created,
                "model": model,
                "system_fingerprint": SYSTEM_FINGERPRINT,
                "choices": choices,
                "usage": usage_object(sum_usage(self._usages)),
            }
        )
