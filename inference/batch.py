"""The rows that are being decoded together, and the groups that are being prefilled: KV caches and token arrays.

Prefill works on mlx-lm's own cache classes, decoding on `kv.py`. Runs on the engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import mlx.core as mx

from .kv import ExclusiveBatch, SlotBatch
from .sampling import Allowed, BatchSampler, Choice, RowSampling

Model: TypeAlias = Any
Cache: TypeAlias = list[Any]
R = TypeVar("R")


def row_kv(layers: Sequence[Any], row: int, length: int) -> Callable[[int, int], tuple[tuple[mx.array, mx.array], ...]]:
    """Return a function that copies keys and values of one row's tokens out of layers that can be cut.

    Args:
        layers: single-row or batched caches; in the latter rows are right-justified.
        row: position in the batch.
        length: tokens that the row has in the caches.
    """

    def kv(start: int, end: int) -> tuple[tuple[mx.array, mx.array], ...]:
        found = []
        for layer in layers:
            first = layer.size() - length
            part = slice(first + start, first + end)
            keys, values = layer.keys[row : row + 1, :, part], layer.values[row : row + 1, :, part]
            found.append((mx.contiguous(keys), mx.contiguous(values)))
        return tuple(found)

    return kv


class Prefill:
    """Prompts on their way into the KV cache.

    Either one prompt, in chunks of any length, or several short ones, right-padded, in one chunk. All tokens but the
    last are computed; the last is the row's first decode input, which spares the output layer for the prompt.

    Args:
        model: the model.
        prompts: token ids of each prompt, without what its cache holds already; at least one token each.
        caches: the caches of each prompt, for one row each.
    """

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], caches: Sequence[Cache]) -> None:
        self._model = model
        self._prompts = prompts
        self.done = 0
        """Tokens of the longest prompt that have been computed, or are being."""
        if len(caches) == 1:
            self.cache = caches[0]
        else:
            self.cache = [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]

    @property
    def remaining(self) -> int:
        """Tokens of the longest prompt that are still to compute."""
        return max(len(prompt) for prompt in self._prompts) - 1 - self.done

    def advance(self, budget: int) -> int:
        """Start computing the next chunk, of at most `budget` tokens for one prompt, and return the tokens in it."""
        if len(self._prompts) == 1:
            end = min(self.done + budget, len(self._prompts[0]) - 1)
            chunk = self._prompts[0][self.done : end]
            if chunk:
                self._model(mx.array([chunk], mx.uint32), cache=self.cache)
            self.done = end
            computed = len(chunk)
        else:
            computed = self._whole()
        mx.async_eval([layer.state for layer in self.cache])
        return computed

    @property
    def single(self) -> bool:
        """Whether the caches are those of one prompt, not of a group."""
        return len(self._prompts) == 1

    def _whole(self) -> int:
        lengths = [len(prompt) - 1 for prompt in self._prompts]
        longest = max(lengths)
        self.done = longest
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
    """A decode step that the device computes: its rows and what it will choose for them."""

    rows: tuple[R, ...]
    choice: Choice


class DecodeBatch(Generic[R]):
    """The rows in the batch. `R` is the engine's own record of a row.

    Args:
        model: the model.
        vocab_size: width of its logits.
        merges: whether rows are computed together. If not, the batch holds one row at a time, which is for models
            whose caches cannot be merged or that compute batches wrongly.
    """

    def __init__(self, model: Model, vocab_size: int, *, merges: bool) -> None:
        self._model = model
        self._merges = merges
        self._kv = SlotBatch() if merges else ExclusiveBatch()
        self._tokens: mx.array | None = None
        self._logits: mx.array | None = None
        self._sampler = BatchSampler(vocab_size)
        self.rows: list[R] = []

    @property
    def cache(self) -> Cache:
        """The layers' caches."""
        return self._kv.layers

    def join(
        self,
        rows: Sequence[R],
        last_tokens: Sequence[int],
        cache: Cache,
        lengths: Sequence[int],
        sampling: Sequence[RowSampling],
        *,
        single: bool,
    ) -> None:
        """Add prefilled rows.

        Args:
            rows: the engine's records.
            last_tokens: the last prompt token of each row.
            cache: KV of the rows as the prefill left it.
            lengths: tokens of each row in the cache.
            sampling: how each row chooses tokens.
            single: whether the cache is that of one prompt, to be copied for each row.
        """
        self._kv.join(cache, lengths, single=single)
        tokens = mx.array(last_tokens, mx.uint32)
        self._tokens = tokens if self._tokens is None else mx.concatenate([self._tokens, tokens])
        self._sampler.join(sampling)
        self.rows.extend(rows)

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only the rows at these positions; the last ones move into the places that become free."""
        if len(indices) == len(self.rows):
            return
        order = compact_order(indices)
        self.rows = [self.rows[i] for i in order]
        self._sampler.keep(order)
        if not order:
            self._kv = SlotBatch() if self._merges else ExclusiveBatch()
            self._tokens = self._logits = None
            return
        at = mx.array(order)
        self._tokens = None if self._tokens is None else self._tokens[at]
        self._logits = None if self._logits is None else self._logits[at]
        self._kv.keep(order)

    def forward(self, *, start: bool) -> None:
        """Build the next forward pass of all rows.

        Args:
            start: begin to compute it now; else `sample` starts both in one go.
        """
        if self._tokens is None:
            raise ValueError("an empty batch has no next step")
        self._logits = self._model(self._tokens[:, None], cache=self._kv.layers)[:, -1, :]
        self._kv.advance()
        if start:
            mx.async_eval(self._logits)

    def sample(self, allowed: Allowed | None = None) -> Launched[R]:
        """Start choosing the next tokens from the forward pass.

        Args:
            allowed: what rows that follow a grammar may choose from.
        """
        if self._logits is None:
            raise ValueError("there was no forward pass")
        choice = self._sampler(self._logits, allowed)
        self._tokens, self._logits = choice.tokens, None
        reported = choice.logprobs
        extra = [] if reported is None else [reported.chosen, reported.top_ids, reported.top]
        mx.async_eval(choice.tokens, self._sampler.state, extra)
        return Launched(tuple(self.rows), choice)

    def padded_tokens(self) -> int:
        """Return how many tokens every row takes in the KV caches, its padding included."""
        return self._kv.columns

    def nbytes(self) -> int:
        """Return the bytes that the rows' KV takes."""
        return sum(layer.nbytes for layer in self._kv.layers)


def compact_order(kept: Sequence[int]) -> list[int]:
    """Return the kept positions in an order in which as many as possible stay where they are.

    Rows behind the last place that is needed fill the places that become free.
    """
    wanted = set(kept)
    spare = [row for row in kept if row >= len(kept)]
    return [row if row in wanted else spare.pop() for row in range(len(kept))]
