"""A radix tree over token sequences with a payload on every edge: which prefixes are known, and which goes first.

Pure bookkeeping for `prefix_cache.py`: it knows nothing of KV. Payloads are cut by a function that the owner gives.
Nodes are kept in order of use, ancestors always after their descendants, so the first node in that order is a leaf
and can be forgotten alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
P = TypeVar("P")


def common_length(first: Tokens, second: Tokens) -> int:
    """Return how many tokens two sequences share from their start."""
    size = min(len(first), len(second))
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size


class Node(Generic[P]):
    """An edge of the tree together with the place where it ends."""

    __slots__ = ("children", "end", "parent", "payload", "tokens")

    def __init__(self, tokens: Tokens, payload: P | None, parent: Node[P] | None) -> None:
        self.tokens = tokens
        self.payload = payload
        self.parent = parent
        self.children: dict[int, Node[P]] = {}
        self.end: int = len(tokens) + (parent.end if parent is not None else 0)
        """Tokens from the root to the end of this edge."""


class RadixTree(Generic[P]):
    """The tree.

    Args:
        cut: returns the two parts of a payload before and after a number of tokens.
    """

    def __init__(self, cut: Callable[[P, int], tuple[P, P]]) -> None:
        self._cut = cut
        self.root: Node[P] = Node(np.empty(0, np.int32), None, None)
        self._by_use: OrderedDict[Node[P], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_use)

    def __iter__(self) -> Iterator[Node[P]]:
        """Return all nodes, least recently used first."""
        return iter(self._by_use)

    def match(self, tokens: Tokens) -> tuple[list[Node[P]], int]:
        """Return the nodes of the longest known prefix, and its length, which may end inside the last node."""
        path: list[Node[P]] = []
        node, done = self.root, 0
        while done < len(tokens):
            child = node.children.get(int(tokens[done]))
            if child is None:
                break
            shared = common_length(child.tokens, tokens[done:])
            path.append(child)
            done += shared
            if shared < len(child.tokens):
                break
            node = child
        return path, done

    def touch(self, node: Node[P]) -> None:
        """Make a node and its ancestors the most recently used."""
        at: Node[P] | None = node
        while at is not None and at.parent is not None:
            self._by_use.move_to_end(at)
            at = at.parent

    def insert(self, tokens: Tokens, payload: Callable[[int, int], P]) -> Node[P]:
        """Make a sequence known and return the node that ends it.

        Args:
            tokens: the whole sequence, at least one token.
            payload: returns the payload of tokens `start` to `end`; called only for what was not known.
        """
        path, done = self.match(tokens)
        node = path[-1] if path else self.root
        if node.end > done:
            node = self.split(node, done)
        if done < len(tokens):
            added = Node(tokens[done:].copy(), payload(done, len(tokens)), node)
            node.children[int(tokens[done])] = added
            self._by_use[added] = None
            node = added
        self.touch(node)
        return node

    def split(self, node: Node[P], end: int) -> Node[P]:
        """Cut an edge so that a node ends after `end` tokens from the root, and return that node."""
        parent = node.parent
        assert parent is not None
        assert parent.end < end < node.end
        size = end - parent.end
        first, second = (None, None) if node.payload is None else self._cut(node.payload, size)
        upper: Node[P] = Node(node.tokens[:size], first, parent)
        parent.children[int(node.tokens[0])] = upper
        node.parent, node.tokens, node.payload = upper, node.tokens[size:], second
        upper.children[int(node.tokens[0])] = node
        self._by_use[upper] = None
        return upper

    def forget(self, node: Node[P]) -> None:
        """Remove a leaf."""
        parent = node.parent
        assert parent is not None
        assert not node.children
        del parent.children[int(node.tokens[0])]
        del self._by_use[node]
        node.parent = None

    def oldest_leaf(self) -> Node[P] | None:
        """Return the least recently used node that has no descendants, or None."""
        return next((node for node in self._by_use if not node.children), None)
