"""One worker process: started, watched, told to drain, killed, reaped. Owned by `supervisor.py`.

It decides nothing and knows no database: `observed()` says what is seen, and the supervisor acts on it.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import msgspec
from django.utils import timezone

import inference.protocol
from inference.protocol import Configure, Load, ModelInfo, ProtocolError, Status, WorkerConfig, WorkerState

from ..errors import ServingError
from .connection import WorkerConnection
from .reconcile import Observed, Spec

logger = logging.getLogger(__name__)
output_logger = logging.getLogger("mlx_serving.worker")
"""Gets every line that a worker prints, the worker's id in front."""

COMMAND = (sys.executable, "-m", "inference.worker")

MAX_LINE_CHARS = 2000
CONNECT_TIMEOUT_S = 2.0
PING_TIMEOUT_S = 5.0
START_POLL_S = 0.1
"""Between two looks at a worker that is not ready yet, so that its readiness is seen at once."""
LAST_OUTPUT_S = 1.0
"""What the end of the output may take to arrive after the process ended; a grandchild may hold the pipe open."""

_TAIL_LINES = 5


class LineSplitter:
    """Cuts a stream of bytes into lines of bounded length. A carriage return ends a line too, as progress bars do."""

    def __init__(self, max_chars: int = MAX_LINE_CHARS) -> None:
        self._max_chars = max_chars
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._rest = ""

    def feed(self, data: bytes, *, final: bool = False) -> list[str]:
        """Return the lines that these bytes complete; `final` ends the last one."""
        parts = (self._rest + self._decode(data, final)).replace("\r", "\n").split("\n")
        self._rest = "" if final else parts.pop()
        lines = [self._cut(part.rstrip()) for part in parts if part.strip()]
        if len(self._rest) > self._max_chars:
            lines.append(self._cut(self._rest))
            self._rest = ""
        return lines

    def _cut(self, line: str) -> str:
        return line if len(line) <= self._max_chars else line[: self._max_chars] + "..."


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return a worker's environment: ours, and a module path on which it finds the same `inference` as we do."""
    root = str(Path(inference.protocol.__file__).parents[1])
    paths = [root, *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONUNBUFFERED": "1"}


def exit_reason(code: int, tail: Sequence[str]) -> str:
    """Return how a process that nobody stopped has ended.

    Args:
        code: its exit code; negative for a signal, as `subprocess` has it.
        tail: its last lines of output.
    """
    if code < 0:
        try:
            how = f"killed by {signal.Signals(-code).name}"
        except ValueError:
            how = f"killed by signal {-code}"
    else:
        how = f"exited with code {code}"
    return f"{how}; last output: {tail[-1]}" if tail and code > 0 else how


class WorkerProcess:
    """A worker from its start to its end. `run` is its whole life; everything else may be called during it.

    Args:
        spec: what the worker serves.
        model_id: the database's key of the model.
        config: sent to the worker on its standard input.
        heartbeat_s: seconds between two pings once it is ready.
        clock: monotonic, in seconds.
        on_change: called, in the event loop, after every observation; the argument says whether the state changed.
        command: the program and its arguments.
    """

    def __init__(
        self,
        *,
        spec: Spec,
        model_id: int,
        config: WorkerConfig,
        heartbeat_s: float,
        clock: Callable[[], float],
        on_change: Callable[[WorkerProcess, bool], None],
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.spec = spec
        self.model_id = model_id
        self.worker_id = config.worker_id
        self.endpoint = f"unix:{config.socket_path}"
        self.pid: int | None = None
        self.status = Status(worker_id=config.worker_id, state="starting", load=Load())
        self.heartbeat_at: datetime | None = None
        self.ready_at: float | None = None
        self.ready_published = False
        self.retiring = False
        self.retirement_published_at: float | None = None
        self.ended = False
        self.exit_code: int | None = None
        self.error = ""
        self._config = config
        self._heartbeat_s = heartbeat_s
        self._clock = clock
        self._on_change = on_change
        self._command = tuple(command)
        self._started_at = self._answered_at = self._state_since = clock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: WorkerConnection | None = None
        self._features = Configure(config.prefix_cache, config.adaptive_batching)
        self._drain_deadline: float | None = None
        self._killed_because = ""
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)

    # --- what is seen ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> WorkerState:
        """The state that everybody else should know."""
        if self.ended:
            return "failed" if self.error else "stopped"
        if self.retiring or self._drain_deadline is not None:
            return "draining"
        return self.status.state

    @property
    def info(self) -> ModelInfo | None:
        """What the worker knows of its model, once it is loaded."""
        return self.status.model

    @property
    def told_to_stop(self) -> bool:
        """Whether its end was asked for, by us or by a signal that it obeyed."""
        return self._drain_deadline is not None or self.status.state == "draining"

    @property
    def ready_s(self) -> float:
        """For how long it has been ready, in seconds."""
        return 0.0 if self.ready_at is None else self._clock() - self.ready_at

    def observed(self) -> Observed:
        """Return what `reconcile.plan` has to know."""
        return Observed(
            worker_id=self.worker_id,
            model_id=self.model_id,
            spec=self.spec,
            state=self.status.state,
            state_since=self._state_since,
            started_at=self._started_at,
            answered_at=self._answered_at,
            ready_published=self.ready_published,
            retiring=self.retiring,
            retirement_published_at=self.retirement_published_at,
            drain_deadline=self._drain_deadline,
            killed=bool(self._killed_because),
        )

    # --- what can be done to it --------------------------------------------------------------------------------------

    def configure(self, features: Configure) -> None:
        """Switch the worker's features; one that is not ready yet is told once it is."""
        self._features = features
        if self._connection is not None and self.status.state == "ready":
            self._connection.send(features)

    def retire(self) -> None:
        """Show as draining from now on, while the worker goes on taking requests."""
        self.retiring = True
        self._on_change(self, True)

    def drain(self, deadline_s: float) -> None:
        """Tell the worker to finish what it has within this many seconds, and to exit."""
        self._drain_deadline = self._clock() + deadline_s
        self._on_change(self, True)
        if self._connection is not None and not self._connection.closed.is_set():
            self._connection.drain(deadline_s)
        else:
            self._signal(signal.SIGTERM)

    def kill(self, reason: str) -> None:
        """End the worker, and whatever it started, at once."""
        self._killed_because = self._killed_because or reason
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        # The worker leads its own process group. An ended one keeps its process id until it is reaped, which sets
        # `returncode`; only a signal sent after that could hit a stranger.
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    # --- its life ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start the process, watch it, and return when it has ended and is reaped. Cancelling kills it."""
        try:
            await self._live()
        except Exception:
            # A fault in watching one worker must not take the others down with the supervisor.
            logger.exception("watching worker %s failed", self.worker_id, extra={"worker_id": self.worker_id})
            self.error = self.error or "the supervisor failed while it watched this worker"
        finally:
            self.ended = True
            self._remove_socket()
            self._on_change(self, True)

    def _remove_socket(self) -> None:
        Path(self._config.socket_path).unlink(missing_ok=True)

    def _spawn(self) -> subprocess.Popen[bytes]:
        # In a session of its own, so that Ctrl-C in a terminal reaches the supervisor alone, which drains.
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=child_environment(os.environ),
            start_new_session=True,
        )

    async def _live(self) -> None:
        if self._drain_deadline is not None or self._killed_because:
            return
        try:
            process = self._spawn()
        except OSError as error:
            self.error = f"cannot be started: {error}"
            return
        self._process, self.pid = process, process.pid
        assert process.stdin is not None
        assert process.stdout is not None
        exited = _exit_of(process)
        # The write end stays open until the very end: closing it tells the worker that its supervisor has gone.
        # Python marks it as not inheritable, so no worker started later holds it open.
        with process.stdin, process.stdout:
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(msgspec.json.encode(self._config) + b"\n")
                    process.stdin.flush()
                self._on_change(self, True)
                async with asyncio.TaskGroup() as group:
                    output = group.create_task(self._read_output(process.stdout.fileno()))
                    watch = group.create_task(self._watch())
                    self.exit_code = await asyncio.shield(exited)
                    await asyncio.wait({output}, timeout=LAST_OUTPUT_S)
                    output.cancel()
                    watch.cancel()
            finally:
                if not exited.done():
                    self.kill("the supervisor stopped")
                    self.exit_code = await asyncio.shield(exited)
        self._conclude(self.exit_code)

    def _conclude(self, code: int) -> None:
        """Set the error of a process that has ended, unless its end was asked for. Its own words come first."""
        if self._connection is not None:
            # The worker's last words may have come after the last look at it.
            self.status = self._connection.status
        if self.status.error:
            self.error = self.status.error
        elif self._killed_because:
            self.error = f"killed: {self._killed_because}"
        elif not (self.told_to_stop or code == 0):
            self.error = exit_reason(code, self._tail)

    async def _read_output(self, fd: int) -> None:
        """Pass the worker's output to logging, line by line, until its end."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        # A duplicate, because the transport closes what it is given.
        pipe = os.fdopen(os.dup(fd), "rb", buffering=0)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        splitter = LineSplitter()
        try:
            while data := await reader.read(65536):
                self._log(splitter.feed(data))
            self._log(splitter.feed(b"", final=True))
        finally:
            transport.close()

    def _log(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._tail.append(line)
            output_logger.info("[%s] %s", self.worker_id, line, extra={"worker_id": self.worker_id})

    async def _watch(self) -> None:
        """Keep a connection to the worker and ask it for its status, until cancelled."""
        try:
            while True:
                if self._connection is None or self._connection.closed.is_set():
                    await self._connect()
                else:
                    await self._ping(self._connection)
                settled = self.status.state in {"ready", "draining"} and self._connection is not None
                await asyncio.sleep(self._heartbeat_s if settled else min(self._heartbeat_s, START_POLL_S))
        finally:
            if self._connection is not None:
                await self._connection.close()

    async def _connect(self) -> None:
        if self._connection is not None:
            await self._connection.close()
            self._connection = None
        try:
            self._connection = await WorkerConnection.open(
                self.endpoint, peer=f"supervisor:{os.getpid()}", timeout_s=CONNECT_TIMEOUT_S
            )
        except (OSError, TimeoutError, ProtocolError, ServingError):
            return
        self._observe(self._connection.status)

    async def _ping(self, connection: WorkerConnection) -> None:
        try:
            status = await connection.ping(PING_TIMEOUT_S)
        except (OSError, TimeoutError, ProtocolError, ServingError):
            # A connection that broke may have said something before.
            status = connection.status
            if status.state == self.status.state:
                return
        self._observe(status)

    def _observe(self, status: Status) -> None:
        changed = status.state != self.status.state
        self.status = status
        self._answered_at = self._clock()
        self.heartbeat_at = timezone.now()
        if changed:
            self._state_since = self._answered_at
            if status.state == "ready":
                self.ready_at = self._answered_at
                self.configure(self._features)
        self._on_change(self, changed)


def _exit_of(process: subprocess.Popen[bytes]) -> asyncio.Future[int]:
    """Return a future of the process's exit code. A thread waits for it, which works alike on every system.

    asyncio's own processes report an exit late on some versions of Python, when a grandchild holds a pipe open.
    """
    loop = asyncio.get_running_loop()
    exited: asyncio.Future[int] = loop.create_future()

    def settle(code: int) -> None:
        if not exited.done():
            exited.set_result(code)

    def wait() -> None:
        code = process.wait()
        # The loop is closed already when the supervisor itself ends in an unusual way.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, code)

    threading.Thread(target=wait, name=f"wait-{process.pid}", daemon=True).start()
    return exited
