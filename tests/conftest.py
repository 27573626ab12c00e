"""Fixtures for every folder of tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from django.db import connections

from tests.support import Demo, free_port, running_demo

NO_SKIP = "TESTS_NO_SKIP"
"""Set where everything that tests need is there, so that a skip means a mistake."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get(NO_SKIP):
        report.outcome = "failed"
        report.longrepr = f"skipped although {NO_SKIP} is set: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def django_db_modify_db_settings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the test database in a file: in memory its threads share locks that no time-out waits for."""
    settings = connections["default"].settings_dict
    if settings["ENGINE"].endswith("sqlite3"):
        settings["TEST"]["NAME"] = str(tmp_path_factory.mktemp("database") / "test.sqlite3")


@pytest.fixture(scope="session")
def redis_url() -> str:
    """The address of a Redis database that tests may empty."""
    url = os.environ.get("REDIS_TEST_URL", "redis://127.0.0.1:6379/15")
    try:
        with redis.Redis.from_url(url, socket_connect_timeout=1) as client:
            client.ping()
    except redis.RedisError as error:
        pytest.skip(f"no Redis at {url}: {error}")
    return url


@pytest.fixture(scope="session")
def postgres_url() -> str:
    """The address of a PostgreSQL database whose user may create others."""
    psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")
    url = os.environ.get("POSTGRES_TEST_URL", "postgres://postgres@127.0.0.1:5432/postgres")
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError as error:
        pytest.skip(f"no PostgreSQL at {url}: {error}")
    return url


@pytest.fixture(scope="session")
def session_runtime_dir() -> Iterator[Path]:
    """A private folder for worker sockets, with a path short enough for them."""
    path = Path(tempfile.mkdtemp(prefix="mlx-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """The same, for one test."""
    path = Path(tempfile.mkdtemp(prefix="mlx-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def port() -> int:
    """A TCP port that nothing listens on."""
    return free_port()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, session_runtime_dir: Path) -> Iterator[Demo]:
    """The demo site with a real worker, shared by the tests that only talk to it."""
    with running_demo(tmp_path_factory.mktemp("demo"), session_runtime_dir) as site:
        yield site


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium that has its driver beside it."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("Chromium and chromedriver are not installed")
    version = subprocess.run([browser, "--version"], capture_output=True, check=False, text=True)
    assert version.returncode == 0, version.stderr
    return browser
