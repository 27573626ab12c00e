"""What web processes know of models and workers."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import OperationalError, connections
from django.utils import timezone

from mlx_serving.errors import ModelNotReady
from mlx_serving.fleet.registry import (
    HEARTBEAT_MAX_AGE_S,
    MAX_AGE_S,
    ModelRow,
    Outage,
    Registry,
    Rows,
    WorkerRow,
    build_views,
    query_rows,
)
from mlx_serving.models import ServedModel, Worker

NOW = 1_000_000.0
MODEL = ModelRow(1, "m", True, None, datetime.fromtimestamp(NOW - 1000, UTC))


def seen(seconds_ago: float) -> datetime:
    return datetime.fromtimestamp(NOW - seconds_ago, UTC)


WORKER = WorkerRow("w1", 1, "unix:/w1", "ready", 2, 3, {"context_length": 4096}, seen(0.5))


def listed(*workers: WorkerRow, suspects: dict[str, float] | None = None, outage: Outage | None = None) -> list[str]:
    views = build_views(Rows((MODEL,), workers), suspects or {}, NOW, outage)
    return [worker.worker_id for worker in views["m"].workers]


class FakeClock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class FakeDatabase:
    """Answers with `rows`, or fails; counts its reads."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.reads = 0
        self.down = False
        self.gate: threading.Event | None = None

    def __call__(self) -> Rows:
        self.reads += 1
        rows, down = self.rows, self.down
        if self.gate is not None:
            assert self.gate.wait(30)
        if down:
            raise OperationalError("down")
        return rows


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def database() -> FakeDatabase:
    return FakeDatabase(Rows((MODEL,), (WORKER,)))


@pytest.fixture
def registry(database: FakeDatabase, clock: FakeClock) -> Registry:
    return Registry(database, clock=clock, wall=clock)


async def ids(registry: Registry) -> list[str]:
    return [worker.worker_id for worker in (await registry.models())["m"].workers]


# --- which workers are believed --------------------------------------------------------------------------------------


def test_a_ready_worker_that_was_seen_is_listed() -> None:
    assert listed(WORKER) == ["w1"]


def test_a_ready_worker_with_an_old_heartbeat_is_left_out() -> None:
    assert listed(replace(WORKER, heartbeat_at=seen(HEARTBEAT_MAX_AGE_S))) == ["w1"]
    assert listed(replace(WORKER, heartbeat_at=seen(HEARTBEAT_MAX_AGE_S + 1))) == []


@pytest.mark.parametrize("state", ["starting", "loading", "draining"])
def test_other_states_need_no_heartbeat(state: str) -> None:
    assert listed(replace(WORKER, state=state, heartbeat_at=None)) == ["w1"]


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_an_ended_worker_is_left_out(state: str) -> None:
    assert listed(replace(WORKER, state=state)) == []


def test_a_suspect_is_left_out_until_it_was_seen_again() -> None:
    assert listed(replace(WORKER, heartbeat_at=seen(2)), suspects={"w1": NOW - 1}) == []
    assert listed(replace(WORKER, heartbeat_at=seen(1)), suspects={"w1": NOW - 1}) == []
    assert listed(replace(WORKER, heartbeat_at=seen(0.5)), suspects={"w1": NOW - 1}) == ["w1"]


def test_a_suspect_that_was_never_seen_is_left_out() -> None:
    assert listed(replace(WORKER, state="loading", heartbeat_at=None), suspects={"w1": NOW - 1}) == []


def test_an_outage_ages_no_heartbeat() -> None:
    outage = Outage(NOW - 100, NOW)
    assert listed(replace(WORKER, heartbeat_at=seen(105)), outage=outage) == ["w1"]
    assert listed(replace(WORKER, heartbeat_at=seen(111)), outage=outage) == []


def test_an_outage_before_the_heartbeat_does_not_matter() -> None:
    outage = Outage(NOW - 100, NOW - 50)
    assert listed(replace(WORKER, heartbeat_at=seen(11)), outage=outage) == []


# --- what is said of a model -----------------------------------------------------------------------------------------


def test_a_model_without_workers_is_listed() -> None:
    view = build_views(Rows((MODEL,)), {}, NOW)["m"]
    assert (view.name, view.wanted, view.workers, view.created) == ("m", True, (), int(NOW - 1000))


def test_the_context_length_is_the_ready_workers() -> None:
    rows = Rows((replace(MODEL, context_length=64),), (WORKER,))
    assert build_views(rows, {}, NOW)["m"].context_length == 4096


def test_without_a_ready_worker_the_context_length_is_the_models_own() -> None:
    rows = Rows((replace(MODEL, context_length=64),), (replace(WORKER, state="loading", info={}),))
    assert build_views(rows, {}, NOW)["m"].context_length == 64
    assert build_views(Rows((MODEL,)), {}, NOW)["m"].context_length is None


def test_workers_go_with_their_model() -> None:
    other = replace(MODEL, pk=2, name="n")
    views = build_views(Rows((MODEL, other), (WORKER, replace(WORKER, pk="w2", model_id=2))), {}, NOW)
    assert [worker.worker_id for worker in views["n"].workers] == ["w2"]
    assert views["n"].workers[0].model == "n"


# --- when the database is read ---------------------------------------------------------------------------------------


async def test_a_fresh_snapshot_is_not_read_again(registry: Registry, database: FakeDatabase, clock: FakeClock) -> None:
    await registry.models()
    clock.now += MAX_AGE_S - 0.1
    await registry.models()
    assert database.reads == 1
    clock.now += 0.1
    await registry.models()
    assert database.reads == 2


