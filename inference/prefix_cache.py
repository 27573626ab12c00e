"""KV reuse across requests: the longest known prefix of a prompt is taken from here instead of being computed.

A radix tree over token ids. Layers whose KV can be cut at any token (`KVCache`) are stored as one segment for each
edge, so a prefix that many prompts share is held once. Layers that cannot be cut (sliding windows that have rotated,
recurrent states) are stored as snapshots at the ends of edges, and a prefix is reused up to its deepest snapshot.
Bounded in bytes, least recently used edges go first. Runs on the engine thread only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from .radix import Node, RadixTree, Tokens

Cache: TypeAlias = list[Any]
KeyValue: TypeAlias = tuple[mx.array, mx.array]

MIN_TOKENS = 8
"""A shorter prefix costs more to look after than to compute."""


def can_cut(layer: Any) -> bool:
    """Return whether a layer's KV can be cut at any token."""
    return type(layer) is KVCache


@dataclass(slots=True)
class Segment:
    """What an edge holds.

    Attributes:
        kv: for each layer that can be cut, keys and values of the edge's tokens, shape [1, heads, tokens, size].
        snapshot: for the other layers, their caches at the end of the edge.
    """

    kv: tuple[KeyValue, ...]
    snapshot: tuple[Any, ...] | None = None
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.measure()

    def measure(self) -> None:
        """Count the bytes anew."""
        self.nbytes = sum(keys.nbytes + values.nbytes for keys, values in self.kv)
        self.nbytes += sum(layer.nbytes for layer in self.snapshot or ())


def _cut(segment: Segment, size: int) -> tuple[Segment, Segment]:
    first = tuple((mx.contiguous(k[..., :size, :]), mx.contiguous(v[..., :size, :])) for k, v in segment.kv)
    second = tuple((mx.contiguous(k[..., size:, :]), mx.contiguous(v[..., size:, :])) for k, v in segment.kv)
    mx.async_eval(first, second)
    return Segment(first), Segment(second, segment.snapshot)


@dataclass(slots=True)
class Stats:
    """Counters since the worker started."""

    hits: int = 0
    misses: int = 0
    hit_tokens: int = 0
    evictions: int = 0
    bytes: int = 0


class PrefixCache:
    """The prefixes of one model.

    Args:
        make_cache: returns empty caches for one row.
        max_bytes: what all segments and snapshots together may take.
    """

    def __init__(self, make_cache: Callable[[], Cache], max_bytes: int) -> None:
        self._make_cache = make_cache
        self.max_bytes = max_bytes
        self._cuttable = [can_cut(layer) for layer in make_cache()]
        self.needs_snapshots = not all(self._cuttable)
        """Whether a prefix can be reused only where a snapshot was taken."""
        self._tree: RadixTree[Segment] = RadixTree(_cut)
        self.stats = Stats()

    def __len__(self) -> int:
        return len(self._tree)

    def known(self, tokens: Tokens) -> int:
        """Return how many tokens of a prompt `take` would give, its last token left aside. Changes nothing."""
        return self._usable(tokens[:-1])[1]

    def shared(self, tokens: Tokens) -> int:
        """Return how many tokens of a prompt are known to the tree, whether or not they can be reused already."""
        return self._tree.match(tokens[:-1])[1]

    def take(self, tokens: Tokens) -> tuple[Cache, int]:
        """Return caches that hold the longest reusable prefix of a prompt, and its length in tokens.

        The prompt's last token is never part of it, as its logits are needed.
        """
        cache = self._make_cache()
        path, length = self._usable(tokens[:-1])
        if length == 0:
            self.stats.misses += 1
            return cache, 0
        self.stats.hits += 1
        self.stats.hit_tokens += length
        self._fill(cache, path, length)
        self._tree.touch(path[-1])
        return cache, length

    def put(
        self, tokens: Tokens, kv: Callable[[int, int], tuple[KeyValue, ...]], others: Sequence[Any]
    ) -> Node[Segment]:
        """Remember a sequence.

        Args:
            tokens: the whole sequence that the caches hold.
            kv: returns keys and values of tokens `start` to `end`, for the layers that can be cut.
            others: the caches of the other layers at the end of the sequence; they are kept, so they must be copies.
        """

        def payload(start: int, end: int) -> Segment:
            segment = Segment(kv(start, end))
            mx.async_eval(segment.kv)
            self.stats.bytes += segment.nbytes
            return segment

        node = self._tree.insert(tokens, payload)
        segment = node.payload
        if segment is not None and others and segment.snapshot is None:
            self.stats.bytes -= segment.nbytes
            segment.snapshot = tuple(others)
            segment.measure()
            self.stats.bytes += segment.nbytes
        self.shrink(self.max_bytes)
        return node

    def put_row(self, tokens: Tokens, cache: Cache) -> Node[Segment]:
        """Remember a sequence whose KV is in caches of a single row that hold exactly its tokens."""
        cuttable = [layer for layer, cut in zip(cache, self._cuttable, strict=True) if cut]
        others = [copy.deepcopy(layer) for layer, cut in zip(cache, self._cuttable, strict=True) if not cut]

        def kv(start: int, end: int) -> tuple[KeyValue, ...]:
            return tuple(
                (mx.contiguous(layer.keys[..., start:end, :]), mx.contiguous(layer.values[..., start:end, :]))
                for layer in cuttable
            )

        return self.put(tokens, kv, others)

    def split_layers(self, layers: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Return the layers that can be cut, and the others."""
        pairs = list(zip(layers, self._cuttable, strict=True))
        return [layer for layer, cut in pairs if cut], [layer for layer, cut in pairs if not cut]

    def shrink(self, max_bytes: int) -> None:
        """Forget the least recently used edges until at most `max_bytes` are taken."""
        while self.stats.bytes > max_bytes:
            leaf = self._tree.oldest_leaf()
            if leaf is None:
                return
            self._tree.forget(leaf)
            self.stats.evictions += 1
            if leaf.payload is not None:
                self.stats.bytes -= leaf.payload.nbytes

    def clear(self) -> None:
        """Forget everything."""
        self.shrink(0)

    def _usable(self, tokens: Tokens) -> tuple[list[Node[Segment]], int]:
        path, length = self._tree.match(tokens)
        if self.needs_snapshots:
            while path and (path[-1].end > length or path[-1].payload is None or path[-1].payload.snapshot is None):
                path.pop()
            length = path[-1].end if path else 0
        return (path, length) if length >= MIN_TOKENS else ([], 0)

    def _fill(self, cache: Cache, path: Sequence[Node[Segment]], length: int) -> None:
        segments = [node.payload for node in path if node.payload is not None]
        snapshot = iter(copy.deepcopy(segments[-1].snapshot or ()))
        at = 0
        for layer, (own, cut) in enumerate(zip(list(cache), self._cuttable, strict=True)):
            if not cut:
                cache[layer] = next(snapshot)
                continue
            own.keys = _joined([segment.kv[at][0] for segment in segments], length)
            own.values = _joined([segment.kv[at][1] for segment in segments], length)
            own.offset = length
            at += 1


def _joined(parts: list[mx.array], length: int) -> mx.array:
    """Return the first `length` tokens of these segments, as an array of its own."""
    whole = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
    # Even when nothing is cut off: the row writes into its array, and the tree's must stay as they are.
    return whole[..., :length, :]


def as_tokens(tokens: Sequence[int]) -> Tokens:
    """Return token ids as the tree compares them."""
    return np.asarray(tokens, np.int32)
