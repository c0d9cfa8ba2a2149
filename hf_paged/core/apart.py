"""Appending where some of the new blocks come from no pool: they lie on the host, or their tokens are not kept."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from hf_paged.core.blocks import NULL_BLOCK, OutOfBlocks
from hf_paged.core.manager import BlockManager
from hf_paged.core.plan import Growth
from hf_paged.core.prefix import seen_from
from hf_paged.core.table import BlockTable
from hf_paged.core.whole import whole


def whole_new_blocks(table: BlockTable, num_tokens: int) -> int:
    """Of the blocks that `num_tokens` more tokens of `table` go to, those that they fill, the last one left out."""
    return max(0, num_tokens - _tokens_to_fill(table, num_tokens) - 1) // table.block_size


def outdated_blocks(manager: BlockManager, table: BlockTable, num_tokens: int) -> list[list[int]]:
    """Null blocks in place of those that would fall out of each group's window with the last of `num_tokens` tokens.

    Only for an empty table: nobody has anything to read in it before that.
    """
    most, windows = whole_new_blocks(table, num_tokens), manager.windows
    gone = [0 if window is None else table.whole_blocks(seen_from(num_tokens, window)) for window in windows]
    return [[NULL_BLOCK] * min(count, most) for count in gone]


@whole
def append_kept(
    manager: BlockManager,
    tables: Sequence[BlockTable],
    counts: Sequence[int],
    room_tokens: int,
    tokens: Sequence[Sequence[int]] | None = None,
) -> Growth:
    """`manager.append`, without `outdated_blocks` where there is no room for them."""
    try:
        return manager.append(tables, counts, room_tokens, tokens)
    except OutOfBlocks:
        given = [outdated_blocks(manager, *each) for each in zip(tables, counts, strict=True)]
        if not any(blocks for each in given for blocks in each):
            raise
    return append_apart(manager, tables, counts, room_tokens, given, tokens)


@whole
def append_apart(
    manager: BlockManager,
    tables: Sequence[BlockTable],
    counts: Sequence[int],
    room_tokens: int,
    given: Sequence[Sequence[Sequence[int]]],
    tokens: Sequence[Sequence[int]] | None = None,
) -> Growth:
    """`manager.append` of `counts[i]` tokens, whose first whole new blocks are `given[i][group]`.

    No more than `whole_new_blocks` of a table: blocks on the host, which count as held already, or null blocks.
    `tokens` are as in `append`. Raises `OutOfBlocks` and changes nothing.
    """
    needed = sum(map(manager.blocks_needed, tables, counts))
    manager.make_room([needed - sum(len(blocks[group]) for blocks in given) for group in range(len(manager.pools))])
    growths = []
    for row, (table, count, blocks) in enumerate(zip(tables, counts, given, strict=True)):
        first, inner = _tokens_to_fill(table, count), max(map(len, blocks)) * table.block_size
        growths.append(manager.append([table], first, room_tokens, [[]]))
        _extend(manager, table, blocks)
        growths.append(manager.append([table], count - first - inner, room_tokens, [[]]))
        table.track(None if tokens is None else tokens[row])
    copies = [list(chain(*each)) for each in zip(*(growth.copies for growth in growths), strict=True)]
    return Growth(copies, [pin for growth in growths for pin in growth.pins])


def _tokens_to_fill(table: BlockTable, num_tokens: int) -> int:
    """Of `num_tokens` more tokens, those that fill the last block."""
    filled = table.tail_tokens
    return min(num_tokens, table.block_size - filled) if filled else 0


def _extend(manager: BlockManager, table: BlockTable, given: Sequence[Sequence[int]]) -> None:
    """As many whole blocks in each group: those that are given, and then some of the pool's own."""
    count = max(map(len, given))
    for pool, blocks, held in zip(manager.pools, given, table.chains, strict=True):
        taken, claim = pool.take(count - len(blocks))
        pool.unclaim(claim)
        held.extend([*blocks, *taken])
    table.num_tokens += count * table.block_size