async def test_many_callers_share_one_read(registry: Registry, database: FakeDatabase) -> None:
    views = await asyncio.gather(*(registry.models() for _ in range(50)))
    assert database.reads == 1
    assert all("m" in view for view in views)


def test_event_loops_in_several_threads_share_one_read(registry: Registry, database: FakeDatabase) -> None:
    database.gate = threading.Event()
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(asyncio.run(ids(registry)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    database.gate.set()
    for thread in threads:
        thread.join()
    assert found == [["w1"]] * 4
    assert database.reads == 1


async def test_a_cancelled_caller_does_not_take_the_others_along(registry: Registry, database: FakeDatabase) -> None:
    database.gate = threading.Event()
    first, second = asyncio.create_task(ids(registry)), asyncio.create_task(ids(registry))
    await asyncio.sleep(0)
    first.cancel()
    database.gate.set()
    assert await second == ["w1"]


async def test_the_last_known_values_stay_while_the_database_is_down(
    registry: Registry, database: FakeDatabase, clock: FakeClock
) -> None:
    await registry.models()
    database.down = True
    clock.now += 1000
    assert await ids(registry) == ["w1"]


async def test_nothing_known_and_no_database_is_said(registry: Registry, database: FakeDatabase) -> None:
    database.down = True
    with pytest.raises(ModelNotReady):
        await registry.models()
    with pytest.raises(ModelNotReady):
        await registry.models()
    assert database.reads == 1


async def test_a_worker_is_still_there_right_after_an_outage(
    registry: Registry, database: FakeDatabase, clock: FakeClock
) -> None:
    await registry.models()
    database.down = True
    for _ in range(60):
        clock.now += 1
        await registry.models()
    database.down = False
    clock.now += 1
    assert await ids(registry) == ["w1"]


async def test_a_database_that_hangs_does_not_hold_up_a_caller(
    registry: Registry, database: FakeDatabase, clock: FakeClock
) -> None:
    await registry.models()
    clock.now += 10
    database.gate = threading.Event()
    try:
        assert await ids(registry) == ["w1"]
        assert database.reads == 2
    finally:
        database.gate.set()


async def test_a_fault_of_ours_is_not_swallowed(clock: FakeClock) -> None:
    def broken() -> Rows:
        raise LookupError("a fault")

    registry = Registry(broken, clock=clock, wall=clock)
    with pytest.raises(LookupError):
        await registry.models()


# --- suspicion and invalidation --------------------------------------------------------------------------------------


async def test_a_suspect_is_left_out_at_once(registry: Registry) -> None:
    await registry.models()
    registry.suspect("w1")
    assert await ids(registry) == []


async def test_a_suspicion_ends_when_the_worker_is_seen_again(
    registry: Registry, database: FakeDatabase, clock: FakeClock
) -> None:
    await registry.models()
    registry.suspect("w1")
    clock.now += 2
    assert await ids(registry) == []
    database.rows = Rows((MODEL,), (replace(WORKER, heartbeat_at=datetime.fromtimestamp(clock.now, UTC)),))
    clock.now += 2
    assert await ids(registry) == ["w1"]


async def test_a_suspicion_is_forgotten_when_the_worker_has_gone(
    registry: Registry, database: FakeDatabase, clock: FakeClock
) -> None:
    await registry.models()
    registry.suspect("w1")
    database.rows = Rows((MODEL,))
    clock.now += 2
    await registry.models()
    database.rows = Rows((MODEL,), (WORKER,))
    clock.now += 2
    assert await ids(registry) == ["w1"]


async def test_invalidation_reads_again(registry: Registry, database: FakeDatabase) -> None:
    await registry.models()
    database.rows = Rows((MODEL,))
    registry.invalidate()
    assert await ids(registry) == []


async def test_a_read_that_began_before_an_invalidation_does_not_count(
    registry: Registry, database: FakeDatabase, clock: FakeClock
) -> None:
    await registry.models()
    clock.now += 2
    database.gate = threading.Event()
    reading = asyncio.create_task(ids(registry))
    await wait_until(lambda: database.reads == 2)
    database.rows = Rows((MODEL,))
    registry.invalidate()
    after = asyncio.create_task(ids(registry))
    await asyncio.sleep(0)
    database.gate.set()
    await reading
    assert await after == []


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


# --- the real database -----------------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_a_read_is_two_queries(django_assert_num_queries: Any) -> None:
    for name in ("m", "n"):
        model = ServedModel.objects.create(name=name, source="demo")
        Worker.objects.create(pk=f"w-{name}", model=model, host="h", endpoint="unix:/w", state="ready")
    with django_assert_num_queries(2):
        rows = query_rows()
    assert (len(rows.models), len(rows.workers)) == (2, 2)


@pytest.fixture
async def async_database(transactional_db: None) -> AsyncIterator[None]:
    """A database for asynchronous code, whose thread keeps its connection open until it is told to close it."""
    yield
    await sync_to_async(connections.close_all)()


async def test_it_shows_what_the_database_has(async_database: None) -> None:
    model = await ServedModel.objects.acreate(name="m", source="demo")
    await Worker.objects.acreate(
        pk="w1", model=model, host="h", endpoint="unix:/w1", state="ready", heartbeat_at=timezone.now(), info={"a": 1}
    )
    await Worker.objects.acreate(pk="w2", model=model, host="h", endpoint="unix:/w2", state="failed")
    views = await Registry().models()
    assert [(worker.worker_id, worker.info) for worker in views["m"].workers] == [("w1", {"a": 1})]
