"""How the next token of every row is chosen, in one vectorised pass over the batch.

`BatchSampler` keeps the sampling state of the rows in batch order: parameters as columns, token counts for penalties
on the device, and for each row its seed and position. The noise for a token depends on (seed, position) alone, so a
row gets the same tokens whoever else is in the batch, and a row that is resumed elsewhere goes on identically.
Runs on the engine thread only.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from .protocol import SamplingParams

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix64(value: int) -> int:
    """Return a 64-bit hash of a 64-bit value: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def choice_seed(seed: int | None, index: int) -> int:
    """Return the seed of one choice: the request's for choice 0, derived ones for the others, random without one."""
    if seed is None:
        return secrets.randbits(64)
    return seed & _MASK if index == 0 else mix64((seed & _MASK) ^ mix64(index))


def noise_keys(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the random key of each (seed, position).

    Args:
        seeds: uint64, shape [rows].
        positions: uint64, shape [rows]; the index of the token within the row's output.

    Returns:
        uint32, shape [rows, 2], keys for `mx.random`.
    """
    with np.errstate(over="ignore"):
        value = seeds + (positions + np.uint64(1)) * np.uint64(_GOLDEN)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        value ^= value >> np.uint64(31)
    return value.view(np.uint32).reshape(-1, 2)


@dataclass(slots=True)
class RowSampling:
    """Sampling state of one row."""

    params: SamplingParams
    seed: int
    prompt: Sequence[int] = ()
    """Prompt token ids; only looked at when there is a repetition penalty."""
    suppressed: Sequence[int] = ()
    """Tokens that may not be chosen before `suppress_until` tokens have been."""
    suppress_until: int = 0
    output: Sequence[int] = ()
    """Tokens chosen before the row joined, when it is resumed; penalties count them."""
    position: int = 0
    """Tokens chosen so far."""
    logprobs: int | None = None
    """How many alternatives to report with each token; None reports nothing."""

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.params.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether the choice depends on tokens that were chosen before."""
        p = self.params
        return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0

    @property
    def filtered(self) -> bool:
        """Whether top_k or top_p leave tokens out."""
        return not self.greedy and (self.params.top_k > 0 or self.params.top_p < 1)


def _column(values: Sequence[float]) -> mx.array:
    return mx.array(values, dtype=mx.float32)[:, None]


@dataclass(slots=True)
class Logprobs:
    """Log probabilities of a step's tokens, for the rows that asked.

    Attributes:
        rows: positions of those rows in the batch.
        chosen: shape [rows].
        top_ids, top: the likeliest tokens and theirs, shape [rows, alternatives], likeliest first.
    """

    rows: tuple[int, ...]
    chosen: mx.array
    top_ids: mx.array
    top: mx.array


@dataclass(slots=True)
class Allowed:
    """The tokens that some rows may choose from.

    Attributes:
        rows: positions of those rows in the batch.
        bits: one bit for each token, uint32, lowest bit first, shape [rows, ceil(vocab / 32)].
    """

    rows: tuple[int, ...]
    bits: np.ndarray


@dataclass(slots=True)
class Choice:
    """What a step chose: token ids, uint32, shape [rows], and log probabilities where they were asked for."""

    tokens: mx.array
    logprobs: Logprobs | None


@dataclass(slots=True)
class _Plan:
    """Device arrays that only change when rows join or leave."""

    bias: tuple[mx.array, mx.array, mx.array] | None = None
    penalised: mx.array | None = None
    penalties: tuple[mx.array, mx.array, mx.array] | None = None
    sampled: mx.array | None = None
    """Indices of rows that are not greedy; None when all of them are sampled."""
    any_sampled: bool = False
    temperature: mx.array | None = None
    log_min_p: mx.array | None = None
    filtered: mx.array | None = None
    """Indices into the sampled rows."""
    top_k: mx.array | None = None
    top_p: mx.array | None = None
    reported: tuple[int, ...] = ()
    """Rows that report log probabilities."""
    alternatives: int = 0
    seeds: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))


