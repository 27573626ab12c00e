"""The demo site's own decisions: its settings, and what the demo tells its user."""

from __future__ import annotations

import json
import shlex
import stat
from pathlib import Path

import pytest

from project.demo import blas_hint, curl_line, daphne
from project.settings import database, secret_key


def test_the_secret_key_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "secret_key"
    key = secret_key(path)
    assert len(key) >= 50
    assert secret_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_database_url_names_every_part() -> None:
    settings = database("postgres://me:p%40ss@db.example:5433/my%20site?sslmode=require")
    assert settings == {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": "my site",
        "USER": "me",
        "PASSWORD": "p@ss",
        "HOST": "db.example",
        "PORT": "5433",
        "OPTIONS": {"sslmode": "require"},
    }


def test_another_database_is_refused() -> None:
    with pytest.raises(ValueError, match="mysql"):
        database("mysql://localhost/site")


def test_without_a_url_writers_on_sqlite_wait_for_each_other() -> None:
    assert database("")["OPTIONS"]["transaction_mode"] == "IMMEDIATE"


def test_the_curl_line_is_one_command_with_a_valid_body() -> None:
    command = shlex.split(curl_line("http://127.0.0.1:8000"))
    assert command[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(command[command.index("-d") + 1])["messages"][0]["role"] == "user"


def test_an_ipv6_address_is_quoted_for_daphne() -> None:
    assert any(r"interface=\:\:1:" in part for part in daphne("::1", 8000))


@pytest.mark.parametrize(
    ("blas", "hinted"),
    [
        ("OpenBLAS (Zen, /usr/lib/libopenblas.so.0)", False),
        ("reference BLAS (slow: install OpenBLAS, Debian package libopenblas0-pthread)", True),
        ("", False),
    ],
)
def test_only_a_slow_blas_is_mentioned(blas: str, hinted: bool) -> None:
    assert bool(blas_hint(blas)) is hinted
