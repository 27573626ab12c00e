"""`make demo` as a stranger runs it: started, asked, stopped, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.parse import urlencode

import psutil
import pytest

from tests.support import ROOT, Demo, clean_environ, running_demo, wait_for

pytestmark = pytest.mark.timeout(300)


def run_curl_line(demo: Demo) -> str:
    result = subprocess.run(["bash", "-c", demo.curl_line], capture_output=True, check=True, text=True, timeout=60)
    return json.loads(result.stdout)["choices"][0]["message"]["content"]


def ended(family: list[psutil.Process]) -> bool:
    return all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in family)


def can_log_in(demo: Demo) -> bool:
    cookies = CookieJar()
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(cookies))
    login = f"{demo.url}/admin/login/?next=/admin/"
    opener.open(login, timeout=10).close()
    token = next(cookie.value for cookie in cookies if cookie.name == "csrftoken")
    form = urlencode({"username": "admin", "password": demo.password, "csrfmiddlewaretoken": token}).encode()
    with opener.open(login, form, timeout=10) as page:
        return page.url == f"{demo.url}/admin/"


def test_the_printed_curl_line_and_login_work_and_sigterm_leaves_nothing(tmp_path: Path, runtime_dir: Path) -> None:
    with running_demo(tmp_path, runtime_dir) as demo:
        assert "42" in run_curl_line(demo)
        assert can_log_in(demo)
        family = demo.family()
        assert len(family) >= 4, "the demo, runworkers, daphne and a worker"
        demo.process.send_signal(signal.SIGTERM)
        assert demo.process.wait(60) == 0
        wait_for(lambda: ended(family), what="every process of the demo has ended")


def test_a_second_start_after_sigkill_works(tmp_path: Path, runtime_dir: Path, port: int) -> None:
    with running_demo(tmp_path, runtime_dir, port) as demo:
        old_password = demo.password
        family = demo.family()
        demo.process.kill()
        demo.process.wait()
        # Started while the rest of the first is still on its way out.
        with running_demo(tmp_path, runtime_dir, port) as again:
            assert "42" in run_curl_line(again)
            assert again.password != old_password
            assert can_log_in(again)
            assert ended(family), "nothing of the first demo is left"


def test_a_busy_port_is_named(tmp_path: Path, runtime_dir: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = run_to_its_end(tmp_path, runtime_dir, "--port", str(port))
    assert result.returncode == 1
    assert f"Port {port} of 127.0.0.1 is in use" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_child_that_dies_early_is_reported_with_its_output(tmp_path: Path, runtime_dir: Path, port: int) -> None:
    result = run_to_its_end(tmp_path, runtime_dir, "--port", str(port), environ={"MLX_SERVING_RUNTIME_DIR": os.devnull})
    assert result.returncode == 1
    assert "ended early" in result.stderr
    assert os.devnull in result.stderr


def run_to_its_end(
    var_dir: Path, runtime_dir: Path, *arguments: str, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "project.demo", *arguments],
        cwd=ROOT,
        env=clean_environ(VAR_DIR=str(var_dir), MLX_SERVING_RUNTIME_DIR=str(runtime_dir)) | (environ or {}),
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
