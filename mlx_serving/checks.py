"""System checks: what `manage.py check`, and every command, says about a site's configuration of this app.

Errors (E) are what cannot work; warnings (W) are what works in some set-ups only. A check is a function of the site's
settings and environment; none touches the database or the network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from django.conf import settings as django_settings
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.urls import URLResolver, get_resolver

from .conf import ENV_PREFIX, Settings, build
from .flags import FLAGS, parse_bool
from .fleet import runtime_dir

_POSITIVE = (
    "MAX_BODY_BYTES",
    "MAX_INFLIGHT",
    "MAX_INFLIGHT_PER_CLIENT",
    "MAX_REQUESTS_PER_SOCKET",
    "REQUEST_TIMEOUT_S",
    "CONNECT_TIMEOUT_S",
    "HEARTBEAT_S",
    "START_TIMEOUT_S",
    "RESTART_BACKOFF_S",
    "MAX_ROWS",
    "MAX_WAITING",
    "TARGET_ITL_MS",
)
_NOT_NEGATIVE = ("RETRY_AFTER_S", "DRAIN_TIMEOUT_S", "PREFILL_TOKENS_PER_STEP", "KV_BUDGET_BYTES", "PREFIX_CACHE_BYTES")
_NOT_EMPTY = ("RUNTIME_DIR", "HOST")

_MAX_HEARTBEAT_S = 3.0
"""Web processes believe a worker for ten seconds after a heartbeat; three must fit."""


def _settings() -> Settings | None:
    """Return the app's settings, or None when they cannot be built, which E001 reports."""
    try:
        return build(getattr(django_settings, "MLX_SERVING", {}), os.environ)
    except (ImproperlyConfigured, ValueError, TypeError):
        return None


def check_settings(**_: Any) -> list[checks.CheckMessage]:
    """E001: the settings cannot be built. W001: an environment variable overrides nothing."""
    found: list[checks.CheckMessage] = []
    try:
        build(getattr(django_settings, "MLX_SERVING", {}), os.environ)
    except (ImproperlyConfigured, ValueError, TypeError) as error:
        found.append(
            checks.Error(
                f"The settings of mlx_serving are not valid: {error}",
                hint="Correct settings.MLX_SERVING, or the environment variable MLX_SERVING_ with that name.",
                id="mlx_serving.E001",
            )
        )
    known = {ENV_PREFIX + field.name for field in fields(Settings)}
    unknown = sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known)
    found += [
        checks.Warning(
            f"The environment variable {name} overrides no setting.",
            hint="Its name is MLX_SERVING_ and a key of settings.MLX_SERVING.",
            id="mlx_serving.W001",
        )
        for name in unknown
    ]
    return found


def bad_ranges(config: Settings) -> list[str]:
    """Return what is wrong with values whose types are right."""
    problems = [f"{name} must be above 0" for name in _POSITIVE if getattr(config, name) <= 0]
    problems += [f"{name} must not be negative" for name in _NOT_NEGATIVE if getattr(config, name) < 0]
    problems += [f"{name} must not be empty" for name in _NOT_EMPTY if not getattr(config, name)]
    if config.RESTART_BACKOFF_MAX_S < config.RESTART_BACKOFF_S:
        problems.append("RESTART_BACKOFF_MAX_S must not be below RESTART_BACKOFF_S")
    if config.HEARTBEAT_S > _MAX_HEARTBEAT_S:
        problems.append(f"HEARTBEAT_S must not be above {_MAX_HEARTBEAT_S:g}")
    return problems


def check_ranges(**_: Any) -> list[checks.CheckMessage]:
    """E002: a value is out of its range."""
    config = _settings()
    return [
        checks.Error(
            f"MLX_SERVING: {problem}.",
            hint=f"The default is {getattr(Settings(), problem.split()[0])!r}.",
            id="mlx_serving.E002",
        )
        for problem in (bad_ranges(config) if config else ())
    ]


def check_flags(**_: Any) -> list[checks.CheckMessage]:
    """E003: MLX_SERVING["FLAGS"] names a flag that does not exist. W002: a flag's variable is not a truth value."""
    config = _settings()
    found: list[checks.CheckMessage] = [
        checks.Error(
            f"MLX_SERVING['FLAGS'] names an unknown flag: {name}",
            hint=f"The flags are: {', '.join(FLAGS)}.",
            id="mlx_serving.E003",
        )
        for name in sorted(set(config.FLAGS if config else ()) - set(FLAGS))
    ]
    found += [
        checks.Warning(
            f"The environment variable {flag.env} is neither true nor false, so it is ignored: {text!r}",
            hint="Use 1 or 0.",
            id="mlx_serving.W002",
        )
        for flag in FLAGS.values()
        if (text := os.environ.get(flag.env, "").strip()) and parse_bool(text) is None
    ]
    return found


