"""A site made by `django-admin startproject` with the README's steps, which are read from the README itself."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, ask, clean_environ, free_port, wait_for

pytestmark = pytest.mark.timeout(300)

SECTION = re.compile(r"^## Add it to a Django project$(.*?)^## ", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"^# (\S+\.py)\b")


def steps() -> list[tuple[str, str]]:
    """Return the code blocks of the README's section, in order, each with its language."""
    section = SECTION.search((ROOT / "README.md").read_text())
    assert section
    return BLOCK.findall(section[1])


def apply_to_file(site: Path, text: str) -> None:
    """Do what a reader does with a block of Python: it names its file, and is added to it or replaces it."""
    name = FILE_NAME.match(text)
    assert name, text
    path = site / name[1]
    if path.name == "settings.py":
        path.write_text(f"{path.read_text()}\n{text}")
    else:
        path.write_text(text)


@contextlib.contextmanager
def started(command: list[str], site: Path, environ: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=site, env=environ, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def answers(port: int, path: str) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().status == 200
    except OSError:
        return False


def test_the_steps_of_the_readme_make_a_new_site_serve_a_chat(tmp_path: Path, runtime_dir: Path) -> None:
    port = free_port()
    site = tmp_path / "mysite"
    site.mkdir()
    subprocess.run([sys.executable, "-m", "django", "startproject", "mysite", str(site)], check=True)
    environ = clean_environ(MLX_SERVING_RUNTIME_DIR=str(runtime_dir), PYTHONPATH=str(ROOT))

    commands: list[str] = []
    for language, text in steps():
        if language == "python":
            apply_to_file(site, text)
        else:
            assert language == "sh"
            commands += [line for line in text.splitlines() if line.startswith("python manage.py")]
    migrate, runworkers, runserver = ([sys.executable, *shlex.split(line, comments=True)[1:]] for line in commands)

    subprocess.run(migrate, cwd=site, env=environ, check=True, capture_output=True)
    logs = tmp_path / "workers.log", tmp_path / "web.log"
    with (
        started(runworkers, site, environ, logs[0]),
        started([*runserver, f"127.0.0.1:{port}", "--noreload"], site, environ, logs[1]),
    ):
        try:
            wait_for(lambda: answers(port, "/ready"), 120, "the site is ready")
            # The README leaves the site closed; it also says how to open it, which the test's environment does here.
            assert "42" in ask(port, "What is 17 + 25?")
        except AssertionError as error:
            error.add_note("\n".join(log.read_text(errors="replace")[-4000:] for log in logs))
            raise
