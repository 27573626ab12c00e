"""The supervisor's reads and writes, against the database."""

import os
from pathlib import Path
from typing import Any

import pytest

from mlx_serving.fleet import store as subject
from mlx_serving.fleet.reconcile import Spec
from mlx_serving.fleet.store import KEPT_ROWS, Store, WorkerRow, abandoned
from mlx_serving.models import ServedModel, Worker

HERE = Path("/run/here")
GONE_PID = 2**22 + 1
"""Above every process id of Linux and macOS."""


@pytest.fixture(autouse=True)
def within_the_tests_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing connections, as the store does around each call, would end the test's transaction."""
    monkeypatch.setattr(subject, "close_old_connections", lambda: None)


@pytest.fixture
def model(db: None) -> ServedModel:
    return ServedModel.objects.create(name="m", source="org/m", max_rows=4)


@pytest.fixture
def store() -> Store:
    return Store("h", HERE)


def worker(model: ServedModel, pk: str, **values: Any) -> Worker:
    endpoint = f"unix:{HERE / pk}.sock"
    return Worker.objects.create(
        **{"pk": pk, "model": model, "host": "h", "endpoint": endpoint, "pid": os.getpid(), "state": "ready", **values}
    )


def row(model: ServedModel, state: str = "ready", **values: Any) -> WorkerRow:
    return WorkerRow("w1", model.pk, state, {"endpoint": "unix:/w1", "state": state, **values})


def states() -> dict[str, str]:
    return dict(Worker.objects.values_list("pk", "state"))


def test_only_wanted_models_are_read(store: Store, model: ServedModel) -> None:
    ServedModel.objects.create(name="off", source="org/off", wanted=False)
    assert store.wanted() == {model.pk: Spec(name="m", source="org/m", max_rows=4)}


def test_every_column_that_a_worker_is_started_with_is_in_its_spec(store: Store, model: ServedModel) -> None:
    not_for_workers = {"id", "wanted", "created_at", "updated_at"}
    columns = {field.name for field in ServedModel._meta.concrete_fields} - not_for_workers
    assert columns == set(Spec.__dataclass_fields__)


def test_a_worker_is_inserted_once_and_then_updated(
    store: Store, model: ServedModel, django_assert_num_queries: Any
) -> None:
    store.save([row(model, "starting")])
    with django_assert_num_queries(1):
        store.save([row(model, running=3)])
    assert list(Worker.objects.values_list("pk", "state", "running", "host")) == [("w1", "ready", 3, "h")]


def test_a_worker_of_a_deleted_model_is_not_stored_again(store: Store, model: ServedModel) -> None:
    store.save([row(model)])
    model.delete()
    store.save([WorkerRow("w1", 1, "draining", {"state": "draining", "endpoint": "unix:/w1"})])
    assert Worker.objects.count() == 0


@pytest.mark.django_db(transaction=True)
def test_a_model_deleted_before_its_workers_first_row_is_no_error(store: Store) -> None:
    store.save([WorkerRow("w1", 12345, "starting", {"state": "starting", "endpoint": "unix:/w1"})])
    assert Worker.objects.count() == 0


def test_the_oldest_ended_workers_are_forgotten(store: Store, model: ServedModel) -> None:
    for number in range(KEPT_ROWS + 5):
        worker(model, f"old{number:02}", state="failed")
    worker(model, "alive")
    store.save([row(model), row(model, "stopped")])
    left = set(states())
    assert len(left) == KEPT_ROWS + 1
    assert {"alive", "w1", f"old{KEPT_ROWS + 4}"} <= left
    assert "old00" not in left


def test_another_models_workers_are_not_forgotten(store: Store, model: ServedModel) -> None:
    other = ServedModel.objects.create(name="n", source="org/n")
    for number in range(KEPT_ROWS):
        worker(other, f"other{number:02}", state="failed")
    store.save([row(model, "stopped")])
    assert len(states()) == KEPT_ROWS + 1


def test_recovery_marks_what_an_earlier_supervisor_left(store: Store, model: ServedModel) -> None:
    worker(model, "same-folder")
    worker(model, "no-pid", pid=None, endpoint="unix:/run/elsewhere/a.sock")
    worker(model, "dead", pid=GONE_PID, endpoint="unix:/run/elsewhere/b.sock")
    worker(model, "elsewhere", endpoint="unix:/run/elsewhere/c.sock")
    worker(model, "other-host", host="other", pid=GONE_PID)
    worker(model, "ended", state="stopped")
    assert store.recover() == 3
    assert states() == {
        "same-folder": "failed",
        "no-pid": "failed",
        "dead": "failed",
        "elsewhere": "ready",
        "other-host": "ready",
        "ended": "stopped",
    }


def test_recovery_leaves_our_own_workers_alone(store: Store, model: ServedModel) -> None:
    store.save([row(model, endpoint=f"unix:{HERE}/w1.sock")])
    assert store.recover() == 0
    assert states() == {"w1": "ready"}


@pytest.mark.parametrize(
    ("endpoint", "pid", "alive", "expected"),
    [
        ("unix:/run/here/a.sock", 1, True, True),
        ("unix:/run/there/a.sock", 1, True, False),
        ("unix:/run/there/a.sock", 1, False, True),
        ("unix:/run/there/a.sock", None, False, True),
    ],
)
def test_whose_supervisor_has_gone(endpoint: str, pid: int | None, alive: bool, expected: bool) -> None:
    assert abandoned(endpoint, pid, HERE, alive=alive) is expected
