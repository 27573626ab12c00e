"""The wire format between app and worker."""

from __future__ import annotations

import asyncio

import pytest

from inference.protocol import (
    MAX_FRAME_BYTES,
    Accepted,
    CommandFrame,
    Credit,
    Delta,
    EventFrame,
    Failed,
    Finished,
    FrameReader,
    GenerationRequest,
    Hello,
    Load,
    ModelInfo,
    ProtocolError,
    SamplingParams,
    Status,
    Submit,
    ToolCall,
    Usage,
    encode_frame,
    merge_deltas,
)


async def _read(data: bytes, frame_type: type) -> object:
    stream = asyncio.StreamReader()
    stream.feed_data(data)
    stream.feed_eof()
    return await FrameReader(stream, frame_type).read()


async def test_commands_survive_the_wire() -> None:
    request = GenerationRequest(
        request_id="r",
        model="m",
        messages=({"role": "user", "content": "héllo 🙂"},),
        sampling=SamplingParams(logit_bias={7: -1.5}, seed=-3),
        stop=("a", "b"),
        stop_token_ids=(1,),
    )
    frame = CommandFrame([Hello(1, "test"), Submit(request, 5), Credit("r", 32)])

    assert await _read(bytes(encode_frame(frame)), CommandFrame) == frame


async def test_events_survive_the_wire() -> None:
    info = ModelInfo(8, 9, 10, 11, 12, "float32", "CPU", "", True, 4, 1.5)
    frame = EventFrame(
        [
            Accepted("r", 3, "w"),
            Delta("r", 0, 1, "text", (1, 2), "tool_calls", (ToolCall(0, "call_1", "f", "{}"),)),
            Finished("r", 1, Usage(3, 2)),
            Failed("s", "overloaded", "busy", "n", True),
            Status("w", "ready", Load(running=2), info, "", 1.0),
        ],
        Load(running=1, step_ms=2.5),
    )

    assert await _read(bytes(encode_frame(frame)), EventFrame) == frame


async def test_end_of_stream_between_frames_is_none() -> None:
    assert await _read(b"", EventFrame) is None


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x00",
        b"\x00\x00\x00\x10short",
        (MAX_FRAME_BYTES + 1).to_bytes(4, "big") + b"x" * 10,
        b"\x00\x00\x00\x03\xff\xff\xff",
        b"\x00\x00\x00\x01\x90",
    ],
    ids=["cut in the length", "cut in the body", "too long", "not MessagePack", "wrong shape"],
)
async def test_broken_frame_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        await _read(data, EventFrame)


def test_merged_delta_has_both_texts_and_the_later_position() -> None:
    call = ToolCall(0, "c", "f", "{}")
    merged = merge_deltas(Delta("r", 4, 1, "ab", (1,)), Delta("r", 6, 1, "cd", (2, 3), "stop", (call,)))

    assert merged == Delta("r", 6, 1, "abcd", (1, 2, 3), "stop", (call,))
