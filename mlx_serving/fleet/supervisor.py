"""Keeps the running workers of this host in step with the models in the database. Run by `manage.py runworkers`.

Four kinds of task, all owned by `Supervisor.run`: one reads the wanted models, one writes what is seen of the workers,
one acts on the difference (`reconcile.plan` decides), and one lives through each worker process (`process.py`). The
database is touched by the first two alone, in a thread, so that it may be slow or away while the workers go on.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from django.db import Error as DatabaseProblem
from django.utils import timezone

from inference.protocol import Configure, Load, ModelInfo, WorkerConfig

from .. import flags
from ..conf import Settings
from . import runtime_dir
from .backoff import Backoff
from .process import COMMAND, WorkerProcess
from .reconcile import Desired, Drain, Kill, Retire, Spec, Start, plan
from .store import Store, WorkerRow

logger = logging.getLogger(__name__)

FLUSH_TIMEOUT_S = 5.0
"""At the end: longest wait until the last state of the workers is stored."""

SAME_SIGNAL_S = 0.5
"""Signals this close together are one: wrappers pass on what a terminal has sent to the whole group already."""

_EARLY = 0.9
"""Pings come once per HEARTBEAT_S, give or take: one that is a little early is stored all the same."""

_T = TypeVar("_T")


def new_worker_id() -> str:
    """Return a name for a worker: short, because it is part of a socket's path."""
    return f"w{secrets.token_hex(5)}"


def worker_features() -> Configure:
    """Return which features of workers the flags switch on. Reads the database when it was not read for a second."""
    flags.refresh()
    return Configure(prefix_cache=flags.enabled("prefix_cache"), adaptive_batching=flags.enabled("adaptive_batching"))


def worker_config(worker_id: str, spec: Spec, settings: Settings, features: Configure) -> WorkerConfig:
    """Return what a worker is started with."""
    return msgspec.convert(
        {
            "worker_id": worker_id,
            "model": spec.name,
            "source": spec.source,
            "revision": spec.revision,
            "socket_path": str(runtime_dir.socket_path(Path(settings.RUNTIME_DIR), worker_id)),
            "dtype": spec.dtype,
            "context_length": spec.context_length,
            "max_rows": spec.max_rows or settings.MAX_ROWS,
            "max_waiting": settings.MAX_WAITING,
            "prefill_tokens_per_step": settings.PREFILL_TOKENS_PER_STEP,
            "kv_budget_bytes": settings.KV_BUDGET_BYTES,
            "prefix_cache_bytes": settings.PREFIX_CACHE_BYTES,
            "target_itl_ms": settings.TARGET_ITL_MS,
            "prefix_cache": features.prefix_cache,
            "adaptive_batching": features.adaptive_batching,
        },
        WorkerConfig,
    )


