"""The rows that are being decoded together, and the groups that are being prefilled: KV caches and token arrays.

Built on the cache classes of mlx-lm, of which only the interface is used that its own generators use: `merge`,
`extend`, `filter`, `prepare`, `finalize`. Runs on the engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import mlx.core as mx

from .sampling import BatchSampler, RowSampling

Model = Any
Cache = list[Any]
R = TypeVar("R")


def _states(cache: Cache) -> list[Any]:
    return [layer.state for layer in cache]


class Prefill:
    """Prompts on their way into the KV cache.

    Either one prompt, in chunks of any length, or several short ones, right-padded, in one chunk. All tokens but the
    last are computed; the last is the row's first decode input, which spares the output layer for the prompt.
    """

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], caches: Sequence[Cache]) -> None:
        self._model = model
        self._prompts = prompts
        self._done = 0
        if len(caches) == 1:
            self.cache = caches[0]
        else:
            self.cache = [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]

    @property
    def remaining(self) -> int:
        """Tokens of the longest prompt that are still to compute."""
        return max(len(prompt) for prompt in self._prompts) - 1 - self._done

    def advance(self, budget: int) -> int:
        """Start computing the next chunk, of at most `budget` tokens for one prompt, and return the tokens in it."""
        if len(self._prompts) == 1:
            end = min(self._done + budget, len(self._prompts[0]) - 1)
            chunk = self._prompts[0][self._done : end]
            if chunk:
                self._model(mx.array([chunk], mx.uint32), cache=self.cache)
            self._done = end
            computed = len(chunk)
        else:
            computed = self._whole()
        mx.async_eval(_states(self.cache))
        return computed

    def for_batch(self, rows: int, *, merges: bool) -> Cache:
        """Return the finished KV in the form that a decode batch takes, that of a single prompt for `rows` rows."""
        if len(self._prompts) > 1 or not merges:
            return self.cache
        return [layer.merge([layer] * rows) for layer in self.cache]

    def _whole(self) -> int:
        lengths = [len(prompt) - 1 for prompt in self._prompts]
        longest = max(lengths)
        self._done = longest
        if longest == 0:
            return 0
        padding = [longest - length for length in lengths]
        tokens = mx.array(
            [[*prompt[:-1], *([0] * pad)] for prompt, pad in zip(self._prompts, padding, strict=True)], mx.uint32
        )
        padded = max(padding) > 0
        if padded:
            for layer in self.cache:
                layer.prepare(lengths=lengths, right_padding=padding)
        self._model(tokens, cache=self.cache)
        if padded:
            for layer in self.cache:
                layer.finalize()
        return sum(lengths)


@dataclass(slots=True)
class Launched(Generic[R]):
    """A decode step that the device computes: its rows, and their next tokens, shape [rows]."""

    rows: tuple[R, ...]
    tokens: mx.array


class DecodeBatch(Generic[R]):
    """The rows in the batch. `R` is the engine's own record of a row.

    With `merges` False every cache is kept as its prefill left it and the batch holds one row at a time; that is for
    models whose caches cannot be merged or that compute batches wrongly.
    """

    def __init__(self, model: Model, vocab_size: int, *, merges: bool) -> None:
        self._model = model
        self._merges = merges
        self._cache: Cache = []
        self._tokens: mx.array | None = None
        self._sampler = BatchSampler(vocab_size)
        self.rows: list[R] = []

    def join(
        self, rows: Sequence[R], last_tokens: Sequence[int], cache: Cache, sampling: Sequence[RowSampling]
    ) -> None:
        """Add prefilled rows.

        Args:
            rows: the engine's records.
            last_tokens: the last prompt token of each row.
            cache: KV of the rows, from `Prefill.for_batch`.
            sampling: how each row chooses tokens.
        """
        if self._cache and self._merges:
            for mine, other in zip(self._cache, cache, strict=True):
                mine.extend(other)
        else:
            self._cache = cache
        tokens = mx.array(last_tokens, mx.uint32)
        self._tokens = tokens if self._tokens is None else mx.concatenate([self._tokens, tokens])
        self._sampler.join(sampling)
        self.rows.extend(rows)

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only the rows at these positions."""
        if len(indices) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in indices]
        self._sampler.keep(indices)
        if not indices:
            self._cache, self._tokens = [], None
            return
        at = mx.array(list(indices))
        self._tokens = None if self._tokens is None else self._tokens[at]
        for layer in self._cache:
            layer.filter(at)

    def launch(self) -> Launched[R]:
        """Start the next decode step of all rows."""
        if self._tokens is None:
            raise ValueError("an empty batch has no next step")
        logits = self._model(self._tokens[:, None], cache=self._cache)[:, -1, :]
        self._tokens = self._sampler(logits)
        mx.async_eval(self._tokens, self._sampler.state)
        return Launched(tuple(self.rows), self._tokens)

    def nbytes(self) -> int:
        """Return the bytes that the rows' KV takes."""
        return sum(layer.nbytes for layer in self._cache)
