"""A connection to one worker, multiplexed: many requests at once, each an asynchronous stream of events.

Used by the gateway for requests and by the supervisor for status and draining. Belongs to the event loop that opened
it. When the connection ends, every request on it gets a retryable `worker_lost`; nothing waits for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Self

from inference.protocol import (
    INITIAL_CREDIT,
    PROTOCOL_VERSION,
    UNLIMITED_CREDIT,
    Cancel,
    Command,
    CommandFrame,
    Credit,
    Delta,
    Drain,
    Event,
    EventFrame,
    Failed,
    Finished,
    FrameReader,
    GenerationRequest,
    Hello,
    Load,
    Ping,
    ProtocolError,
    RequestEvent,
    Status,
    Submit,
    encode_frame,
    merge_deltas,
)

from ..errors import WorkerLost

logger = logging.getLogger(__name__)

_READ_LIMIT_BYTES = 1 << 20
_UNIX = "unix:"


class RequestStream:
    """The events of one request, in order, ending with `Finished` or `Failed`.

    Returns credit to the worker as events are taken, so that a reader that stops taking them stops the worker's
    sending. `merged_total` counts deltas that were merged because they had piled up here.
    """

    def __init__(self, connection: WorkerConnection, request_id: str, *, merge: bool) -> None:
        self.request_id = request_id
        self.merged_total = 0
        self._connection = connection
        self._merge = merge
        self._events: deque[RequestEvent] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._taken = 0
        self.ended = False

    def feed(self, event: RequestEvent) -> None:
        """Append an event that has arrived."""
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestEvent:
        if self.ended:
            raise StopAsyncIteration
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        event = self._events.popleft()
        if isinstance(event, Delta):
            event = self._take(event)
        elif isinstance(event, Finished | Failed):
            self.ended = True
        return event

    def _take(self, delta: Delta) -> Delta:
        self._taken += 1
        if self._merge and self._events:
            delta = self._merge_piled_up(delta)
        if self._taken >= INITIAL_CREDIT // 2:
            self._connection.send(Credit(self.request_id, self._taken))
            self._taken = 0
        return delta

    def _merge_piled_up(self, first: Delta) -> Delta:
        """Make one delta of each choice from those that wait at the front; return the one of the first's choice."""
        by_choice = {first.index: first}
        while self._events and isinstance(following := self._events[0], Delta):
            self._events.popleft()
            earlier = by_choice.get(following.index)
            by_choice[following.index] = following if earlier is None else merge_deltas(earlier, following)
            self.merged_total += earlier is not None
            # The others are taken, and counted as taken, when their turn comes.
            self._taken += earlier is not None
        merged = by_choice.pop(first.index)
        self._events.extendleft(reversed(by_choice.values()))
        return merged

    def fail(self, failed: Failed) -> None:
        """End the stream with a failure that arose on this side, and stop the request at the worker."""
        if not self.ended:
            self._connection.forget(self)
            self.feed(failed)

    def cancel(self) -> None:
        """Stop the request if it has not ended; the worker frees its row before the next step."""
        self._connection.forget(self)
        self.ended = True


