"""The step loop: admit, prefill, decode, sample, emit. The only thread that touches mlx runs it.

The server hands requests over with `submit` and `cancel`, which only put them into a queue, and gets events back
through the `emit` callback, once per step. A step starts the next decode on the device first and then, while the
device computes, reads the tokens of the step before, turns them into text and starts a chunk of prefill. So the host's
work and the device's overlap, and a long prompt delays running rows by one chunk at most.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import mlx.core as mx

from .batch import DecodeBatch, Launched, Prefill
from .loading import LoadedModel
from .protocol import (
    Accepted,
    Delta,
    Event,
    Failed,
    FailureCode,
    Finished,
    FinishReason,
    GenerationRequest,
    Load,
    Usage,
)
from .sampling import RowSampling, choice_seed
from .scheduler import Job, Limits, NeverFits, QueueFull, Scheduler
from .text import Piece, TextStream

logger = logging.getLogger(__name__)

_EMA_WEIGHT = 0.1
_MEASURE_EVERY_STEPS = 16
_CLEAR_CACHE_EVERY_STEPS = 512

Emit: TypeAlias = Callable[[list[Event], Load], None]


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A valid request with its prompt as token ids.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: most tokens of each choice; prompt and output fit the context.
    """

    request: GenerationRequest
    prompt: tuple[int, ...]
    max_new_tokens: int


@dataclass(slots=True)
class _Row:
    """One choice that is being generated."""

    running: _Running
    index: int
    text: TextStream
    launched: int = 0
    """Tokens that the device was asked for, read or not."""
    generated: int = 0
    """Tokens that have been read."""
    done: bool = False


@dataclass(slots=True)
class _Running:
    """A request between its admission and its last event."""

    prepared: PreparedRequest
    seq: int = 0
    open_choices: int = 0
    generated: int = 0
    rows: list[_Row] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        return self.prepared.request.request_id

    def next_seq(self) -> int:
        self.seq += 1
        return self.seq - 1


