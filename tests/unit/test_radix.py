"""The tree of known prefixes, against a plain list of sequences."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.radix import RadixTree, common_length

Sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=20)


def _tree() -> RadixTree[list[int]]:
    return RadixTree(lambda payload, size: (payload[:size], payload[size:]))


def _fill(sequences: list[list[int]]) -> RadixTree[list[int]]:
    tree = _tree()
    for sequence in sequences:
        tree.insert(np.array(sequence, np.int32), lambda start, end, s=sequence: s[start:end])
    return tree


@given(Sequences, st.lists(st.integers(0, 2), max_size=9))
@settings(deadline=None)
def test_match_is_the_longest_prefix_of_any_known_sequence(sequences: list[list[int]], query: list[int]) -> None:
    tree = _fill(sequences)
    wanted = np.array(query, np.int32)
    expected = max(common_length(np.array(s, np.int32), wanted) for s in sequences)

    path, length = tree.match(wanted)

    assert length == expected
    payload = [token for node in path for token in node.payload or []]
    assert payload[:length] == query[:length]
    assert [len(node.payload or []) for node in path] == [len(node.tokens) for node in path]


@given(Sequences)
@settings(deadline=None)
def test_ancestors_are_always_used_later_than_their_descendants(sequences: list[list[int]]) -> None:
    tree = _fill(sequences)
    order = {node: at for at, node in enumerate(tree)}

    for node in tree:
        if node.parent is not tree.root:
            assert order[node.parent] > order[node]


@given(Sequences)
@settings(deadline=None)
def test_forgetting_every_oldest_leaf_empties_the_tree(sequences: list[list[int]]) -> None:
    tree = _fill(sequences)
    while (leaf := tree.oldest_leaf()) is not None:
        tree.forget(leaf)

    assert len(tree) == 0
    assert tree.root.children == {}


def test_least_recently_used_goes_first() -> None:
    tree = _tree()
    nodes = {
        name: tree.insert(np.array(sequence, np.int32), lambda start, end, s=sequence: s[start:end])
        for name, sequence in {"a": [1, 1], "b": [2, 2], "c": [3, 3]}.items()
    }
    tree.touch(nodes["a"])

    assert tree.oldest_leaf() is nodes["b"]


def test_split_keeps_the_tokens() -> None:
    tree = _tree()
    node = tree.insert(np.array([1, 2, 3, 4], np.int32), lambda start, end: [1, 2, 3, 4][start:end])
    upper = tree.split(node, 2)

    assert (upper.payload, node.payload) == ([1, 2], [3, 4])
    assert [*upper.tokens, *node.tokens] == [1, 2, 3, 4]
