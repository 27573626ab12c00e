"""From token ids to visible text."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.loading import LoadedModel
from inference.protocol import ToolCall
from inference.text import StopStrings, TextStream, ToolCallSplitter, ToolSyntax


def _parse(text: str, _tools: object) -> object:
    return json.loads(text.strip())


SYNTAX = ToolSyntax("<tool_call>", "</tool_call>", _parse)


def _splitter() -> ToolCallSplitter:
    return ToolCallSplitter(SYNTAX, ({"type": "function"},), lambda: "call_1")


def _cut(text: str, borders: list[int]) -> list[str]:
    at = sorted({min(border, len(text)) for border in borders} | {0, len(text)})
    return [text[start:end] for start, end in pairwise(at)]


def _through(stops: StopStrings, pieces: list[str]) -> str:
    shown = ""
    for piece in pieces:
        text, stopped = stops.push(piece)
        shown += text
        if stopped:
            return shown
    return shown + stops.flush()


@given(
    text=st.text("abcx", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    borders=st.lists(st.integers(0, 30)),
)
@settings(deadline=None)
def test_stop_string_cuts_at_its_first_place_wherever_the_pieces_end(
    text: str, stops: list[str], borders: list[int]
) -> None:
    shown = _through(StopStrings(stops), _cut(text, borders))

    # The first stop to be complete ends the text; among those complete with the same piece the earliest place counts.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
        assert len(shown) <= min(ends)
        assert not any(stop in shown for stop in stops)


def test_possible_beginning_of_a_stop_is_held_back() -> None:
    stops = StopStrings(["STOP"])

    assert stops.push("go on ST") == ("go on ", False)
    assert stops.push("ILL") == ("STILL", False)
    assert stops.push(" STO") == (" ", False)
    assert stops.push("P now") == ("", True)


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語のテキスト", "emoji 🙂👩‍👩‍👧 done", "a\n\n b\t"])
def test_text_of_a_stream_is_that_of_all_tokens_and_never_half_a_character(tiny: LoadedModel, text: str) -> None:
    ids = tiny.tokenizer.encode(text, add_special_tokens=False)
    stream = tiny.text_stream((), ())

    pieces = [stream.add(token).text for token in ids]
    pieces.append(stream.finish(stopped=False).text)

    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_unfinished_character_is_never_shown(tiny: LoadedModel) -> None:
    ids = tiny.tokenizer.encode("ok 🙂", add_special_tokens=False)[:-1]
    stream = tiny.text_stream((), ())

    shown = "".join(stream.add(token).text for token in ids) + stream.finish(stopped=False).text

    assert shown == "ok "


def test_stop_string_ends_a_stream_across_token_borders(tiny: LoadedModel) -> None:
    ids = tiny.tokenizer.encode("hello world, how are you", add_special_tokens=False)
    stream: TextStream = tiny.text_stream(("d, h",), ())
    shown = ""
    for token in ids:
        piece = stream.add(token)
        shown += piece.text
        if piece.stopped:
            break

    assert shown + stream.finish(stopped=True).text == "hello worl"


@given(borders=st.lists(st.integers(0, 120)))
@settings(deadline=None)
def test_tool_call_is_taken_out_of_the_content_wherever_the_pieces_end(borders: list[int]) -> None:
    text = 'Let me see.<tool_call>\n{"name": "f", "arguments": {"x": "<b>"}}\n</tool_call>'
    splitter = _splitter()
    content, calls = "", ()
    for piece in _cut(text, borders):
        shown, found = splitter.push(piece)
        content += shown
        calls += found
    rest, last = splitter.flush()

    assert content + rest == "Let me see."
    assert calls + last == (ToolCall(0, "call_1", "f", '{"x": "<b>"}'),)


def test_several_calls_are_numbered() -> None:
    one = '<tool_call>{"name": "a", "arguments": {}}</tool_call>\n'
    content, calls = _splitter().push(one + one.replace('"a"', '"b"'))

    assert [(call.index, call.name) for call in calls] == [(0, "a"), (1, "b")]
    assert content == ""


@pytest.mark.parametrize("body", ["not json", "[1]", '{"name": "f"}'])
def test_call_that_cannot_be_parsed_is_given_back_as_content(body: str) -> None:
    text = f"<tool_call>{body}</tool_call>"

    assert _splitter().push(text) == (text, ())


def test_call_that_was_cut_off_is_given_back_as_content() -> None:
    splitter = _splitter()
    splitter.push('x<tool_call>{"name": ')

    assert splitter.flush() == ('<tool_call>{"name": ', ())
