"""A test of the model itself at load time: does a batch compute what each of its rows computes alone?

Rows of unequal lengths are prefilled together, decoded, joined by others, and left by one, on sliding windows so short
that they rotate. A model whose batches are wrong is run one request at a time, correctly, instead of fast and wrong.
One that is wrong only where prompts are padded to one length is prefilled prompt by prompt and decoded in batches.
The check computes fewer than a hundred tokens, and warms the kernels up.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .batch import Cache, Prefill, compact_order
from .compat import sliding_windows
from .kv import SlotBatch
from .loading import LoadedModel

logger = logging.getLogger(__name__)

_LENGTHS = (3, 11, 6, 1)
"""Prompts; those after the first ones join while these are being decoded, the last of them without any KV."""
_FIRST = 2
_STEPS = (2, 4, 3)
"""Decode steps of the first rows, then with those that join, then without the one that leaves."""
_LEAVES = 1
_STEPS_OF_ROW = (sum(_STEPS), _STEPS[0] + _STEPS[1], _STEPS[1] + _STEPS[2], _STEPS[1] + _STEPS[2])
_WINDOW = 8
# Relative to the largest logit. A wrong mask or position is off by tens of percent; rounding in bfloat16 by a few.
_TOLERANCE = {"float32": 2e-3, "float16": 3e-2, "bfloat16": 8e-2}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a model computes rightly.

    Attributes:
        batches: rows may be decoded together.
        pads: prompts of unequal lengths may be prefilled together.
    """

    batches: bool
    pads: bool


@dataclass(slots=True)
class _Row:
    prompt: list[int]
    forced: list[int]
    """What it is fed while decoding, whatever it would say."""
    alone: list[np.ndarray]
    """Logits of each of its steps."""


def check(loaded: LoadedModel) -> Verdict:
    """Return what the model computes rightly, within the rounding of its number format."""
    rng = np.random.default_rng(0)
    vocab = loaded.info.vocab_size
    rows = []
    for length, steps in zip(_LENGTHS, _STEPS_OF_ROW, strict=True):
        row = _Row(rng.integers(0, vocab, length).tolist(), rng.integers(0, vocab, steps).tolist(), [])
        cache = _prefilled(loaded, [row]).cache
        row.alone = [_step(loaded, cache, [token])[0] for token in (row.prompt[-1], *row.forced[:-1])]
        rows.append(row)
    if _right(loaded, rows, padded=True):
        return Verdict(batches=True, pads=True)
    if _right(loaded, rows, padded=False):
        logger.warning("padded prompts are computed wrongly by this architecture; each is prefilled by itself")
        return Verdict(batches=True, pads=False)
    logger.warning("batches are computed wrongly by this architecture; requests run one at a time")
    return Verdict(batches=False, pads=False)


def batches_correctly(loaded: LoadedModel) -> bool:
    """Return whether rows of a batch, padded prompts included, get the logits that they get alone."""
    verdict = check(loaded)
    return verdict.batches and verdict.pads


def _right(loaded: LoadedModel, rows: list[_Row], *, padded: bool) -> bool:
    try:
        found = _together(loaded, rows, padded=padded)
    except Exception as error:
        # Whatever it is that a model cannot do with a batch: the engine is not to find it out again.
        logger.info("a batch fails: %s: %s", type(error).__name__, str(error).split("\n", maxsplit=1)[0])
        return False
    tolerance = _TOLERANCE.get(loaded.info.dtype, _TOLERANCE["bfloat16"])
    for row, steps in zip(rows, found, strict=True):
        off = sorted(_difference(logits, alone) for logits, alone in zip(steps, row.alone, strict=True))
        # One step may be off: where experts are mixed, rounding can send a token to another expert.
        if not off[-2] <= tolerance:
            logger.info("a row of a batch is off by %.3g of its largest logit", off[-2])
            return False
    return True


def _together(loaded: LoadedModel, rows: list[_Row], *, padded: bool) -> list[list[np.ndarray]]:
    """Return the logits of each row's steps in a batch that rows join and one leaves."""
    kv = SlotBatch()
    found: list[list[np.ndarray]] = [[] for _ in rows]
    present: list[int] = []

    def join(group: list[_Row]) -> None:
        prefill = _prefilled(loaded, group)
        kv.join(prefill.cache, [len(row.prompt) - 1 for row in group], single=prefill.single)
        present.extend(range(len(present), len(present) + len(group)))

    def decode(steps: int) -> None:
        for _ in range(steps):
            tokens = [[rows[at].prompt[-1], *rows[at].forced][len(found[at])] for at in present]
            for at, logits in zip(present, _step(loaded, kv.layers, tokens), strict=True):
                found[at].append(logits)
            kv.advance()

    for group in [rows[:_FIRST]] if padded else [[row] for row in rows[:_FIRST]]:
        join(group)
    decode(_STEPS[0])
    for row in rows[_FIRST:]:
        join([row])
    decode(_STEPS[1])
    order = compact_order([at for at in present if at != _LEAVES])
    kv.keep(order)
    present[:] = order
    decode(_STEPS[2])
    return found


def _prefilled(loaded: LoadedModel, rows: list[_Row]) -> Prefill:
    prefill = Prefill(loaded.model, [row.prompt for row in rows], [_small_windows(loaded.make_cache()) for _ in rows])
    while prefill.remaining:
        prefill.advance(prefill.remaining)
    return prefill


def _small_windows(cache: Cache) -> Cache:
    """Shorten the sliding windows, alone and in the batch alike, so that they rotate within the check."""
    for window in sliding_windows(cache):
        window.max_size = min(window.max_size, _WINDOW)
    return cache


def _step(loaded: LoadedModel, cache: Cache, tokens: list[int]) -> np.ndarray:
    """Return the next logits of every row, shape [rows, vocab]."""
    logits = loaded.model(mx.array(tokens, mx.uint32)[:, None], cache=cache)[:, -1, :]
    return np.array(logits.astype(mx.float32))


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    finite = np.isfinite(expected)
    difference = float(np.abs(found[finite] - expected[finite]).max() / max(np.abs(expected[finite]).max(), 1e-6))
    return difference if np.isfinite(difference) else float("inf")
