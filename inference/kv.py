"""KV caches of a decode batch whose rows come and go: a row that joins or leaves is copied, the others stay in place.

mlx-lm's `BatchKVCache` copies the whole batch whenever its rows change, and keeps offsets and padding in every layer.
Here rows live in slots of arrays with room to spare, and one `Layout` holds for all layers which token is where. Rows
are right-justified, so that all of them write at the same place. For plain attention caches only; layers of other
kinds keep mlx-lm's own batch caches. Runs on the engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache

_TOKEN_STEP = 256
_ROW_STEP = 8
_WORTH_COMPACTING = 256
"""Columns of padding in every row that are worth a copy of the batch to be rid of."""


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


class Layout:
    """Where the rows of a batch have their tokens; shared by all layers.

    Attributes:
        lengths: tokens of each row.
        end: column after the last token of every row; row i begins at column `end - lengths[i]`.
        left_padding, offset: the same for the device, shape [rows].
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.end = 0
        self.left_padding = mx.zeros((0,), mx.int32)
        self.offset = mx.zeros((0,), mx.int32)

    def set(self, lengths: list[int], end: int) -> None:
        """Set the rows anew."""
        self.lengths = lengths
        self.end = end
        self.offset = mx.array(lengths, mx.int32)
        self.left_padding = mx.array([end - length for length in lengths], mx.int32)

    def advance(self, tokens: int) -> None:
        """Note that every layer has written this many further tokens to each row."""
        self.lengths = [length + tokens for length in self.lengths]
        self.end += tokens
        self.offset = self.offset + tokens

    @property
    def padded(self) -> bool:
        """Whether any row is shorter than the longest."""
        return any(length < self.end for length in self.lengths)


class SlotKVCache(BatchKVCache):
    """The KV of one layer. Offers models what `BatchKVCache` offers; rows are changed by the `DecodeBatch` alone."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self._shown = (0, 0)

    @property
    def offset(self) -> mx.array:
        """Tokens of each row, for rotary embeddings, shape [rows]."""
        return self.layout.offset

    @property
    def left_padding(self) -> mx.array:
        """Columns before each row's first token, shape [rows]."""
        return self.layout.left_padding

    @property
    def _idx(self) -> int:
        return self.layout.end

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None]:
        """What has to be evaluated."""
        return self.keys, self.values

    def size(self) -> int:
        """Return the columns in use."""
        return self.layout.end

    def make_mask(self, N: int, return_array: bool = False, **kwargs: Any) -> Any:  # noqa: N803  # models pass it by this name
        """Return the attention mask for N new tokens of each row; None where every row sees all of its columns."""
        if N == 1 and not return_array and not kwargs.get("window_size") and not self.layout.padded:
            return None
        return super().make_mask(N, return_array=return_array, **kwargs)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write new tokens after the last column and return all columns of all rows.

        Args:
            keys: shape [rows, heads, tokens, size].
            values: the same, of a size of its own.
        """
        start, rows = self.layout.end, keys.shape[0]
        end = start + keys.shape[2]
        self._reserve(rows, end, keys, values)
        assert self.keys is not None
        assert self.values is not None
        self.keys[:rows, :, start:end, :] = keys
        self.values[:rows, :, start:end, :] = values
        self._shown = (rows, end)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return all columns of all rows, as of the last update; some models read the KV of another layer."""
        assert self.keys is not None
        assert self.values is not None
        rows, end = self._shown
        return self.keys[:rows, :, :end, :], self.values[:rows, :, :end, :]

    def place(self, first: int, other: Any, columns: int, end: int) -> None:
        """Write the rows of another cache into slots, right-justified.

        Args:
            first: the first slot.
            other: a batch cache, or that of a single row.
            columns: how many of the other's columns hold its rows, counted from its last.
            end: column after the last token.
        """
        if columns == 0:
            return
        last = other.size()
        keys, values = other.keys[:, :, last - columns : last, :], other.values[:, :, last - columns : last, :]
        rows = keys.shape[0]
        self._reserve(first + rows, end, keys, values)
        assert self.keys is not None
        assert self.values is not None
        self.keys[first : first + rows, :, end - columns : end, :] = keys
        self.values[first : first + rows, :, end - columns : end, :] = values

    def move(self, source: int, target: int) -> None:
        """Copy a row into another slot."""
        if self.keys is not None and self.values is not None:
            self.keys[target : target + 1] = self.keys[source : source + 1]
            self.values[target : target + 1] = self.values[source : source + 1]

    def shift(self, rows: int, old_end: int, new_end: int) -> None:
        """Move the columns of all rows so that they end elsewhere; a negative move drops columns of padding."""
        if self.keys is None or self.values is None:
            return
        kept = min(old_end, new_end)
        keys = self.keys[:rows, :, old_end - kept : old_end, :]
        values = self.values[:rows, :, old_end - kept : old_end, :]
        wanted = (self.keys.shape[0], _round_up(new_end, _TOKEN_STEP))
        self.keys, self.values = _grown(None, keys, wanted), _grown(None, values, wanted)
        self.keys[:rows, :, new_end - kept : new_end, :] = keys
        self.values[:rows, :, new_end - kept : new_end, :] = values

    def _reserve(self, rows: int, columns: int, keys: mx.array, values: mx.array) -> None:
        """Make room for this many rows and columns of the given kind."""
        have = (0, 0) if self.keys is None else (self.keys.shape[0], self.keys.shape[2])
        if rows <= have[0] and columns <= have[1]:
            return
        wanted_rows = _round_up(rows, _ROW_STEP) if rows > 1 else 1
        wanted = (max(have[0], wanted_rows), max(have[1], _round_up(columns, _TOKEN_STEP)))
        self.keys = _grown(self.keys, keys, wanted)
        self.values = _grown(self.values, values, wanted)


