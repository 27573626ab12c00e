"""The load client, a process of its own: `python -m benchmarks.client`.

Reads jobs as JSON lines on standard input and answers each with what it measured. While a run goes on it does as little
as it can, because it shares the machine with the server: it notes when which bytes came, on bare asyncio protocols, and
parses them afterwards.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from urllib.parse import urlsplit

import msgspec

from . import wire
from .records import ClientJob, Measured

CHAT_PATH = "/v1/chat/completions"
SOCKET_PATH = "/ws/chat/"


class _Reader(asyncio.Protocol):
    """Collects the bytes of one answer until a mark shows its end, the connection closes, or nothing comes."""

    def __init__(self, marks: tuple[bytes, ...]) -> None:
        self.marks = marks
        self._tail = b""
        self.transport: asyncio.Transport | None = None
        self.arrivals: list[wire.Arrival] = []
        self.last = 0.0
        self.closed = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.last = time.perf_counter()
        self.arrivals.append((self.last, data))
        tail = self._tail + data
        if any(mark in tail for mark in self.marks):
            self._end()
        self._tail = tail[-32:]

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._end()

    def _end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def restart(self) -> None:
        """Begin to collect another answer on the same connection."""
        self.arrivals, self._tail = [], b""
        self.done = asyncio.get_running_loop().create_future()

    async def finish(self, idle_s: float) -> str:
        """Wait for the end; return what went wrong, or nothing."""
        self.last = time.perf_counter()
        while True:
            wait_s = self.last + idle_s - time.perf_counter()
            if wait_s <= 0:
                return f"nothing came for {idle_s:g} s"
            await asyncio.wait([self.done], timeout=wait_s)
            if self.done.done():
                return ""


class _Load:
    """One run."""

    def __init__(self, job: ClientJob) -> None:
        self._job = job
        parts = urlsplit(job.url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._authority = f"{self._host}:{self._port}"
        self._raw: dict[int, tuple[float, list[wire.Arrival], str]] = {}
        self._queue = iter(range(len(job.prompts)))

    async def run(self) -> Measured:
        """Send every prompt and return the traces in the order of the prompts."""
        client = self._sse_client if self._job.transport == "sse" else self._socket_client
        gc.collect()
        gc.disable()
        cpu = time.process_time()
        await asyncio.gather(*(client() for _ in range(min(self._job.clients, len(self._job.prompts)))))
        cpu_s = time.process_time() - cpu
        gc.enable()
        read = wire.read_sse if self._job.transport == "sse" else wire.read_websocket
        return Measured([read(*self._raw[at]) for at in range(len(self._job.prompts))], cpu_s)

    def _body(self, prompt: str) -> dict[str, object]:
        return {
            "model": self._job.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self._job.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }

    async def _sse_client(self) -> None:
        loop = asyncio.get_running_loop()
        for at in self._queue:
            body = self._body(self._job.prompts[at]) | {"stream": True, "stream_options": {"include_usage": True}}
            request = wire.http_request("POST", CHAT_PATH, self._authority, msgspec.json.encode(body))
            started = time.perf_counter()
            try:
                _, reader = await loop.create_connection(
                    lambda: _Reader((b"\r\n" + wire.LAST_CHUNK,)), self._host, self._port
                )
            except OSError as error:
                self._raw[at] = (started, [], f"no connection: {error.strerror}")
                continue
            assert reader.transport is not None
            reader.transport.write(request)
            problem = await reader.finish(self._job.idle_s)
            reader.transport.abort()
            self._raw[at] = (started, reader.arrivals, problem)

    async def _socket_client(self) -> None:
        reader: _Reader | None = None
        for at in self._queue:
            frame = {"type": "chat", "id": str(at), "request": self._body(self._job.prompts[at])}
            started = time.perf_counter()
            try:
                if reader is None or reader.closed:
                    reader = await self._open_socket()
                    started = time.perf_counter()
            except (OSError, wire.BadStream) as error:
                self._raw[at] = (started, [], f"no connection: {error}")
                continue
            assert reader.transport is not None
            reader.restart()
            reader.transport.write(wire.client_frame(msgspec.json.encode(frame)))
            problem = await reader.finish(self._job.idle_s)
            self._raw[at] = (started, reader.arrivals, problem)
            if problem:
                reader.transport.abort()
                reader.closed = True
        if reader is not None and reader.transport is not None:
            reader.transport.abort()

    async def _open_socket(self) -> _Reader:
        marks = (b'"type":"finished"', b'"type":"error"')
        _, reader = await asyncio.get_running_loop().create_connection(
            lambda: _Reader((b"\r\n\r\n",)), self._host, self._port
        )
        assert reader.transport is not None
        reader.transport.write(wire.websocket_request(SOCKET_PATH, self._authority, os.urandom(16)))
        problem = await reader.finish(self._job.idle_s)
        status = 0 if problem else wire.split_head(b"".join(part for _, part in reader.arrivals))[0]
        if status != 101:
            reader.transport.abort()
            raise wire.BadStream(problem or f"the handshake got status {status}")
        reader.marks = marks
        return reader


def main() -> None:
    """Serve jobs until standard input ends."""
    decoder = msgspec.json.Decoder(ClientJob)
    for line in sys.stdin.buffer:
        measured = asyncio.run(_Load(decoder.decode(line)).run())
        sys.stdout.buffer.write(msgspec.json.encode(measured) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
