"""What the engine has done and how long it took: counters, moving averages, and the `Load` made from them."""

from __future__ import annotations

from bisect import bisect_left

from .prefix_cache import Stats
from .protocol import BATCH_ROW_BUCKETS, Load

_EMA_WEIGHT = 0.1


def _average(old: float, new: float) -> float:
    """Return the exponential moving average, starting with the first value."""
    return old + (new - old) * _EMA_WEIGHT if old else new


class Accounts:
    """Kept by the engine thread; `steps` is read by others."""

    def __init__(self) -> None:
        self.steps = 0
        """Decode steps started."""
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.requests = 0
        self.cancelled = 0
        self.cancel_steps_max = 0
        self.preempted = 0
        self.kv_bytes = 0
        self.memory_bytes = 0
        self.step_ms = 0.0
        """Moving average of a decode step without prefill."""
        self.prefill_s_per_token = 0.0
        """Moving average; 0 while nothing is known."""
        self._row_steps = 0
        self._batch_rows = [0] * (len(BATCH_ROW_BUCKETS) + 1)
        self._launched_s = 0.0
        self._chunk_tokens = 0

    def prefilled(self, tokens: int) -> None:
        """Note prompt tokens whose computation was started."""
        self.prompt_tokens += tokens
        self._chunk_tokens += tokens

    def cancel(self, *, in_batch: bool, at_step: int) -> None:
        """Note a cancelled request, and the steps for which its rows stayed in the batch."""
        self.cancelled += 1
        if in_batch:
            self.cancel_steps_max = max(self.cancel_steps_max, self.steps - at_step)

    def launched(self, now_s: float, rows: int) -> bool:
        """Note the start of a decode step; return whether the average of the step time has a new value.

        The time since the start before is that of a step, or of prefill where a chunk ran between the two.
        """
        self.steps += 1
        self._row_steps += rows
        self._batch_rows[bisect_left(BATCH_ROW_BUCKETS, rows)] += 1
        took_s, tokens = now_s - self._launched_s if self._launched_s else 0.0, self._chunk_tokens
        self._launched_s, self._chunk_tokens = now_s, 0
        if not took_s:
            return False
        if tokens:
            per_token = max(took_s - self.step_ms / 1000, 0.0) / tokens
            self.prefill_s_per_token = _average(self.prefill_s_per_token, per_token)
            return False
        self.step_ms = _average(self.step_ms, took_s * 1000)
        return True

    def idle(self) -> None:
        """Note a pause, which is not the time of a step."""
        self._launched_s = 0.0

    def load(self, *, running: int, waiting: int, row_limit: int, prefixes: Stats) -> Load:
        """Return the state of things.

        Args:
            running: rows in the batch.
            waiting: requests that are not in the batch.
            row_limit: rows that may run.
            prefixes: counters of the prefix cache.
        """
        return Load(
            running=running,
            waiting=waiting,
            kv_bytes=self.kv_bytes,
            memory_bytes=self.memory_bytes,
            step_ms=round(self.step_ms, 3),
            steps_total=self.steps,
            prompt_tokens_total=self.prompt_tokens,
            generated_tokens_total=self.generated_tokens,
            requests_total=self.requests,
            cancelled_total=self.cancelled,
            cancel_steps_max=self.cancel_steps_max,
            row_limit=row_limit,
            preempted_total=self.preempted,
            batch_rows=tuple(self._batch_rows),
            batch_rows_sum=self._row_steps,
            prefix_hits_total=prefixes.hits,
            prefix_misses_total=prefixes.misses,
            prefix_hit_tokens_total=prefixes.hit_tokens,
            prefix_evictions_total=prefixes.evictions,
            prefix_bytes=prefixes.bytes,
        )
