"""The step loop: admit, prefill, decode, sample, emit. The only thread that touches mlx runs it.

The server hands requests over with `submit` and `cancel`, which only put them into a queue, and gets events back
through the `emit` callback, once per step. On a GPU a step starts the next decode first and then, while the device
computes, reads the tokens of the step before, turns them into text and starts a chunk of prefill, so the host's work
and the device's overlap. On a CPU there is nothing to overlap with, and tokens are emitted before the chunk is
computed. Either way a long prompt delays running rows by one chunk at most.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from .accounts import Accounts
from .batch import DecodeBatch, Launched, row_kv
from .grammar import fill_masks
from .loading import LoadedModel
from .prefilling import Lane, PrefillFailed, Prefilling
from .prefix_cache import PrefixCache, as_tokens
from .protocol import (
    Accepted,
    Configure,
    Delta,
    Event,
    Failed,
    FailureCode,
    Finished,
    FinishReason,
    Load,
    Progress,
    TokenLogprob,
    Usage,
)
from .running import PreparedRequest, Row, Running
from .sampling import Allowed, Logprobs, RowSampling, choice_seed
from .scheduler import AdaptiveLimit, Job, Limits, NeverFits, QueueFull, Scheduler
from .text import Piece

logger = logging.getLogger(__name__)

_PREFILL_GAP_S = 0.1
"""Time that prefill may take between two decode steps, where one chunk takes less."""
_MAX_PRESSURE = 4
"""How many times larger chunks get, at most, when as many requests wait."""
_MEASURE_EVERY_STEPS = 16
_CLEAR_CACHE_EVERY_STEPS = 512

Emit: TypeAlias = Callable[[list[Event], Load], None]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is set up with.

    Attributes:
        limits: what bounds the batch.
        prefix_cache_bytes: most memory for known prefixes, out of the KV budget.
        target_itl_ms: step time above which adaptive batching starts no further rows.
        runs_ahead: start the next step before the last one has been read.
        features: which features are on at first.
    """

    limits: Limits
    prefix_cache_bytes: int
    target_itl_ms: float
    runs_ahead: bool
    features: Configure


