"""The demo, `make demo`: a site on this machine that serves the model which ships with the package.

    python -m project.demo [--host 127.0.0.1] [--port 8000]

Prepares the database, makes an admin login for this run, starts `manage.py runworkers` and daphne, waits until the
model answers, says where everything is and then stands by. SIGINT and SIGTERM stop both children; so does the end of
this process in any other way (`project.tether`). It belongs to the demo site and not to the app, because it gives the
user `admin` a new password at each start.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import http.client
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING

import django
from django.conf import settings

if TYPE_CHECKING:
    from mlx_serving.models import Worker

MODEL = "mlx-serving-demo"
ADMIN = "admin"
PROMPT = "What is 17 + 25?"
WILDCARDS = {"0.0.0.0", "::"}  # noqa: S104 - names them in order to warn

LISTEN_BACKLOG = 2048
"""Connections that may wait to be accepted: with daphne's own 50, a hundred clients at once wait for a second."""
LOCK_WAIT_S = 15.0
"""How long a demo that was killed may take to end: its children notice at once, but may have requests to finish."""
STOP_WAIT_S = 20.0
"""How long a child may take to stop before it is killed."""
POLL_S = 0.2
MOST_FAILURES = 3
"""Failed workers after which the demo gives up: the supervisor would go on for ever, and what one says stays true."""
LAST_LINES = 40


class DemoError(Exception):
    """The demo cannot start or go on; the message is all that its user needs."""


class Stopped(Exception):
    """A signal asked the demo to stop."""


@dataclass(frozen=True, slots=True)
class Child:
    """A process of the demo, and the file that holds its output."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def require_alive(self) -> None:
        """Check that the process runs.

        Raises:
            DemoError: it has ended; the message holds the end of its output.
        """
        if (code := self.process.poll()) is not None:
            how = f"exit status {code}" if code >= 0 else f"signal {-code}"
            raise DemoError(f"{self.name} ended early ({how}). The end of its output:\n\n{last_lines(self.log)}")

    def stop(self) -> None:
        """Ask the process to end, and end it when it does not."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_WAIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def last_lines(path: Path) -> str:
    """Return the last lines of a text file."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-LAST_LINES:])


def say(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


@contextlib.contextmanager
def only_demo(path: Path) -> Iterator[IO[str]]:
    """Hold the lock of this folder's demo; the children inherit it, so that it is free when all have ended.

    Raises:
        DemoError: another demo runs in this folder.
    """
    with path.open("a+") as file:
        deadline = time.monotonic() + LOCK_WAIT_S
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DemoError("Another demo runs from this folder; stop that one first.") from None
            if not waiting:
                say("Another demo runs from this folder; waiting for it to end ...")
                waiting = True
            time.sleep(POLL_S)
        yield file


def require_free(host: str, port: int) -> None:
    """Check that a server can listen on this address.

    Raises:
        DemoError: it cannot; the message says why and what to do.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"Port {port} of {host} is in use. Choose another: make demo PORT={port + 1}"
        else:
            message = f"Cannot listen on {host}, port {port}: {error.strerror}"
        raise DemoError(message) from None


def prepare() -> str:
    """Bring the database up to date, add the demo's model and login, and return the login's password."""
    from django.contrib.auth import get_user_model  # needs the apps that `main` loads
    from django.core.management import call_command

    from mlx_serving.models import ServedModel

    call_command("migrate", verbosity=0, interactive=False)
    ServedModel.objects.update_or_create(name=MODEL, defaults={"source": "demo", "wanted": True})
    password = secrets.token_urlsafe(9)
    user, _ = get_user_model().objects.get_or_create(username=ADMIN)
    user.is_active = user.is_staff = user.is_superuser = True
    user.set_password(password)
    user.save()
    return password


