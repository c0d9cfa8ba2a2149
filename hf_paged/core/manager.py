"""The manager: sequences' tables on top of the pool and the prefix index, with fork, copy-on-write and crop."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from hf_paged.core.blocks import BlockPool, OutOfBlocks
from hf_paged.core.plan import Copy
from hf_paged.core.prefix import TOKEN_LIMIT, Entry, PrefixIndex, pack_tokens
from hf_paged.core.table import BlockTable


class Growth(NamedTuple):
    """What appending asks for: `copies` to make after the new tokens are written, and the blocks they read.

    The blocks are pinned: nobody else gets them before `unpin`, which comes when the pass is done.
    """

    copies: list[Copy]
    pins: list[int]


class BlockManager:
    """Owns the pool, the prefix index and every live table. Operations are short and hold `lock`; none touches tensors.

    A block that several tables hold is never written, nor is that part of a block which is indexed: `append` gives the
    table a block of its own and says which slots are to be copied. An operation that raises `OutOfBlocks` has changed
    nothing.

    Args:
        num_blocks: pool size including the null block.
        block_size: tokens per block.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self.index = PrefixIndex(block_size)
        self.pool = BlockPool(num_blocks, on_evict=self.index.forget)
        self.lock = threading.RLock()
        self.copied_blocks = 0
        self._tables: dict[int, BlockTable] = {}
        self._pinned: Counter[int] = Counter()

    def new_table(self, root: bytes | None = None) -> BlockTable:
        """An empty table, live until `free`; `root` is where its tokens are looked for and kept in the prefix index."""
        table = BlockTable(self.block_size, root)
        with self.lock:
            self._tables[id(table)] = table
        return table

    def fork(self, source: BlockTable, num_tokens: int | None = None) -> BlockTable:
        """A new table that shares the first `num_tokens` tokens of `source` (default: all)."""
        table = self.new_table()
        self.assign(table, source, source.num_tokens if num_tokens is None else num_tokens)
        return table

    def assign(self, target: BlockTable, source: BlockTable, num_tokens: int) -> list[int]:
        """Make `target` share the first `num_tokens` tokens of `source`.

        Returns the blocks that it held before, pinned: pending copies may still read them.
        """
        with self.lock:
            self.pool.share(source.blocks[: source.blocks_for(num_tokens)])
            self._unclaim(target)
            before = target.truncate(0)
            target.copy_from(source, num_tokens)
            self._pinned.update(before)
            return before

    def unpin(self, pins: Sequence[int]) -> None:
        """Let go of blocks that `append` and `assign` have pinned."""
        with self.lock:
            self._pinned.subtract(pins)
            self._drop(pins)

    def blocks_needed(self, table: BlockTable, num_tokens: int, may_part: bool = False) -> int:
        """Blocks that appending `num_tokens` tokens to `table` takes from the pool."""
        if num_tokens == 0:
            return 0
        if may_part and self._opens_seam(table):
            return -(-num_tokens // self.block_size)
        grown = table.blocks_for(table.num_tokens + num_tokens) - len(table.blocks)
        return grown + self.must_leave_tail(table)

    def must_leave_tail(self, table: BlockTable) -> bool:
        """Whether the next token of `table` would fall into a block that others hold too, or may yet find."""
        filled = table.tail_tokens
        if filled == 0:
            return False
        tail = table.blocks[-1]
        if self.pool.references(tail) > 1 or self.index.tokens_in(tail) > filled:
            return True
        return self.index.is_followed(tail)  # as a seam of others, which it stays only as it is

    def _opens_seam(self, table: BlockTable) -> bool:
        """Whether `table` leaves its tail where it is and goes on behind it, instead of copying it: once a table.

        Beams part again and again; were each time to leave a block behind, there would be many of a few tokens.
        """
        return table.is_forked and table.seam_blocks == 0 and self.must_leave_tail(table)

    def append(
        self,
        tables: Sequence[BlockTable],
        num_tokens: int | Sequence[int],
        room_tokens: int = 0,
        tokens: Sequence[Sequence[int]] | None = None,
        may_part: bool = False,
    ) -> Growth:
        """Make room for `num_tokens` more tokens in each table; `room_tokens` more are expected later.

        `tokens` are their ids; without them, or with numbers that are no plain ids, a table is not indexed any more.
        Every table whose tail block is shared gets a tail of its own, all of them, so that none writes into what
        another is yet to copy; with `may_part` forked tables go on behind the tail, once. Raises `OutOfBlocks`.
        """
        counts = [num_tokens] * len(tables) if isinstance(num_tokens, int) else num_tokens
        with self.lock:
            needed = sum(self.blocks_needed(*each, may_part) for each in zip(tables, counts, strict=True))
            if needed > self.pool.available:
                raise OutOfBlocks(needed, self.pool.available)
            growth = Growth([], [])
            for table, count in zip(tables, counts, strict=True):
                if may_part and count and self._opens_seam(table):
                    table.open_seam()
                self._append(table, count, room_tokens, growth)
            self._pinned.update(growth.pins)
            for i, table in enumerate(tables):
                if table.root is not None:
                    _track(table, None if tokens is None else tokens[i])
            return growth

    def _append(self, table: BlockTable, num_tokens: int, room_tokens: int, growth: Growth) -> None:
        size = self.block_size
        total_blocks = table.blocks_for(table.num_tokens + num_tokens)
        room = table.blocks_for(table.num_tokens + num_tokens + room_tokens) - total_blocks
        if num_tokens and self.must_leave_tail(table):
            filled = table.tail_tokens
            (shared,) = table.truncate(len(table.blocks) - 1)
            # The copy and what follows it are taken together, so that they lie side by side.
            self._extend(table, total_blocks - len(table.blocks), None, room)
            own = table.blocks[table.whole_blocks(table.num_tokens)]
            growth.copies.append(Copy(shared * size, own * size, filled))
            growth.pins.append(shared)
            self.copied_blocks += 1
        missing = total_blocks - len(table.blocks)
        if missing > 0:
            # Behind a seam all rows look for room of their own, so that they come to lie at equal distance.
            goes_on = len(table.blocks) > table.seam_blocks
            self._extend(table, missing, table.blocks[-1] if goes_on else None, room)
        table.num_tokens += num_tokens

    def _extend(self, table: BlockTable, count: int, after: int | None, room: int) -> None:
        blocks, claim = self.pool.take(count, after, room)
        table.extend(blocks)
        if claim:
            table.claims.append(claim)

    def crop(self, table: BlockTable, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens."""
        with self.lock:
            self._drop(table.truncate(table.blocks_for(num_tokens)))
            if num_tokens < table.seam_tokens:
                table.seam_tokens = table.seam_blocks = 0
            table.num_tokens = num_tokens
            del table.tokens[num_tokens:]
            del table.keys[table.whole_blocks(num_tokens) :]

    def free(self, table: BlockTable) -> None:
        """Give up the table; freeing twice is harmless."""
        with self.lock:
            if self._tables.pop(id(table), None) is not None:
                self._empty(table)

    def _empty(self, table: BlockTable) -> None:
        self._unclaim(table)
        keys = table.keys[::-1]
        self._drop(table.truncate(0))
        table.num_tokens = 0
        table.tokens.clear()
        for key in keys:  # where another block holds the same content, that one was used, ends before roots
            block = self.index.block_of(key)
            if block is not None:
                self.pool.touch(block)

    def _drop(self, blocks: Sequence[int]) -> None:
        """One reference less; a block that is indexed stays cached."""
        self.pool.drop(blocks, keep=self.index.__contains__)

    def _unclaim(self, table: BlockTable) -> None:
        for claim in table.claims:
            self.pool.unclaim(claim)
        table.claims.clear()

    # -- prefixes ------------------------------------------------------------------------------------------------

    def match(self, table: BlockTable, tokens: Sequence[int], limit: int) -> int:
        """Let an empty table begin with blocks of earlier sequences that hold its `tokens`, at most `limit` of them.

        Returns the number of tokens that need not be computed.
        """
        if table.root is None or not _are_plain(tokens):
            return 0
        with self.lock:
            blocks, keys, num_tokens, seam_blocks, seam_tokens = self.index.match(table.root, tokens, limit)
            self.pool.share(blocks)
            table.extend(blocks[:seam_blocks])
            table.seam_blocks, table.seam_tokens = seam_blocks, seam_tokens
            table.extend(blocks[seam_blocks:])
            table.num_tokens = num_tokens
            table.tokens, table.keys = list(tokens[:num_tokens]), keys
            return num_tokens

    def index_table(self, table: BlockTable, with_tail: bool) -> None:
        """Let later sequences find the full blocks of a table, and with `with_tail` the last, partly filled one.

        Only for content that is complete in memory.
        """
        if table.root is None:
            return
        with self.lock:
            parent, whole = table.root, table.whole_blocks(table.num_tokens)
            for i in range(whole):
                if i == len(table.keys) or self.index.block_of(table.keys[i]) is None:
                    table.keys[i:] = [self._index_block(table, i, parent), *table.keys[i + 1 :]]
                parent = table.keys[i]
            if with_tail and table.tail_tokens and not self.index.is_covered(parent, _packed(table, whole)):
                self._index_block(table, whole, parent)

    def _index_block(self, table: BlockTable, i: int, parent: bytes) -> bytes:
        """Index block `i` of a table in place of those that hold a beginning of it; returns its key."""
        packed = _packed(table, i)
        for block in self.index.covered_by(parent, packed):
            self.index.forget(block)
            self.pool.discard(block)
        return self.index.add(parent, packed, table.blocks[i])

    def hold_prefixes(self, root: bytes) -> list[Entry]:
        """What is indexed under `root`, parents first; the blocks stay where they are until `unpin`."""
        with self.lock:
            entries = self.index.below(root)
            blocks = [entry.block for entry in entries]
            self.pool.share(blocks)
            self._pinned.update(blocks)
            return entries

    def forget_prefixes(self) -> None:
        """Give up every cached block and forget what the others hold."""
        with self.lock:
            self.index.clear()
            self.pool.evict(self.pool.cached)

    def check_integrity(self) -> None:
        """Prove that the pool and the index agree with the live tables; for tests."""
        with self.lock:
            held = +self._pinned
            for table in self._tables.values():
                assert len(table.blocks) == table.blocks_for(table.num_tokens), (
                    "a table holds too many or too few blocks"
                )
                slots = [run.slot + i for run in table.runs(0, table.num_tokens) for i in range(run.tokens)]
                assert slots == [table.slot(i) for i in range(table.num_tokens)], "spans disagree with the blocks"
                held.update(table.blocks)
                assert table.root is None or len(table.tokens) == table.num_tokens, "token ids were lost"
            self.pool.check_integrity(dict(held))
            self.index.check_integrity()
            for block in range(1, self.pool.num_blocks):
                assert block in self.index or not self.pool.is_cached(block), f"block {block} is kept for nobody"
                assert block not in self.index or held[block] or self.pool.is_cached(block), f"block {block} is gone"


def _are_plain(tokens: Sequence[int]) -> bool:
    """Whether all are token ids and nothing else."""
    return not tokens or (min(tokens) >= 0 and max(tokens) < TOKEN_LIMIT)


def _packed(table: BlockTable, i: int) -> bytes:
    """The tokens of block `i`."""
    return pack_tokens(table.tokens[table.block_start(i) : table.block_start(i + 1)])


def _track(table: BlockTable, tokens: Sequence[int] | None) -> None:
    if tokens is None or not _are_plain(tokens):
        table.untrack()
    else:
        table.tokens.extend(tokens)
