"""The blocks of one sequence in one group of layers, and the runs of adjacent slots they form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from hf_paged.core.blocks import NULL_BLOCK
from hf_paged.core.overflow import HOST_BLOCKS

if TYPE_CHECKING:
    from hf_paged.core.table import BlockTable


class Run(NamedTuple):
    """`tokens` adjacent slots that begin at `slot`."""

    slot: int
    tokens: int


class BlockChain:
    """Block `i` holds the tokens from `table.block_start(i)` on; the table says where its blocks begin.

    The first `dropped` blocks have been given up, because they lie outside the group's window; the null block stands in
    their place. Adjacent blocks are kept as spans (first block, number of blocks), so that the slots of a long sequence
    come as a few runs without walking over its blocks; none reaches over the table's seam.

    `version` is another one whenever the blocks have changed.
    """

    __slots__ = ("_spans", "_table", "blocks", "claims", "dropped", "version")

    def __init__(self, table: BlockTable):
        self._table = table
        self.blocks: list[int] = []
        self.dropped = 0
        self.claims: list[range] = []
        self.version = 0
        self._spans: list[tuple[int, int]] = []

    @property
    def first_token(self) -> int:
        """The first token that is still there."""
        return self._table.block_start(self.dropped)

    @property
    def held(self) -> list[int]:
        """The blocks that are still there."""
        return self.blocks[self.dropped :]

    @property
    def reaches_host(self) -> bool:
        """Whether some of the blocks lie on the host."""
        return any(first >= HOST_BLOCKS for first, _ in self._spans)

    @property
    def on_device(self) -> Sequence[int]:
        """All blocks, null blocks in place of those on the host."""
        if not self.reaches_host:
            return self.blocks
        return [block if block < HOST_BLOCKS else NULL_BLOCK for block in self.blocks]

    def has_claimed(self, block: int) -> bool:
        """Whether room at `block` is kept for this sequence."""
        return any(block in claim for claim in self.claims)

    def extend(self, blocks: Sequence[int]) -> None:
        """Put `blocks` behind the last one; null blocks stand for such as are already given up, and come first."""
        spans, seam_blocks = self._spans, self._table.seam_blocks
        self.version += 1
        for block in blocks:
            at_seam = len(self.blocks) == seam_blocks > 0
            if block == NULL_BLOCK:
                self.dropped += 1
                spans[:] = [(NULL_BLOCK, self.dropped)]
            elif not at_seam and spans and spans[-1][0] != NULL_BLOCK and sum(spans[-1]) == block:
                spans[-1] = (spans[-1][0], spans[-1][1] + 1)
            else:
                spans.append((block, 1))
            self.blocks.append(block)

    def truncate(self, num_blocks: int) -> list[int]:
        """Cut the chain to `num_blocks` blocks; returns the removed ones, last first."""
        self.version += 1
        removed = self.blocks[max(num_blocks, self.dropped) :]
        excess = len(self.blocks) - num_blocks
        del self.blocks[num_blocks:]
        self.dropped = min(self.dropped, len(self.blocks))
        self._cut_spans(excess)
        return removed[::-1]

    def _cut_spans(self, excess: int) -> None:
        while excess > 0:
            first, count = self._spans.pop()
            if count > excess:
                self._spans.append((first, count - excess))
            excess -= min(count, excess)

    def drop_front(self, num_blocks: int) -> list[int]:
        """Give up the first `num_blocks` blocks, those included that are gone; returns the removed ones, in order."""
        self.version += 1
        removed = self.blocks[self.dropped : num_blocks]
        self.blocks[self.dropped : num_blocks] = [NULL_BLOCK] * len(removed)
        self.dropped += len(removed)
        gone, rest = self.dropped, []
        for first, count in self._spans:
            passed = min(count, gone)
            gone -= passed
            if count > passed:
                rest.append((first + passed, count - passed))
        self._spans = [(NULL_BLOCK, self.dropped), *rest]
        return removed

    def replace(self, moves: Mapping[int, int]) -> None:
        """Hold block `moves[block]` instead of `block` (the caller counts the references)."""
        blocks = [moves.get(block, block) for block in self.blocks]
        self.blocks, self._spans, self.dropped = [], [], 0
        self.extend(blocks)

    def copy_from(self, other: BlockChain, num_blocks: int) -> None:
        """Hold the first `num_blocks` blocks of `other` (the caller counts the references)."""
        self.version += 1
        self.blocks = other.blocks[:num_blocks]
        self.dropped = min(other.dropped, num_blocks)
        self._spans = other._spans.copy()
        self._cut_spans(len(other.blocks) - num_blocks)

    def slot(self, token: int) -> int:
        """The slot of one token."""
        table = self._table
        block = table.whole_blocks(token)
        return self.blocks[block] * table.block_size + token - table.block_start(block)

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """The slots of tokens `start` to `stop` as runs of adjacent slots; `start` is not before `first_token`."""
        size, block_start = self._table.block_size, self._table.block_start
        block = at = 0
        for first, count in self._spans:
            block += count
            end = block_start(block)
            if end > start:
                assert first != NULL_BLOCK, "these tokens have fallen out of the window"
                lo = max(start, at)
                hi = min(stop, end)
                if hi > lo:
                    yield Run(first * size + lo - at, hi - lo)
                if end >= stop:
                    return
            at = end

    def check_integrity(self) -> None:
        """Prove that blocks, spans and the table's number of tokens agree."""
        table = self._table
        assert len(self.blocks) == table.blocks_for(table.num_tokens), "too many or too few blocks"
        assert [block == NULL_BLOCK for block in self.blocks] == [i < self.dropped for i in range(len(self.blocks))]
        first = min(self.first_token, table.num_tokens)
        slots = [run.slot + i for run in self.runs(first, table.num_tokens) for i in range(run.tokens)]
        assert slots == [self.slot(i) for i in range(first, table.num_tokens)], "spans disagree with the blocks"
