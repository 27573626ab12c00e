"""Prompts between the queue and the batch: admission, reuse of known prefixes, and chunks of prefill.

At most two groups are being computed: one that needs many chunks, and a short one that runs between them, so that a
long prompt does not hold up short ones. Groups that are complete wait here until they join the batch. Runs on the
engine thread only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .batch import Cache, Prefill, row_kv
from .loading import LoadedModel
from .prefix_cache import PrefixCache
from .radix import Tokens, common_length
from .running import Running
from .scheduler import Job, Scheduler

_MAX_CHECKPOINTS = 4


@dataclass(slots=True)
class Lane:
    """A group of prompts that are prefilled together."""

    group: list[Running]
    prefill: Prefill
    cached: list[int]
    """Tokens of each prompt that came from the prefix cache."""
    checkpoints: list[int] = field(default_factory=list)
    """Lengths at which a single prompt's KV is to be remembered on its way, ascending."""


class PrefillFailed(Exception):
    """The model raised on a group of prompts; nothing else is affected."""

    def __init__(self, group: list[Running], cause: Exception) -> None:
        super().__init__(str(cause))
        self.group = group
        self.cause = cause


class Prefilling:
    """The groups on their way.

    Args:
        loaded: the model.
        scheduler: decides who is next.
        prefixes: the prefix cache.
    """

    def __init__(self, loaded: LoadedModel, scheduler: Scheduler, prefixes: PrefixCache) -> None:
        self._loaded = loaded
        self._scheduler = scheduler
        self._prefixes = prefixes
        self.reuse = True
        """Whether the prefix cache is used."""
        self._lanes: list[Lane] = []
        self._turn = 0

    @property
    def idle(self) -> bool:
        """Whether no prompt is on its way."""
        return not self._lanes

    def take_ready(self) -> list[Lane]:
        """Return the groups whose prefill has been started to its end; they may join the batch."""
        ready = [lane for lane in self._lanes if lane.prefill.remaining == 0]
        self._lanes = [lane for lane in self._lanes if lane.prefill.remaining > 0]
        return ready

    def drop(self, running: Running) -> None:
        """Forget a request that was cancelled; prompts that are computed together with it go on."""
        self._lanes = [lane for lane in self._lanes if lane.group != [running]]

    def advance(self, requests: Mapping[str, Running], budget: int) -> tuple[int, Lane | None]:
        """Admit what may start, start computing one chunk, and return its tokens and its group.

        Args:
            requests: the engine's requests by id.
            budget: most tokens of the chunk.

        Raises:
            PrefillFailed: the model raised; the group is not on its way any more.
        """
        open_lanes = [lane for lane in self._lanes if lane.prefill.remaining > 0]
        if not open_lanes or (len(open_lanes) == 1 and open_lanes[0].prefill.remaining > budget):
            admitted = self._admit(requests, open_lanes, budget)
            open_lanes += [] if admitted is None else [admitted]
        if not open_lanes:
            return 0, None
        self._turn += 1
        lane = open_lanes[self._turn % len(open_lanes)]
        try:
            return self._chunk(lane, budget), lane
        except Exception as error:
            self._lanes.remove(lane)
            raise PrefillFailed(lane.group, error) from error

    def _admit(self, requests: Mapping[str, Running], open_lanes: Sequence[Lane], budget: int) -> Lane | None:
        def known(job: Job) -> int:
            return self._prefixes.known(requests[job.request_id].prompt) if self.reuse else 0

        def overlap(first: Job, second: Job) -> int:
            if not self.reuse:
                return 0
            return common_length(requests[first.request_id].prompt, requests[second.request_id].prompt)

        jobs = self._scheduler.admit(
            known=known,
            overlap=overlap,
            computing=[running.job for lane in open_lanes for running in lane.group],
            budget=budget,
            only_short=bool(open_lanes),
            one=self._prefixes.needs_snapshots or not self._scheduler.limits.pads_prompts,
        )
        if not jobs:
            return None
        group = [requests[job.request_id] for job in jobs]
        try:
            lane = self._lane(group, requests)
        except Exception as error:
            raise PrefillFailed(group, error) from error
        self._lanes.append(lane)
        return lane

    def _lane(self, group: list[Running], requests: Mapping[str, Running]) -> Lane:
        caches: list[Cache] = []
        cached: list[int] = []
        for running in group:
            cache, length = self._prefixes.take(running.prompt) if self.reuse else (self._loaded.make_cache(), 0)
            caches.append(cache)
            cached.append(length)
            if running.cached_tokens is None:
                running.cached_tokens = length
        suffixes = [running.prompt[length:].tolist() for running, length in zip(group, cached, strict=True)]
        lane = Lane(group, Prefill(self._loaded.model, suffixes, caches), cached)
        if self.reuse and self._prefixes.needs_snapshots and len(group) == 1:
            others = [requests[job.request_id].prompt for job in self._scheduler.jobs()]
            lane.checkpoints = self._checkpoints(group[0].prompt, cached[0], others)
        return lane

    def _checkpoints(self, prompt: Tokens, cached: int, others: Sequence[Tokens]) -> list[int]:
        """Return where other prompts part from this one: only there can they take over KV that cannot be cut."""
        lengths = {self._prefixes.shared(prompt), *(common_length(prompt, other) for other in others)}
        return sorted(length for length in lengths if cached < length < len(prompt) - 1)[-_MAX_CHECKPOINTS:]

    def _chunk(self, lane: Lane, budget: int) -> int:
        prefill = lane.prefill
        computed = 0
        if prefill.remaining > 0:
            if lane.checkpoints:
                budget = min(budget, lane.checkpoints[0] - lane.cached[0] - prefill.done)
            computed = prefill.advance(budget)
            if lane.checkpoints and lane.cached[0] + prefill.done == lane.checkpoints[0]:
                length = lane.checkpoints.pop(0)
                self._prefixes.put_row(lane.group[0].prompt[:length], prefill.cache)
        if prefill.remaining == 0 and self.reuse:
            self._remember(lane)
        return computed

    def _remember(self, lane: Lane) -> None:
        if len(lane.group) == 1:
            prompt = lane.group[0].prompt
            if lane.cached[0] < len(prompt) - 1:
                self._prefixes.put_row(prompt[:-1], lane.prefill.cache)
            return
        layers, _ = self._prefixes.split_layers(lane.prefill.cache)
        for row, running in enumerate(lane.group):
            length = len(running.prompt) - 1
            if lane.cached[row] < length:
                self._prefixes.put(running.prompt[:-1], row_kv(layers, row, length), ())
