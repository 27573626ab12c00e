"""What is said of a worker process: its lines of output, and why it ended."""

import os
import signal
from pathlib import Path

import pytest

import inference.protocol
from mlx_serving.fleet.process import LineSplitter, child_environment, exit_reason


def split(*parts: bytes, max_chars: int = 20) -> list[str]:
    splitter = LineSplitter(max_chars)
    lines = [line for part in parts for line in splitter.feed(part)]
    return [*lines, *splitter.feed(b"", final=True)]


def test_lines_come_out_whole_however_they_arrive() -> None:
    assert split(b"one\ntw", b"o\nthr", b"ee") == ["one", "two", "three"]


def test_empty_lines_and_blanks_at_the_end_are_dropped() -> None:
    assert split(b"one  \n\n   \n two\n") == ["one", " two"]


def test_a_progress_bar_gives_lines() -> None:
    assert split(b"10%\r20%\r30%\n") == ["10%", "20%", "30%"]


def test_a_character_may_be_cut_anywhere() -> None:
    text = "größe ≥ 3".encode()
    assert split(*(bytes([byte]) for byte in text)) == ["größe ≥ 3"]


def test_what_is_not_text_is_replaced() -> None:
    assert split(b"a\xffb\n") == ["a\ufffdb"]


def test_a_long_line_is_cut() -> None:
    assert split(b"x" * 21 + b"\n") == ["x" * 20 + "..."]


def test_a_line_without_an_end_does_not_grow_for_ever() -> None:
    splitter = LineSplitter(20)
    lines = [line for _ in range(100) for line in splitter.feed(b"x" * 15)]
    assert lines
    assert max(map(len, lines)) <= 23
    assert len(splitter._rest) <= 20


@pytest.mark.parametrize(
    ("code", "tail", "reason"),
    [
        (-signal.SIGKILL, ["noise"], "killed by SIGKILL"),
        (-63, [], "killed by signal 63"),
        (1, ["Traceback", "ImportError: no mlx"], "exited with code 1; last output: ImportError: no mlx"),
        (1, [], "exited with code 1"),
    ],
)
def test_why_a_process_ended(code: int, tail: list[str], reason: str) -> None:
    assert exit_reason(code, tail) == reason


def test_a_worker_finds_the_same_code_as_its_supervisor() -> None:
    root = str(Path(inference.protocol.__file__).parents[1])
    environ = child_environment({"PYTHONPATH": os.pathsep.join(["/elsewhere", root]), "HF_TOKEN": "t"})
    assert environ["PYTHONPATH"] == os.pathsep.join([root, "/elsewhere"])
    assert environ["HF_TOKEN"] == "t"
