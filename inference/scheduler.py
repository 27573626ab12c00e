"""Who runs next: a pure decision over plain data, without mlx and without a clock of its own.

The engine reports what arrives and what leaves; `admit` answers which waiting requests are prefilled now. Order is by
a key that is fixed on arrival: the time of arrival, plus the time that the prompt will take to compute, less a head
start for priority. So a short prompt overtakes a long one that came a little earlier, a request of higher priority
overtakes others, and nobody waits for ever, since requests that come later get ever larger keys. A request starts
when its rows fit the batch and its projected KV fits the memory budget.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

PROJECTED_NEW_TOKENS = 1024
"""Output tokens that admission reserves memory for when a request allows more; most completions are shorter. Rows that
outgrow their reservation are preempted when memory runs out, never failed."""

PRIORITY_HEAD_START_S = 10.0
"""How much earlier a request counts as having come for each step of priority."""

SHORT_FIRST_WEIGHT = 2.0
"""How much a prompt's prefill time counts against it. At 2, one that takes a second lets others pass that come up to
two seconds later, if they take no time themselves."""

WORTHWHILE_OVERLAP = 32
"""Tokens of a shared prefix that make it worth waiting until another request has computed them."""

_SCAN = 64
"""Waiting jobs that one decision looks at."""


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
        pads_prompts: whether prompts of unequal lengths may be computed together.
    """

    max_rows: int
    max_waiting: int
    kv_budget_bytes: int
    kv_bytes_per_token: int
    prefill_tokens_per_step: int
    pads_prompts: bool = True


@dataclass(frozen=True, slots=True)
class Job:
    """A request as the scheduler sees it.

    Attributes:
        rows: choices to generate.
        prompt_tokens: length of the prompt.
        max_new_tokens: most tokens each row may generate.
        priority: higher runs earlier; 0 is usual.
        arrived_s: when it came, on the engine's clock.
        deadline_s: when it is no longer worth starting, on the same clock.
        prefill_s: how long its prompt is expected to take, what is cached left aside.
    """

    request_id: str
    rows: int
    prompt_tokens: int
    max_new_tokens: int
    priority: int = 0
    arrived_s: float = 0.0
    deadline_s: float = float("inf")
    prefill_s: float = 0.0

    @property
    def key(self) -> float:
        """Return the place in the queue; lower runs earlier."""
        return self.arrived_s + SHORT_FIRST_WEIGHT * self.prefill_s - PRIORITY_HEAD_START_S * self.priority

    @property
    def projected_tokens(self) -> int:
        """Return the tokens of one row that memory is reserved for."""
        return self.prompt_tokens + min(self.max_new_tokens, PROJECTED_NEW_TOKENS)


@dataclass(order=True, slots=True)
class _Waiting:
    key: float
    number: int
    job: Job = field(compare=False)


