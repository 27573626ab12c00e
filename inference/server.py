"""The I/O side of a worker: connections, streams, flow control, draining. Runs an event loop on a thread of its own.

Requests come in over a unix socket and are prepared on one helper thread (template, tokenizer), then handed to the
engine. The engine's events come back once per step; each peer gets one frame with all of its deltas. A stream whose
peer has returned no credit keeps its deltas here, merged, up to a limit, so the batch never waits for a reader.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from .engine import Engine
from .loading import LoadedModel
from .prompts import BadPrompt, prepare, prompt_size
from .protocol import (
    PROTOCOL_VERSION,
    Cancel,
    Command,
    CommandFrame,
    Configure,
    Credit,
    Delta,
    Drain,
    Event,
    EventFrame,
    Failed,
    FailureCode,
    Finished,
    FrameReader,
    GenerationRequest,
    Hello,
    Load,
    ModelInfo,
    Ping,
    ProtocolError,
    Status,
    Submit,
    WorkerConfig,
    WorkerState,
    encode_frame,
    merge_deltas,
)

logger = logging.getLogger(__name__)

_LISTEN_BACKLOG = 512
_HELLO_WAIT_S = 10.0
_FLUSH_WAIT_S = 2.0
_LONG_PROMPT_CHARS = 32_768


class _Peer:
    """A connection from the app, with what is to be sent in its next frame."""

    def __init__(self, name: str, writer: asyncio.StreamWriter) -> None:
        self.name = name
        self.writer = writer
        self.streams: dict[str, _Stream] = {}
        self.outbox: list[Event] = []


class _Stream:
    """One request of one peer: what has not been sent yet, and how much may be sent."""

    def __init__(self, peer: _Peer, request_id: str, credit: int) -> None:
        self.peer = peer
        self.request_id = request_id
        self.credit = credit
        self.pending: list[Delta] = []
        self.pending_bytes = 0
        self.last: Finished | Failed | None = None

    def push(self, delta: Delta) -> bool:
        """Send a delta, or keep it until there is credit. Return whether it was merged into another."""
        if self.credit > 0 and not self.pending:
            self.credit -= 1
            self.peer.outbox.append(delta)
            return False
        self.pending_bytes += len(delta.text) + sum(len(call.arguments) for call in delta.tool_calls)
        for at in range(len(self.pending) - 1, -1, -1):
            if self.pending[at].index == delta.index:
                self.pending[at] = merge_deltas(self.pending[at], delta)
                return True
        self.pending.append(delta)
        return False

    def release(self) -> bool:
        """Send what the credit allows; return whether the stream has sent its last event."""
        while self.pending and self.credit > 0:
            self.credit -= 1
            self.peer.outbox.append(self.pending.pop(0))
        if not self.pending:
            self.pending_bytes = 0
            if self.last is not None:
                self.peer.outbox.append(self.last)
                return True
        return False


class WorkerServer:
    """Serves one worker's socket. All methods run on the event loop unless they say otherwise."""

    def __init__(self, config: WorkerConfig, on_exit: Callable[[], None]) -> None:
        """Prepare to serve.

        Args:
            config: the worker's configuration.
            on_exit: called once, when the server is done and the process may end.
        """
        self._config = config
        self._on_exit = on_exit
        self._state: WorkerState = "loading"
        self._error = ""
        self._progress = 0.0
        self._info: ModelInfo | None = None
        self._loaded: LoadedModel | None = None
        self._engine: Engine | None = None
        self._load = Load()
        self._peers: set[_Peer] = set()
        self._streams: dict[str, _Stream] = {}
        self._dirty: set[_Peer] = set()
        self._preparer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")
        # A prompt of a megabyte takes a second; short ones must not wait for it.
        self._long_preparer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare-long")
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._drain: asyncio.Task[None] | None = None
        self._frames = 0
        self._deltas = 0
        self._merged = 0

    # --- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> asyncio.Server:
        """Listen on the worker's socket."""
        path = self._config.socket_path
        await asyncio.to_thread(Path(path).unlink, missing_ok=True)
        mask = os.umask(0o177)
        try:
            return await asyncio.start_unix_server(self._serve_peer, path, backlog=_LISTEN_BACKLOG, limit=1 << 20)
        finally:
            os.umask(mask)

    def set_progress(self, fraction: float) -> None:
        """Tell all peers how far the load has come."""
        self._progress = fraction
        self._broadcast()

    def set_ready(self, loaded: LoadedModel, engine: Engine) -> None:
        """Begin to take requests."""
        self._loaded, self._engine, self._info = loaded, engine, loaded.info
        if self._state == "loading":
            self._state = "ready"
        self._progress = 1.0
        self._broadcast()

    async def fail(self, error: str) -> None:
        """Report a failed load to whoever is connected, or connects within a moment."""
        self._state, self._error = "failed", error
        self._broadcast()
        if not self._peers:
            await self._wait_for(lambda: bool(self._peers), _HELLO_WAIT_S)
        await self._flush_writers()

    def begin_drain(self, deadline_s: float) -> None:
        """Refuse new requests, finish the others, then end the process; at the deadline fail what still runs."""
        if self._drain is None and self._state != "failed":
            self._drain = asyncio.create_task(self._run_drain(deadline_s))

    async def _run_drain(self, deadline_s: float) -> None:
        self._state = "draining"
        self._broadcast()
        logger.info("draining %d requests, at most %g s", len(self._streams), deadline_s)
        await self._wait_for(lambda: not self._streams, deadline_s)
        for stream in list(self._streams.values()):
            self._end(stream, "worker_draining", "the worker was stopped before the request had ended")
        self._state = "stopped"
        self._broadcast()
        await self._flush_writers()
        self._on_exit()

    async def _wait_for(self, condition: Callable[[], bool], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return

    async def _flush_writers(self) -> None:
        """Give every peer a bounded time to take what was written."""
        self._flush()
        drains = [asyncio.wait_for(peer.writer.drain(), _FLUSH_WAIT_S) for peer in self._peers]
        await asyncio.gather(*drains, return_exceptions=True)

    # --- connections -------------------------------------------------------------------------------------------------

    async def _serve_peer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = FrameReader(reader, CommandFrame)
        peer: _Peer | None = None
        try:
            peer = await self._greet(frames, writer)
            while peer is not None and (frame := await frames.read()) is not None:
                for command in frame.commands:
                    self._handle(peer, command)
                self._flush()
        except ProtocolError as error:
            logger.warning("connection closed: %s", error)
        finally:
            if peer is not None:
                self._forget_peer(peer)
            writer.close()

    async def _greet(self, frames: FrameReader, writer: asyncio.StreamWriter) -> _Peer | None:
        try:
            frame = await asyncio.wait_for(frames.read(), _HELLO_WAIT_S)
        except TimeoutError:
            return None
        if frame is None:
            return None
        hello, *rest = frame.commands or [None]
        if not isinstance(hello, Hello) or hello.version != PROTOCOL_VERSION:
            raise ProtocolError(f"the peer does not speak version {PROTOCOL_VERSION} of the protocol")
        peer = _Peer(hello.peer, writer)
        self._peers.add(peer)
        self._send(peer, self._status())
        for command in rest:
            self._handle(peer, command)
        self._flush()
        self._changed.set()
        return peer

    def _forget_peer(self, peer: _Peer) -> None:
        """Stop every request of a peer that has gone."""
        self._peers.discard(peer)
        self._dirty.discard(peer)
        for stream in list(peer.streams.values()):
            self._remove(stream)
            self._cancel_in_engine(stream.request_id)

    def _handle(self, peer: _Peer, command: Command) -> None:
        match command:
            case Submit(request, credit):
                self._submit(peer, request, credit)
            case Credit(request_id, events):
                self._add_credit(peer, request_id, events)
            case Cancel(request_id):
                if (stream := peer.streams.get(request_id)) is not None:
                    self._remove(stream)
                    self._cancel_in_engine(request_id)
            case Drain(deadline_s):
                self.begin_drain(deadline_s)
            case Configure():
                if self._engine is not None:
                    self._engine.configure(command)
            case Ping():
                self._send(peer, self._status())
            case Hello():
                raise ProtocolError("a second hello")

    # --- requests ----------------------------------------------------------------------------------------------------

    def _submit(self, peer: _Peer, request: GenerationRequest, credit: int) -> None:
        refusal = self._refusal(request)
        if refusal is not None:
            code, message = refusal
            self._send(peer, Failed(request.request_id, code, message, retryable=True))
            return
        stream = _Stream(peer, request.request_id, credit)
        self._streams[request.request_id] = stream
        peer.streams[request.request_id] = stream
        task = asyncio.create_task(self._prepare(stream, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _refusal(self, request: GenerationRequest) -> tuple[FailureCode, str] | None:
        if self._state in ("draining", "stopped"):
            return "worker_draining", "the worker takes no new requests"
        if self._state != "ready":
            return "worker_not_ready", "the model is not loaded yet"
        if request.request_id in self._streams:
            return "invalid_request", "a request with this id is running"
        if len(self._streams) >= self._config.max_waiting + self._config.max_rows:
            return "overloaded", "the model is busy: its queue is full"
        return None

    async def _prepare(self, stream: _Stream, request: GenerationRequest) -> None:
        loaded, engine = self._loaded, self._engine
        if loaded is None or engine is None:
            return
        loop = asyncio.get_running_loop()
        try:
            preparer = self._preparer if prompt_size(request) < _LONG_PROMPT_CHARS else self._long_preparer
            prepared = await loop.run_in_executor(preparer, prepare, loaded, request)
        except BadPrompt as error:
            self._end(stream, error.code, str(error), param=error.param)
        except Exception as error:
            logger.exception("request %s could not be prepared", request.request_id)
            self._end(stream, "engine_error", f"the prompt could not be prepared: {type(error).__name__}")
        else:
            if stream.request_id in self._streams:
                engine.submit(prepared)
        self._flush()

    def _add_credit(self, peer: _Peer, request_id: str, events: int) -> None:
        stream = peer.streams.get(request_id)
        if stream is None:
            return
        stream.credit += events
        if stream.release():
            self._remove(stream)
        self._dirty.add(peer)

    def _end(self, stream: _Stream, code: FailureCode, message: str, *, param: str | None = None) -> None:
        """Fail a stream at once, whatever is pending."""
        if self._streams.get(stream.request_id) is not stream:
            return
        self._remove(stream)
        self._cancel_in_engine(stream.request_id)
        retryable = code not in ("invalid_request", "context_length_exceeded", "slow_reader")
        self._send(stream.peer, Failed(stream.request_id, code, message, param, retryable))

    def _remove(self, stream: _Stream) -> None:
        self._streams.pop(stream.request_id, None)
        stream.peer.streams.pop(stream.request_id, None)
        self._changed.set()

    def _cancel_in_engine(self, request_id: str) -> None:
        if self._engine is not None:
            self._engine.cancel(request_id)

    # --- events ------------------------------------------------------------------------------------------------------

    def on_step(self, events: list[Event], load: Load) -> None:
        """Take what a step of the engine produced."""
        self._load = load
        for event in events:
            if isinstance(event, Status):
                continue
            stream = self._streams.get(event.request_id)
            if stream is None:
                continue
            if isinstance(event, Delta):
                self._deltas += 1
                self._merged += stream.push(event)
                if stream.pending_bytes > self._config.max_stream_buffer_bytes:
                    self._end(stream, "slow_reader", "the output was not read fast enough")
            elif isinstance(event, Finished | Failed):
                stream.last = event
                if stream.release():
                    self._remove(stream)
            else:
                stream.peer.outbox.append(event)
            self._dirty.add(stream.peer)
        self._flush()

    def _status(self) -> Status:
        return Status(
            self._config.worker_id, self._state, self._load_now(), self._info, self._error, round(self._progress, 3)
        )

    def _load_now(self) -> Load:
        return msgspec.structs.replace(
            self._load,
            # Requests in preparation are not known to the engine yet.
            waiting=max(self._load.waiting, len(self._streams) - self._load.running),
            frames_total=self._frames,
            deltas_total=self._deltas,
            merged_deltas_total=self._merged,
        )

    def _broadcast(self) -> None:
        for peer in self._peers:
            self._send(peer, self._status())
        self._flush()

    def _send(self, peer: _Peer, event: Event) -> None:
        peer.outbox.append(event)
        self._dirty.add(peer)

    def _flush(self) -> None:
        """Write one frame to each peer that has something to get."""
        if not self._dirty:
            return
        load = self._load_now()
        for peer in self._dirty:
            if peer.outbox and not peer.writer.is_closing():
                self._frames += 1
                peer.writer.write(encode_frame(EventFrame(peer.outbox, load)))
            peer.outbox = []
        self._dirty.clear()
