"""Who runs next."""

from __future__ import annotations

from typing import Any

import pytest

from inference.scheduler import (
    PRIORITY_HEAD_START_S,
    PROJECTED_NEW_TOKENS,
    AdaptiveLimit,
    Job,
    Limits,
    NeverFits,
    QueueFull,
    Scheduler,
)


def _scheduler(**changes: Any) -> Scheduler:
    limits = {
        "max_rows": 4,
        "max_waiting": 10,
        "kv_budget_bytes": 10**9,
        "kv_bytes_per_token": 100,
        "prefill_tokens_per_step": 100,
    }
    return Scheduler(Limits(**{**limits, **changes}))


def _job(name: str, *, rows: int = 1, prompt: int = 10, new: int = 20, **changes: Any) -> Job:
    return Job(name, rows, prompt, new, **changes)


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
    assert scheduler.projected_kv_bytes == 2 * 30 * 100
    scheduler.leave("b")
    assert _admit(scheduler) == ["c"]
    scheduler.leave("a")
    scheduler.leave("c")
    assert scheduler.projected_kv_bytes == 0


def test_open_ended_requests_reserve_a_bounded_length() -> None:
    scheduler = _scheduler()

    scheduler.submit(_job("a", new=10**6))
    scheduler.admit()

    assert scheduler.projected_kv_bytes == (10 + PROJECTED_NEW_TOKENS) * 100


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


def test_memory_counts_every_row_as_long_as_the_longest() -> None:
    scheduler = _scheduler(kv_budget_bytes=12_000, prefill_tokens_per_step=1000)
    scheduler.submit(_job("long", prompt=80))
    scheduler.submit(_job("short", prompt=10))

    # Two rows of 100 padded tokens would take 20,000 bytes.
    assert _admit(scheduler) == ["long"]
    assert _admit(scheduler) == []


def test_short_prompt_overtakes_a_long_one_that_came_just_before() -> None:
    scheduler = _scheduler(max_rows=1)
    scheduler.submit(_job("long", arrived_s=0.0, prefill_s=3.0))
    scheduler.submit(_job("short", arrived_s=1.0, prefill_s=0.01))

    assert _admit(scheduler) == ["short"]


def test_long_prompt_is_overtaken_only_for_a_while() -> None:
    scheduler = _scheduler(max_rows=1)
    scheduler.submit(_job("long", arrived_s=0.0, prefill_s=3.0))
    scheduler.submit(_job("late", arrived_s=7.0, prefill_s=0.01))

    assert _admit(scheduler) == ["long"]


def test_priority_counts_like_time_waited() -> None:
    scheduler = _scheduler(max_rows=1)
    scheduler.submit(_job("first", arrived_s=0.0))
    scheduler.submit(_job("urgent", arrived_s=PRIORITY_HEAD_START_S - 1, priority=1))
    scheduler.submit(_job("too late", arrived_s=2 * PRIORITY_HEAD_START_S, priority=1))

    order = []
    for _ in range(3):
        order += _admit(scheduler)
        scheduler.leave(order[-1])
    assert order == ["urgent", "first", "too late"]


def test_cached_tokens_do_not_count_as_prefill() -> None:
    scheduler = _scheduler()
    for name in "ab":
        scheduler.submit(_job(name, prompt=500))

    assert [job.request_id for job in scheduler.admit(known=lambda _job: 480)] == ["a", "b"]


def test_job_waits_for_a_prefix_that_another_is_computing() -> None:
    scheduler = _scheduler()
    for name in ("a", "same", "other"):
        scheduler.submit(_job(name, prompt=50 if name != "other" else 40))

    def overlap(first: Job, second: Job) -> int:
        return 40 if {first.request_id, second.request_id} == {"a", "same"} else 0

    assert [job.request_id for job in scheduler.admit(overlap=overlap)] == ["a", "other"]
    started = [_job("a", prompt=50)]
    assert scheduler.admit(overlap=overlap, computing=started) == []
    assert [job.request_id for job in scheduler.admit(overlap=overlap, known=lambda _job: 40)] == ["same"]


def test_only_short_jobs_run_between_the_chunks_of_a_long_one() -> None:
    scheduler = _scheduler()
    scheduler.submit(_job("long", prompt=500))
    scheduler.submit(_job("short", prompt=20))

    assert [job.request_id for job in scheduler.admit(only_short=True)] == ["short"]


def test_expired_jobs_are_named() -> None:
    scheduler = _scheduler()
    scheduler.submit(_job("a", deadline_s=5.0))
    scheduler.submit(_job("b"))

    assert scheduler.expired(4.0) == []
    assert scheduler.expired(5.0) == ["a"]


def test_row_limit_holds_new_rows_back_but_never_a_lone_request() -> None:
    scheduler = _scheduler()
    scheduler.row_limit = 2
    for name in "abc":
        scheduler.submit(_job(name))
    scheduler.submit(_job("four", rows=4))

    assert _admit(scheduler) == ["a", "b"]
    for name in "abc":
        scheduler.leave(name)
    assert _admit(scheduler) == ["four"]


def test_preempted_job_comes_back_at_its_old_place() -> None:
    scheduler = _scheduler(max_rows=1)
    scheduler.submit(_job("a", arrived_s=1.0))
    scheduler.admit()
    scheduler.submit(_job("b", arrived_s=2.0))
    scheduler.requeue(_job("a", arrived_s=1.0, prompt=15))

    assert _admit(scheduler) == ["a"]


def test_adaptive_limit_falls_above_the_target_and_rises_below_it() -> None:
    limit = AdaptiveLimit(max_rows=8, target_ms=100)

    assert [limit.update(150, rows) for rows in (8, 7, 6, 5)] == [7, 6, 5, 4]
    assert limit.update(95, 4) == 4
    assert [limit.update(50, 4) for _ in range(6)] == [5, 6, 7, 8, 8, 8]
    for rows in (8, 6, 4, 3, 2, 2):
        limit.update(150, rows)
    assert limit.limit == 2
