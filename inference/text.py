"""From token ids to the text that a client may see: decoding piece by piece, stop strings, and tool calls.

One `TextStream` belongs to one choice and runs on the engine thread while the device computes the next step. It never
shows half a character, never shows a stop string or the beginning of one that may still complete, and never looks at
the text so far as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from .protocol import ToolCall


class Detokenizer(Protocol):
    """Turns token ids into text, one at a time."""

    def add(self, token: int) -> str:
        """Return the text that this token completes, empty while a character is unfinished."""
        ...


class FastDetokenizer:
    """Detokenizer over the `tokenizers` library's own incremental decoder."""

    __slots__ = ("_stream", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """Return the text that this token completes."""
        return self._stream.step(self._tokenizer, token) or ""


class SegmentDetokenizer:
    """Detokenizer over mlx-lm's streaming detokenizers, for tokenizers that the `tokenizers` library does not run."""

    __slots__ = ("_inner",)

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def add(self, token: int) -> str:
        """Return the text that this token completes."""
        self._inner.add_token(token)
        return str(self._inner.last_segment)


class StopStrings:
    """Finds the first of several texts in a stream of pieces, also across their borders.

    Text that may be the beginning of a stop string is held back until the next piece decides.
    """

    __slots__ = ("_held", "_longest", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Return the text that may be shown now, and whether a stop string was found (it and the rest are cut off)."""
        if not self._stops or not piece:
            return piece, False
        text = self._held + piece
        first = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=-1)
        if first >= 0:
            self._held = ""
            return text[:first], True
        keep = self._open_suffix(text)
        self._held = text[len(text) - keep :] if keep else ""
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Return what is still held back: the stream has ended without completing a stop string."""
        held, self._held = self._held, ""
        return held

    def _open_suffix(self, text: str) -> int:
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0


@dataclass(slots=True)
class Piece:
    """What a token added to a choice's output."""

    text: str = ""
    stopped: bool = False
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    """How a model writes tool calls: the markers around one, and mlx-lm's parser for what is between them."""

    start: str
    end: str
    parse: Callable[[str, Any], Any]


@dataclass(slots=True)
class ToolCallSplitter:
    """Separates tool calls from content in a stream of text pieces. Used when a request offers tools.

    A call that cannot be parsed is given back as content, markers included, so that nothing the model wrote is lost.
    """

    syntax: ToolSyntax
    tools: tuple[dict[str, Any], ...]
    make_id: Callable[[], str]
    calls: int = 0
    _inside: bool = False
    _buffer: str = ""
    _outside: StopStrings = field(init=False)

    def __post_init__(self) -> None:
        self._outside = StopStrings((self.syntax.start,))

    def push(self, piece: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Return the content and the finished calls that this piece brings."""
        content: list[str] = []
        found: list[ToolCall] = []
        rest = piece
        while rest:
            if not self._inside:
                held_and_rest = self._outside.flush() + rest
                before, opened = self._outside.push(held_and_rest)
                content.append(before)
                if not opened:
                    break
                self._inside, self._buffer = True, ""
                rest = held_and_rest[len(before) + len(self.syntax.start) :]
                continue
            self._buffer += rest
            if not self.syntax.end or (at := self._buffer.find(self.syntax.end)) < 0:
                break
            body, rest = self._buffer[:at], self._buffer[at + len(self.syntax.end) :]
            text, calls = self._close(body, self.syntax.end)
            content.append(text)
            found.extend(calls)
        text = "".join(content)
        # Blank lines around a call are layout, not content.
        if self.calls or self._inside:
            text = text if text.strip() else ""
        return text, tuple(found)

    def flush(self) -> tuple[str, tuple[ToolCall, ...]]:
        """Return what is left when the output ends."""
        if not self._inside:
            return self._outside.flush(), ()
        return self._close(self._buffer, "")

    def _close(self, body: str, end: str) -> tuple[str, tuple[ToolCall, ...]]:
        self._inside, self._buffer = False, ""
        try:
            parsed = self.syntax.parse(body, list(self.tools))
            parsed = parsed if isinstance(parsed, list) else [parsed]
            calls = tuple(self._call(offset, item) for offset, item in enumerate(parsed))
        except (ValueError, KeyError, TypeError, AttributeError, SyntaxError):
            return f"{self.syntax.start}{body}{end}", ()
        self.calls += len(calls)
        return "", calls

    def _call(self, offset: int, item: dict[str, Any]) -> ToolCall:
        arguments = item["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return ToolCall(index=self.calls + offset, id=self.make_id(), name=str(item["name"]), arguments=text)


class TextStream:
    """The visible output of one choice."""

    __slots__ = ("_detokenizer", "_splitter", "_stops")

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str], splitter: ToolCallSplitter | None = None
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._splitter = splitter

    @property
    def has_tool_calls(self) -> bool:
        """Whether a complete tool call has been seen."""
        return self._splitter is not None and self._splitter.calls > 0

    def add(self, token: int) -> Piece:
        """Take the next token."""
        text, stopped = self._stops.push(self._detokenizer.add(token))
        if self._splitter is None:
            return Piece(text, stopped)
        text, calls = self._splitter.push(text)
        return Piece(text, stopped, calls)

    def finish(self, *, stopped: bool) -> Piece:
        """Return what was held back. `stopped` says that a stop string ended the output, so that nothing is."""
        text = "" if stopped else self._stops.flush()
        if self._splitter is None:
            return Piece(text)
        shown, calls = self._splitter.push(text)
        rest, last = self._splitter.flush()
        return Piece(shown + rest, tool_calls=calls + last)
