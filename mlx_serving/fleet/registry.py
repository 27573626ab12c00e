"""What a web process knows of models and workers: a snapshot of the database, at most a second old.

Called by the gateway's routing and by the API for every request, so reading it costs a comparison of two numbers.
Writes nothing. When the database does not answer, the last known values stay.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.db import Error as DatabaseProblem
from django.db import close_old_connections, connections

from ..errors import ModelNotReady

logger = logging.getLogger(__name__)

MAX_AGE_S = 1.0
"""A snapshot that is older is read anew."""

PATIENCE_S = 0.25
"""How long a caller that has an old snapshot waits for the new one; the database may hang."""

HEARTBEAT_MAX_AGE_S = 10.0
"""A ready worker that its supervisor has not seen for longer is left out."""

LISTED_STATES = ("starting", "loading", "ready", "draining")


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker, as far as routing and the model list need it."""

    worker_id: str
    model: str
    endpoint: str
    state: str
    running: int
    waiting: int
    info: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model and the workers that serve it, or are about to."""

    name: str
    wanted: bool
    created: int
    """When it was added, in Unix seconds."""
    context_length: int | None
    """Tokens; None while nobody knows."""
    workers: tuple[WorkerView, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model as the database has it."""

    pk: int
    name: str
    wanted: bool
    context_length: int | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker as the database has it."""

    pk: str
    model_id: int
    endpoint: str
    state: str
    running: int
    waiting: int
    info: dict[str, Any]
    heartbeat_at: datetime | None


@dataclass(frozen=True, slots=True)
class Rows:
    """What one refresh has read."""

    models: tuple[ModelRow, ...] = ()
    workers: tuple[WorkerRow, ...] = ()


@dataclass(frozen=True, slots=True)
class Outage:
    """A time in which this process could not read the database, in Unix seconds."""

    start: float
    end: float

    def seconds_since(self, moment: float) -> float:
        """Return how much of the outage lies after a moment."""
        return max(0.0, self.end - max(self.start, moment))


def build_views(
    rows: Rows, suspects: Mapping[str, float], now: float, outage: Outage | None = None
) -> dict[str, ModelView]:
    """Return the models by name, with the workers that can be believed.

    Args:
        rows: what the database has.
        suspects: worker ids, each with the time at which a link to it broke, in Unix seconds.
        now: when the rows were read, in Unix seconds.
        outage: the last one that has ended. A supervisor could not write during it either, so it ages no heartbeat.
    """
    by_model: dict[int, list[WorkerRow]] = {}
    for worker in rows.workers:
        if _believable(worker, suspects, now, outage):
            by_model.setdefault(worker.model_id, []).append(worker)
    return {model.name: _view(model, by_model.get(model.pk, ())) for model in rows.models}


def _believable(worker: WorkerRow, suspects: Mapping[str, float], now: float, outage: Outage | None) -> bool:
    seen_at = float("-inf") if worker.heartbeat_at is None else worker.heartbeat_at.timestamp()
    if worker.state not in LISTED_STATES or (worker.pk in suspects and seen_at <= suspects[worker.pk]):
        return False
    age_s = now - seen_at - (outage.seconds_since(seen_at) if outage else 0.0)
    return worker.state != "ready" or age_s <= HEARTBEAT_MAX_AGE_S


def _view(model: ModelRow, workers: Iterable[WorkerRow]) -> ModelView:
    views = tuple(
        WorkerView(
            worker_id=worker.pk,
            model=model.name,
            endpoint=worker.endpoint,
            state=worker.state,
            running=worker.running,
            waiting=worker.waiting,
            info=worker.info,
        )
        for worker in workers
    )
    known = (view.info.get("context_length") for view in views if view.state == "ready")
    return ModelView(
        name=model.name,
        wanted=model.wanted,
        created=int(model.created_at.timestamp()),
        context_length=next(filter(None, known), model.context_length),
        workers=views,
    )


def query_rows() -> Rows:
    """Read models and workers: two queries.

    Raises:
        django.db.Error: the database does not answer.
    """
    from ..models import ServedModel, Worker

    models = ServedModel.objects.values_list("pk", "name", "wanted", "context_length", "created_at")
    workers = Worker.objects.filter(state__in=LISTED_STATES).values_list(
        "pk", "model_id", "endpoint", "state", "running", "waiting", "info", "heartbeat_at"
    )
    return Rows(tuple(ModelRow(*row) for row in models), tuple(WorkerRow(*row) for row in workers))


def read_rows() -> Rows:
    """As `query_rows`, in a thread that serves no request: keeps or closes its connections as a request would.

    Raises:
        django.db.Error: the database does not answer.
    """
    close_old_connections()
    try:
        return query_rows()
    except DatabaseProblem:
        connections.close_all()
        raise
    finally:
        close_old_connections()


@dataclass(slots=True)
class _State:
    """What several threads share; guarded by the registry's lock."""

    rows: Rows | None = None
    rows_at: float = 0.0
    """When the rows were read, in Unix seconds."""
    checked_at: float = float("-inf")
    """When the database was last asked, on the monotonic clock, whether or not it answered."""
    refresh: Future[None] | None = None
    wishes: int = 0
    """Counts the calls of `invalidate`: a refresh that began before one is not fresh."""
    views: dict[str, ModelView] = field(default_factory=dict)
    suspects: dict[str, float] = field(default_factory=dict)
    failing_since: float | None = None
    outage: Outage | None = None


