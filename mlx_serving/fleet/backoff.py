"""How long to wait before a crashed worker is started again: exponential backoff with full jitter. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_MAX_DOUBLINGS = 32


@dataclass(frozen=True, slots=True)
class Backoff:
    """The failures of one model's workers in a row, and when the next one may start."""

    failures: int = 0
    not_before: float = float("-inf")
    """On the caller's monotonic clock, in seconds."""

    def after_failure(
        self, *, now: float, ready_s: float, base_s: float, max_s: float, random: Callable[[], float]
    ) -> Backoff:
        """Return the state after one more failure.

        A worker that was ready for longer than the longest pause proved that the model runs, so counting starts anew.

        Args:
            now: the monotonic clock, in seconds.
            ready_s: how long the failed worker had been ready, in seconds.
            base_s: upper bound of the first pause, in seconds.
            max_s: upper bound of every pause, in seconds.
            random: returns a number in [0, 1); the pause is this fraction of its bound, so that the workers of many
                hosts do not start together.
        """
        failures = 0 if ready_s >= max_s else self.failures
        bound_s = min(max_s, base_s * 2 ** min(failures, _MAX_DOUBLINGS))
        return Backoff(failures=failures + 1, not_before=now + bound_s * random())
