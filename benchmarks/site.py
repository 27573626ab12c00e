"""The product under test: a private copy of the demo site with a worker, and what CPU its processes use."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from .interference import cpu_s_of

ROOT = Path(__file__).resolve().parent.parent
MODEL = "bench"
LISTEN_BACKLOG = 2048
READY_TIMEOUT_S = 180.0
STOP_WAIT_S = 20.0
_OURS = ("DJANGO_SETTINGS_MODULE", "DATABASE_URL", "REDIS_URL", "ALLOWED_HOSTS", "DEBUG", "SECRET_KEY")


class SiteError(Exception):
    """The site does not start; the message holds the end of its output."""


@dataclass(frozen=True, slots=True)
class Site:
    """A running site.

    Attributes:
        url: where it listens, `http://host:port`.
        web: the web server's process.
        workers: the process of `manage.py runworkers`.
    """

    url: str
    web: psutil.Process
    workers: psutil.Process

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds that each part has used so far: web, supervisor, worker."""
        worker = sum(cpu_s_of(child) for child in self.workers.children(recursive=True))
        return {"web": cpu_s_of(self.web), "supervisor": cpu_s_of(self.workers), "worker": worker}


def web_command(server: str, port: int) -> list[str]:
    """Return the command that serves the demo site with daphne or uvicorn."""
    if server == "daphne":
        return [
            "-m",
            "daphne",
            "-e",
            f"tcp:port={port}:interface=127.0.0.1:backlog={LISTEN_BACKLOG}",
            "project.asgi:application",
        ]
    where = ["--host", "127.0.0.1", "--port", str(port), "--backlog", str(LISTEN_BACKLOG)]
    return ["-m", "uvicorn", "project.asgi:application", *where, "--no-access-log", "--log-level", "warning"]


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_ready(port: int) -> bool:
    """Return whether the site says that a model can answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def running(server: str, source: str, rows: int, prefill_tokens_per_step: int) -> Iterator[Site]:
    """Run a site on folders and a port of its own for the length of a block.

    Args:
        server: "daphne" or "uvicorn".
        source: the model's source.
        rows: sequences that the worker decodes together.
        prefill_tokens_per_step: 0 leaves the worker's default.

    Raises:
        SiteError: it does not start.
    """
    # The name is short because the path of a unix socket may not be long.
    folder = Path(tempfile.mkdtemp(prefix="mlxb-"))
    environ = {name: value for name, value in os.environ.items() if name not in _OURS}
    environ |= {
        "VAR_DIR": str(folder / "var"),
        "MLX_SERVING_RUNTIME_DIR": str(folder / "run"),
        "MLX_SERVING_MAX_ROWS": str(rows),
        "MLX_SERVING_DEFAULT_MODEL": MODEL,
        "PYTHONUNBUFFERED": "1",
    }
    if prefill_tokens_per_step:
        environ["MLX_SERVING_PREFILL_TOKENS_PER_STEP"] = str(prefill_tokens_per_step)
    port = free_port()
    try:
        _manage(environ, "migrate", "--verbosity", "0")
        code = (
            "from mlx_serving.models import ServedModel; "
            f"ServedModel.objects.create(name={MODEL!r}, source={source!r}, dtype='float32')"
        )
        _manage(environ, "shell", "--no-imports", "--command", code)
        with (
            _child(["manage.py", "runworkers"], environ, folder / "workers.log") as workers,
            _child(web_command(server, port), environ, folder / "web.log") as web,
        ):
            deadline = time.monotonic() + READY_TIMEOUT_S
            while not is_ready(port):
                if workers.poll() is not None or web.poll() is not None or time.monotonic() > deadline:
                    ends = [(folder / name).read_text(errors="replace")[-2000:] for name in ("workers.log", "web.log")]
                    raise SiteError("the site did not become ready:\n" + "\n".join(ends))
                time.sleep(0.1)
            yield Site(f"http://127.0.0.1:{port}", psutil.Process(web.pid), psutil.Process(workers.pid))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _manage(environ: dict[str, str], *arguments: str) -> None:
    command = [sys.executable, "manage.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SiteError(f"manage.py {arguments[0]} failed:\n{done.stdout}{done.stderr}")


@contextlib.contextmanager
def _child(command: Sequence[str], environ: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Python program that ends with the block, and with this process in any case (`project.tether`)."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "project.tether", *command],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_WAIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert process.stdin is not None
        process.stdin.close()
