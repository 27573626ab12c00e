"""`manage.py runworkers` with real workers: what must hold when processes are killed, told to stop, or cannot start."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from inference.protocol import Delta, Failed, Finished, GenerationRequest, RequestEvent
from mlx_serving.fleet.connection import WorkerConnection
from tests.system.deployments import TINY_MODEL, Deployment, Program, is_running, wait_for


def request(request_id: str, tokens: int) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id, model=TINY_MODEL, prompt="Once upon a time", max_tokens=tokens, ignore_eos=True
    )


async def stream(endpoint: str, tokens: int, first_delta: asyncio.Event | None = None) -> list[RequestEvent]:
    """Return the events of a request that is sent to a worker directly."""
    connection = await WorkerConnection.open(endpoint, peer="test", timeout_s=30)
    events = []
    try:
        async for event in connection.submit(request(f"r{tokens}", tokens), merge=False):
            events.append(event)
            if first_delta is not None and isinstance(event, Delta):
                first_delta.set()
    finally:
        await connection.close()
    return events


def sockets(deployment: Deployment) -> list[Path]:
    return list(Path(deployment.environ["MLX_SERVING_RUNTIME_DIR"]).glob("*.sock"))


def test_a_wanted_model_gets_a_ready_worker(deployment: Deployment, tiny_model: Path) -> None:
    deployment.supervise("--add", str(tiny_model))
    worker = deployment.wait_for_worker("ready", model="tiny")
    events = asyncio.run(stream(worker["endpoint"], 5))
    assert isinstance(events[-1], Finished)
    assert events[-1].usage.completion_tokens == 5


def test_a_ready_worker_says_what_it_is(deployment: Deployment, supervisor: Program) -> None:
    asyncio.run(stream(deployment.wait_for_worker("ready")["endpoint"], 5))
    worker = deployment.wait_for(
        lambda: next((row for row in deployment.workers("ready") if row["memory_bytes"]), None), "memory to be reported"
    )
    assert worker["pid"] in {child.pid for child in psutil.Process(supervisor.pid).children()}
    assert worker["heartbeat_at"] is not None
    assert '"context_length": 4096' in worker["info"]
    assert f"{TINY_MODEL}: ready" in supervisor.output()


def test_heartbeats_go_on(deployment: Deployment, supervisor: Program) -> None:
    first = deployment.wait_for_worker("ready")["heartbeat_at"]
    deployment.wait_for(lambda: deployment.workers("ready")[0]["heartbeat_at"] > first, "the next heartbeat")


def test_a_killed_worker_is_replaced(deployment: Deployment, supervisor: Program) -> None:
    killed = deployment.wait_for_worker("ready")
    os.kill(killed["pid"], signal.SIGKILL)
    fresh = deployment.wait_for_worker("ready", without=[killed["id"]])
    assert fresh["pid"] != killed["pid"]
    (row,) = (row for row in deployment.workers() if row["id"] == killed["id"])
    assert (row["state"], row["last_error"]) == ("failed", "killed by SIGKILL")
    assert [path.stem for path in sockets(deployment)] == [fresh["id"]]


def test_a_killed_worker_is_reaped(deployment: Deployment, supervisor: Program) -> None:
    killed = deployment.wait_for_worker("ready")
    os.kill(killed["pid"], signal.SIGKILL)
    deployment.wait_for_worker("failed")
    deployment.wait_for(lambda: not psutil.pid_exists(killed["pid"]), "the killed worker to be reaped")


async def _unload_while_streaming(deployment: Deployment) -> list[RequestEvent]:
    worker = deployment.wait_for_worker("ready")
    started = asyncio.Event()
    task = asyncio.create_task(stream(worker["endpoint"], 400, started))
    await started.wait()
    deployment.update_model(TINY_MODEL, wanted=0)
    return await task


def test_unloading_finishes_what_runs_and_stops_the_worker(deployment: Deployment, supervisor: Program) -> None:
    pid = deployment.wait_for_worker("ready")["pid"]
    events = asyncio.run(_unload_while_streaming(deployment))
    assert isinstance(events[-1], Finished)
    row = deployment.wait_for_worker("stopped")
    assert not is_running(pid)
    assert row["last_error"] == ""
    assert sockets(deployment) == []


def test_deleting_a_model_stops_its_worker(deployment: Deployment, supervisor: Program) -> None:
    pid = deployment.wait_for_worker("ready")["pid"]
    deployment.execute("DELETE FROM mlx_serving_worker")
    deployment.execute("DELETE FROM mlx_serving_servedmodel")
    deployment.wait_for(lambda: not is_running(pid), "the worker of the deleted model to end")
    deployment.wait_for(lambda: not sockets(deployment), "its socket to go")
    assert deployment.rows("SELECT id FROM mlx_serving_worker") == []


def test_loading_again_starts_a_fresh_worker(deployment: Deployment, supervisor: Program) -> None:
    first = deployment.wait_for_worker("ready")
    deployment.update_model(TINY_MODEL, wanted=0)
    deployment.wait_for_worker("stopped")
    deployment.update_model(TINY_MODEL, wanted=1)
    deployment.wait_for_worker("ready", without=[first["id"]])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_a_running_stream(deployment: Deployment, supervisor: Program, number: signal.Signals) -> None:
    worker = deployment.wait_for_worker("ready")

    async def stop_while_streaming() -> list[RequestEvent]:
        started = asyncio.Event()
        task = asyncio.create_task(stream(worker["endpoint"], 400, started))
        await started.wait()
        supervisor.signal(number)
        return await task

    events = asyncio.run(stop_while_streaming())
    assert isinstance(events[-1], Finished), events[-1]
    assert events[-1].usage.completion_tokens == 400
    assert supervisor.wait() == 0
    assert not is_running(worker["pid"])
    assert sockets(deployment) == []
    assert [row["state"] for row in deployment.workers()] == ["stopped"]


def test_a_drain_ends_at_its_deadline(deployment: Deployment, tiny_model: Path) -> None:
    deployment.add_model(TINY_MODEL, tiny_model)
    program = deployment.supervise(MLX_SERVING_DRAIN_TIMEOUT_S="0.5")
    worker = deployment.wait_for_worker("ready")

    async def stop_while_streaming() -> list[RequestEvent]:
        started = asyncio.Event()
        task = asyncio.create_task(stream(worker["endpoint"], 4000, started))
        await started.wait()
        program.signal(signal.SIGTERM)
        return await task

    last = asyncio.run(stop_while_streaming())[-1]
    assert isinstance(last, Failed)
    assert last.code == "worker_draining"
    assert program.wait() == 0


def test_a_second_signal_stops_at_once(deployment: Deployment, supervisor: Program) -> None:
    worker = deployment.wait_for_worker("ready")

    async def stop_twice() -> list[RequestEvent]:
        started = asyncio.Event()
        task = asyncio.create_task(stream(worker["endpoint"], 4000, started))
        await started.wait()
        supervisor.signal(signal.SIGTERM)
        await asyncio.to_thread(deployment.wait_for_worker, "draining")
        await asyncio.sleep(0.6)  # signals that come closer together than this count as one
        supervisor.signal(signal.SIGTERM)
        return await task

    last = asyncio.run(stop_twice())[-1]
    assert isinstance(last, Failed)
    assert last.code == "worker_lost"
    assert supervisor.wait() == 1
    assert not is_running(worker["pid"])


def test_a_killed_supervisor_leaves_no_worker(deployment: Deployment, supervisor: Program) -> None:
    worker = deployment.wait_for_worker("ready")
    family = [child.pid for child in psutil.Process(supervisor.pid).children(recursive=True)]
    assert worker["pid"] in family
    supervisor.signal(signal.SIGKILL)
    supervisor.wait()
    wait_for(
        lambda: not any(map(is_running, family)), "the workers to notice that their supervisor has gone", timeout_s=20
    )


def test_a_supervisor_starts_after_one_that_was_killed(deployment: Deployment, supervisor: Program) -> None:
    old = deployment.wait_for_worker("ready")
    supervisor.signal(signal.SIGKILL)
    supervisor.wait()
    deployment.supervise()
    fresh = deployment.wait_for_worker("ready", without=[old["id"]])
    (row,) = (row for row in deployment.workers() if row["id"] == old["id"])
    assert row["state"] == "failed"
    assert row["last_error"] == "its supervisor ended without stopping it"
    assert [path.stem for path in sockets(deployment)] == [fresh["id"]]


def test_a_second_supervisor_refuses(deployment: Deployment, supervisor: Program) -> None:
    second = deployment.manage("runworkers", check=False)
    assert second.returncode == 3
    assert f"another supervisor (process {supervisor.pid})" in second.stderr
    assert supervisor.process.poll() is None


def test_a_reload_leaves_no_moment_without_a_ready_worker(deployment: Deployment, supervisor: Program) -> None:
    old = deployment.wait_for_worker("ready")
    deployment.update_model(TINY_MODEL, reload_token=1)
    gaps = []

    def swapped() -> bool:
        rows = deployment.workers()
        if not any(row["state"] == "ready" for row in rows):
            gaps.append(rows)
        return any(row["id"] == old["id"] and row["state"] == "stopped" for row in rows)

    deployment.wait_for(swapped, "the old worker to be replaced")
    assert gaps == []
    (fresh,) = deployment.workers("ready")
    assert fresh["reload_token"] == 1


def test_a_retiring_worker_takes_requests_from_those_who_do_not_know_yet(
    deployment: Deployment, supervisor: Program
) -> None:
    old = deployment.wait_for_worker("ready")
    deployment.update_model(TINY_MODEL, reload_token=1)
    deployment.wait_for_worker("draining")
    events = asyncio.run(stream(old["endpoint"], 5))
    assert isinstance(events[-1], Finished)


def test_a_changed_setting_gives_a_new_worker(deployment: Deployment, supervisor: Program) -> None:
    old = deployment.wait_for_worker("ready")
    deployment.update_model(TINY_MODEL, context_length=64)
    fresh = deployment.wait_for_worker("ready", without=[old["id"]])
    assert '"context_length": 64' in fresh["info"]


def test_a_bad_source_fails_with_its_reason_and_is_tried_again(deployment: Deployment, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    deployment.add_model("broken", missing)
    program = deployment.supervise()
    first = deployment.wait_for_worker("failed")
    assert str(missing) in first["last_error"]
    deployment.wait_for_worker("failed", without=[first["id"]])
    assert "restart in" in program.output()


def test_a_corrected_source_is_tried_without_waiting(deployment: Deployment, tiny_model: Path, tmp_path: Path) -> None:
    deployment.add_model("broken", tmp_path / "missing")
    deployment.supervise(MLX_SERVING_RESTART_BACKOFF_S="100000", MLX_SERVING_RESTART_BACKOFF_MAX_S="100000")
    deployment.wait_for_worker("failed")
    deployment.update_model("broken", source=str(tiny_model))
    deployment.wait_for_worker("ready")


def test_a_broken_model_does_not_disturb_another(deployment: Deployment, supervisor: Program, tmp_path: Path) -> None:
    worker = deployment.wait_for_worker("ready")
    deployment.add_model("broken", tmp_path / "missing")
    deployment.wait_for_worker("failed", model="broken")
    assert [row["id"] for row in deployment.workers("ready")] == [worker["id"]]


@contextlib.contextmanager
def database_away(deployment: Deployment) -> Iterator[None]:
    database = deployment.folder / "db.sqlite3"
    away = database.with_suffix(".away")
    database.rename(away)
    database.mkdir()  # a folder in its place cannot be opened, nor made anew
    try:
        yield
    finally:
        database.rmdir()
        away.rename(database)


def test_workers_outlive_the_database(deployment: Deployment, supervisor: Program) -> None:
    worker = deployment.wait_for_worker("ready")
    with database_away(deployment):
        wait_for(lambda: "the database does not answer" in supervisor.output(), "the outage to be logged")
        events = asyncio.run(stream(worker["endpoint"], 5))
        assert isinstance(events[-1], Finished)
    wait_for(lambda: "the database answers again" in supervisor.output(), "the recovery to be logged")
    deployment.wait_for(
        lambda: deployment.workers("ready")[0]["heartbeat_at"] > worker["heartbeat_at"], "heartbeats after the outage"
    )
    assert [row["id"] for row in deployment.workers("ready")] == [worker["id"]]


def test_a_worker_that_dies_during_an_outage_is_replaced(deployment: Deployment, supervisor: Program) -> None:
    worker = deployment.wait_for_worker("ready")
    with database_away(deployment):
        os.kill(worker["pid"], signal.SIGKILL)
        wait_for(lambda: supervisor.output().count(f"{TINY_MODEL}: ready") == 2, "a new worker")
    deployment.wait_for_worker("ready", without=[worker["id"]])


def test_the_sockets_are_private(deployment: Deployment, supervisor: Program) -> None:
    folder = Path(deployment.environ["MLX_SERVING_RUNTIME_DIR"])
    assert folder.stat().st_mode & 0o077 == 0


def test_a_folder_that_others_can_enter_is_refused(deployment: Deployment) -> None:
    folder = Path(deployment.environ["MLX_SERVING_RUNTIME_DIR"])
    folder.chmod(0o755)
    refused = deployment.manage("runworkers", check=False)
    assert refused.returncode != 0
    assert "can be entered by others" in refused.stderr


def test_no_tables_is_said_clearly(deployment: Deployment) -> None:
    (deployment.folder / "db.sqlite3").unlink()
    refused = deployment.manage("runworkers", check=False)
    assert refused.returncode == 3
    assert "migrate" in refused.stderr


def test_every_line_of_a_worker_carries_its_id(deployment: Deployment, supervisor: Program) -> None:
    worker = deployment.wait_for_worker("ready")
    wait_for(lambda: f"[{worker['id']}] " in supervisor.output(), "a line of the worker")


def test_adding_twice_changes_nothing(deployment: Deployment, tiny_model: Path, supervisor: Program) -> None:
    supervisor.signal(signal.SIGTERM)
    supervisor.wait()
    again = deployment.supervise("--add", str(tiny_model), "--name", TINY_MODEL)
    wait_for(lambda: "is there already" in again.output(), "the command to say so")
    assert len(deployment.rows("SELECT id FROM mlx_serving_servedmodel")) == 1
