"""How long to wait before a restart."""

from itertools import pairwise

from mlx_serving.fleet.backoff import Backoff


def pauses(
    count: int, *, random: float = 1.0, ready_s: float = 0.0, base_s: float = 1.0, max_s: float = 30.0
) -> list[float]:
    backoff, found = Backoff(), []
    for _ in range(count):
        backoff = backoff.after_failure(now=100.0, ready_s=ready_s, base_s=base_s, max_s=max_s, random=lambda: random)
        found.append(backoff.not_before - 100.0)
    return found


def test_a_fresh_model_starts_at_once() -> None:
    assert Backoff().not_before < 0


def test_the_bound_doubles_with_each_failure_up_to_the_longest() -> None:
    assert pauses(7) == [1, 2, 4, 8, 16, 30, 30]


def test_jitter_takes_any_part_of_the_bound() -> None:
    assert pauses(3, random=0.25) == [0.25, 0.5, 1.0]
    assert pauses(3, random=0.0) == [0, 0, 0]


def test_a_worker_that_was_ready_for_long_starts_the_count_anew() -> None:
    assert pauses(4, ready_s=30.0) == [1, 1, 1, 1]


def test_a_worker_that_was_ready_for_a_moment_does_not() -> None:
    assert all(longer > shorter for shorter, longer in pairwise(pauses(4, ready_s=29.9)))


def test_thousands_of_failures_do_not_overflow() -> None:
    assert pauses(5000)[-1] == 30
