"""What the supervisor does next: the wanted models against the running workers. Pure; called by `supervisor.py`.

Nothing here knows processes, sockets, the database or the time of day. `plan` may be called at any moment and as often
as one likes: an action that is under way shows in `Observed`, and is not asked for again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from inference.protocol import WorkerState

UNRESPONSIVE_S = 30.0
"""A loaded worker that answers nothing for this long is killed."""

HANDOVER_S = 2.5
"""Between telling web processes that a worker retires and telling the worker: they read the database once a second."""

EXIT_GRACE_S = 5.0
"""What a worker may take to exit after its drain deadline, or after it reported its own failure."""


@dataclass(frozen=True, slots=True)
class Spec:
    """Everything of a model that its worker is started with. A worker with another spec is outdated."""

    name: str
    source: str
    revision: str = ""
    dtype: str = "auto"
    context_length: int | None = None
    max_rows: int | None = None
    reload_token: int = 0


@dataclass(frozen=True, slots=True)
class Desired:
    """A model that should have a worker."""

    model_id: int
    spec: Spec
    not_before: float = float("-inf")
    """No worker is started before this moment, because the last one failed."""


@dataclass(frozen=True, slots=True)
class Observed:
    """A worker process that has not ended."""

    worker_id: str
    model_id: int
    spec: Spec
    state: WorkerState
    """What the worker says of itself; `starting` before it has said anything."""
    state_since: float
    started_at: float
    answered_at: float
    """Its last sign of life; the start before the first."""
    ready_published: bool = False
    """Whether web processes can know that it is ready."""
    retiring: bool = False
    """Whether it is being replaced: it still takes requests, but web processes are told to send none."""
    retirement_published_at: float | None = None
    drain_deadline: float | None = None
    """When it was told to have finished; None when it was not told to stop."""
    killed: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """Start a worker."""

    model_id: int
    spec: Spec


@dataclass(frozen=True, slots=True)
class Retire:
    """Tell web processes to route around this worker."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Tell a worker to finish what it has and exit."""

    worker_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Kill:
    """End a worker that cannot be asked."""

    worker_id: str
    reason: str


Action: TypeAlias = Start | Retire | Drain | Kill


def plan(
    desired: Iterable[Desired], observed: Sequence[Observed], now: float, *, start_timeout_s: float
) -> list[Action]:
    """Return what brings the running workers closer to the wanted models.

    Args:
        desired: the models that are wanted.
        observed: every worker process that has not ended.
        now: the monotonic clock, in seconds.
        start_timeout_s: longest time from a worker's start until it is ready, in seconds.
    """
    wanted = {item.model_id: item for item in desired}
    actions: list[Action] = []
    in_service: dict[int, list[Observed]] = {}
    # What has failed and not ended yet: the pause before the next try begins with its end.
    failing = {worker.model_id: worker.spec for worker in observed if worker.killed or worker.state == "failed"}
    for worker in observed:
        if worker.killed:
            continue
        if reason := _overdue(worker, now, start_timeout_s):
            actions.append(Kill(worker.worker_id, reason))
        elif worker.drain_deadline is not None or worker.state in {"draining", "stopped", "failed"}:
            continue
        elif worker.model_id not in wanted:
            actions.append(Drain(worker.worker_id, "no longer wanted"))
        elif worker.retiring:
            if worker.retirement_published_at is not None and now - worker.retirement_published_at >= HANDOVER_S:
                actions.append(Drain(worker.worker_id, "replaced"))
        else:
            in_service.setdefault(worker.model_id, []).append(worker)
    for item in wanted.values():
        may_start = now >= item.not_before and failing.get(item.model_id) != item.spec
        actions += _serve(item, in_service.get(item.model_id, ()), may_start=may_start)
    return actions


def _serve(item: Desired, workers: Sequence[Observed], *, may_start: bool) -> list[Action]:
    """Return what one wanted model needs, given its workers in service."""
    current = [worker for worker in workers if worker.spec == item.spec]
    outdated = [worker for worker in workers if worker.spec != item.spec]
    actions: list[Action] = []
    if not current and may_start:
        actions.append(Start(item.model_id, item.spec))
    replaced = any(worker.state == "ready" and worker.ready_published for worker in current)
    for worker in outdated:
        if worker.state != "ready":
            actions.append(Drain(worker.worker_id, "outdated before it was ready"))
        elif replaced:
            actions.append(Retire(worker.worker_id))
    return actions


def _overdue(worker: Observed, now: float, start_timeout_s: float) -> str:
    """Return why a worker has to be killed, or an empty string."""
    if worker.drain_deadline is not None:
        return "it did not end by its drain deadline" if now >= worker.drain_deadline + EXIT_GRACE_S else ""
    if worker.state in {"starting", "loading"}:
        late = now - worker.started_at >= start_timeout_s
        return f"it was not ready after {start_timeout_s:g} s" if late else ""
    if worker.state in {"stopped", "failed"}:
        return f"it {worker.state} but did not exit" if now - worker.state_since >= EXIT_GRACE_S else ""
    return f"it did not answer for {UNRESPONSIVE_S:g} s" if now - worker.answered_at >= UNRESPONSIVE_S else ""