class Registry:
    """The snapshot and its refresh. Safe under any number of event loops and threads.

    Args:
        read: returns the rows, in a thread; may raise `django.db.Error`.
        clock: monotonic, in seconds.
        wall: Unix seconds.
    """

    def __init__(
        self,
        read: Callable[[], Rows] = read_rows,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._read = read
        self._clock = clock
        self._wall = wall
        self._lock = threading.Lock()
        self._state = _State()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registry")

    async def models(self) -> Mapping[str, ModelView]:
        """Return the models by name.

        Raises:
            ModelNotReady: nothing is known yet, and the database does not answer.
        """
        # The second round is for a refresh that was under way when `invalidate` was called.
        for _ in range(2):
            refresh, known = self._pending_refresh()
            if refresh is None:
                break
            # `wait` leaves the refresh alone when this caller is cancelled: others wait for the same one.
            done, _pending = await asyncio.wait({asyncio.wrap_future(refresh)}, timeout=PATIENCE_S if known else None)
            for future in done:
                future.result()
        state = self._state
        if state.rows is None:
            raise ModelNotReady("the models cannot be read from the database at this moment", retry_after_s=1)
        return state.views

    def suspect(self, worker_id: str) -> None:
        """Leave a worker out, because a link to it broke, until its supervisor has seen it again or given it up."""
        with self._lock:
            self._state.suspects[worker_id] = self._wall()
            self._rebuild()

    def invalidate(self) -> None:
        """Read the database at the next call, however fresh the snapshot is."""
        with self._lock:
            self._state.checked_at = float("-inf")
            self._state.wishes += 1

    def _pending_refresh(self) -> tuple[Future[None] | None, bool]:
        """Return the refresh to wait for, if one is due, and whether there is something to go by without it."""
        with self._lock:
            state = self._state
            if self._clock() - state.checked_at < MAX_AGE_S:
                return None, state.rows is not None
            if state.refresh is None:
                state.refresh = self._executor.submit(self._refresh, state.wishes)
            return state.refresh, state.rows is not None

    def _refresh(self, wishes: int) -> None:
        started_at = self._wall()
        rows: Rows | None = None
        try:
            rows = self._read()
        except DatabaseProblem as error:
            # Logged once: the next attempt is a second away, and an outage may be long.
            if self._state.failing_since is None:
                logger.warning("models and workers cannot be read, the last known ones stay: %s", error)
        finally:
            with self._lock:
                self._settle(rows, started_at, fresh=wishes == self._state.wishes)

    def _settle(self, rows: Rows | None, started_at: float, *, fresh: bool) -> None:
        state = self._state
        state.refresh = None
        if fresh:
            state.checked_at = self._clock()
        if rows is None:
            state.failing_since = state.failing_since or started_at
            return
        if state.failing_since is not None:
            state.outage = Outage(state.failing_since, self._wall())
            state.failing_since = None
            logger.info("models and workers can be read again")
        state.rows, state.rows_at = rows, started_at
        self._forget_suspects(rows)
        self._rebuild()

    def _rebuild(self) -> None:
        state = self._state
        if state.rows is not None:
            state.views = build_views(state.rows, state.suspects, state.rows_at, state.outage)

    def _forget_suspects(self, rows: Rows) -> None:
        """Drop suspicions that are settled: the worker has gone from the list, or was seen after the link broke."""
        seen_at = {worker.pk: worker.heartbeat_at for worker in rows.workers}
        self._state.suspects = {
            worker_id: since
            for worker_id, since in self._state.suspects.items()
            if worker_id in seen_at and ((at := seen_at[worker_id]) is None or at.timestamp() <= since)
        }


registry = Registry()
"""The one of this process."""
