"""Who runs next: a pure decision over plain data, without mlx and without a clock of its own.

The engine reports what arrives and what leaves; `admit` answers which waiting requests are prefilled now. First come,
first served; a request starts when its rows fit the batch and its projected KV fits the memory budget.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

PROJECTED_NEW_TOKENS = 1024
"""Output tokens that admission reserves memory for when a request allows more; most completions are shorter."""


class QueueFull(Exception):
    """As many requests wait as may."""


class NeverFits(Exception):
    """The request needs more rows or memory than there can be."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the batch.

    Attributes:
        max_rows: sequences decoded together.
        max_waiting: requests that may wait.
        kv_budget_bytes: memory for KV.
        kv_bytes_per_token: KV of one token of one row.
        prefill_tokens_per_step: prompt tokens computed between two decode steps.
    """

    max_rows: int
    max_waiting: int
    kv_budget_bytes: int
    kv_bytes_per_token: int
    prefill_tokens_per_step: int


@dataclass(frozen=True, slots=True)
class Job:
    """A request as the scheduler sees it.

    Attributes:
        rows: choices to generate.
        prefill_tokens: prompt tokens to compute before the first decode step.
        max_new_tokens: most tokens each row may generate.
    """

    request_id: str
    rows: int
    prefill_tokens: int
    max_new_tokens: int


class Scheduler:
    """The queue, and what is taken by requests that have started."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._waiting: deque[Job] = deque()
        self._started: dict[str, Job] = {}
        self._rows = 0
        self._kv_bytes = 0

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        return len(self._waiting)

    @property
    def projected_kv_bytes(self) -> int:
        """Memory reserved for the requests that have started."""
        return self._kv_bytes

    def projected_bytes(self, job: Job) -> int:
        """Return the KV memory that a job is expected to need at most."""
        tokens = job.prefill_tokens + 1 + min(job.max_new_tokens, PROJECTED_NEW_TOKENS)
        return tokens * job.rows * self.limits.kv_bytes_per_token

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            QueueFull: `max_waiting` jobs wait already.
            NeverFits: it could not start even alone.
        """
        if job.rows > self.limits.max_rows:
            raise NeverFits(
                f"{job.rows} completions at once are more than the {self.limits.max_rows} that a batch holds"
            )
        if self.projected_bytes(job) > self.limits.kv_budget_bytes:
            raise NeverFits("the prompt needs more memory for its KV cache than this worker has")
        if len(self._waiting) >= self.limits.max_waiting:
            raise QueueFull(f"{self.limits.max_waiting} requests wait already")
        self._waiting.append(job)

    def admit(self) -> list[Job]:
        """Start the jobs to be prefilled next and return them.

        Several are returned only when all of them, padded to the longest, fit the prefill budget of one step. A longer
        prompt, and a job of several rows, is returned alone.
        """
        group: list[Job] = []
        longest = 0
        while self._waiting:
            job = self._waiting[0]
            if not self._fits(job):
                break
            longest = max(longest, job.prefill_tokens)
            alone = job.rows > 1 or longest * (len(group) + 1) > self.limits.prefill_tokens_per_step
            if group and alone:
                break
            self._waiting.popleft()
            self._started[job.request_id] = job
            self._rows += job.rows
            self._kv_bytes += self.projected_bytes(job)
            group.append(job)
            if alone:
                break
        return group

    def leave(self, request_id: str) -> bool:
        """Forget a job, waiting or started, and return whether it was known."""
        job = self._started.pop(request_id, None)
        if job is not None:
            self._rows -= job.rows
            self._kv_bytes -= self.projected_bytes(job)
            return True
        for waiting in self._waiting:
            if waiting.request_id == request_id:
                self._waiting.remove(waiting)
                return True
        return False

    def request_ids(self) -> Iterable[str]:
        """Return the ids of all jobs, started ones first."""
        return [*self._started, *(job.request_id for job in self._waiting)]

    def _fits(self, job: Job) -> bool:
        limits = self.limits
        return (
            self._rows + job.rows <= limits.max_rows
            and self._kv_bytes + self.projected_bytes(job) <= limits.kv_budget_bytes
        )
