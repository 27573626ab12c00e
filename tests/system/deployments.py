"""A site as real processes: its folder, its supervisor with real workers, its web server."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from tests.support import ROOT, free_port

DEMO_MODEL = "mlx-serving-demo"
TINY_MODEL = "tiny"

PATIENCE_S = 120.0
"""How long anything may take before a test gives up. Not an expectation: the machine may be very busy."""

POLL_S = 0.05

T = TypeVar("T")


def wait_for(
    look: Callable[[], T | None], what: str, *, timeout_s: float = PATIENCE_S, details: Callable[[], str] = str
) -> T:
    """Call `look` until it returns something true, and return that; fail with the details after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s:g} s in vain for {what}\n{details()}")
        time.sleep(POLL_S)
    return found


def is_running(pid: int) -> bool:
    """Return whether a process runs. One that has ended and that nobody has reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Program:
    """A child process whose output is kept in a file."""

    def __init__(self, arguments: Sequence[str], environ: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for the end and return the exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"process {self.pid} did not end within {timeout_s:g} s\n{self.output()}")

    def stop(self) -> None:
        """End the process and everything in its group."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@dataclass
class Deployment:
    """A site's folder: database, sockets and logs, and the environment that points there."""

    folder: Path
    environ: dict[str, str]
    programs: list[Program] = field(default_factory=list)

    # --- processes ---------------------------------------------------------------------------------------------------

    def manage(self, *arguments: str, check: bool = True, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run `manage.py` to its end."""
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=ROOT,
            env={**self.environ, **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def start(self, name: str, *arguments: str, **environ: str) -> Program:
        """Start a Python program; it is stopped when the deployment ends."""
        program = Program(arguments, {**self.environ, **environ}, self.folder / f"{name}.log")
        self.programs.append(program)
        return program

    def supervise(self, *arguments: str, **environ: str) -> Program:
        """Start `manage.py runworkers`."""
        return self.start("runworkers", "manage.py", "runworkers", *arguments, **environ)

    def close(self) -> None:
        for program in reversed(self.programs):
            program.stop()

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-6000:]}" for path in self.folder.glob("*.log")
        )

    # --- database ----------------------------------------------------------------------------------------------------

    def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """Return what a query finds, straight from the database."""
        with closing(self._connect()) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(query, values)]

    def execute(self, statement: str, *values: Any) -> None:
        """Change the database, as the admin would."""
        with closing(self._connect()) as connection, connection:
            connection.execute(statement, values)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.folder / "db.sqlite3", timeout=20)

    def add_model(self, name: str, source: str | Path) -> None:
        """Add a model that is to be loaded."""
        self.execute(
            "INSERT INTO mlx_serving_servedmodel"
            " (name, source, revision, wanted, dtype, reload_token, created_at, updated_at)"
            " VALUES (?, ?, '', 1, 'auto', 0, datetime('now'), datetime('now'))",
            name,
            str(source),
        )

    def update_model(self, name: str, **values: Any) -> None:
        """Change columns of a model."""
        assignments = ", ".join(f"{column} = ?" for column in values)
        self.execute(f"UPDATE mlx_serving_servedmodel SET {assignments} WHERE name = ?", *values.values(), name)

    def workers(self, *states: str, model: str | None = None) -> list[dict[str, Any]]:
        """Return the workers in these states, the oldest first; without states, all."""
        found = self.rows(
            "SELECT w.*, m.name AS model FROM mlx_serving_worker w"
            " JOIN mlx_serving_servedmodel m ON m.id = w.model_id ORDER BY w.started_at"
        )
        return [row for row in found if (not states or row["state"] in states) and model in (None, row["model"])]

    def wait_for(self, look: Callable[[], T | None], what: str, *, timeout_s: float = PATIENCE_S) -> T:
        """As the function of this name; a failure shows the logs."""
        return wait_for(look, what, timeout_s=timeout_s, details=self.logs)

    def wait_for_worker(self, *states: str, without: Sequence[str] = (), model: str | None = None) -> dict[str, Any]:
        """Wait for a worker in one of these states whose id is not in `without`, and return its row."""

        def look() -> dict[str, Any] | None:
            found = [row for row in self.workers(*states, model=model) if row["id"] not in without]
            return found[-1] if found else None

        return self.wait_for(look, f"a worker that is {' or '.join(states)}")


@contextmanager
def deploy(folder: Path, database: Path | None = None, **environ: str) -> Iterator[Deployment]:
    """Make a site's folder; stop at the end what was started in it.

    `database` is a migrated one to copy, because migrating takes seconds; without it the new one is migrated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Under /tmp, because the path of a socket may have 103 bytes only.
    runtime_dir = tempfile.mkdtemp(prefix="mlx-", dir="/tmp")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MLX_")}
    deployment = Deployment(
        folder,
        {
            **inherited,
            "DJANGO_SETTINGS_MODULE": "project.settings",
            "VAR_DIR": str(folder),
            "DATABASE_URL": "",
            "REDIS_URL": "",
            "PYTHONUNBUFFERED": "1",
            "MLX_SERVING_RUNTIME_DIR": runtime_dir,
            "MLX_SERVING_HEARTBEAT_S": "0.2",
            "MLX_SERVING_RESTART_BACKOFF_S": "0.2",
            "MLX_SERVING_RESTART_BACKOFF_MAX_S": "1",
            **environ,
        },
    )
    try:
        if database is None:
            deployment.manage("migrate", "--verbosity", "0")
        else:
            shutil.copy(database, folder / "db.sqlite3")
        yield deployment
    finally:
        deployment.close()
        shutil.rmtree(runtime_dir, ignore_errors=True)


@dataclass
class Site:
    """A web server with workers behind it."""

    base_url: str
    model: str
    deployment: Deployment
    server: Program
    supervisor: Program


def server_command(kind: str, port: int) -> list[str]:
    if kind == "uvicorn":
        return ["-m", "uvicorn", "project.asgi:application", "--host", "127.0.0.1", "--port", str(port)]
    endpoint = f"tcp:port={port}:interface=127.0.0.1:backlog=2048"
    return ["-m", "daphne", "-e", endpoint, "project.asgi:application"]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.HTTPError):
        return False


@contextmanager
def serve(deployment: Deployment, kind: str, **environ: str) -> Iterator[tuple[str, Program]]:
    """Run a web server for a deployment; yields its address once `/ready` says yes."""
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    server = deployment.start(kind, *server_command(kind, port), **environ)
    deployment.wait_for(lambda: answers(f"{base_url}/ready"), f"{kind} to be ready")
    try:
        yield base_url, server
    finally:
        server.stop()