class WorkerConnection:
    """An open connection. Made by `open`."""

    def __init__(self, endpoint: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.endpoint = endpoint
        self.closed = asyncio.Event()
        self.load = Load()
        self._frames = FrameReader(reader, EventFrame)
        self._writer = writer
        self._streams: dict[str, RequestStream] = {}
        self._status: Status | None = None
        self._status_waiters: list[asyncio.Future[Status]] = []
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, endpoint: str, *, peer: str, timeout_s: float) -> WorkerConnection:
        """Connect to a worker and wait for its status.

        Args:
            endpoint: `unix:` and the path of its socket.
            peer: how this side is named in the worker's log.
            timeout_s: longest wait.

        Raises:
            OSError: nobody listens there.
            TimeoutError: no answer in time.
            ProtocolError: whoever listens does not speak the protocol.
        """
        if not endpoint.startswith(_UNIX):
            raise ProtocolError(f"unknown kind of endpoint: {endpoint}")
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(endpoint.removeprefix(_UNIX), limit=_READ_LIMIT_BYTES)
            connection = cls(endpoint, reader, writer)
            connection.send(Hello(PROTOCOL_VERSION, peer))
            try:
                frame = await connection._frames.read()
                if frame is None:
                    raise ProtocolError("the worker closed the connection")
                connection._dispatch(frame)
                if connection._status is None:
                    raise ProtocolError("the worker did not say its status")
            except BaseException:
                writer.close()
                raise
        connection._reading = asyncio.create_task(connection._read())
        return connection

    @property
    def status(self) -> Status:
        """The worker's status as it last said it."""
        if self._status is None:
            raise ProtocolError("the connection is not open")
        return self._status

    @property
    def requests(self) -> int:
        """Requests of this side that have not ended."""
        return len(self._streams)

    def send(self, command: Command) -> None:
        """Write a command; on a closed connection it is dropped, as its streams have been failed already."""
        if not self._writer.is_closing():
            self._writer.write(encode_frame(CommandFrame([command])))

    def submit(self, request: GenerationRequest, *, merge: bool) -> RequestStream:
        """Start a request and return its events.

        Args:
            request: what to generate; its id must be unique.
            merge: whether deltas that have piled up unread become one.
        """
        stream = RequestStream(self, request.request_id, merge=merge)
        if self.closed.is_set():
            stream.feed(self._lost(request.request_id))
        else:
            # What cannot be encoded raises here, before anything is registered.
            self.send(Submit(request, INITIAL_CREDIT if merge else UNLIMITED_CREDIT))
            self._streams[request.request_id] = stream
        return stream

    def forget(self, stream: RequestStream) -> None:
        """Cancel a request at the worker, unless it has ended."""
        if self._streams.pop(stream.request_id, None) is not None:
            self.send(Cancel(stream.request_id))

    async def ping(self, timeout_s: float) -> Status:
        """Return the worker's status, asked for now.

        Raises:
            WorkerLost: the connection has ended.
            TimeoutError: no answer in time.
        """
        if self.closed.is_set():
            raise WorkerLost("the connection to the worker has ended")
        waiter: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        self._status_waiters.append(waiter)
        self.send(Ping())
        try:
            return await asyncio.wait_for(waiter, timeout_s)
        finally:
            if waiter in self._status_waiters:
                self._status_waiters.remove(waiter)

    def drain(self, deadline_s: float) -> None:
        """Ask the worker to finish what it has and then to exit, within `deadline_s` seconds."""
        self.send(Drain(deadline_s))

    async def close(self) -> None:
        """End the connection; the worker cancels what runs on it."""
        self._writer.close()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        self._end()

    async def _read(self) -> None:
        try:
            while (frame := await self._frames.read()) is not None:
                self._dispatch(frame)
        except ProtocolError as error:
            logger.warning("connection to %s: %s", self.endpoint, error)
        finally:
            self._writer.close()
            self._end()

    def _dispatch(self, frame: EventFrame) -> None:
        self.load = frame.load
        for event in frame.events:
            self._deliver(event)

    def _deliver(self, event: Event) -> None:
        if isinstance(event, Status):
            self._status = event
            waiters, self._status_waiters = self._status_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(event)
            return
        stream = self._streams.get(event.request_id)
        if stream is None:
            return
        if isinstance(event, Finished | Failed):
            del self._streams[event.request_id]
        stream.feed(event)

    def _end(self) -> None:
        if self.closed.is_set():
            return
        self.closed.set()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.feed(self._lost(stream.request_id))
        waiters, self._status_waiters = self._status_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(WorkerLost("the connection to the worker has ended"))

    @staticmethod
    def _lost(request_id: str) -> Failed:
        return Failed(request_id, "worker_lost", "the worker ended before the request had", retryable=True)