def check_runtime_dir(**_: Any) -> list[checks.CheckMessage]:
    """E004: the folder of the worker sockets cannot be used."""
    config = _settings()
    if config is None or not config.RUNTIME_DIR or not (problem := runtime_dir.problem(Path(config.RUNTIME_DIR))):
        return []
    return [
        checks.Error(
            f"MLX_SERVING['RUNTIME_DIR']: {problem}.",
            hint="It holds the sockets of the workers: a short path, of this user, that nobody else can enter.",
            id="mlx_serving.E004",
        )
    ]


def check_apps(**_: Any) -> list[checks.CheckMessage]:
    """W003: Channels is not installed. W004: daphne is missing or comes too late. W005: no ASGI application."""
    apps = [name.removesuffix(".apps.DaphneConfig") for name in django_settings.INSTALLED_APPS]
    found: list[checks.CheckMessage] = []
    if "channels" not in apps:
        found.append(
            checks.Warning(
                "“channels” is not in INSTALLED_APPS.",
                hint="Add it: streaming over WebSocket is built on it.",
                id="mlx_serving.W003",
            )
        )
    if "daphne" not in apps:
        found.append(
            checks.Warning(
                "“daphne” is not in INSTALLED_APPS, so “manage.py runserver” speaks no WebSocket.",
                hint="Put it first. A site that never uses runserver may silence this check.",
                id="mlx_serving.W004",
            )
        )
    elif _comes_after(apps, "daphne", "django.contrib.staticfiles"):
        found.append(
            checks.Warning(
                "“daphne” comes after “django.contrib.staticfiles”, whose “runserver” then wins.",
                hint="Put “daphne” first in INSTALLED_APPS.",
                id="mlx_serving.W004",
            )
        )
    if not getattr(django_settings, "ASGI_APPLICATION", None):
        found.append(
            checks.Warning(
                "ASGI_APPLICATION is not set.",
                hint="Set it to your ASGI application, such as “mysite.asgi.application”.",
                id="mlx_serving.W005",
            )
        )
    return found


def _comes_after(apps: Sequence[str], one: str, other: str) -> bool:
    return other in apps and apps.index(one) > apps.index(other)


def check_urls(**_: Any) -> list[checks.CheckMessage]:
    """W006: the app's URLs are not included."""
    if not getattr(django_settings, "ROOT_URLCONF", None) or _includes_app(get_resolver()):
        return []
    return [
        checks.Warning(
            "The URLs of mlx_serving are not included, so it answers nothing.",
            hint='Add path("", include("mlx_serving.urls")) to your URLs.',
            id="mlx_serving.W006",
        )
    ]


def _includes_app(resolver: URLResolver) -> bool:
    if getattr(resolver.urlconf_name, "__name__", resolver.urlconf_name) == "mlx_serving.urls":
        return True
    return any(_includes_app(item) for item in resolver.url_patterns if isinstance(item, URLResolver))


def check_open_site(**_: Any) -> list[checks.CheckMessage]:
    """W007: everybody who reaches this site may use its models."""
    config = _settings()
    wide_open = not django_settings.DEBUG and "*" in django_settings.ALLOWED_HOSTS
    if config is None or not (config.ALLOW_ANONYMOUS and wide_open):
        return []
    return [
        checks.Warning(
            "MLX_SERVING['ALLOW_ANONYMOUS'] is on and ALLOWED_HOSTS has “*”: who reaches this site uses its models.",
            hint="Name the hosts, or leave ALLOW_ANONYMOUS off.",
            id="mlx_serving.W007",
        )
    ]


def database_problems(databases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the aliases of SQLite databases whose writers fail instead of waiting for each other."""
    return [
        alias
        for alias, database in databases.items()
        if database.get("ENGINE") == "django.db.backends.sqlite3"
        and database.get("OPTIONS", {}).get("transaction_mode", "DEFERRED") == "DEFERRED"
    ]


def check_database(**_: Any) -> list[checks.CheckMessage]:
    """W008: with SQLite's default transactions, the web server and `runworkers` can lock each other out."""
    return [
        checks.Warning(
            f"DATABASES[{alias!r}] is SQLite with deferred transactions: web server and workers both write to it, and "
            "may fail with “database is locked”.",
            hint='Set OPTIONS to {"transaction_mode": "IMMEDIATE", "timeout": 20}.',
            id="mlx_serving.W008",
        )
        for alias in database_problems(django_settings.DATABASES)
    ]


CHECKS: Mapping[Callable[..., list[checks.CheckMessage]], str] = {
    check_settings: "mlx_serving",
    check_ranges: "mlx_serving",
    check_flags: "mlx_serving",
    check_runtime_dir: "mlx_serving",
    check_apps: "mlx_serving",
    check_urls: checks.Tags.urls,
    check_open_site: checks.Tags.security,
}

DEPLOY_CHECKS: Mapping[Callable[..., list[checks.CheckMessage]], str] = {check_database: "mlx_serving"}
"""Run by `manage.py check --deploy` alone."""


def register_all() -> None:
    """Register the checks; called once, when the app is ready."""
    for check, tag in CHECKS.items():
        checks.register(check, tag)
    for check, tag in DEPLOY_CHECKS.items():
        checks.register(check, tag, deploy=True)
