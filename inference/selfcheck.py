"""A test of the model itself at load time: does a batch of unequal rows compute what each row computes alone?

Some architectures do not survive batching in mlx-lm (Gemma 2 raises at the second row, for one). Such a model is run
one request at a time, correctly, instead of fast and wrong. The check also warms the kernels up.
"""

from __future__ import annotations

import logging

import mlx.core as mx
import numpy as np

from .batch import Prefill
from .loading import LoadedModel

logger = logging.getLogger(__name__)

_PROMPT_LENGTHS = (5, 19)
_DECODE_STEPS = 3
# Relative to the largest logit. A wrong mask or position is off by tens of percent; rounding in bfloat16 by a few.
_TOLERANCE = {"float32": 2e-3, "float16": 3e-2, "bfloat16": 8e-2}


def _logits(loaded: LoadedModel, prompts: list[list[int]], forced: np.ndarray) -> mx.array:
    """Return the logits of decode steps that are fed `forced`, shape [steps, rows, vocab]."""
    prefill = Prefill(loaded.model, prompts, [loaded.make_cache() for _ in prompts])
    while prefill.remaining:
        prefill.advance(prefill.remaining)
    cache = prefill.for_batch(len(prompts), merges=len(prompts) > 1)
    tokens = mx.array([prompt[-1] for prompt in prompts], mx.uint32)
    steps = []
    for step in range(_DECODE_STEPS):
        logits = loaded.model(tokens[:, None], cache=cache)[:, -1, :]
        mx.eval(logits)
        steps.append(logits.astype(mx.float32))
        tokens = mx.array(forced[step], mx.uint32)
    return mx.stack(steps)


def batches_correctly(loaded: LoadedModel) -> bool:
    """Return whether rows of a batch get the logits that they get alone, within the rounding of their number format."""
    rng = np.random.default_rng(0)
    vocab = loaded.info.vocab_size
    prompts = [rng.integers(0, vocab, length).tolist() for length in _PROMPT_LENGTHS]
    forced = rng.integers(0, vocab, (_DECODE_STEPS, len(prompts)))
    alone = [_logits(loaded, [prompt], forced[:, i : i + 1]) for i, prompt in enumerate(prompts)]
    try:
        together = _logits(loaded, prompts, forced)
    except Exception as error:
        logger.warning("batching fails for this architecture (%s); requests run one at a time", type(error).__name__)
        return False
    expected = mx.concatenate(alone, axis=1)
    difference = mx.abs(together - expected).max().item() / max(mx.abs(expected).max().item(), 1e-6)
    tolerance = _TOLERANCE.get(loaded.info.dtype, _TOLERANCE["bfloat16"])
    if not difference <= tolerance:
        logger.warning(
            "a batch differs from single rows by %.3g of the largest logit; requests run one at a time", difference
        )
        return False
    return True