class BatchSampler:
    """Chooses tokens for the rows of a batch."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows: list[RowSampling] = []
        self._plan = _Plan()
        # Shape [penalised rows, vocab]: how often the output holds a token, and whether the prompt does.
        self._counts: mx.array | None = None
        self._in_prompt: mx.array | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def join(self, rows: Sequence[RowSampling]) -> None:
        """Append rows to the batch."""
        penalised = [row for row in rows if row.penalised]
        if penalised:
            counts = mx.array(np.stack([np.bincount(row.output, minlength=self._vocab_size) for row in penalised]))
            counts = counts.astype(mx.float32)
            seen = np.zeros((len(penalised), self._vocab_size), np.bool_)
            for mark, row in zip(seen, penalised, strict=True):
                if row.params.repetition_penalty != 1:
                    mark[np.asarray(row.prompt, np.int64)] = True
            in_prompt = mx.array(seen)
            self._counts = counts if self._counts is None else mx.concatenate([self._counts, counts])
            self._in_prompt = in_prompt if self._in_prompt is None else mx.concatenate([self._in_prompt, in_prompt])
        self._rows.extend(rows)
        self._replan()

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only the rows at these positions, in this order."""
        if self._counts is not None and self._in_prompt is not None:
            slot = {row: at for at, row in enumerate(i for i, r in enumerate(self._rows) if r.penalised)}
            kept = [slot[i] for i in indices if i in slot]
            self._counts = self._counts[mx.array(kept)] if kept else None
            self._in_prompt = self._in_prompt[mx.array(kept)] if kept else None
        self._rows = [self._rows[i] for i in indices]
        self._replan()

    @property
    def state(self) -> list[mx.array]:
        """Arrays that the next call depends on, to be evaluated together with its result."""
        return [] if self._counts is None else [self._counts]

    def __call__(self, logits: mx.array, allowed: Allowed | None = None) -> Choice:
        """Choose the next token of every row; nothing is evaluated.

        Args:
            logits: shape [rows, vocab].
            allowed: what rows that follow a grammar may choose from.
        """
        plan = self._plan
        logits = logits.astype(mx.float32)
        raw = logits[mx.array(plan.reported)] if plan.reported else None
        if plan.bias is not None:
            at_row, at_token, value = plan.bias
            logits = logits.at[at_row, at_token].add(value)
        if any(row.position < row.suppress_until for row in self._rows):
            logits = self._suppress(logits)
        if plan.penalised is not None:
            logits = self._penalise(logits, plan.penalised)
        if allowed is not None:
            logits = _only_allowed(logits, allowed)
        tokens = self._choose(logits)
        if plan.penalised is not None and self._counts is not None:
            chosen = tokens[plan.penalised]
            self._counts = self._counts.at[mx.arange(chosen.shape[0]), chosen].add(1.0)
        for row in self._rows:
            row.position += 1
        return Choice(tokens, None if raw is None else self._logprobs(raw, tokens))

    def _logprobs(self, raw: mx.array, tokens: mx.array) -> Logprobs:
        """Return what the rows that asked for it report, from their logits as the model gave them."""
        plan = self._plan
        values = raw - mx.logsumexp(raw, axis=-1, keepdims=True)
        chosen = mx.take_along_axis(values, tokens[mx.array(plan.reported)][:, None], axis=-1)[:, 0]
        order = mx.argsort(-values, axis=-1)[:, : plan.alternatives]
        return Logprobs(plan.reported, chosen, order, mx.take_along_axis(values, order, axis=-1))

    def _replan(self) -> None:
        rows = self._rows
        plan = _Plan()
        bias = [(i, token, value) for i, row in enumerate(rows) for token, value in row.params.logit_bias.items()]
        if bias:
            at_row, at_token, values = zip(*bias, strict=True)
            plan.bias = (mx.array(at_row), mx.array(at_token), mx.array(values, dtype=mx.float32))
        penalised = [i for i, row in enumerate(rows) if row.penalised]
        if penalised:
            params = [rows[i].params for i in penalised]
            plan.penalised = mx.array(penalised)
            plan.penalties = (
                _column([p.repetition_penalty for p in params]),
                _column([p.presence_penalty for p in params]),
                _column([p.frequency_penalty for p in params]),
            )
        plan.reported = tuple(i for i, row in enumerate(rows) if row.logprobs is not None)
        plan.alternatives = max((rows[i].logprobs or 0 for i in plan.reported), default=0)
        sampled = [i for i, row in enumerate(rows) if not row.greedy]
        plan.any_sampled = bool(sampled)
        if sampled:
            plan.sampled = None if len(sampled) == len(rows) else mx.array(sampled)
            params = [rows[i].params for i in sampled]
            plan.temperature = _column([p.temperature for p in params])
            if any(p.min_p > 0 for p in params):
                plan.log_min_p = _column([float(np.log(p.min_p)) if p.min_p > 0 else -np.inf for p in params])
            plan.seeds = np.array([rows[i].seed for i in sampled], np.uint64)
            filtered = [at for at, i in enumerate(sampled) if rows[i].filtered]
            if filtered:
                plan.filtered = mx.array(filtered)
                size = self._vocab_size
                plan.top_k = mx.array([min(params[at].top_k or size, size) for at in filtered])[:, None]
                plan.top_p = _column([params[at].top_p for at in filtered])
        self._plan = plan

    def _suppress(self, logits: mx.array) -> mx.array:
        pairs = [
            (i, token)
            for i, row in enumerate(self._rows)
            if row.position < row.suppress_until
            for token in row.suppressed
        ]
        if not pairs:
            return logits
        at_row, at_token = zip(*pairs, strict=True)
        return logits.at[mx.array(at_row), mx.array(at_token)].add(-mx.inf)

    def _penalise(self, logits: mx.array, rows: mx.array) -> mx.array:
        counts, in_prompt, penalties = self._counts, self._in_prompt, self._plan.penalties
        if counts is None or in_prompt is None or penalties is None:
            return logits
        repetition, presence, frequency = penalties
        part = logits[rows]
        in_output = counts > 0
        repeated = mx.where(part > 0, part / repetition, part * repetition)
        part = mx.where(in_output | in_prompt, repeated, part)
        part = part - presence * in_output - frequency * counts
        logits[rows] = part
        return logits

    def _choose(self, logits: mx.array) -> mx.array:
        plan = self._plan
        if not plan.any_sampled:
            return mx.argmax(logits, axis=-1)
        part = logits if plan.sampled is None else logits[plan.sampled]
        chosen = self._sample(part)
        if plan.sampled is None:
            return chosen
        tokens = mx.argmax(logits, axis=-1)
        tokens[plan.sampled] = chosen
        return tokens

    def _sample(self, logits: mx.array) -> mx.array:
        plan = self._plan
        scaled = logits / plan.temperature
        if plan.filtered is not None and plan.top_k is not None and plan.top_p is not None:
            part = scaled[plan.filtered]
            scaled[plan.filtered] = mx.where(part >= _threshold(part, plan.top_k, plan.top_p), part, -mx.inf)
        if plan.log_min_p is not None:
            scaled = mx.where(scaled >= scaled.max(axis=-1, keepdims=True) + plan.log_min_p, scaled, -mx.inf)
        rows = [row for row in self._rows if not row.greedy]
        keys = mx.array(noise_keys(plan.seeds, np.array([row.position for row in rows], np.uint64)))
        vocab = scaled.shape[-1]
        noise = mx.vmap(lambda key: mx.random.gumbel((vocab,), key=key))(keys)
        # Gumbel-max: the argmax of logits plus Gumbel noise is a sample of their softmax.
        return mx.argmax(scaled + noise, axis=-1)


def _only_allowed(logits: mx.array, allowed: Allowed) -> mx.array:
    """Return the logits with minus infinity for what is not allowed."""
    rows, vocab = mx.array(allowed.rows), logits.shape[-1]
    bits = (mx.array(allowed.bits)[:, :, None] >> mx.arange(32, dtype=mx.uint32)) & 1
    mask = bits.reshape(len(allowed.rows), -1)[:, :vocab].astype(mx.bool_)
    logits[rows] = mx.where(mask, logits[rows], -mx.inf)
    return logits


def _threshold(logits: mx.array, top_k: mx.array, top_p: mx.array) -> mx.array:
    """Return the smallest logit that top_k and then top_p leave in, shape [rows, 1]."""
    ordered = -mx.sort(-logits, axis=-1)
    rank = mx.arange(ordered.shape[-1])
    ordered = mx.where(rank < top_k, ordered, -mx.inf)
    probabilities = mx.softmax(ordered, axis=-1)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    kept = mx.maximum((before < top_p).sum(axis=-1, keepdims=True), 1)
    kept = mx.minimum(kept, top_k)
    return mx.take_along_axis(ordered, kept - 1, axis=-1)
