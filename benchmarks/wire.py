"""The client's side of the wire, as functions of the bytes that came: HTTP/1.1, server-sent events, WebSocket.

The load client only notes when which bytes arrived and looks for the end; it parses them with these functions when the
run is over, so that parsing takes no CPU from the server while that is being measured. Pure.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence

import msgspec

from .records import Trace

Arrival = tuple[float, bytes]
"""When some bytes came, in seconds, and which."""

LAST_CHUNK = b"0\r\n\r\n"
DONE = b"[DONE]"
TEXT_OPCODE, CLOSE_OPCODE, PING_OPCODE, PONG_OPCODE = 0x1, 0x8, 0x9, 0xA


class BadStream(Exception):
    """The bytes are not what they should be; the message says what is wrong."""


def http_request(method: str, path: str, host: str, body: bytes) -> bytes:
    """Return a request that asks the server to close the connection after its answer."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Accept: text/event-stream\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def split_head(data: bytes) -> tuple[int, dict[str, str], int]:
    """Return an answer's status, its headers in lower case, and where its body begins.

    Raises:
        BadStream: the head is not complete.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0:
        raise BadStream("the answer has no complete head")
    first, *lines = data[:end].decode("latin-1").split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(first.split(" ", 2)[1]), headers, end + 4


class _Timeline:
    """Tells when the byte at a position of the whole answer came."""

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        self._arrivals = arrivals
        self._at = 0
        self._end = len(arrivals[0][1]) if arrivals else 0

    def when(self, position: int) -> float:
        """Return the arrival of a byte; positions must not decrease from call to call."""
        while position >= self._end and self._at + 1 < len(self._arrivals):
            self._at += 1
            self._end += len(self._arrivals[self._at][1])
        return self._arrivals[self._at][0]


def chunks(data: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield the parts of a body in chunked transfer coding, each with the position of its last byte.

    Raises:
        BadStream: the body is cut off.
    """
    while True:
        line_end = data.find(b"\r\n", start)
        if line_end < 0:
            raise BadStream("the body is cut off")
        size = int(data[start:line_end].split(b";")[0], 16)
        if size == 0:
            return
        begin, end = line_end + 2, line_end + 2 + size
        if end > len(data):
            raise BadStream("the body is cut off inside a chunk")
        yield end - 1, data[begin:end]
        start = end + 2


def sse_events(arrivals: Sequence[Arrival]) -> Iterator[Arrival]:
    """Yield the data of each server-sent event of an answer, with the time at which the event was complete.

    Raises:
        BadStream: the answer is not a complete stream with status 200.
    """
    data = b"".join(part for _, part in arrivals)
    status, headers, start = split_head(data)
    if status != 200:
        raise BadStream(f"status {status}: {data[start : start + 300].decode(errors='replace').strip()}")
    chunked = "chunked" in headers.get("transfer-encoding", "").lower()
    parts = chunks(data, start) if chunked else iter([(len(data) - 1, data[start:])])
    timeline = _Timeline(arrivals)
    rest = b""
    for last_byte, part in parts:
        *events, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
        when = timeline.when(last_byte)
        for event in events:
            lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield when, b"\n".join(lines)


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, object] | None = None


_chunk_decoder = msgspec.json.Decoder(_Chunk)


def read_sse(started: float, arrivals: Sequence[Arrival], problem: str = "") -> Trace:
    """Return the trace of a chat completion that came as server-sent events.

    Args:
        started: when the request was sent.
        arrivals: what came, and when.
        problem: what the client noticed itself, such as silence.
    """
    ended = arrivals[-1][0] if arrivals else started
    trace = Trace(started, ended, [], error=problem)
    texts: list[str] = []
    done = False
    try:
        for when, data in sse_events(arrivals):
            if data == DONE:
                done = True
                break
            chunk = _chunk_decoder.decode(data)
            if chunk.error is not None:
                raise BadStream(f"failed in mid-stream: {chunk.error.get('message')}")
            if chunk.usage is not None:
                trace.prompt_tokens, trace.tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
            for choice in chunk.choices:
                if choice.delta.content:
                    trace.arrivals.append(when)
                    texts.append(choice.delta.content)
        if not done:
            raise BadStream("the stream has no end mark")
        if not trace.tokens:
            raise BadStream("the stream says nothing of its usage")
    except (BadStream, msgspec.DecodeError) as error:
        trace.error = trace.error or str(error)
    trace.text = "".join(texts)
    return trace


# --- WebSocket -------------------------------------------------------------------------------------------------------


def websocket_request(path: str, host: str, nonce: bytes) -> bytes:
    """Return the handshake; `nonce` is 16 random bytes."""
    key = base64.b64encode(nonce).decode()
    return (
        f"GET {path} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def client_frame(payload: bytes, opcode: int = TEXT_OPCODE) -> bytes:
    """Return a frame from client to server. Its mask is zero: that is valid, and nothing here needs protection."""
    size = len(payload)
    if size < 126:
        head = bytes([0x80 | opcode, 0x80 | size])
    elif size < 65536:
        head = bytes([0x80 | opcode, 0x80 | 126]) + size.to_bytes(2, "big")
    else:
        head = bytes([0x80 | opcode, 0x80 | 127]) + size.to_bytes(8, "big")
    return head + bytes(4) + payload


def server_frames(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield the opcode, the position after its last byte, and the payload of each complete frame."""
    at = 0
    while at + 2 <= len(data):
        opcode, size = data[at] & 0x0F, data[at + 1] & 0x7F
        begin = at + 2
        if size == 126:
            begin += 2
        elif size == 127:
            begin += 8
        if begin > len(data):
            return
        if begin > at + 2:
            size = int.from_bytes(data[at + 2 : begin], "big")
        if begin + size > len(data):
            return
        yield opcode, begin + size, data[begin : begin + size]
        at = begin + size


class _SocketFrame(msgspec.Struct):
    type: str
    text: str = ""
    usage: _Usage | None = None
    error: dict[str, object] | None = None


_frame_decoder = msgspec.json.Decoder(_SocketFrame)


def read_websocket(started: float, arrivals: Sequence[Arrival], problem: str = "") -> Trace:
    """Return the trace of one request on a socket; the arguments are those of `read_sse`, without the handshake."""
    trace = Trace(started, arrivals[-1][0] if arrivals else started, [], error=problem)
    timeline = _Timeline(arrivals)
    texts: list[str] = []
    for opcode, end, payload in server_frames(b"".join(part for _, part in arrivals)):
        if opcode != TEXT_OPCODE:
            continue
        try:
            frame = _frame_decoder.decode(payload)
        except msgspec.DecodeError as error:
            trace.error = trace.error or str(error)
            break
        if frame.type == "delta" and frame.text:
            trace.arrivals.append(timeline.when(end - 1))
            texts.append(frame.text)
        elif frame.type == "finished" and frame.usage is not None:
            trace.prompt_tokens, trace.tokens = frame.usage.prompt_tokens, frame.usage.completion_tokens
        elif frame.type == "error":
            trace.error = trace.error or str((frame.error or {}).get("message"))
    if not trace.error and not trace.tokens:
        trace.error = "the socket ended before the request"
    trace.text = "".join(texts)
    return trace
