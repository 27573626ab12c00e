"""What tests of several folders share: the demo as a child process, and small waits."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
MODEL = "mlx-serving-demo"


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], timeout_s: float = 10.0, what: str = "") -> Any:
    """Return the condition's first true value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or condition}"
        time.sleep(0.05)
    return value


def clean_environ(**extra: str) -> dict[str, str]:
    """Return this process's environment without what the test run itself has set for Django and the demo."""
    ours = {"DJANGO_SETTINGS_MODULE", "DATABASE_URL", "REDIS_URL", "ALLOWED_HOSTS", "DEBUG", "SECRET_KEY", "VAR_DIR"}
    return {name: value for name, value in os.environ.items() if name not in ours} | extra


def ask(port: int, question: str, **fields: Any) -> str:
    """Return the answer to a question, over HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        body = {"model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": question}], **fields}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        assert response.status == 200, text
        return str(json.loads(text)["choices"][0]["message"]["content"])


@dataclass
class Demo:
    """A running `make demo`."""

    process: subprocess.Popen[str]
    port: int
    output: str
    var_dir: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def password(self) -> str:
        match = re.search(r"password (\S+)", self.output)
        assert match, self.output
        return match[1]

    @property
    def curl_line(self) -> str:
        return next(line for line in self.output.splitlines() if line.startswith("curl "))

    def family(self) -> list[psutil.Process]:
        """Return the demo's process and all that descend from it."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def stop(self) -> int:
        """End the demo as Ctrl-C does and return its exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


def start_demo(var_dir: Path, runtime_dir: Path, port: int, **environ: str) -> Demo:
    """Start the demo and wait until it says that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "project.demo", "--port", str(port)],
        cwd=ROOT,
        env=clean_environ(VAR_DIR=str(var_dir), MLX_SERVING_RUNTIME_DIR=str(runtime_dir), **environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if "Ctrl-C" in line:
            return Demo(process, port, "".join(lines), var_dir)
    raise AssertionError(f"the demo ended with status {process.wait()}:\n{''.join(lines)}")


@contextlib.contextmanager
def running_demo(var_dir: Path, runtime_dir: Path, port: int | None = None, **environ: str) -> Iterator[Demo]:
    """Run the demo for the length of a block, with these variables added to its environment."""
    demo = start_demo(var_dir, runtime_dir, port or free_port(), **environ)
    try:
        yield demo
    finally:
        if demo.process.poll() is None:
            demo.stop()
        assert demo.process.stdout is not None
        demo.process.stdout.close()