@dataclass(frozen=True, slots=True)
class _Submit:
    prepared: PreparedRequest
    at_s: float


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: str
    at_step: int


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class Engine:
    """Runs requests on one loaded model. `run` is called by the thread that loaded it; the rest from any thread."""

    def __init__(
        self,
        loaded: LoadedModel,
        options: EngineOptions,
        emit: Emit,
        worker_id: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loaded = loaded
        self._worker_id = worker_id
        self._emit = emit
        self._clock = clock
        self._limits = options.limits
        self._runs_ahead = options.runs_ahead
        self._scheduler = Scheduler(options.limits)
        self._adaptive = AdaptiveLimit(options.limits.max_rows, options.target_itl_ms)
        self._prefixes = PrefixCache(loaded.make_cache, options.prefix_cache_bytes)
        self._prefilling = Prefilling(loaded, self._scheduler, self._prefixes)
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | Configure | _Stop] = queue.SimpleQueue()
        self._requests: dict[str, Running] = {}
        self._batch: DecodeBatch[Row] = self._new_batch()
        self._in_flight: Launched[Row] | None = None
        self._events: list[Event] = []
        self._stopped = False
        self._accounts = Accounts()
        self._configure(options.features)

    # --- from any thread ---------------------------------------------------------------------------------------------

    def submit(self, prepared: PreparedRequest) -> None:
        """Hand over a request. Its events arrive through `emit`."""
        self._inbox.put(_Submit(prepared, self._clock()))

    def cancel(self, request_id: str) -> None:
        """Take a request out of the batch before the next step. No further event of it is emitted."""
        self._inbox.put(_Cancel(request_id, self._accounts.steps))

    def configure(self, features: Configure) -> None:
        """Switch features on or off from the next step on."""
        self._inbox.put(features)

    def stop(self) -> None:
        """Make `run` return after the current step."""
        self._inbox.put(_Stop())

    # --- the engine thread -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Step until `stop` is called; sleep while there is nothing to do."""
        self._publish()
        while not self._stopped:
            self._take_commands()
            if not self._stopped:
                self.step()

    def step(self) -> None:
        """Do what is due: join, decode, collect, prefill; then emit what came of it."""
        previous, self._in_flight = self._in_flight, None
        try:
            for lane in self._prefilling.take_ready():
                self._join(lane)
            self._decode(previous)
        except Exception as error:
            # Whatever mlx raised, the rows of this batch are lost; the process and its queue are not.
            logger.exception("decode step failed")
            self._fail_batch(error)
        if self._events and not self._runs_ahead:
            self._publish()
        self._advance_prefill()
        self._publish()

    def _new_batch(self) -> DecodeBatch[Row]:
        info = self._loaded.info
        return DecodeBatch(self._loaded.model, info.vocab_size, merges=info.batched)

    # --- commands ----------------------------------------------------------------------------------------------------

    def _idle(self) -> bool:
        return (
            not self._batch.rows and self._in_flight is None and self._prefilling.idle and not self._scheduler.waiting
        )

    def _take_commands(self) -> None:
        block = self._idle()
        if block:
            self._accounts.idle()
        while True:
            try:
                command = self._inbox.get(block=block)
            except queue.Empty:
                return
            block = False
            match command:
                case _Submit(prepared, at_s):
                    self._accept(prepared, at_s)
                case _Cancel(request_id, at_step):
                    self._drop(request_id, at_step)
                case Configure():
                    self._configure(command)
                case _Stop():
                    self._stopped = True
                    return

    def _configure(self, features: Configure) -> None:
        self._prefilling.reuse = features.prefix_cache
        if not features.prefix_cache:
            self._prefixes.clear()
        self._adapts = features.adaptive_batching
        if not features.adaptive_batching:
            self._scheduler.row_limit = self._limits.max_rows

    def _accept(self, prepared: PreparedRequest, at_s: float) -> None:
        request = prepared.request
        prompt = as_tokens(prepared.prompt)
        job = Job(
            request.request_id,
            request.n,
            len(prepared.prompt),
            prepared.max_new_tokens,
            request.priority,
            at_s,
            float("inf") if request.timeout_s is None else at_s + request.timeout_s,
            len(prepared.prompt) * self._accounts.prefill_s_per_token,
        )
        try:
            self._scheduler.submit(job)
        except QueueFull as error:
            self._events.append(Failed(request.request_id, "overloaded", f"the model is busy: {error}", retryable=True))
        except NeverFits as error:
            param = "n" if request.n > 1 else "messages" if request.messages is not None else "prompt"
            self._events.append(Failed(request.request_id, "invalid_request", str(error), param=param))
        else:
            self._requests[request.request_id] = Running(prepared, job, prompt, open_choices=request.n)
            accepted = Accepted(request.request_id, len(prepared.prompt), self._worker_id, prepared.prompt_text)
            self._events.append(accepted)

    def _drop(self, request_id: str, at_step: int) -> None:
        running = self._requests.get(request_id)
        if running is None:
            return
        self._accounts.cancel(in_batch=running.in_batch, at_step=at_step)
        self._forget(running)

    def _forget(self, running: Running) -> None:
        """Remove a request from wherever it is: queue, prefill or batch."""
        del self._requests[running.request_id]
        self._scheduler.leave(running.request_id)
        self._prefilling.drop(running)
        self._accounts.requests += 1
        for row in running.rows:
            row.done = True
        if running.in_batch:
            self._keep_open_rows()

    def _keep_open_rows(self) -> None:
        self._batch.keep([i for i, row in enumerate(self._batch.rows) if row.in_batch and not row.done])

    # --- from prefill into the batch ---------------------------------------------------------------------------------

    def _join(self, lane: Lane) -> None:
        """Move a prefilled group into the batch."""
        rows: list[Row] = []
        for running in lane.group:
            request = running.prepared.request
            if not running.rows:
                running.rows = [
                    Row(
                        running,
                        index,
                        self._loaded.text_stream(request.stop, request.tools),
                        choice_seed(request.sampling.seed, index),
                        running.prepared.matchers[index] if running.prepared.matchers else None,
                    )
                    for index in range(request.n)
                ]
            for row in running.rows:
                row.joined_at, row.joined_launched, row.in_batch = len(running.prompt), row.launched, True
            rows.extend(running.rows)
        self._batch.join(
            rows,
            [int(row.running.prompt[-1]) for row in rows],
            lane.prefill.cache,
            [len(row.running.prompt) - 1 for row in rows],
            [self._sampling(row) for row in rows],
            single=lane.prefill.single,
        )
        # A request that was cancelled during a shared prefill has a row here, which leaves at once.
        for row in rows:
            row.done = row.done or row.running.request_id not in self._requests
        self._keep_open_rows()

    def _sampling(self, row: Row) -> RowSampling:
        prepared = row.running.prepared
        request = prepared.request
        ends = [] if request.ignore_eos else list(self._loaded.eos_token_ids)
        return RowSampling(
            params=request.sampling,
            seed=row.seed,
            prompt=prepared.prompt,
            suppressed=[*ends, *request.stop_token_ids] if request.min_tokens else (),
            suppress_until=request.min_tokens,
            output=tuple(row.tokens),
            position=len(row.tokens),
            logprobs=request.logprobs,
        )

    # --- a decode step -----------------------------------------------------------------------------------------------

    def _decode(self, previous: Launched[Row] | None) -> None:
        # A row whose last allowed token is already on its way needs no further step.
        complete = [row for row in self._batch.rows if row.launched >= row.running.prepared.max_new_tokens]
        for row in complete:
            self._remember(row)
        if complete:
            self._batch.keep([i for i, row in enumerate(self._batch.rows) if row not in complete])
        if self._short_of_memory():
            if previous is not None:
                self._collect(previous)
                previous = None
            self._preempt()
        if self._batch.rows:
            constrained = any(row.matcher is not None for row in self._batch.rows)
            self._batch.forward(start=constrained)
            if constrained and previous is not None:
                # A grammar has to see a token before it can say what may follow; the forward pass goes on meanwhile.
                self._collect(previous)
                previous = None
        if self._batch.rows:
            self._in_flight = self._batch.sample(self._allowed())
            self._note_launch(self._in_flight.rows)
        if previous is not None:
            self._collect(previous)
        if self._in_flight is not None and not self._runs_ahead:
            launched, self._in_flight = self._in_flight, None
            self._collect(launched)

    def _allowed(self) -> Allowed | None:
        """Return what the rows that follow a grammar may choose from."""
        found = [(at, row.matcher) for at, row in enumerate(self._batch.rows) if row.matcher is not None]
        if not found:
            return None
        rows, matchers = zip(*found, strict=True)
        bits = np.empty((len(rows), -(-self._loaded.info.vocab_size // 32)), np.uint32)
        fill_masks(matchers, bits)
        return Allowed(rows, bits)

    def _note_launch(self, rows: Sequence[Row]) -> None:
        for row in rows:
            row.launched += 1
        if self._accounts.launched(self._clock(), len(rows)) and self._adapts:
            self._scheduler.row_limit = self._adaptive.update(self._accounts.step_ms, len(rows))

    def _short_of_memory(self) -> bool:
        """Return whether the next step would take more KV than there may be; known prefixes give way first."""
        budget = self._limits.kv_budget_bytes
        tokens = self._batch.padded_tokens() + 1 if self._batch.rows else 0
        needed = len(self._batch.rows) * tokens * self._limits.kv_bytes_per_token
        if needed + self._prefixes.stats.bytes > budget:
            self._prefixes.shrink(max(0, budget - needed))
        return needed > budget

    def _preempt(self) -> None:
        """Put the youngest rows back into the queue until the others have room; they go on later where they were."""
        candidates = [row for row in self._batch.rows if row.running.prepared.request.n == 1 and not row.done]
        while len(candidates) > 1 and self._short_of_memory():
            row = max(candidates, key=lambda row: (row.running.job.key, row.joined_at))
            candidates.remove(row)
            running = row.running
            row.in_batch = False
            row.launched = len(row.tokens)
            running.prompt = as_tokens([*running.prepared.prompt, *row.tokens])
            left = running.prepared.max_new_tokens - len(row.tokens)
            running.job = replace(running.job, prompt_tokens=len(running.prompt), max_new_tokens=left)
            self._scheduler.requeue(running.job)
            self._accounts.preempted += 1
            self._keep_open_rows()

    def _collect(self, step: Launched[Row]) -> None:
        """Read a step's tokens, emit their text, and let the rows that have ended leave."""
        tokens: list[int] = step.choice.tokens.tolist()
        logprobs = self._read_logprobs(step.choice.logprobs)
        ended = False
        for at, (row, token) in enumerate(zip(step.rows, tokens, strict=True)):
            if not row.done and row.in_batch:
                self._take_token(row, token, logprobs.get(at, ()))
                ended = ended or row.done
        if ended:
            self._keep_open_rows()

    def _read_logprobs(self, found: Logprobs | None) -> dict[int, tuple[tuple[float, Any], ...]]:
        if found is None:
            return {}
        chosen, ids, top = found.chosen.tolist(), found.top_ids.tolist(), found.top.tolist()
        return {row: ((chosen[at], tuple(zip(ids[at], top[at], strict=True))),) for at, row in enumerate(found.rows)}

    def _take_token(self, row: Row, token: int, logprobs: tuple[tuple[float, Any], ...]) -> None:
        running = row.running
        request = running.prepared.request
        if row.matcher is not None and not row.matcher.accept(token):
            self._fail(running.request_id, "engine_error", f"the grammar cannot go on: {row.matcher.error}")
            return
        row.tokens.append(token)
        running.generated += 1
        self._accounts.generated_tokens += 1
        at_end = token in request.stop_token_ids or (token in self._loaded.eos_token_ids and not request.ignore_eos)
        piece = Piece() if at_end else row.text.add(token)
        reason: FinishReason | None = None
        if at_end or piece.stopped or (row.matcher is not None and row.matcher.finished):
            reason = "stop"
        elif len(row.tokens) >= running.prepared.max_new_tokens:
            reason = "length"
        text, calls = piece.text, piece.tool_calls
        if reason is not None:
            rest = row.text.finish(stopped=piece.stopped)
            text, calls = text + rest.text, calls + rest.tool_calls
            if reason == "stop" and row.text.has_tool_calls:
                reason = "tool_calls"
            self._remember(row)
            row.done = True
        reported = tuple(
            TokenLogprob(
                token,
                self._loaded.token_text(token),
                value,
                tuple((other, self._loaded.token_text(other), p) for other, p in top[: request.logprobs or 0]),
            )
            for value, top in logprobs
        )
        self._events.append(
            Delta(running.request_id, running.next_seq(), row.index, text, (token,), reason, calls, reported)
        )
        if reason is not None:
            running.open_choices -= 1
            if running.open_choices == 0:
                self._finish(running)

    def _remember(self, row: Row) -> None:
        """Keep a finished row's KV: the next turn of its conversation begins with it."""
        if not self._prefilling.reuse or row not in self._batch.rows:
            return
        # What a step in flight has added for this row belongs to tokens that are known already.
        tokens = as_tokens([*row.running.prepared.prompt, *row.tokens])[: row.kv_tokens]
        layers, others = self._prefixes.split_layers(self._batch.cache)
        at = self._batch.rows.index(row)
        if self._loaded.info.batched:
            snapshot = [layer.extract(at) for layer in others]
            self._prefixes.put(tokens, row_kv(layers, at, row.kv_tokens), snapshot)
        else:
            self._prefixes.put_row(tokens, self._batch.cache)

    def _finish(self, running: Running) -> None:
        usage = Usage(len(running.prepared.prompt), running.generated, running.cached_tokens or 0)
        self._events.append(Finished(running.request_id, running.next_seq(), usage))
        del self._requests[running.request_id]
        self._scheduler.leave(running.request_id)
        self._accounts.requests += 1

    # --- prefill -----------------------------------------------------------------------------------------------------

    def _advance_prefill(self) -> None:
        """Start computing prompts, as many chunks as fit between two decode steps."""
        for request_id in self._scheduler.expired(self._clock()):
            self._fail(request_id, "request_timeout", "the request waited longer than its timeout allows")
        chunk = self._prefill_chunk()
        budget = max(
            chunk, int(_PREFILL_GAP_S / self._accounts.prefill_s_per_token) if self._accounts.prefill_s_per_token else 0
        )
        while budget > 0:
            try:
                computed, lane = self._prefilling.advance(self._requests, chunk)
            except PrefillFailed as failure:
                logger.error("prefill failed", exc_info=failure.cause)
                for running in failure.group:
                    message = f"the prompt could not be computed: {_brief(failure.cause)}"
                    self._fail(running.request_id, "engine_error", message)
                return
            if lane is None:
                return
            budget -= computed
            self._accounts.prefilled(computed)
            if lane.prefill.remaining > 0:
                running = lane.group[0]
                done = lane.cached[0] + lane.prefill.done
                self._events.append(Progress(running.request_id, "prefill", done, len(running.prompt)))

    def _prefill_chunk(self) -> int:
        """Return how many prompt tokens to compute at a time.

        More while several requests wait: large matrix products and full batches are more efficient, and those who
        wait for their first token outnumber those who would notice the gap. A long prompt that comes alone is not
        given more.
        """
        return self._limits.prefill_tokens_per_step * min(max(self._scheduler.waiting, 1), _MAX_PRESSURE)

    # --- failure and accounts ----------------------------------------------------------------------------------------

    def _fail_batch(self, error: Exception) -> None:
        self._batch, self._in_flight = self._new_batch(), None
        for running in [running for running in self._requests.values() if running.in_batch]:
            self._fail(running.request_id, "engine_error", f"the engine failed: {_brief(error)}")
        mx.clear_cache()

    def _fail(self, request_id: str, code: FailureCode, message: str) -> None:
        running = self._requests.get(request_id)
        if running is not None:
            self._forget(running)
            self._events.append(Failed(request_id, code, message, retryable=code == "engine_error"))

    def _publish(self) -> None:
        accounts = self._accounts
        if accounts.steps % _CLEAR_CACHE_EVERY_STEPS == 0 and self._batch.rows:
            mx.clear_cache()
        if accounts.steps % _MEASURE_EVERY_STEPS == 0 or not self._batch.rows:
            accounts.kv_bytes = self._batch.nbytes()
            accounts.memory_bytes = mx.get_active_memory()
        load = accounts.load(
            running=len(self._batch.rows),
            waiting=sum(not request.in_batch for request in self._requests.values()),
            row_limit=self._scheduler.row_limit,
            prefixes=self._prefixes.stats,
        )
        events, self._events = self._events, []
        self._emit(events, load)


def _brief(error: Exception) -> str:
    lines: list[Any] = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
