"""The parts of the benchmarks that decide what the numbers are: percentiles, parsers, tables."""

from __future__ import annotations

import json

import pytest

from benchmarks import stats, table, wire
from benchmarks.blas import seconds_per_call
from benchmarks.load import Run, parse, report
from benchmarks.records import Measured, Trace


def trace(started: float, arrivals: list[float], **fields: object) -> Trace:
    return Trace(started, arrivals[-1] if arrivals else started, arrivals, 10, **{"tokens": len(arrivals), **fields})


def chunk(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text_chunk(text: str) -> bytes:
    return chunk(choices=[{"index": 0, "delta": {"content": text}}], usage=None)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = chunk(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9})
DONE = b"data: [DONE]\n\n"


def coded(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize(("percent", "expected"), [(0, 1.0), (50, 2.5), (100, 4.0), (75, 3.25)])
def test_percentiles_interpolate_between_neighbours(percent: float, expected: float) -> None:
    assert stats.percentile([4.0, 1.0, 3.0, 2.0], percent) == pytest.approx(expected)


def test_the_percentile_of_one_value_is_that_value_and_of_none_is_zero() -> None:
    assert (stats.percentile([5.0], 99), stats.percentile([], 50)) == (5.0, 0.0)


def test_summary_measures_from_the_first_start_to_the_last_end() -> None:
    summary = stats.summarise([trace(0.0, [1.0, 1.5]), trace(1.0, [2.0, 4.0])])
    assert (summary.tokens, summary.wall_s, summary.tokens_per_s) == (4, 4.0, 1.0)
    assert summary.ttft.p50 == pytest.approx(1000)
    assert summary.itl.p50 == pytest.approx(1250)


def test_failed_requests_count_as_errors_and_nowhere_else() -> None:
    summary = stats.summarise([trace(0.0, [1.0]), trace(0.0, [0.1, 9.0], error="cut off")])
    assert (summary.errors, summary.tokens, summary.ttft.p99) == (1, 1, 1000.0)


def test_a_run_without_requests_has_no_numbers() -> None:
    assert stats.summarise([]).tokens_per_s == 0.0


def test_ratio_compares_runs_pairwise() -> None:
    assert stats.median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0


def test_same_texts_counts_requests() -> None:
    first, second = [trace(0, [1], text="a"), trace(0, [1], text="b")], [trace(0, [1], text="a"), trace(0, [1])]
    assert stats.same_texts(first, second) == 0.5


def test_stream_is_read_whatever_its_pieces_on_the_wire() -> None:
    data = HEAD + coded(text_chunk(""), text_chunk("Hé"), text_chunk("llo"), USAGE, DONE)
    for size in (1, 2, 3, 7, 50, len(data)):
        arrivals = [(float(at), data[at : at + size]) for at in range(0, len(data), size)]
        result = wire.read_sse(0.0, arrivals)
        assert (result.error, result.text, result.tokens, result.prompt_tokens) == ("", "Héllo", 2, 7)
        assert len(result.arrivals) == 2


def test_event_arrives_with_its_last_byte() -> None:
    parts = [HEAD, coded(text_chunk("a"))[:-5], coded(text_chunk("b"))[:10], coded(text_chunk("b"))[10:-5]]
    parts.append(coded(USAGE + DONE))
    result = wire.read_sse(0.5, [(float(at), part) for at, part in enumerate(parts, 1)])
    assert (result.arrivals, result.ended, result.error) == ([2.0, 4.0], 5.0, "")


def test_several_events_in_one_chunk_and_events_across_chunks_are_told_apart() -> None:
    a, b = text_chunk("a"), text_chunk("b")
    result = wire.read_sse(0.0, [(1.0, HEAD + coded(a + b[:8], b[8:] + USAGE, DONE))])
    assert (result.text, len(result.arrivals)) == ("ab", 2)


def test_answer_without_chunked_coding_is_read() -> None:
    body = text_chunk("a") + USAGE + DONE
    assert wire.read_sse(0.0, [(1.0, b"HTTP/1.1 200 OK\r\n\r\n" + body)]).text == "a"


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "no complete head"),
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nbusy", "status 429: busy"),
        (HEAD + coded(text_chunk("a"))[:-8], "cut off"),
        (HEAD + coded(text_chunk("a"), USAGE), "no end mark"),
        (HEAD + coded(text_chunk("a"), DONE), "nothing of its usage"),
        (HEAD + coded(chunk(error={"message": "worker lost"})), "worker lost"),
        (HEAD + coded(b"data: {\n\n"), "truncated"),
    ],
)
def test_bad_answers_are_errors(data: bytes, error: str) -> None:
    assert error in wire.read_sse(0.0, [(1.0, data)] if data else []).error


def test_what_the_client_noticed_itself_is_the_error() -> None:
    assert wire.read_sse(0.0, [], "nothing came for 5 s").error == "nothing came for 5 s"


def frame(**fields: object) -> bytes:
    payload = json.dumps(fields).encode()
    size = len(payload)
    head = bytes([0x81, size]) if size < 126 else bytes([0x81, 126]) + size.to_bytes(2, "big")
    return head + payload


@pytest.mark.parametrize("size", [1, 5, 126, 127, 1000, 70000])
def test_client_frames_carry_their_payload(size: int) -> None:
    data = wire.client_frame(b"x" * size)
    assert data.endswith(bytes(4) + b"x" * size)
    assert data[1] & 0x80


def test_socket_stream_is_read() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    parts = [
        frame(type="accepted", id="1"),
        frame(type="delta", id="1", text="long " * 40),
        b"\x89\x00" + frame(type="delta", id="1", text="b"),
        frame(type="finished", id="1", usage=usage),
    ]
    result = wire.read_websocket(0.0, [(float(at), part) for at, part in enumerate(parts, 1)])
    assert (result.arrivals, result.text, result.tokens, result.error) == ([2.0, 3.0], "long " * 40 + "b", 2, "")


def test_socket_error_and_early_end_are_errors() -> None:
    refused = wire.read_websocket(0.0, [(1.0, frame(type="error", error={"message": "busy"}))])
    ended = wire.read_websocket(0.0, [(1.0, frame(type="delta", text="a")[:-3])])
    assert (refused.error, ended.error) == ("busy", "the socket ended before the request")


def test_numbers_keep_three_digits() -> None:
    assert [table.number(value) for value in (0.123, 1.239, 12.34, 123.4, 1234.5)] == [
        "0.12",
        "1.24",
        "12.3",
        "123",
        "1234",
    ]


def test_table_aligns_numbers_right_and_words_left() -> None:
    text = table.render(["what", "n"], [["a", "1"], ["bcd", "100"]])
    assert text.splitlines() == ["| what |   n |", "|------|----:|", "| a    |   1 |", "| bcd  | 100 |"]


def test_report_divides_by_the_run_that_was_made_beside_it() -> None:
    def run(tokens_per_s: float) -> Run:
        return Run.of(Measured([trace(0.0, [10 / tokens_per_s], tokens=10, text="a")], 0.1), {"worker": 0.1})

    _, rows = report({8: {"product": [run(5), run(20)], "mlx-lm": [run(10), run(10)]}})
    assert rows[0]["ratio_to_mlx_lm"] == pytest.approx(1.25)
    assert rows[0]["same_text_as_mlx_lm"] == 1.0


def test_seconds_per_call_counts_calls() -> None:
    assert 0 < seconds_per_call(lambda: sum(range(100)), 3) < 0.01


def test_defaults_are_those_of_the_published_table() -> None:
    options = parse([])
    assert (options.clients, options.prompt_tokens, options.max_tokens) == ("1,8,32", 200, 64)
