"""Tries over token sequences and over block tables: what several rows have in common, in depth-first order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrieNode:
    """A stretch of tokens that the same rows have in common.

    Attributes:
        start, stop: positions `[start, stop)` in the rows' sequences.
        rows: the rows that pass through the node, ascending.
        parent: index of the parent in the list of nodes, `None` for a root.
    """

    start: int
    stop: int
    rows: tuple[int, ...]
    parent: int | None


def common_prefix(a: Sequence[int], b: Sequence[int], start: int = 0) -> int:
    """Length of the common prefix of two lists that are known to agree on `[0, start)`.

    Compares slices, at C speed, of doubling and then halving length.
    """
    lo, hi = start, min(len(a), len(b))
    step = 32
    while lo < hi:
        end = min(lo + step, hi)
        if a[lo:end] == b[lo:end]:
            lo = end
            step *= 2
        elif end - lo == 1:
            return lo
        else:
            hi, step = end, (end - lo) // 2
    return lo


def build_trie(sequences: Sequence[Sequence[int]]) -> list[TrieNode]:
    """The radix trie of `sequences`, depth first, so that a node's descendants follow it without a gap.

    Each distinct token of a common prefix is in exactly one node. Rows are sorted, so only neighbours are compared.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    nodes: list[TrieNode] = []
    # A stack instead of recursion: a deep trie (each row a prefix of the next) must not hit Python's limit.
    stack = [(lo, hi, 0, None) for lo, hi in _groups(sequences, order, 0, len(order), 0)]
    while stack:
        lo, hi, start, parent = stack.pop()
        stop = common_prefix(sequences[order[lo]], sequences[order[hi - 1]], start)
        nodes.append(TrieNode(start, stop, tuple(sorted(order[lo:hi])), parent))
        parent = len(nodes) - 1
        stack.extend((a, b, stop, parent) for a, b in _groups(sequences, order, lo, hi, stop))
    return nodes


def _groups(sequences: Sequence[Sequence[int]], order: list[int], lo: int, hi: int, at: int) -> list[tuple[int, int]]:
    """Split sorted rows `[lo, hi)` where their element at position `at` changes; rows that end before are left out.

    The group with the first row comes last: a stack then yields rows about in the order they came in.
    """
    groups: list[tuple[int, int]] = []
    start = lo
    while start < hi and len(sequences[order[start]]) <= at:
        start += 1
    while start < hi:
        token, end = sequences[order[start]][at], start + 1
        while end < hi and sequences[order[end]][at] == token:
            end += 1
        groups.append((start, end))
        start = end
    groups.sort(key=lambda group: -min(order[group[0] : group[1]]))
    return groups
