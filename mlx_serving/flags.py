"""The feature flags: which exist, how a value is resolved, and the snapshot that the hot path reads.

Resolution takes the first that is set: environment variable, database, `MLX_SERVING["FLAGS"]`, default. The kill
switch turns every flag off at once. `enabled()` is a dictionary look-up; `refresh()` and `arefresh()` bring the
snapshot up to date and do nothing while it is younger than a second, so a change reaches every process that serves
requests, or is scraped, within two seconds. With the database down the last known values stay in force.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from django.db import Error as DatabaseProblem
from django.db import connections

from .conf import settings

logger = logging.getLogger(__name__)

MAX_AGE_S = 1.0
KILL_SWITCH = "kill_switch"

Source = Literal["environment", "database", "settings", "default", "kill switch"]


@dataclass(frozen=True, slots=True)
class Flag:
    """A feature that can be switched off, and what then happens instead."""

    name: str
    env: str
    default: bool
    off_means: str


FLAGS: dict[str, Flag] = {
    flag.name: flag
    for flag in (
        Flag(KILL_SWITCH, "MLX_KILL_SWITCH", False, "every flag below has its own value"),
        Flag("prefix_cache", "MLX_PREFIX_CACHE_ENABLED", True, "every prompt is prefilled from its first token"),
        Flag("adaptive_batching", "MLX_ADAPTIVE_BATCHING_ENABLED", True, "a fixed row limit"),
        Flag("connection_pool", "MLX_CONNECTION_POOL_ENABLED", True, "a fresh connection per request"),
        Flag(
            "optimized_streaming",
            "MLX_OPTIMIZED_STREAMING_ENABLED",
            True,
            "each delta is written at once, as its own chunk",
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Value:
    """A flag's effective value and where it comes from."""

    enabled: bool
    source: Source


def parse_bool(text: str) -> bool | None:
    """Return the truth value of an environment variable's text, or None when it is empty or neither."""
    lowered = text.strip().lower()
    if lowered in {"1", "true", "yes", "on"}:
        return True
    if lowered in {"0", "false", "no", "off"}:
        return False
    return None


def resolve_one(
    flag: Flag, environ: Mapping[str, str], database: Mapping[str, bool | None], site: Mapping[str, bool]
) -> Value:
    """Return the value of one flag, the kill switch left aside."""
    if (value := parse_bool(environ.get(flag.env, ""))) is not None:
        return Value(value, "environment")
    if (stored := database.get(flag.name)) is not None:
        return Value(stored, "database")
    if flag.name in site:
        return Value(site[flag.name], "settings")
    return Value(flag.default, "default")


def resolve(
    environ: Mapping[str, str], database: Mapping[str, bool | None], site: Mapping[str, bool]
) -> dict[str, Value]:
    """Return the value of every flag."""
    values = {name: resolve_one(flag, environ, database, site) for name, flag in FLAGS.items()}
    if values[KILL_SWITCH].enabled:
        for name in values:
            if name != KILL_SWITCH:
                values[name] = Value(False, "kill switch")
    return values


class _Snapshot:
    """The values in force in this process, and when they were read."""

    def __init__(self) -> None:
        self.values: dict[str, Value] | None = None
        self.read_at = float("-inf")
        self.lock = threading.Lock()

    def stale(self) -> bool:
        return time.monotonic() - self.read_at >= MAX_AGE_S


_snapshot = _Snapshot()
_reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlx-flags")


def _read() -> None:
    from .models import FeatureFlag

    try:
        database = dict(FeatureFlag.objects.values_list("name", "enabled"))
    except DatabaseProblem as error:
        logger.warning("feature flags could not be read, last known values stay in force: %s", type(error).__name__)
        _snapshot.read_at = time.monotonic()
        if _snapshot.values is not None:
            return
        database = {}
    _snapshot.values = resolve(os.environ, database, settings().FLAGS)
    _snapshot.read_at = time.monotonic()


def refresh(*, force: bool = False) -> None:
    """Bring the snapshot up to date, from synchronous code."""
    if not force and not _snapshot.stale():
        return
    if _snapshot.lock.acquire(blocking=force or _snapshot.values is None):
        try:
            if force or _snapshot.stale():
                _read()
        finally:
            _snapshot.lock.release()


def _refresh_and_disconnect() -> None:
    try:
        refresh()
    finally:
        # An idle thread would otherwise hold its connection for as long as the process lives.
        connections.close_all()


async def arefresh() -> None:
    """Bring the snapshot up to date, from asynchronous code; one query a second at most."""
    if _snapshot.stale():
        await asyncio.get_running_loop().run_in_executor(_reader, _refresh_and_disconnect)


def enabled(name: str) -> bool:
    """Return whether a flag is on, by the snapshot; a process that has read none yet goes by all but the database."""
    values = _snapshot.values
    if values is None:
        values = resolve(os.environ, {}, settings().FLAGS)
    return values[name].enabled


def values() -> dict[str, Value]:
    """Return every flag's value and source, freshly read when the snapshot is stale. For synchronous code."""
    refresh()
    return dict(_snapshot.values or resolve(os.environ, {}, settings().FLAGS))
