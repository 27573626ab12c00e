"""The supervisor on PostgreSQL: the same life as on SQLite, and an outage as a server has them."""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from psycopg.rows import dict_row

from tests.system.deployments import TINY_MODEL, Deployment, deploy, wait_for


class Postgres:
    """A database of a test's own."""

    def __init__(self, server_url: str) -> None:
        self.server_url = server_url
        self.name = f"mlx_test_{secrets.token_hex(6)}"
        self.url = urlunsplit(urlsplit(server_url)._replace(path=f"/{self.name}"))

    def on_server(self, statement: str) -> None:
        with psycopg.connect(self.server_url, autocommit=True) as connection:
            connection.execute(statement.encode())

    def rows(self, query: str) -> list[dict[str, Any]]:
        with psycopg.connect(self.url, row_factory=dict_row) as connection:
            return connection.execute(query.encode()).fetchall()

    def ready_worker(self) -> dict[str, Any] | None:
        found = self.rows("SELECT * FROM mlx_serving_worker WHERE state = 'ready'")
        return found[0] if found else None

    def refuse(self) -> None:
        """End every connection and take no new one."""
        self.on_server(f"ALTER DATABASE {self.name} WITH ALLOW_CONNECTIONS false")
        self.on_server(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{self.name}'")

    def accept(self) -> None:
        self.on_server(f"ALTER DATABASE {self.name} WITH ALLOW_CONNECTIONS true")


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[Postgres]:
    database = Postgres(postgres_url)
    database.on_server(f"CREATE DATABASE {database.name}")
    yield database
    database.on_server(f"DROP DATABASE {database.name} WITH (FORCE)")


@pytest.fixture
def postgres_deployment(tmp_path: Path, postgres: Postgres) -> Iterator[Deployment]:
    with deploy(tmp_path / "site", DATABASE_URL=postgres.url) as made:
        yield made


def test_workers_outlive_an_outage_of_postgresql(
    postgres_deployment: Deployment, postgres: Postgres, tiny_model: Path
) -> None:
    program = postgres_deployment.supervise("--add", str(tiny_model), "--name", TINY_MODEL)
    before = postgres_deployment.wait_for(postgres.ready_worker, "a ready worker")
    postgres.refuse()
    wait_for(lambda: "the database does not answer" in program.output(), "the outage to be logged")
    postgres.accept()

    def seen_again() -> dict[str, Any] | None:
        row = postgres.ready_worker()
        return row if row and row["heartbeat_at"] > before["heartbeat_at"] else None

    after = postgres_deployment.wait_for(seen_again, "heartbeats after the outage")
    assert (after["id"], after["pid"]) == (before["id"], before["pid"])
    program.process.terminate()
    assert program.wait() == 0
    assert [row["state"] for row in postgres.rows("SELECT state FROM mlx_serving_worker")] == ["stopped"]