def start(name: str, command: Sequence[str], log: Path, lock: IO[str], environ: dict[str, str]) -> Child:
    """Start a child in a session of its own, so that Ctrl-C reaches this process alone, which stops it in order."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "project.tether", *command],
            cwd=settings.BASE_DIR,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )
    return Child(name, process, log)


def daphne(host: str, port: int) -> list[str]:
    """Return the command that serves the site."""
    interface = host.replace(":", r"\:")
    return [
        "-m",
        "daphne",
        "-e",
        f"tcp:port={port}:interface={interface}:backlog={LISTEN_BACKLOG}",
        "project.asgi:application",
    ]


def is_ready(host: str, port: int) -> bool:
    """Return whether the site answers that a model can answer."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/ready", headers={"Host": "localhost"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def ready_worker(since: datetime) -> Worker | None:
    """Return the ready worker that was started since then, if there is one.

    A site that was killed a moment ago leaves workers in the database that look alive until their heartbeat is missed.

    Raises:
        DemoError: workers fail again and again; the message holds the last one's error.
    """
    from mlx_serving.models import Worker  # needs the apps that `main` loads

    workers = Worker.objects.filter(model__name=MODEL, started_at__gte=since)
    errors = list(workers.filter(state=Worker.State.FAILED).values_list("last_error", flat=True))
    if len(errors) >= MOST_FAILURES:
        raise DemoError(f"The model cannot be loaded: {errors[0]}")
    return workers.filter(state=Worker.State.READY).first()


def wait_until_ready(children: Sequence[Child], since: datetime, host: str, port: int, timeout_s: float) -> Worker:
    """Wait until the site can answer, and return the worker that does.

    Raises:
        DemoError: a child has ended, the model cannot be loaded, or it takes longer than `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not ((worker := ready_worker(since)) and is_ready(host, port)):
        for child in children:
            child.require_alive()
        if time.monotonic() > deadline:
            logs = "\n\n".join(f"{child.log}:\n{last_lines(child.log)}" for child in children)
            raise DemoError(f"The model was not ready within {timeout_s:.0f} seconds.\n\n{logs}")
        time.sleep(POLL_S)
    return worker


def curl_line(address: str) -> str:
    """Return a command that asks the model a question."""
    body = f'{{"model": "{MODEL}", "temperature": 0, "messages": [{{"role": "user", "content": "{PROMPT}"}}]}}'
    return f"curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def describe(host: str, port: int, password: str, logs: Path, worker: Worker) -> str:
    """Return what the demo's user needs to know."""
    name = "localhost" if host in WILDCARDS else f"[{host}]" if ":" in host else host
    address = f"http://{name}:{port}"
    lines = [
        "",
        f"  Chat     {address}/",
        f"  Admin    {address}/admin/   user {ADMIN}, password {password} (for this run)",
        f"  Metrics  {address}/metrics",
        f"  Logs     {logs}",
        "",
        curl_line(address),
        "",
    ]
    if host in WILDCARDS:
        lines += ["Everyone who can reach this machine can use the model: the demo lets anonymous clients in.", ""]
    if hint := blas_hint(worker.info.get("blas", "")):
        lines += [hint, ""]
    return "\n".join([*lines, "Ctrl-C stops it."])


def blas_hint(blas: str) -> str:
    """Return how to make the CPU much faster, if the worker's BLAS is named and is a slow one, else nothing."""
    if not blas or "openblas" in blas.lower().partition("(")[0]:
        return ""
    return "Slow without OpenBLAS: sudo apt-get install libopenblas0-pthread, then start again (ten times as fast)."


def run(host: str, port: int, timeout_s: float) -> None:
    """Run the demo until a signal comes.

    Raises:
        DemoError: it cannot start, or a child has ended.
        Stopped: a signal came.
    """
    logs: Path = settings.VAR_DIR / "log"
    logs.mkdir(parents=True, exist_ok=True)
    environ = dict(os.environ)
    if host in WILDCARDS:
        environ["ALLOWED_HOSTS"] = "*"
    with only_demo(settings.VAR_DIR / "demo.lock") as lock, contextlib.ExitStack() as children:
        require_free(host, port)
        say("Preparing the database ...")
        password = prepare()
        since = datetime.now(UTC)
        say("Starting a worker and the web server ...")
        workers = start("runworkers", ["manage.py", "runworkers"], logs / "workers.log", lock, environ)
        children.callback(workers.stop)
        web = start("daphne", daphne(host, port), logs / "web.log", lock, environ)
        children.callback(web.stop)
        reachable = "127.0.0.1" if host in WILDCARDS else host
        worker = wait_until_ready([workers, web], since, reachable, port, timeout_s)
        say(describe(host, port, password, logs, worker))
        while True:
            time.sleep(POLL_S)
            workers.require_alive()
            web.require_alive()


def main() -> int:
    """Run the demo and return its exit status."""
    parser = argparse.ArgumentParser(prog="make demo", description="Serve the demo model on this machine.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--timeout", type=float, default=180.0, help="longest wait for the model, in seconds")
    options = parser.parse_args()

    def stop(signum: int, _frame: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # stopping is under way; once is enough
        raise Stopped(signal.Signals(signum).name)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
    try:
        django.setup()
        run(options.host, options.port, options.timeout)
    except Stopped:
        say("\nStopped.")
    except DemoError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
