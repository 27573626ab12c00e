"""What the supervisor decides. Every case is plain data."""

from dataclasses import replace
from typing import Any

import pytest

from mlx_serving.fleet.reconcile import (
    EXIT_GRACE_S,
    HANDOVER_S,
    UNRESPONSIVE_S,
    Action,
    Desired,
    Drain,
    Kill,
    Observed,
    Retire,
    Spec,
    Start,
    plan,
)

NOW = 1000.0
START_TIMEOUT_S = 600.0
SPEC = Spec(name="m", source="org/m")
NEW = replace(SPEC, reload_token=1)


def worker(worker_id: str = "w1", state: str = "ready", **values: Any) -> Observed:
    moments = {"state_since": NOW, "started_at": NOW, "answered_at": NOW}
    return Observed(**{"worker_id": worker_id, "model_id": 1, "spec": SPEC, "state": state, **moments, **values})


def decide(*observed: Observed, spec: Spec | None = SPEC, not_before: float = 0.0) -> list[Action]:
    desired = [] if spec is None else [Desired(1, spec, not_before)]
    return plan(desired, observed, NOW, start_timeout_s=START_TIMEOUT_S)


def kinds(actions: list[Action]) -> list[tuple[str, str]]:
    return [(type(action).__name__, getattr(action, "worker_id", "")) for action in actions]


def test_a_wanted_model_without_a_worker_gets_one() -> None:
    assert decide() == [Start(1, SPEC)]


@pytest.mark.parametrize("state", ["starting", "loading", "ready"])
def test_a_worker_that_fits_is_left_alone(state: str) -> None:
    assert decide(worker(state=state)) == []


def test_nothing_starts_before_the_pause_is_over() -> None:
    assert decide(not_before=NOW + 0.1) == []
    assert decide(not_before=NOW) == [Start(1, SPEC)]


def test_a_failed_worker_ends_before_the_next_is_started() -> None:
    # Only its end says how long the pause has to be.
    assert decide(worker(state="failed")) == []
    assert decide(worker(state="failed"), spec=NEW) == [Start(1, NEW)]


@pytest.mark.parametrize("state", ["draining", "stopped"])
def test_a_worker_on_its_way_out_does_not_count(state: str) -> None:
    assert decide(worker(state=state)) == [Start(1, SPEC)]


@pytest.mark.parametrize("state", ["starting", "loading", "ready"])
def test_a_worker_of_an_unwanted_model_drains(state: str) -> None:
    assert decide(worker(state=state), spec=None) == [Drain("w1", "no longer wanted")]


def test_a_worker_is_told_to_drain_once() -> None:
    assert decide(worker(drain_deadline=NOW + 30), spec=None) == []


def test_a_drained_worker_does_not_keep_its_model_from_starting_again() -> None:
    assert decide(worker(drain_deadline=NOW + 30)) == [Start(1, SPEC)]


def test_a_worker_that_outlives_its_drain_deadline_is_killed() -> None:
    late = worker(drain_deadline=NOW - EXIT_GRACE_S)
    assert kinds(decide(late, spec=None)) == [("Kill", "w1")]
    assert decide(replace(late, drain_deadline=NOW - EXIT_GRACE_S + 0.1), spec=None) == []


def test_a_killed_worker_is_left_to_die() -> None:
    assert decide(worker(drain_deadline=NOW - 100, killed=True), spec=None) == []


@pytest.mark.parametrize("state", ["starting", "loading"])
def test_a_hung_start_is_killed(state: str) -> None:
    hung = worker(state=state, started_at=NOW - START_TIMEOUT_S)
    assert decide(hung) == [Kill("w1", "it was not ready after 600 s"), Start(1, SPEC)]
    assert decide(replace(hung, started_at=NOW - START_TIMEOUT_S + 1)) == []


def test_a_silent_worker_is_killed_and_replaced() -> None:
    silent = worker(answered_at=NOW - UNRESPONSIVE_S)
    assert kinds(decide(silent)) == [("Kill", "w1"), ("Start", "")]
    assert decide(replace(silent, answered_at=NOW - UNRESPONSIVE_S + 1)) == []


def test_a_loading_worker_may_be_silent() -> None:
    assert decide(worker(state="loading", answered_at=NOW - 10 * UNRESPONSIVE_S, started_at=NOW - 400)) == []


def test_a_failed_worker_that_does_not_exit_is_killed() -> None:
    stuck = worker(state="failed", state_since=NOW - EXIT_GRACE_S)
    assert kinds(decide(stuck, not_before=NOW + 1)) == [("Kill", "w1")]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"source": "org/other"},
        {"revision": "v2"},
        {"dtype": "float32"},
        {"context_length": 64},
        {"max_rows": 4},
        {"reload_token": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_change_of_the_model_starts_a_new_worker_and_keeps_the_old(change: dict[str, Any]) -> None:
    changed = replace(SPEC, **change)
    assert decide(worker(), spec=changed) == [Start(1, changed)]


@pytest.mark.parametrize("state", ["starting", "loading"])
def test_the_old_worker_serves_until_the_new_one_is_ready(state: str) -> None:
    assert decide(worker("old"), worker("new", state, spec=NEW), spec=NEW) == []


def test_the_old_worker_serves_until_others_can_know_of_the_new_one() -> None:
    assert decide(worker("old"), worker("new", spec=NEW), spec=NEW) == []


def test_the_old_worker_retires_when_the_new_one_is_known() -> None:
    assert decide(worker("old"), worker("new", spec=NEW, ready_published=True), spec=NEW) == [Retire("old")]


def test_a_retired_worker_drains_once_nobody_can_be_on_the_way_to_it() -> None:
    fresh = worker("new", spec=NEW, ready_published=True)
    old = worker("old", retiring=True)
    assert decide(old, fresh, spec=NEW) == []
    told = replace(old, retirement_published_at=NOW - HANDOVER_S + 0.1)
    assert decide(told, fresh, spec=NEW) == []
    told = replace(old, retirement_published_at=NOW - HANDOVER_S)
    assert decide(told, fresh, spec=NEW) == [Drain("old", "replaced")]


def test_a_retired_worker_drains_at_once_when_its_model_is_unloaded() -> None:
    assert decide(worker(retiring=True), spec=None) == [Drain("w1", "no longer wanted")]


def test_an_outdated_worker_that_is_not_ready_makes_way_at_once() -> None:
    outdated = worker("old", "loading")
    assert decide(outdated, spec=NEW) == [Start(1, NEW), Drain("old", "outdated before it was ready")]


def test_a_reload_that_fails_leaves_the_old_worker_in_service() -> None:
    assert decide(worker("old"), worker("new", "failed", spec=NEW), spec=NEW, not_before=NOW + 5) == []


def test_models_are_independent() -> None:
    desired = [Desired(1, SPEC), Desired(2, replace(SPEC, name="n"))]
    actions = plan(desired, [worker(model_id=1), worker("w3", model_id=3)], NOW, start_timeout_s=START_TIMEOUT_S)
    assert actions == [Drain("w3", "no longer wanted"), Start(2, replace(SPEC, name="n"))]
