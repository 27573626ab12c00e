"""The folder of the worker sockets and its lock."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_serving.fleet import runtime_dir as subject
from mlx_serving.fleet.supervisor import new_worker_id


def test_the_folder_is_made_private(runtime_dir: Path) -> None:
    folder = runtime_dir / "a" / "b"
    subject.prepare(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_private_folder_is_taken_as_it_is(runtime_dir: Path) -> None:
    subject.prepare(runtime_dir)
    subject.prepare(runtime_dir)


def test_a_folder_that_others_can_enter_is_refused(runtime_dir: Path) -> None:
    runtime_dir.chmod(0o701)
    with pytest.raises(subject.RuntimeDirError, match="mode 0701"):
        subject.prepare(runtime_dir)


def test_a_folder_of_somebody_else_is_refused(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: runtime_dir.stat().st_uid + 1)
    with pytest.raises(subject.RuntimeDirError, match="belongs to another user"):
        subject.prepare(runtime_dir)


def test_a_file_in_its_place_is_refused(runtime_dir: Path) -> None:
    (runtime_dir / "file").touch()
    with pytest.raises(subject.RuntimeDirError):
        subject.prepare(runtime_dir / "file")


def test_a_path_that_is_too_long_for_a_socket_is_refused() -> None:
    folder = Path("/tmp") / ("x" * 90)
    with pytest.raises(subject.RuntimeDirError, match="more than 103"):
        subject.prepare(folder)
    assert not folder.exists()


def test_worker_ids_have_the_length_that_is_reckoned_with() -> None:
    ids = {new_worker_id() for _ in range(100)}
    assert {len(worker_id) for worker_id in ids} == {subject._LONGEST_WORKER_ID}
    assert len(ids) == 100


def test_only_sockets_are_removed(runtime_dir: Path) -> None:
    for name in ("a.sock", "b.sock", "supervisor.lock"):
        (runtime_dir / name).touch()
    subject.remove_sockets(runtime_dir)
    assert [path.name for path in runtime_dir.iterdir()] == ["supervisor.lock"]


def test_the_lock_is_held_once(runtime_dir: Path) -> None:
    second = subject.SupervisorLock(runtime_dir)
    with subject.SupervisorLock(runtime_dir), pytest.raises(subject.AlreadyRunning, match=f"process {os.getpid()}"):
        second.__enter__()
    with subject.SupervisorLock(runtime_dir):
        pass


def test_the_lock_goes_with_its_process_even_if_a_child_lives_on(runtime_dir: Path) -> None:
    script = (
        "import os, pathlib, subprocess, sys\n"
        "from mlx_serving.fleet.runtime_dir import SupervisorLock\n"
        "lock = SupervisorLock(pathlib.Path(sys.argv[1])).__enter__()\n"
        "child = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    output = subprocess.run([sys.executable, "-c", script, runtime_dir], stdout=subprocess.PIPE, check=True, text=True)
    try:
        with subject.SupervisorLock(runtime_dir):
            pass
    finally:
        os.kill(int(output.stdout), 9)
