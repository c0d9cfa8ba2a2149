"""Block tables: the ordered blocks of one sequence, and the runs of adjacent slots they form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """`tokens` adjacent slots that begin at `slot`."""

    slot: int
    tokens: int


class BlockTable:
    """The blocks of one sequence, in order; token `i` lies in slot `blocks[i // size] * size + i % size`.

    Only the manager changes a table. Adjacent blocks are kept as spans (first block, number of blocks), so that
    the slots of a long sequence come as a few runs without walking over its blocks.
    """

    __slots__ = ("_spans", "block_size", "blocks", "claims", "keys", "num_tokens", "root", "tokens")

    def __init__(self, block_size: int, root: bytes | None = None):
        self.block_size = block_size
        self.blocks: list[int] = []
        self.num_tokens = 0
        self.claims: list[range] = []
        self._spans: list[tuple[int, int]] = []
        # Where the prefix index begins for this sequence, `None` where it is not to be indexed; then its token ids,
        # and the keys of its first blocks as far as they are known.
        self.root = root
        self.tokens: list[int] = []
        self.keys: list[bytes] = []

    def untrack(self) -> None:
        """Something was stored that token ids do not describe: the sequence is not indexed any more."""
        self.root = None
        self.tokens.clear()
        self.keys.clear()

    def extend(self, blocks: Sequence[int]) -> None:
        """Put `blocks` behind the last one."""
        self.blocks.extend(blocks)
        spans = self._spans
        for block in blocks:
            if spans and spans[-1][0] + spans[-1][1] == block:
                spans[-1] = (spans[-1][0], spans[-1][1] + 1)
            else:
                spans.append((block, 1))

    def truncate(self, num_blocks: int) -> list[int]:
        """Cut the table to `num_blocks` blocks; returns the removed ones, last first."""
        removed = self.blocks[num_blocks:]
        del self.blocks[num_blocks:]
        excess = len(removed)
        while excess:
            first, count = self._spans.pop()
            if count > excess:
                self._spans.append((first, count - excess))
            excess -= min(count, excess)
        return removed[::-1]

    def copy_from(self, other: BlockTable, num_tokens: int) -> None:
        """Hold the first `num_tokens` tokens of `other` (the caller counts the references)."""
        num_blocks = -(-num_tokens // self.block_size)
        self.blocks = other.blocks[:num_blocks]
        self.num_tokens = num_tokens
        self.root = other.root
        self.tokens = other.tokens[:num_tokens]
        self.keys = other.keys[: num_tokens // self.block_size]
        self._spans = other._spans.copy()
        excess = len(other.blocks) - num_blocks
        while excess:
            first, count = self._spans.pop()
            if count > excess:
                self._spans.append((first, count - excess))
            excess -= min(count, excess)

    def slot(self, token: int) -> int:
        """The slot of one token."""
        block, offset = divmod(token, self.block_size)
        return self.blocks[block] * self.block_size + offset

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """The slots of tokens `start` to `stop` as runs of adjacent slots."""
        size, at = self.block_size, 0
        for first, count in self._spans:
            end = at + count * size
            if end > start:
                lo = max(start, at)
                hi = min(stop, end)
                if hi > lo:
                    yield Run(first * size + lo - at, hi - lo)
                if end >= stop:
                    return
            at = end
