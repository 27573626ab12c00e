"""The system checks: each fault is found, named and explained, and a sound site is quiet."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.core.checks import CheckMessage, run_checks
from django.core.checks.registry import registry

from mlx_serving import checks, flags
from mlx_serving.conf import Settings

Check = Callable[..., list[CheckMessage]]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, settings: Any, runtime_dir: Path) -> None:
    for name in list(os.environ):
        if name.startswith("MLX_"):
            monkeypatch.delenv(name)
    settings.MLX_SERVING = {"RUNTIME_DIR": str(runtime_dir)}


def ids(check: Check) -> list[str]:
    messages = check()
    assert all(message.hint for message in messages), "every message says what to do"
    return [str(message.id).removeprefix("mlx_serving.") for message in messages]


@pytest.mark.parametrize("check", [*checks.CHECKS, *checks.DEPLOY_CHECKS], ids=lambda check: check.__name__)
def test_a_sound_site_is_quiet(check: Check) -> None:
    assert ids(check) == []


def test_the_checks_are_registered() -> None:
    assert [message for message in run_checks() if str(message.id).startswith("mlx_serving.")] == []
    assert {check.__name__ for check in registry.registered_checks} >= {check.__name__ for check in checks.CHECKS}


def test_every_id_is_described_by_one_check() -> None:
    described = [
        word.rstrip(":")
        for check in (*checks.CHECKS, *checks.DEPLOY_CHECKS)
        for word in (check.__doc__ or "").split()
        if word.rstrip(":")[1:].isdigit() and word[0] in "EW"
    ]
    assert sorted(set(described)) == sorted(described)
    assert described


@pytest.mark.parametrize(
    "values", [{"MAX_ROW": 1}, {"MAX_ROWS": "four"}, {"ALLOW_ANONYMOUS": "yes"}, {"FLAGS": {"connection_pool": "no"}}]
)
def test_settings_that_cannot_be_built(settings: Any, values: dict[str, Any]) -> None:
    settings.MLX_SERVING = values
    assert ids(checks.check_settings) == ["E001"]
    assert str(next(iter(values))) in checks.check_settings()[0].msg


def test_settings_that_cannot_be_built_do_not_break_the_other_checks(settings: Any) -> None:
    settings.MLX_SERVING = {"MAX_ROW": 1}
    assert [ids(check) for check in checks.CHECKS if check is not checks.check_settings] == [[]] * (
        len(checks.CHECKS) - 1
    )


def test_an_environment_variable_with_a_bad_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_SERVING_MAX_ROWS", "four")
    assert ids(checks.check_settings) == ["E001"]


def test_an_environment_variable_that_nothing_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_SERVING_MAX_ROW", "4")
    assert ids(checks.check_settings) == ["W001"]
    assert "MLX_SERVING_MAX_ROW " in checks.check_settings()[0].msg


@pytest.mark.parametrize("name", [*checks._POSITIVE, *checks._NOT_NEGATIVE])
def test_a_negative_number(settings: Any, name: str) -> None:
    settings.MLX_SERVING = {name: -1}
    assert "E002" in ids(checks.check_ranges)
    assert name in checks.check_ranges()[0].msg


@pytest.mark.parametrize("name", checks._POSITIVE)
def test_zero_where_it_means_nothing(settings: Any, name: str) -> None:
    settings.MLX_SERVING = {name: 0}
    assert ids(checks.check_ranges) == ["E002"]


@pytest.mark.parametrize("name", checks._NOT_NEGATIVE)
def test_zero_where_it_has_a_meaning(settings: Any, name: str) -> None:
    settings.MLX_SERVING = {name: 0}
    assert ids(checks.check_ranges) == []


@pytest.mark.parametrize(
    "values", [{"HOST": ""}, {"RUNTIME_DIR": ""}, {"HEARTBEAT_S": 60.0}, {"RESTART_BACKOFF_MAX_S": 0.5}], ids=str
)
def test_other_values_out_of_range(settings: Any, values: dict[str, Any]) -> None:
    settings.MLX_SERVING = values
    assert ids(checks.check_ranges) == ["E002"]


def test_every_number_among_the_settings_has_a_range() -> None:
    numbers = {name for name in Settings.__dataclass_fields__ if type(getattr(Settings(), name)) in {int, float}}
    assert numbers - {"RESTART_BACKOFF_MAX_S"} == {*checks._POSITIVE, *checks._NOT_NEGATIVE}


def test_an_empty_default_model_is_fine(settings: Any) -> None:
    settings.MLX_SERVING = {"DEFAULT_MODEL": ""}
    assert ids(checks.check_ranges) == []


def test_an_unknown_flag(settings: Any) -> None:
    settings.MLX_SERVING = {"FLAGS": {"warp_drive": True}}
    assert ids(checks.check_flags) == ["E003"]


def test_a_flags_variable_that_is_no_truth_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(flags.FLAGS["kill_switch"].env, "maybe")
    assert ids(checks.check_flags) == ["W002"]


def test_a_runtime_dir_that_others_can_enter(runtime_dir: Path) -> None:
    runtime_dir.chmod(0o750)
    assert ids(checks.check_runtime_dir) == ["E004"]


def test_a_runtime_dir_whose_sockets_would_have_too_long_names(settings: Any) -> None:
    settings.MLX_SERVING = {"RUNTIME_DIR": "/tmp/" + "x" * 82}
    assert ids(checks.check_runtime_dir) == ["E004"]
    settings.MLX_SERVING = {"RUNTIME_DIR": "/tmp/" + "x" * 81}
    assert ids(checks.check_runtime_dir) == []


def test_a_runtime_dir_that_is_a_link(settings: Any, runtime_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "l").symlink_to(runtime_dir)
    settings.MLX_SERVING = {"RUNTIME_DIR": str(tmp_path / "l")}
    assert ids(checks.check_runtime_dir) == ["E004"]


def test_a_relative_runtime_dir(settings: Any) -> None:
    settings.MLX_SERVING = {"RUNTIME_DIR": "run"}
    assert ids(checks.check_runtime_dir) == ["E004"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Change INSTALLED_APPS for the check alone: for all of Django, the apps would be loaded anew."""

    def install(names: list[str]) -> None:
        fake = SimpleNamespace(INSTALLED_APPS=names, ASGI_APPLICATION="mysite.asgi.application")
        monkeypatch.setattr(checks, "django_settings", fake)

    return install


