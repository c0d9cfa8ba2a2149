"""Block tables: the ordered blocks of one sequence, and the runs of adjacent slots they form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """`tokens` adjacent slots that begin at `slot`."""

    slot: int
    tokens: int


class BlockTable:
    """The blocks of one sequence, in order; block `i` begins with token `block_start(i)`, `i * block_size` as a rule.

    A table may have one *seam*: a block that is left partly filled, because others hold it too, and behind which the
    sequence goes on in a block of its own. Samples and beams of a prompt part there, so that none copies its tail:

        prompt of 27 tokens   [ 16 ][ 11 . ]          block_start: 0, 16
        a sample of it        [ 16 ][ 11 . ][ 5 . ]   block_start: 0, 16, 27 = seam_tokens; seam_blocks = 2

    Only the manager changes a table. Adjacent blocks are kept as spans (first block, number of blocks), so that
    the slots of a long sequence come as a few runs without walking over its blocks; none reaches over the seam.
    """

    __slots__ = (
        "_spans",
        "block_size",
        "blocks",
        "claims",
        "is_forked",
        "keys",
        "num_tokens",
        "root",
        "seam_blocks",
        "seam_tokens",
        "tokens",
    )

    def __init__(self, block_size: int, root: bytes | None = None):
        self.block_size = block_size
        self.blocks: list[int] = []
        self.num_tokens = 0
        self.seam_tokens = self.seam_blocks = 0
        # Whether another sequence of the same call began as a copy of this one, or this one as a copy of another.
        self.is_forked = False
        self.claims: list[range] = []
        self._spans: list[tuple[int, int]] = []
        # Where the prefix index begins for this sequence, `None` where it is not to be indexed; then its token ids,
        # and the keys of its first blocks as far as they are known.
        self.root = root
        self.tokens: list[int] = []
        self.keys: list[bytes] = []

    def block_start(self, block: int) -> int:
        """Tokens before the table's block number `block`."""
        if block < self.seam_blocks:
            return block * self.block_size
        return self.seam_tokens + (block - self.seam_blocks) * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that the first `num_tokens` tokens lie in."""
        if num_tokens <= self.seam_tokens:
            return -(-num_tokens // self.block_size)
        return self.seam_blocks - (self.seam_tokens - num_tokens) // self.block_size

    def whole_blocks(self, num_tokens: int) -> int:
        """Of these, the blocks that get no more tokens as the sequence grows."""
        if num_tokens < self.seam_tokens:
            return num_tokens // self.block_size
        return self.seam_blocks + (num_tokens - self.seam_tokens) // self.block_size

    @property
    def tail_tokens(self) -> int:
        """Tokens in a last block that has room for more; 0 where the next token needs another block."""
        return self.num_tokens - self.block_start(self.whole_blocks(self.num_tokens))

    def open_seam(self) -> None:
        """Go on in a new block behind a tail that others hold too."""
        self.seam_tokens, self.seam_blocks = self.num_tokens, len(self.blocks)

    def untrack(self) -> None:
        """Something was stored that token ids do not describe: the sequence is not indexed any more."""
        self.root = None
        self.tokens.clear()
        self.keys.clear()

    def extend(self, blocks: Sequence[int]) -> None:
        """Put `blocks` behind the last one."""
        spans = self._spans
        after_seam = len(self.blocks) == self.seam_blocks > 0
        self.blocks.extend(blocks)
        for block in blocks:
            if not after_seam and spans and spans[-1][0] + spans[-1][1] == block:
                spans[-1] = (spans[-1][0], spans[-1][1] + 1)
            else:
                spans.append((block, 1))
            after_seam = False

    def truncate(self, num_blocks: int) -> list[int]:
        """Cut the table to `num_blocks` blocks; returns the removed ones, last first."""
        if num_blocks < self.seam_blocks:
            self.seam_tokens = self.seam_blocks = 0
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
        num_blocks = other.blocks_for(num_tokens)
        self.blocks = other.blocks[:num_blocks]
        self.num_tokens = num_tokens
        has_seam = num_tokens >= other.seam_tokens
        self.seam_tokens, self.seam_blocks = (other.seam_tokens, other.seam_blocks) if has_seam else (0, 0)
        self.is_forked = other.is_forked = True
        self.root = other.root
        self.tokens = other.tokens[:num_tokens]
        self.keys = other.keys[: self.whole_blocks(num_tokens)]
        self._spans = other._spans.copy()
        excess = len(other.blocks) - num_blocks
        while excess:
            first, count = self._spans.pop()
            if count > excess:
                self._spans.append((first, count - excess))
            excess -= min(count, excess)

    def slot(self, token: int) -> int:
        """The slot of one token."""
        block = self.whole_blocks(token)
        return self.blocks[block] * self.block_size + token - self.block_start(block)

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """The slots of tokens `start` to `stop` as runs of adjacent slots."""
        size, block, at = self.block_size, 0, 0
        for first, count in self._spans:
            block += count
            end = self.block_start(block)
            if end > start:
                lo = max(start, at)
                hi = min(stop, end)
                if hi > lo:
                    yield Run(first * size + lo - at, hi - lo)
                if end >= stop:
                    return
            at = end
