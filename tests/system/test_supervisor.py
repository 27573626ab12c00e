"""The supervisor against workers that misbehave, and a database that does. Processes are real, the workers are fake."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from django.db import OperationalError

from inference.protocol import Configure
from mlx_serving.conf import Settings
from mlx_serving.fleet import process, reconcile
from mlx_serving.fleet.reconcile import Spec
from mlx_serving.fleet.store import WorkerRow
from mlx_serving.fleet.supervisor import Supervisor
from tests.system.deployments import PATIENCE_S, is_running

FAKE_WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))


class FakeStore:
    """What the database would hold."""

    def __init__(self) -> None:
        self.models: dict[int, Spec] = {}
        self.workers: dict[str, dict[str, Any]] = {}
        self.history: list[tuple[str, str]] = []
        self.down = False
        self.saves = 0

    def recover(self) -> int:
        self._answer()
        return 0

    def wanted(self) -> dict[int, Spec]:
        self._answer()
        return dict(self.models)

    def save(self, rows: list[WorkerRow]) -> None:
        self._answer()
        for row in rows:
            self.saves += 1
            if self.workers.get(row.worker_id, {}).get("state") != row.state:
                self.history.append((row.worker_id, row.state))
            self.workers[row.worker_id] = {**self.workers.get(row.worker_id, {}), **row.values}

    def _answer(self) -> None:
        if self.down:
            raise OperationalError("down")

    def states(self) -> list[str]:
        return [row["state"] for row in self.workers.values()]

    def in_state(self, state: str) -> list[dict[str, Any]]:
        return [row for row in self.workers.values() if row["state"] == state]


class Fleet:
    """A running supervisor."""

    def __init__(self, store: FakeStore, task: asyncio.Task[bool]) -> None:
        self.store = store
        self.task = task

    async def until(self, condition: Callable[[], Any]) -> Any:
        """Wait until something is true; the supervisor must not end before."""
        async with asyncio.timeout(PATIENCE_S):
            while not (found := condition()):
                if self.task.done():
                    await self.task
                    pytest.fail("the supervisor ended")
                await asyncio.sleep(0.02)
        return found

    async def stop(self) -> bool:
        """Tell it to stop; return whether it drained."""
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            return await self.task


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def settings_of(runtime_dir: Path) -> Settings:
    return Settings(
        RUNTIME_DIR=str(runtime_dir),
        HEARTBEAT_S=0.1,
        START_TIMEOUT_S=PATIENCE_S,
        DRAIN_TIMEOUT_S=5.0,
        RESTART_BACKOFF_S=0.05,
        RESTART_BACKOFF_MAX_S=0.2,
    )


@pytest.fixture
async def start(store: FakeStore, settings_of: Settings) -> Any:
    """Start a supervisor for one model whose workers behave in a given way."""
    tasks: list[asyncio.Task[bool]] = []

    def begin(behaviour: str, command: tuple[str, ...] = FAKE_WORKER, **values: Any) -> Fleet:
        store.models = {1: Spec(name="m", source=behaviour)}
        supervisor = Supervisor(replace(settings_of, **values), store, features=Configure, command=command)  # type: ignore[arg-type]  # a stand-in
        tasks.append(asyncio.create_task(supervisor.run()))
        return Fleet(store, tasks[-1])

    yield begin
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not any(is_running(row["pid"]) for row in store.workers.values() if row.get("pid"))


async def test_a_sound_worker_gets_ready_and_drains(start: Any, store: FakeStore) -> None:
    fleet = start("ready")
    await fleet.until(lambda: store.in_state("ready"))
    assert await fleet.stop()
    assert store.states() == ["stopped"]
    seen = [state for _, state in store.history if state != "loading"]  # which may pass unseen
    assert seen == ["starting", "ready", "draining", "stopped"]


async def test_the_load_is_stored(start: Any, store: FakeStore) -> None:
    fleet = start("ready")
    (row,) = await fleet.until(lambda: store.in_state("ready"))
    assert (row["running"], row["waiting"], row["kv_bytes"], row["memory_bytes"]) == (1, 2, 3, 4)
    assert row["load"]["waiting"] == 2


async def test_an_ended_worker_is_busy_with_nothing(start: Any, store: FakeStore) -> None:
    fleet = start("ready")
    await fleet.until(lambda: store.in_state("ready"))
    await fleet.stop()
    (row,) = store.workers.values()
    assert (row["running"], row["waiting"], row["kv_bytes"], row["memory_bytes"]) == (0, 0, 0, 0)


async def test_a_hung_start_is_killed_and_tried_again(start: Any, store: FakeStore) -> None:
    fleet = start("hang", START_TIMEOUT_S=0.5)
    failed = await fleet.until(lambda: store.in_state("failed")[1:])
    assert failed[0]["last_error"] == "killed: it was not ready after 0.5 s"
    assert not is_running(failed[0]["pid"])


async def test_a_worker_that_answers_nothing_is_killed(
    start: Any, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "UNRESPONSIVE_S", 1.0)
    monkeypatch.setattr(process, "PING_TIMEOUT_S", 0.2)
    fleet = start("deaf")
    (failed, *_) = await fleet.until(lambda: store.in_state("failed"))
    assert failed["last_error"] == "killed: it did not answer for 1 s"


async def test_a_worker_that_ignores_its_drain_is_killed(
    start: Any, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "EXIT_GRACE_S", 0.2)
    fleet = start("stubborn", DRAIN_TIMEOUT_S=0.2)
    (row,) = await fleet.until(lambda: store.in_state("ready"))
    assert await fleet.stop()
    assert not is_running(row["pid"])
    assert [worker["last_error"] for worker in store.workers.values()] == [
        "killed: it did not end by its drain deadline"
    ]


async def test_a_crash_is_explained_by_its_last_output(start: Any, store: FakeStore) -> None:
    fleet = start("crash")
    (failed, *_) = await fleet.until(lambda: store.in_state("failed"))
    assert failed["last_error"] == "exited with code 1; last output: something went wrong"


async def test_a_worker_that_fails_and_stays_is_killed(
    start: Any, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "EXIT_GRACE_S", 0.2)
    fleet = start("fail")
    ended = await fleet.until(lambda: [row for row in store.in_state("failed") if row.get("stopped_at")])
    assert "it is broken" in ended[0]["last_error"]


async def test_a_worker_that_quits_is_started_again(start: Any, store: FakeStore) -> None:
    fleet = start("quit")
    await fleet.until(lambda: store.in_state("stopped")[1:])


async def test_a_program_that_is_not_there_is_said(start: Any, store: FakeStore) -> None:
    fleet = start("ready", command=("/no/such/program",))
    (failed, *_) = await fleet.until(lambda: store.in_state("failed"))
    assert failed["last_error"].startswith("cannot be started: ")


async def test_a_long_line_is_cut(start: Any, store: FakeStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mlx_serving.worker")
    fleet = start("chatty")
    (row,) = await fleet.until(lambda: store.in_state("ready"))
    lines = await fleet.until(lambda: [record for record in caplog.records if record.name == "mlx_serving.worker"])
    assert max(len(line.getMessage()) for line in lines) < 3000
    assert row["pid"]


async def test_workers_start_again_while_the_database_is_away(start: Any, store: FakeStore) -> None:
    fleet = start("ready")
    (row,) = await fleet.until(lambda: store.in_state("ready"))
    known = set(store.workers)
    store.down = True
    os.kill(row["pid"], signal.SIGKILL)
    await fleet.until(lambda: not is_running(row["pid"]))
    store.down = False
    await fleet.until(lambda: [worker for worker in store.in_state("ready") if worker is not row])
    await fleet.until(lambda: [store.workers[name]["state"] for name in known] == ["failed"])
    assert len(store.workers) == 2


async def test_a_database_that_is_away_at_the_start_is_waited_for(start: Any, store: FakeStore) -> None:
    store.down = True
    fleet = start("ready")
    await asyncio.sleep(0.3)
    assert not fleet.task.done()
    store.down = False
    await fleet.until(lambda: store.in_state("ready"))


async def test_it_stops_although_the_database_is_away(
    start: Any, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_serving.fleet.supervisor.FLUSH_TIMEOUT_S", 0.5)
    fleet = start("ready")
    (row,) = await fleet.until(lambda: store.in_state("ready"))
    store.down = True
    assert await fleet.stop()
    assert not is_running(row["pid"])


async def test_nothing_is_written_more_often_than_the_heartbeat(start: Any, store: FakeStore) -> None:
    fleet = start("hang", HEARTBEAT_S=1000.0)
    await fleet.until(lambda: store.in_state("starting"))
    await asyncio.sleep(0.5)
    assert store.saves == 1


async def test_cancelling_the_supervisor_kills_its_workers(start: Any, store: FakeStore) -> None:
    fleet = start("ready")
    (row,) = await fleet.until(lambda: store.in_state("ready"))
    fleet.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fleet.task
    assert not is_running(row["pid"])


async def test_a_fault_in_watching_one_worker_is_contained(
    start: Any, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = process.WorkerProcess._log
    faults = iter([True])

    def faulty(self: Any, lines: Any) -> None:
        if next(faults, False):
            raise LookupError("a fault")
        original(self, lines)

    monkeypatch.setattr(process.WorkerProcess, "_log", faulty)
    fleet = start("chatty")
    (failed,) = await fleet.until(lambda: store.in_state("failed"))
    assert failed["last_error"] == "the supervisor failed while it watched this worker"
    await fleet.until(lambda: store.in_state("ready"))