@dataclass(frozen=True, slots=True)
class _Submit:
    prepared: PreparedRequest


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: str
    at_step: int


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class Engine:
    """Runs requests on one loaded model. `run` is called by the thread that loaded it; the rest from any thread."""

    def __init__(self, loaded: LoadedModel, limits: Limits, emit: Emit, worker_id: str) -> None:
        self._loaded = loaded
        self._worker_id = worker_id
        self._emit = emit
        self._scheduler = Scheduler(limits)
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Stop] = queue.SimpleQueue()
        self._requests: dict[str, _Running] = {}
        self._batch: DecodeBatch[_Row] = self._new_batch()
        self._prefill: Prefill | None = None
        self._prefilling: list[_Running] = []
        self._in_flight: Launched[_Row] | None = None
        self._events: list[Event] = []
        self._stopped = False
        self._last_launch = 0.0
        self._load = Load()
        self.steps = 0
        """Decode steps started; read by other threads."""
        self._totals = dict.fromkeys(("prompt_tokens", "generated_tokens", "requests", "cancelled"), 0)
        self._cancel_steps_max = 0
        self._step_ms = 0.0
        self._kv_bytes = 0
        self._memory_bytes = 0

    # --- from any thread ---------------------------------------------------------------------------------------------

    def submit(self, prepared: PreparedRequest) -> None:
        """Hand over a request. Its events arrive through `emit`."""
        self._inbox.put(_Submit(prepared))

    def cancel(self, request_id: str) -> None:
        """Take a request out of the batch before the next step. No further event of it is emitted."""
        self._inbox.put(_Cancel(request_id, self.steps))

    def stop(self) -> None:
        """Make `run` return after the current step."""
        self._inbox.put(_Stop())

    @property
    def load(self) -> Load:
        """What the engine is busy with, as of its last step."""
        return self._load

    # --- the engine thread -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Step until `stop` is called; sleep while there is nothing to do."""
        while not self._stopped:
            self._take_commands()
            if not self._stopped:
                self.step()

    def step(self) -> None:
        """Do what is due: join, launch, collect, prefill; then emit what came of it."""
        previous, self._in_flight = self._in_flight, None
        try:
            self._join()
            self._in_flight = self._launch()
            if previous is not None:
                self._collect(previous)
        except Exception as error:
            # Whatever mlx raised, the rows of this batch are lost; the process and its queue are not.
            logger.exception("decode step failed")
            self._fail_batch(error)
        self._advance_prefill()
        self._publish()

    def _new_batch(self) -> DecodeBatch[_Row]:
        info = self._loaded.info
        return DecodeBatch(self._loaded.model, info.vocab_size, merges=info.batched)

    def _idle(self) -> bool:
        return (
            not self._batch.rows and self._in_flight is None and self._prefill is None and not self._scheduler.waiting
        )

    def _take_commands(self) -> None:
        block = self._idle()
        if block:
            self._last_launch = 0.0
        while True:
            try:
                command = self._inbox.get(block=block)
            except queue.Empty:
                return
            block = False
            match command:
                case _Submit(prepared):
                    self._accept(prepared)
                case _Cancel(request_id, at_step):
                    self._drop(request_id, at_step)
                case _Stop():
                    self._stopped = True
                    return

    def _accept(self, prepared: PreparedRequest) -> None:
        request = prepared.request
        job = Job(request.request_id, request.n, len(prepared.prompt) - 1, prepared.max_new_tokens)
        try:
            self._scheduler.submit(job)
        except QueueFull as error:
            self._events.append(Failed(request.request_id, "overloaded", f"the model is busy: {error}", retryable=True))
        except NeverFits as error:
            param = "n" if request.n > 1 else "messages" if request.messages is not None else "prompt"
            self._events.append(Failed(request.request_id, "invalid_request", str(error), param=param))
        else:
            self._requests[request.request_id] = _Running(prepared, open_choices=request.n)
            self._events.append(Accepted(request.request_id, len(prepared.prompt), self._worker_id))

    def _drop(self, request_id: str, at_step: int) -> None:
        if request_id not in self._requests:
            return
        had_rows = bool(self._requests[request_id].rows)
        self._forget(request_id)
        self._totals["cancelled"] += 1
        if had_rows:
            self._cancel_steps_max = max(self._cancel_steps_max, self.steps - at_step)

    def _forget(self, request_id: str) -> None:
        """Remove a request from wherever it is: queue, prefill or batch."""
        running = self._requests.pop(request_id)
        self._scheduler.leave(request_id)
        self._totals["requests"] += 1
        for row in running.rows:
            row.done = True
        if running.rows:
            self._batch.keep([i for i, row in enumerate(self._batch.rows) if not row.done])
        elif running in self._prefilling and len(self._prefilling) == 1:
            self._prefill, self._prefilling = None, []

    def _join(self) -> None:
        """Move the prefilled requests into the batch."""
        if self._prefill is None or self._prefill.remaining > 0:
            return
        prefill, group = self._prefill, self._prefilling
        self._prefill, self._prefilling = None, []
        rows: list[_Row] = []
        sampling: list[RowSampling] = []
        for running in group:
            request = running.prepared.request
            running.rows = [
                _Row(running, index, self._loaded.text_stream(request.stop, request.tools))
                for index in range(request.n)
            ]
            rows.extend(running.rows)
            sampling.extend(self._sampling(running.prepared, index) for index in range(request.n))
        last_tokens = [row.running.prepared.prompt[-1] for row in rows]
        cache = prefill.for_batch(len(rows), merges=self._loaded.info.batched)
        self._batch.join(rows, last_tokens, cache, sampling)
        # A request that was cancelled during a shared prefill has a row here, which leaves at once.
        gone = {running.request_id for running in group if running.request_id not in self._requests}
        if gone:
            self._batch.keep([i for i, row in enumerate(self._batch.rows) if row.running.request_id not in gone])

    def _sampling(self, prepared: PreparedRequest, index: int) -> RowSampling:
        request = prepared.request
        ends = [] if request.ignore_eos else list(self._loaded.eos_token_ids)
        return RowSampling(
            params=request.sampling,
            seed=choice_seed(request.sampling.seed, index),
            prompt=prepared.prompt,
            suppressed=[*ends, *request.stop_token_ids] if request.min_tokens else (),
            suppress_until=request.min_tokens,
        )

    def _launch(self) -> Launched[_Row] | None:
        # A row whose last allowed token is already on its way needs no further step.
        self._batch.keep(
            [i for i, row in enumerate(self._batch.rows) if row.launched < row.running.prepared.max_new_tokens]
        )
        if not self._batch.rows:
            return None
        launched = self._batch.launch()
        for row in launched.rows:
            row.launched += 1
        self.steps += 1
        now = time.perf_counter()
        if self._last_launch:
            took = (now - self._last_launch) * 1000
            self._step_ms += (took - self._step_ms) * _EMA_WEIGHT if self._step_ms else took
        self._last_launch = now
        return launched

    def _collect(self, step: Launched[_Row]) -> None:
        """Read a step's tokens, emit their text, and let the rows that have ended leave."""
        tokens: list[int] = step.tokens.tolist()
        ended = False
        for row, token in zip(step.rows, tokens, strict=True):
            if not row.done:
                self._take_token(row, token)
                ended = ended or row.done
        if ended:
            self._batch.keep([i for i, row in enumerate(self._batch.rows) if not row.done])

    def _take_token(self, row: _Row, token: int) -> None:
        running = row.running
        request = running.prepared.request
        row.generated += 1
        running.generated += 1
        self._totals["generated_tokens"] += 1
        at_end = token in request.stop_token_ids or (token in self._loaded.eos_token_ids and not request.ignore_eos)
        piece = Piece() if at_end else row.text.add(token)
        reason: FinishReason | None = None
        if at_end or piece.stopped:
            reason = "stop"
        elif row.generated >= running.prepared.max_new_tokens:
            reason = "length"
        text, calls = piece.text, piece.tool_calls
        if reason is not None:
            rest = row.text.finish(stopped=piece.stopped)
            text, calls = text + rest.text, calls + rest.tool_calls
            if reason == "stop" and row.text.has_tool_calls:
                reason = "tool_calls"
            row.done = True
        self._events.append(Delta(running.request_id, running.next_seq(), row.index, text, (token,), reason, calls))
        if reason is not None:
            running.open_choices -= 1
            if running.open_choices == 0:
                self._finish(running)

    def _finish(self, running: _Running) -> None:
        usage = Usage(prompt_tokens=len(running.prepared.prompt), completion_tokens=running.generated)
        self._events.append(Finished(running.request_id, running.next_seq(), usage))
        del self._requests[running.request_id]
        self._scheduler.leave(running.request_id)
        self._totals["requests"] += 1

    def _advance_prefill(self) -> None:
        try:
            if self._prefill is None:
                self._start_prefill()
            if self._prefill is not None and self._prefill.remaining > 0:
                budget = self._scheduler.limits.prefill_tokens_per_step
                self._totals["prompt_tokens"] += self._prefill.advance(budget)
        except Exception as error:
            logger.exception("prefill failed")
            group, self._prefilling, self._prefill = self._prefilling, [], None
            for running in group:
                self._fail(running.request_id, "engine_error", f"the prompt could not be computed: {_brief(error)}")

    def _start_prefill(self) -> None:
        group = [self._requests[job.request_id] for job in self._scheduler.admit()]
        if group:
            self._prefilling = group
            prompts = [running.prepared.prompt for running in group]
            self._prefill = Prefill(self._loaded.model, prompts, [self._loaded.make_cache() for _ in group])

    def _fail_batch(self, error: Exception) -> None:
        self._batch, self._in_flight = self._new_batch(), None
        for request_id in [running.request_id for running in self._requests.values() if running.rows]:
            self._fail(request_id, "engine_error", f"the engine failed: {_brief(error)}")
        mx.clear_cache()

    def _fail(self, request_id: str, code: FailureCode, message: str) -> None:
        if request_id in self._requests:
            self._forget(request_id)
            self._events.append(Failed(request_id, code, message, retryable=True))

    def _publish(self) -> None:
        if self.steps % _CLEAR_CACHE_EVERY_STEPS == 0 and self._batch.rows:
            mx.clear_cache()
        if self.steps % _MEASURE_EVERY_STEPS == 0 or not self._batch.rows:
            self._kv_bytes = self._batch.nbytes()
            self._memory_bytes = mx.get_active_memory()
        running = len(self._batch.rows)
        self._load = Load(
            running=running,
            waiting=sum(not request.rows for request in self._requests.values()),
            kv_bytes=self._kv_bytes,
            memory_bytes=self._memory_bytes,
            step_ms=round(self._step_ms, 3),
            steps_total=self.steps,
            prompt_tokens_total=self._totals["prompt_tokens"],
            generated_tokens_total=self._totals["generated_tokens"],
            requests_total=self._totals["requests"],
            cancelled_total=self._totals["cancelled"],
            cancel_steps_max=self._cancel_steps_max,
        )
        events, self._events = self._events, []
        self._emit(events, self._load)


def _brief(error: Exception) -> str:
    lines: list[Any] = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