def _grown(old: mx.array | None, like: mx.array, wanted: tuple[int, int]) -> mx.array:
    new = mx.zeros((wanted[0], like.shape[1], wanted[1], like.shape[3]), like.dtype)
    if old is not None:
        new[: old.shape[0], :, : old.shape[2], :] = old
    return new


def is_plain(layer: Any) -> bool:
    """Return whether a prefilled layer, single or batched, is plain attention KV."""
    return type(layer) in (KVCache, BatchKVCache)


class SlotBatch:
    """The layers of a decode batch: slots for plain attention, mlx-lm's batch caches for the rest."""

    def __init__(self) -> None:
        self._layout = Layout()
        self.layers: list[Any] = []

    def join(self, cache: Sequence[Any], lengths: Sequence[int], *, single: bool) -> None:
        """Add prefilled rows.

        Args:
            cache: the layers of a single prompt, to be copied for each row, or of a group with a row for each prompt.
            lengths: tokens of each row.
            single: which of the two.
        """
        layout, first = self._layout, len(self._layout.lengths)
        if not self.layers:
            self.layers = [SlotKVCache(layout) if is_plain(layer) else None for layer in cache]
        end = max(layout.end, *lengths)
        for at, (mine, other) in enumerate(zip(self.layers, cache, strict=True)):
            if isinstance(mine, SlotKVCache):
                if end > layout.end and first:
                    mine.shift(first, layout.end, end)
                for copy in range(len(lengths) if single else 1):
                    mine.place(first + copy, other, max(lengths), end)
                continue
            part = other.merge([other] * len(lengths)) if single else other
            if mine is None:
                self.layers[at] = part
            else:
                mine.extend(part)
        layout.set([*layout.lengths, *lengths], end)

    def keep(self, order: Sequence[int]) -> None:
        """Keep only these rows, in this order; rows that change their place must come from behind the last kept one."""
        layout = self._layout
        lengths = [layout.lengths[row] for row in order]
        spare = layout.end - max(lengths)
        end = layout.end - spare if spare >= _WORTH_COMPACTING else layout.end
        index = mx.array(list(order))
        for layer in self.layers:
            if not isinstance(layer, SlotKVCache):
                layer.filter(index)
                continue
            for target, source in enumerate(order):
                if source != target:
                    layer.move(source, target)
            if end != layout.end:
                layer.shift(len(order), layout.end, end)
        layout.set(lengths, end)

    def advance(self) -> None:
        """Note that a decode step has written one token to every row."""
        self._layout.advance(1)

    @property
    def columns(self) -> int:
        """Tokens that every row takes, its padding included."""
        return self._layout.end


class ExclusiveBatch:
    """The layers of a batch that holds one row at a time, as its prefill left them."""

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.columns = 0

    def join(self, cache: Sequence[Any], lengths: Sequence[int], *, single: bool) -> None:
        """Take the only row.

        Raises:
            ValueError: there is one already, or there are several.
        """
        if self.layers or len(lengths) > 1 or not single:
            raise ValueError("this model computes one row at a time")
        self.layers, self.columns = list(cache), lengths[0]

    def keep(self, _order: Sequence[int]) -> None:
        """Keep the row."""

    def advance(self) -> None:
        """Note that a decode step has written a token."""
        self.columns += 1
