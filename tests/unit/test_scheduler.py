"""Who runs next."""

from __future__ import annotations

from typing import Any

import pytest

from inference.scheduler import PROJECTED_NEW_TOKENS, Job, Limits, NeverFits, QueueFull, Scheduler


def _scheduler(**changes: Any) -> Scheduler:
    limits = {
        "max_rows": 4,
        "max_waiting": 10,
        "kv_budget_bytes": 10**9,
        "kv_bytes_per_token": 100,
        "prefill_tokens_per_step": 100,
    }
    return Scheduler(Limits(**{**limits, **changes}))


def _job(name: str, *, rows: int = 1, prompt: int = 10, new: int = 20) -> Job:
    return Job(name, rows, prompt, new)


def _admit(scheduler: Scheduler) -> list[str]:
    return [job.request_id for job in scheduler.admit()]


def test_short_prompts_are_prefilled_together_up_to_the_budget() -> None:
    scheduler = _scheduler(max_rows=10)
    for name in "abcdef":
        scheduler.submit(_job(name, prompt=25))

    assert _admit(scheduler) == ["a", "b", "c", "d"]
    assert _admit(scheduler) == ["e", "f"]


def test_budget_counts_the_padding() -> None:
    scheduler = _scheduler()
    for name, prompt in (("a", 10), ("b", 10), ("c", 40)):
        scheduler.submit(_job(name, prompt=prompt))

    assert _admit(scheduler) == ["a", "b"]
    assert _admit(scheduler) == ["c"]


def test_long_prompt_is_prefilled_alone() -> None:
    scheduler = _scheduler()
    scheduler.submit(_job("long", prompt=500))
    scheduler.submit(_job("short"))

    assert _admit(scheduler) == ["long"]
    assert _admit(scheduler) == ["short"]


def test_several_choices_are_prefilled_alone() -> None:
    scheduler = _scheduler()
    scheduler.submit(_job("a"))
    scheduler.submit(_job("three", rows=3))

    assert _admit(scheduler) == ["a"]
    assert _admit(scheduler) == ["three"]


def test_rows_are_limited_and_given_back() -> None:
    scheduler = _scheduler(max_rows=2)
    for name in "abc":
        scheduler.submit(_job(name))

    assert _admit(scheduler) == ["a", "b"]
    assert _admit(scheduler) == []
    assert scheduler.leave("a")
    assert _admit(scheduler) == ["c"]


def test_memory_is_reserved_and_given_back() -> None:
    scheduler = _scheduler(kv_budget_bytes=7000)
    scheduler.submit(_job("a"))
    scheduler.submit(_job("b"))
    scheduler.submit(_job("c"))

    assert _admit(scheduler) == ["a", "b"]
    assert scheduler.projected_kv_bytes == 2 * 31 * 100
    scheduler.leave("b")
    assert _admit(scheduler) == ["c"]
    scheduler.leave("a")
    scheduler.leave("c")
    assert scheduler.projected_kv_bytes == 0


def test_open_ended_requests_reserve_a_bounded_length() -> None:
    scheduler = _scheduler()

    assert scheduler.projected_bytes(_job("a", new=10**6)) == (11 + PROJECTED_NEW_TOKENS) * 100


def test_full_queue_refuses() -> None:
    scheduler = _scheduler(max_waiting=2)
    scheduler.submit(_job("a"))
    scheduler.submit(_job("b"))

    with pytest.raises(QueueFull):
        scheduler.submit(_job("c"))


@pytest.mark.parametrize("job", [_job("rows", rows=5), _job("prompt", prompt=10**8)])
def test_what_can_never_start_is_refused_at_once(job: Job) -> None:
    with pytest.raises(NeverFits):
        _scheduler().submit(job)


def test_waiting_job_can_leave_and_an_unknown_one_is_no_error() -> None:
    scheduler = _scheduler(max_rows=1)
    for name in "abc":
        scheduler.submit(_job(name))
    scheduler.admit()

    assert scheduler.leave("b")
    assert not scheduler.leave("b")
    assert scheduler.waiting == 1
    scheduler.leave("a")
    assert _admit(scheduler) == ["c"]
