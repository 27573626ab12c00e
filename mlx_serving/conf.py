"""Every setting of the app, with its type, default and meaning, read once from `settings.MLX_SERVING`.

A setting can be overridden by the environment variable `MLX_SERVING_<NAME>`. `settings()` returns the current values;
tests that use Django's `override_settings` get new ones. Validation is done by the system checks (`checks.py`).
"""

from __future__ import annotations

import functools
import os
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed

ENV_PREFIX = "MLX_SERVING_"


def default_runtime_dir() -> str:
    """Return a private folder for worker sockets, short enough for the 104-byte limit of macOS on socket paths."""
    bases = (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), str(Path.home()))
    paths = [str(Path(base) / f"mlx-serving-{os.getuid()}") for base in bases if base]
    return min(paths, key=lambda path: len(path) > 60)


@dataclass(frozen=True, slots=True)
class Settings:
    """The app's settings. Field names are the keys of `settings.MLX_SERVING`."""

    ALLOW_ANONYMOUS: bool = False
    """Whether requests without a logged-in user are served. Closed by default."""
    DEFAULT_MODEL: str = ""
    """The model that a request without one gets; empty means that a request must name its model."""
    MAX_BODY_BYTES: int = 8 * 1024 * 1024
    """Longest request body, in bytes."""
    MAX_INFLIGHT: int = 512
    """Requests that one web process may have in flight; more get 429."""
    MAX_INFLIGHT_PER_CLIENT: int = 256
    """The same for one user, or for all anonymous clients of one address."""
    MAX_REQUESTS_PER_SOCKET: int = 64
    """Requests that one WebSocket may have in flight."""
    RETRY_AFTER_S: int = 1
    """Seconds that a 429 or 503 answer tells the client to wait."""
    REQUEST_TIMEOUT_S: float = 600.0
    """Longest time from a request's admission to its end."""
    CONNECT_TIMEOUT_S: float = 2.0
    """Longest wait for a worker to accept a connection."""
    RUNTIME_DIR: str = field(default_factory=default_runtime_dir)
    """Folder of the worker sockets; made with mode 0700."""
    HOST: str = field(default_factory=socket.gethostname)
    """The name under which this host's workers are registered."""
    HEARTBEAT_S: float = 1.0
    """Seconds between two observations of a worker by the supervisor."""
    START_TIMEOUT_S: float = 600.0
    """Longest time from a worker's start until it is ready, download included."""
    DRAIN_TIMEOUT_S: float = 30.0
    """How long a stopping worker may go on with the requests that it has."""
    RESTART_BACKOFF_S: float = 1.0
    """Pause before the first restart of a crashed worker; doubles with each further crash."""
    RESTART_BACKOFF_MAX_S: float = 30.0
    """Longest pause before a restart."""
    MAX_ROWS: int = 32
    """Sequences that a worker decodes in one batch, for models that set no limit of their own."""
    MAX_WAITING: int = 512
    """Requests that may wait in a worker; more get 429."""
    PREFILL_TOKENS_PER_STEP: int = 0
    """Prompt tokens that a worker computes between two decode steps; 0 chooses by device."""
    KV_BUDGET_BYTES: int = 0
    """Memory for the KV cache of one worker; 0 chooses by the host's memory."""
    PREFIX_CACHE_BYTES: int = 0
    """Most of that memory for the KV of earlier requests, which later ones may begin with; 0 takes half."""
    TARGET_ITL_MS: float = 400.0
    """Time of a decode step, in milliseconds, above which adaptive batching starts no further sequences."""
    FLAGS: Mapping[str, bool] = field(default_factory=dict)
    """Feature flags set by the site: below the database and the environment, above the default."""


def build(values: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """Return the settings for these values and this environment.

    Raises:
        ImproperlyConfigured: a key is unknown or a value has the wrong type; the message names the key.
    """
    known = {f.name for f in fields(Settings)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ImproperlyConfigured(f"MLX_SERVING has unknown keys: {', '.join(unknown)}")
    hints = get_type_hints(Settings)
    merged: dict[str, Any] = {}
    for name in sorted(known):
        text = environ.get(ENV_PREFIX + name)
        if text is None and name not in values:
            continue
        try:
            value: Any = values[name] if text is None else msgspec.json.decode(text) if name == "FLAGS" else text
            merged[name] = msgspec.convert(value, hints[name], strict=text is None)
        except msgspec.MsgspecError as error:
            raise ImproperlyConfigured(f"MLX_SERVING[{name!r}]: {error}") from error
    return Settings(**merged)


@functools.cache
def settings() -> Settings:
    """Return the settings of this process, built on first use.

    Raises:
        ImproperlyConfigured: see `build`.
    """
    return build(getattr(django_settings, "MLX_SERVING", {}), os.environ)


def _forget(*, setting: str, **_: Any) -> None:
    if setting == "MLX_SERVING":
        settings.cache_clear()


setting_changed.connect(_forget)
