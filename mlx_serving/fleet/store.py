"""The supervisor's side of the database: the models it should serve, and the workers that it has.

Synchronous, called by `supervisor.py` in a thread of its own. Every call may raise `django.db.Error`; the caller keeps
its last known values and comes back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from django.db import Error, IntegrityError, close_old_connections, connections
from django.utils import timezone

from ..models import ServedModel, Worker
from .reconcile import Spec

KEPT_ROWS = 20
"""Ended workers that are remembered, for each model."""

ENDED = (Worker.State.STOPPED, Worker.State.FAILED)


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """What is to be stored of one worker. `values` are the columns that change."""

    worker_id: str
    model_id: int
    state: str
    values: dict[str, Any] = field(default_factory=dict)


def spec_of(model: ServedModel) -> Spec:
    """Return what a model's worker is started with."""
    return Spec(
        name=model.name,
        source=model.source,
        revision=model.revision,
        dtype=model.dtype,
        context_length=model.context_length,
        max_rows=model.max_rows,
        reload_token=model.reload_token,
    )


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def abandoned(endpoint: str, pid: int | None, runtime_dir: Path, *, alive: bool) -> bool:
    """Return whether a worker that the database calls running has no supervisor any more.

    The caller holds the lock of `runtime_dir`, so every worker in that folder is an earlier supervisor's. One in
    another folder may belong to a supervisor that runs there, unless its process is gone.

    Args:
        endpoint: where the worker listens.
        pid: its process id, if it got as far as having one.
        runtime_dir: the folder of the calling supervisor.
        alive: whether a process with this id exists.
    """
    return Path(endpoint.removeprefix("unix:")).parent == runtime_dir or pid is None or not alive


@contextlib.contextmanager
def _connection() -> Iterator[None]:
    """Close the thread's connections when they are too old, and after an error, as a request would."""
    close_old_connections()
    try:
        yield
    except Error:
        connections.close_all()
        raise
    finally:
        close_old_connections()


class Store:
    """Reads and writes for one host."""

    def __init__(self, host: str, runtime_dir: Path) -> None:
        self._host = host
        self._runtime_dir = runtime_dir
        self._known: set[str] = set()

    def recover(self) -> int:
        """Mark the workers of supervisors that have gone as failed; return how many there were."""
        with _connection():
            rows = Worker.objects.filter(host=self._host).exclude(state__in=ENDED).exclude(pk__in=self._known)
            gone = [
                pk
                for pk, endpoint, pid in rows.values_list("pk", "endpoint", "pid")
                if abandoned(endpoint, pid, self._runtime_dir, alive=pid is not None and _process_exists(pid))
            ]
            Worker.objects.filter(pk__in=gone).update(
                state=Worker.State.FAILED,
                last_error="its supervisor ended without stopping it",
                running=0,
                waiting=0,
                stopped_at=timezone.now(),
            )
            for model_id in ServedModel.objects.values_list("pk", flat=True):
                self._prune(model_id)
        return len(gone)

    def wanted(self) -> dict[int, Spec]:
        """Return the models that should be loaded, by their key."""
        with _connection():
            return {model.pk: spec_of(model) for model in ServedModel.objects.filter(wanted=True)}

    def save(self, rows: Sequence[WorkerRow]) -> None:
        """Store what is known of these workers: one update each, and an insert at the first time."""
        with _connection():
            for row in rows:
                if (
                    Worker.objects.filter(pk=row.worker_id).update(**row.values) == 0
                    and row.worker_id not in self._known
                ):
                    self._insert(row)
                self._known.add(row.worker_id)
                if row.state in ENDED:
                    self._prune(row.model_id)
                    self._known.discard(row.worker_id)

    def _insert(self, row: WorkerRow) -> None:
        # The model may have been deleted since, and its workers' rows with it.
        with contextlib.suppress(IntegrityError):
            Worker.objects.create(pk=row.worker_id, model_id=row.model_id, host=self._host, **row.values)

    def _prune(self, model_id: int) -> None:
        ended = Worker.objects.filter(model_id=model_id, state__in=ENDED).order_by("-started_at", "-pk")
        if old := list(ended.values_list("pk", flat=True)[KEPT_ROWS:]):
            Worker.objects.filter(pk__in=old).delete()