def test_missing_channels(installed: Callable[[list[str]], None]) -> None:
    installed(["daphne", "django.contrib.staticfiles"])
    assert ids(checks.check_apps) == ["W003"]


def test_missing_daphne(installed: Callable[[list[str]], None]) -> None:
    installed(["channels", "django.contrib.staticfiles"])
    assert ids(checks.check_apps) == ["W004"]


def test_daphne_after_staticfiles(installed: Callable[[list[str]], None]) -> None:
    installed(["channels", "django.contrib.staticfiles", "daphne"])
    assert ids(checks.check_apps) == ["W004"]


def test_no_asgi_application(settings: Any) -> None:
    settings.ASGI_APPLICATION = None
    assert ids(checks.check_apps) == ["W005"]


def test_urls_that_are_not_included(settings: Any) -> None:
    settings.ROOT_URLCONF = "django.contrib.auth.urls"
    assert ids(checks.check_urls) == ["W006"]


def test_a_site_that_is_open_to_everybody(settings: Any) -> None:
    settings.MLX_SERVING = {"ALLOW_ANONYMOUS": True}
    settings.ALLOWED_HOSTS = ["*"]
    settings.DEBUG = False
    assert ids(checks.check_open_site) == ["W007"]
    settings.DEBUG = True
    assert ids(checks.check_open_site) == []


def test_sqlite_whose_writers_do_not_wait_for_each_other() -> None:
    engine = "django.db.backends.sqlite3"
    immediate = {"ENGINE": engine, "OPTIONS": {"transaction_mode": "IMMEDIATE"}}
    databases = {"default": {"ENGINE": engine}, "good": immediate, "other": {"ENGINE": "django.db.backends.postgresql"}}
    assert checks.database_problems(databases) == ["default"]
