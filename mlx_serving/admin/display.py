"""How the admin's pages show states, sizes and ages. No page of its own."""

from __future__ import annotations

from datetime import datetime

from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from ..models import Worker

NOTHING = "-"

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_WORST_FIRST = (
    Worker.State.READY,
    Worker.State.LOADING,
    Worker.State.STARTING,
    Worker.State.DRAINING,
    Worker.State.FAILED,
    Worker.State.STOPPED,
)

STALE_S = 10.0
"""A heartbeat that is older is shown as a fault; web processes leave such a worker out."""


def human_bytes(size_bytes: int) -> str:
    """Return a size in the unit that suits it, such as `1.5 GiB`."""
    size = float(size_bytes)
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable: the last unit takes every size")


def human_age(moment: datetime | None, now: datetime) -> str:
    """Return how long ago something was, in the largest unit that fits."""
    if moment is None:
        return NOTHING
    seconds = max(0, int((now - moment).total_seconds()))
    if seconds < 60:
        return ngettext("%d second ago", "%d seconds ago", seconds) % seconds
    if seconds < 3600:
        minutes = seconds // 60
        return ngettext("%d minute ago", "%d minutes ago", minutes) % minutes
    if seconds < 86400:
        hours = seconds // 3600
        return ngettext("%d hour ago", "%d hours ago", hours) % hours
    days = seconds // 86400
    return ngettext("%d day ago", "%d days ago", days) % days


def badge(kind: str, label: object) -> SafeString:
    """Return a label in the colours of its kind: a worker's state, or `on`, `off`, `idle`."""
    return format_html('<span class="mlx-badge mlx-{}">{}</span>', kind, label)


def is_stale(worker: Worker, now: datetime) -> bool:
    """Return whether a worker that is called ready has not been seen for too long."""
    if worker.state != Worker.State.READY:
        return False
    return worker.heartbeat_at is None or (now - worker.heartbeat_at).total_seconds() > STALE_S


def worker_badge(worker: Worker, now: datetime) -> SafeString:
    """Return a worker's state, with its progress while it loads and a fault when nobody has seen it lately."""
    if is_stale(worker, now):
        return badge("failed", _("no heartbeat"))
    label = worker.get_state_display()
    if worker.state == Worker.State.LOADING and worker.progress:
        return badge(worker.state, f"{label} {worker.progress:.0%}")
    return badge(worker.state, label)


def telling(workers: list[Worker]) -> Worker | None:
    """Return the worker that says most about its model: the newest of those that are furthest, else the newest at all.

    Args:
        workers: the model's workers, newest first.
    """
    alive = [worker for worker in workers if worker.state not in {Worker.State.FAILED, Worker.State.STOPPED}]
    if not alive:
        return workers[0] if workers else None
    return min(alive, key=lambda worker: _WORST_FIRST.index(Worker.State(worker.state)))