class Scheduler:
    """The queue, and what is taken by requests that have started."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.row_limit = limits.max_rows
        """Rows that may run now; adaptive batching lowers and raises it."""
        self._waiting: list[_Waiting] = []
        self._numbers = 0
        self._started: dict[str, Job] = {}
        self._rows = 0

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        return len(self._waiting)

    @property
    def projected_kv_bytes(self) -> int:
        """Memory that the requests that have started are expected to need at most."""
        return self._padded_bytes(self._rows, max((job.projected_tokens for job in self._started.values()), default=0))

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            QueueFull: `max_waiting` jobs wait already.
            NeverFits: it could not start even alone.
        """
        if job.rows > self.limits.max_rows:
            raise NeverFits(f"{job.rows} completions at once are more than the {self.limits.max_rows} of a batch")
        if self._padded_bytes(job.rows, job.projected_tokens) > self.limits.kv_budget_bytes:
            raise NeverFits("the prompt needs more memory for its KV cache than this worker has")
        if len(self._waiting) >= self.limits.max_waiting:
            raise QueueFull(f"{self.limits.max_waiting} requests wait already")
        self._enqueue(job)

    def requeue(self, job: Job) -> None:
        """Queue a job again that was preempted; its place is by its first arrival."""
        self.leave(job.request_id)
        self._enqueue(job)

    def admit(
        self,
        *,
        known: Callable[[Job], int] = lambda _job: 0,
        overlap: Callable[[Job, Job], int] = lambda _first, _second: 0,
        computing: Sequence[Job] = (),
        budget: int | None = None,
        only_short: bool = False,
        one: bool = False,
    ) -> list[Job]:
        """Start the jobs to be prefilled next and return them.

        Several are returned only when all of them, padded to the longest, fit the prefill budget of one step; a longer
        prompt, and a job of several rows, is returned alone. A job that shares a prefix with one that is being
        computed, or that is about to be, waits until it can take that prefix from the cache.

        Args:
            known: returns how many tokens of a job's prompt need not be computed.
            overlap: returns how many tokens two prompts share from their start.
            computing: jobs whose prefill goes on already.
            budget: tokens that one step may compute; `prefill_tokens_per_step` when it is not given.
            only_short: admit only prompts that fit one step.
            one: admit one job at most.
        """
        budget = budget or self.limits.prefill_tokens_per_step
        group: list[Job] = []
        longest = 0
        for waiting in self._waiting[:_SCAN]:
            job = waiting.job
            if not self._fits(job):
                break
            cached = known(job)
            ahead = (*computing, *group)
            if any(overlap(job, other) - cached >= WORTHWHILE_OVERLAP for other in ahead):
                continue
            left = job.prompt_tokens - 1 - cached
            if only_short and (left > budget or job.rows > 1):
                continue
            alone = job.rows > 1 or max(longest, left) * (len(group) + 1) > budget
            if group and alone:
                break
            longest = max(longest, left)
            self._waiting.remove(waiting)
            self._started[job.request_id] = job
            self._rows += job.rows
            group.append(job)
            if alone or one:
                break
        return group

    def expired(self, now_s: float) -> list[str]:
        """Return the ids of waiting jobs whose deadline has passed."""
        return [waiting.job.request_id for waiting in self._waiting if waiting.job.deadline_s <= now_s]

    def leave(self, request_id: str) -> bool:
        """Forget a job, waiting or started, and return whether it was known."""
        job = self._started.pop(request_id, None)
        if job is not None:
            self._rows -= job.rows
            return True
        for waiting in self._waiting:
            if waiting.job.request_id == request_id:
                self._waiting.remove(waiting)
                return True
        return False

    def jobs(self) -> Iterator[Job]:
        """Return the waiting jobs in the order of their places."""
        return (waiting.job for waiting in self._waiting)

    def _enqueue(self, job: Job) -> None:
        self._numbers += 1
        insort(self._waiting, _Waiting(job.key, self._numbers, job))

    def _fits(self, job: Job) -> bool:
        rows = self._rows + job.rows
        if rows > max(self.row_limit, job.rows):
            return False
        longest = max((other.projected_tokens for other in self._started.values()), default=0)
        return self._padded_bytes(rows, max(longest, job.projected_tokens)) <= self.limits.kv_budget_bytes

    def _padded_bytes(self, rows: int, tokens: int) -> int:
        """Return the KV of a batch, in which every row is as long as the longest."""
        return rows * tokens * self.limits.kv_bytes_per_token


class AdaptiveLimit:
    """How many rows may run so that a step stays below a target time (flag `adaptive_batching`).

    Additive: one row less while the moving average is above the target, one more while it is clearly below. Never
    below two rows, never above the limit of the batch.

    Args:
        max_rows: the limit of the batch.
        target_ms: target of a decode step's time, which is the inter-token latency of every stream.
    """

    _ROOM = 0.9

    def __init__(self, max_rows: int, target_ms: float) -> None:
        self._max_rows = max_rows
        self._target_ms = target_ms
        self.limit = max_rows

    def update(self, step_ms: float, rows: int) -> int:
        """Return the limit after a step.

        Args:
            step_ms: moving average of the step time.
            rows: rows in the step.
        """
        if step_ms > self._target_ms:
            self.limit = min(self._max_rows, max(2, min(self.limit, rows) - 1))
        elif step_ms < self._target_ms * self._ROOM:
            self.limit = min(self._max_rows, self.limit + 1)
        return self.limit