class Supervisor:
    """One per host and database. The caller holds the lock of RUNTIME_DIR.

    Args:
        settings: the app's settings.
        store: the database.
        features: returns which features of workers are on; called where the database may be read.
        command: how a worker is started.
        clock: monotonic, in seconds.
        jitter: returns a number in [0, 1); spreads restarts.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        *,
        features: Callable[[], Configure] = worker_features,
        command: Sequence[str] = COMMAND,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._store = store
        self._read_features = features
        self._command = command
        self._clock = clock
        self._jitter = jitter
        self._wanted: dict[int, Spec] = {}
        self._features = Configure()
        self._backoffs: dict[int, tuple[Spec, Backoff]] = {}
        self._workers: dict[str, WorkerProcess] = {}
        self._unsaved: dict[str, WorkerProcess] = {}
        self._saved: dict[str, tuple[float, str]] = {}
        self._act_now = asyncio.Event()
        self._save_now = asyncio.Event()
        self._all_saved = asyncio.Event()
        self._all_saved.set()
        self._stopping_since: float | None = None
        self._forced = False
        self._database_down = False
        self._database = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")

    async def run(self) -> bool:
        """Supervise until SIGTERM or SIGINT; return whether every worker could be drained.

        The first signal drains all workers for at most DRAIN_TIMEOUT_S, a second one kills them.
        """
        with self._signals():
            try:
                async with asyncio.TaskGroup() as group:
                    reading = group.create_task(self._read_wanted())
                    writing = group.create_task(self._write_workers())
                    await self._reconcile(group)
                    reading.cancel()
                    await self._flush()
                    writing.cancel()
            finally:
                self._database.shutdown(wait=False, cancel_futures=True)
        return not self._forced

    # --- signals -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self._stop, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _stop(self, number: signal.Signals) -> None:
        if self._stopping_since is None:
            logger.info(
                "%s: draining %d worker(s) for at most %g s; once more stops them at once",
                number.name,
                len(self._workers),
                self._settings.DRAIN_TIMEOUT_S,
            )
            self._stopping_since = self._clock()
        elif self._clock() - self._stopping_since >= SAME_SIGNAL_S:
            logger.warning("%s again: killing %d worker(s)", number.name, len(self._workers))
            self._forced = True
            for worker in self._workers.values():
                worker.kill("the supervisor was told to stop at once")
        self._act_now.set()

    @property
    def _stopping(self) -> bool:
        return self._stopping_since is not None

    # --- what should run ---------------------------------------------------------------------------------------------

    async def _read_wanted(self) -> None:
        recovered = False
        while True:
            try:
                if not recovered:
                    gone = await self._in_database(self._store.recover)
                    if gone:
                        logger.info("%d worker(s) of an earlier supervisor marked as failed", gone)
                    recovered = True
                wanted = await self._in_database(self._store.wanted)
                features = await self._in_database(self._read_features)
            except DatabaseProblem as error:
                self._note_database(error)
            else:
                self._note_database(None)
                self._configure(features)
                if wanted != self._wanted:
                    self._wanted = wanted
                    self._act_now.set()
            await asyncio.sleep(self._settings.HEARTBEAT_S / 2)

    def _configure(self, features: Configure) -> None:
        if features != self._features:
            self._features = features
            for worker in self._workers.values():
                worker.configure(features)

    async def _in_database(self, call: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._database, call, *args)

    def _note_database(self, error: DatabaseProblem | None) -> None:
        """Log the first failure and the recovery, not each attempt between them."""
        if error is not None and not self._database_down:
            logger.warning("the database does not answer, workers go on as they are: %s", error)
        if error is None and self._database_down:
            logger.info("the database answers again")
        self._database_down = error is not None

    # --- acting on the difference ------------------------------------------------------------------------------------

    async def _reconcile(self, group: asyncio.TaskGroup) -> None:
        """Act until told to stop and no worker is left."""
        while not (self._stopping and not self._workers):
            observed = [worker.observed() for worker in self._workers.values()]
            timeout_s = self._settings.START_TIMEOUT_S
            for action in plan(self._desired(), observed, self._clock(), start_timeout_s=timeout_s):
                match action:
                    case Start(model_id, spec):
                        self._start(group, model_id, spec)
                    case Retire(worker_id):
                        self._workers[worker_id].retire()
                    case Drain(worker_id, reason):
                        worker = self._workers[worker_id]
                        why = "the supervisor stops" if self._stopping else reason
                        logger.info("%s: draining worker %s: %s", worker.spec.name, worker_id, why)
                        worker.drain(self._settings.DRAIN_TIMEOUT_S)
                    case Kill(worker_id, reason):
                        worker = self._workers[worker_id]
                        logger.error("%s: killing worker %s: %s", worker.spec.name, worker_id, reason)
                        worker.kill(reason)
            await _wait(self._act_now, self._settings.HEARTBEAT_S / 2)

    def _desired(self) -> list[Desired]:
        if self._stopping:
            return []
        desired = []
        for model_id, spec in self._wanted.items():
            failed_spec, backoff = self._backoffs.get(model_id, (spec, Backoff()))
            # A changed model deserves a fresh try: what failed was the old one.
            not_before = backoff.not_before if failed_spec == spec else float("-inf")
            desired.append(Desired(model_id, spec, not_before))
        return desired

    def _start(self, group: asyncio.TaskGroup, model_id: int, spec: Spec) -> None:
        worker_id = new_worker_id()
        worker = WorkerProcess(
            spec=spec,
            model_id=model_id,
            config=worker_config(worker_id, spec, self._settings, self._features),
            heartbeat_s=self._settings.HEARTBEAT_S,
            clock=self._clock,
            on_change=self._changed,
            command=self._command,
        )
        self._workers[worker_id] = worker
        logger.info("%s: starting worker %s", spec.name, worker_id, extra={"worker_id": worker_id})
        group.create_task(self._live_through(worker), name=worker_id)

    async def _live_through(self, worker: WorkerProcess) -> None:
        try:
            await worker.run()
        finally:
            del self._workers[worker.worker_id]
        who = f"{worker.spec.name}: worker {worker.worker_id}"
        extra = {"worker_id": worker.worker_id}
        if worker.told_to_stop:
            level, how = (logging.ERROR, f": {worker.error}") if worker.error else (logging.INFO, "")
            logger.log(level, "%s stopped%s", who, how, extra=extra)
        else:
            pause_s = self._back_off(worker)
            restarts = not self._stopping and self._wanted.get(worker.model_id) == worker.spec
            then = f"; restart in {pause_s:.1f} s" if restarts else ""
            logger.error("%s failed: %s%s", who, worker.error or "it ended without being told to", then, extra=extra)
        self._act_now.set()

    def _back_off(self, worker: WorkerProcess) -> float:
        """Note a failure; return the pause before the model's next worker, in seconds."""
        now = self._clock()
        failed_spec, backoff = self._backoffs.get(worker.model_id, (worker.spec, Backoff()))
        if failed_spec != worker.spec:
            backoff = Backoff()
        backoff = backoff.after_failure(
            now=now,
            ready_s=worker.ready_s,
            base_s=self._settings.RESTART_BACKOFF_S,
            max_s=self._settings.RESTART_BACKOFF_MAX_S,
            random=self._jitter,
        )
        self._backoffs[worker.model_id] = (worker.spec, backoff)
        return max(0.0, backoff.not_before - now)

    # --- what is seen of the workers ---------------------------------------------------------------------------------

    def _changed(self, worker: WorkerProcess, state_changed: bool) -> None:
        if state_changed:
            if worker.state == "ready":
                self._say_ready(worker)
            self._act_now.set()
        self._unsaved[worker.worker_id] = worker
        if self._due(worker):
            self._all_saved.clear()
            self._save_now.set()

    def _due(self, worker: WorkerProcess) -> bool:
        """Whether what is seen of a worker has to be stored now: a new state, or a heartbeat's time has passed."""
        saved_at, state = self._saved.get(worker.worker_id, (float("-inf"), ""))
        return state != worker.state or self._clock() - saved_at >= self._settings.HEARTBEAT_S * _EARLY

    def _say_ready(self, worker: WorkerProcess) -> None:
        info = worker.info
        details = f", {info.device}, {info.dtype}, loaded in {info.load_s:.1f} s" if info else ""
        logger.info(
            "%s: ready (worker %s, process %s%s)",
            worker.spec.name,
            worker.worker_id,
            worker.pid,
            details,
            extra={"worker_id": worker.worker_id},
        )

    async def _write_workers(self) -> None:
        while True:
            await self._save_now.wait()
            self._save_now.clear()
            if not await self._save():
                await asyncio.sleep(self._settings.HEARTBEAT_S)
                self._save_now.set()

    async def _save(self) -> bool:
        """Store what has changed; return whether that worked. What failed stays to be stored."""
        workers = [worker for worker in self._unsaved.values() if self._due(worker)]
        rows = [_row(worker) for worker in workers]
        for worker in workers:
            del self._unsaved[worker.worker_id]
        try:
            await self._in_database(self._store.save, rows)
        except DatabaseProblem as error:
            self._note_database(error)
            for worker in workers:
                self._unsaved.setdefault(worker.worker_id, worker)
            return False
        now = self._clock()
        for worker, row in zip(workers, rows, strict=True):
            self._published(worker, row.state, now)
        if not any(self._due(worker) for worker in self._unsaved.values()):
            self._all_saved.set()
        return True

    def _published(self, worker: WorkerProcess, state: str, now: float) -> None:
        """Note what web processes can know from now on."""
        if worker.ended:
            self._saved.pop(worker.worker_id, None)
            return
        self._saved[worker.worker_id] = (now, state)
        if state == "ready" and not worker.ready_published:
            worker.ready_published = True
            self._act_now.set()
        if state == "draining" and worker.retiring and worker.retirement_published_at is None:
            worker.retirement_published_at = now

    async def _flush(self) -> None:
        if not self._all_saved.is_set() and not await _wait(self._all_saved, FLUSH_TIMEOUT_S):
            logger.warning("the last state of the workers could not be stored; the next start will mark them")


def _row(worker: WorkerProcess) -> WorkerRow:
    """Return what is stored of a worker."""
    load, ended = worker.status.load, worker.ended
    values: dict[str, Any] = {
        "endpoint": worker.endpoint,
        "pid": worker.pid,
        "state": worker.state,
        "reload_token": worker.spec.reload_token,
        "progress": worker.status.progress,
        "running": 0 if ended else load.running,
        "waiting": 0 if ended else load.waiting,
        "kv_bytes": 0 if ended else load.kv_bytes,
        "memory_bytes": 0 if ended else load.memory_bytes,
        "step_ms": load.step_ms,
        "load": _as_dict(load),
        "last_error": worker.error or worker.status.error,
        "heartbeat_at": worker.heartbeat_at,
    }
    if worker.info is not None:
        values["info"] = _as_dict(worker.info)
    if ended:
        values["stopped_at"] = timezone.now()
    return WorkerRow(worker.worker_id, worker.model_id, worker.state, values)


def _as_dict(message: ModelInfo | Load) -> dict[str, Any]:
    return msgspec.structs.asdict(message)


async def _wait(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait for an event and clear it; return whether it came within this many seconds."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    event.clear()
    return True
