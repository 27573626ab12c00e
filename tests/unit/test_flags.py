"""The feature flags: which value wins, and when a process learns of a change."""

import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import InterfaceError, OperationalError, connections

from mlx_serving import flags
from mlx_serving.models import FeatureFlag

FLAG = flags.Flag("connection_pool", "MLX_CONNECTION_POOL_ENABLED", True, "")


@pytest.fixture(autouse=True)
def fresh_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "_snapshot", flags._Snapshot())
    for flag in flags.FLAGS.values():
        monkeypatch.delenv(flag.env, raising=False)


@pytest.mark.parametrize(
    ("environ", "database", "site", "expected"),
    [
        ({}, {}, {}, (True, "default")),
        ({}, {}, {"connection_pool": False}, (False, "settings")),
        ({}, {"connection_pool": True}, {"connection_pool": False}, (True, "database")),
        ({}, {"connection_pool": None}, {"connection_pool": False}, (False, "settings")),
        ({FLAG.env: "0"}, {"connection_pool": True}, {"connection_pool": True}, (False, "environment")),
        ({FLAG.env: "nonsense"}, {"connection_pool": False}, {}, (False, "database")),
        ({FLAG.env: ""}, {}, {}, (True, "default")),
    ],
)
def test_the_first_that_is_set_counts(
    environ: dict[str, str], database: dict[str, bool | None], site: dict[str, bool], expected: tuple[bool, str]
) -> None:
    value = flags.resolve_one(FLAG, environ, database, site)
    assert (value.enabled, value.source) == expected


@pytest.mark.parametrize("text", ["1", "true", "YES", " on "])
def test_words_for_true(text: str) -> None:
    assert flags.parse_bool(text) is True


@pytest.mark.parametrize("text", ["0", "false", "No", " off "])
def test_words_for_false(text: str) -> None:
    assert flags.parse_bool(text) is False


def test_the_kill_switch_turns_everything_else_off() -> None:
    values = flags.resolve({FLAG.env: "1"}, {"kill_switch": True}, {})
    assert values["kill_switch"].enabled
    others = {name: value for name, value in values.items() if name != "kill_switch"}
    assert others
    assert {(value.enabled, value.source) for value in others.values()} == {(False, "kill switch")}


def test_every_flag_has_a_variable_of_its_own_and_says_what_off_means() -> None:
    assert len({flag.env for flag in flags.FLAGS.values()}) == len(flags.FLAGS)
    assert all(flag.off_means for flag in flags.FLAGS.values())


def test_an_unknown_flag_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        flags.enabled("no_such_flag")


def test_before_the_first_read_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FLAG.env, "0")
    assert not flags.enabled("connection_pool")


@pytest.mark.django_db
def test_a_row_in_the_database_takes_effect() -> None:
    FeatureFlag.objects.create(name="connection_pool", enabled=False)
    flags.refresh()
    assert not flags.enabled("connection_pool")


@pytest.mark.django_db
def test_a_fresh_snapshot_asks_nobody(django_assert_num_queries: Any) -> None:
    flags.refresh()
    with django_assert_num_queries(0):
        flags.refresh()
        flags.enabled("connection_pool")


@pytest.mark.django_db
def test_an_old_snapshot_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    flags.refresh()
    FeatureFlag.objects.create(name="connection_pool", enabled=False)
    assert flags.enabled("connection_pool")
    flags._snapshot.read_at -= flags.MAX_AGE_S
    flags.refresh()
    assert not flags.enabled("connection_pool")


@pytest.fixture
async def async_database(transactional_db: None) -> AsyncIterator[None]:
    """A database for asynchronous code, whose thread keeps its connection open until it is told to close it."""
    yield
    await sync_to_async(connections.close_all)()


async def test_asynchronous_code_reads_it_too(async_database: None) -> None:
    await FeatureFlag.objects.acreate(name="connection_pool", enabled=False)
    await flags.arefresh()
    assert not flags.enabled("connection_pool")


@pytest.mark.django_db
@pytest.mark.parametrize("error", [OperationalError, InterfaceError])
def test_the_last_known_values_stay_while_the_database_is_down(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    FeatureFlag.objects.create(name="connection_pool", enabled=False)
    flags.refresh()

    def fail(*_: Any) -> Any:
        raise error("down")

    monkeypatch.setattr(FeatureFlag.objects, "values_list", fail)
    with caplog.at_level(logging.WARNING):
        flags.refresh(force=True)
    assert not flags.enabled("connection_pool")
    assert "last known values" in caplog.text
