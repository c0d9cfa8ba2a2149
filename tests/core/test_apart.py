"""Appending with blocks that come from no pool, against appending as ever."""

import random

import pytest

from hf_paged.core.apart import append_apart, append_kept, outdated_blocks, whole_new_blocks
from hf_paged.core.blocks import NULL_BLOCK, OutOfBlocks
from hf_paged.core.manager import BlockManager
from hf_paged.core.overflow import HOST_BLOCKS, on_host
from hf_paged.core.table import BlockTable

SIZE = 4


class Somewhere:
    def free(self):
        pass


def on_hosts(manager: BlockManager, count: int) -> list[int]:
    blocks = [manager.pools[0].overflow.add(Somewhere()) for _ in range(count)]
    manager.pools[0].share(blocks)
    return blocks


@pytest.mark.parametrize("num_tokens", range(1, 3 * SIZE + 2))
@pytest.mark.parametrize("before", range(2 * SIZE))
def test_blocks_that_are_filled_lie_elsewhere_and_no_others(before, num_tokens):
    manager = BlockManager(20, SIZE)
    table = manager.new_table()
    manager.append([table], before)
    held = table.chains[0].blocks.copy()
    most = whole_new_blocks(table, num_tokens)
    assert most == sum(  # the blocks that begin with a new token and end before the last one
        before <= block * SIZE and (block + 1) * SIZE < before + num_tokens for block in range(10)
    )
    given = on_hosts(manager, most)
    append_apart(manager, [table], [num_tokens], 0, [[given]])
    manager.check_integrity()
    assert table.num_tokens == before + num_tokens
    blocks = table.chains[0].blocks
    assert blocks[: len(held)] == held
    assert blocks[-(-before // SIZE) :][:most] == given
    assert on_host([table], 0) == given
    assert blocks[-1] < HOST_BLOCKS
    manager.crop(table, before)
    manager.check_integrity()
    assert len(manager.pools[0].overflow) == 0


def test_a_tail_that_others_hold_is_left_before_that():
    manager = BlockManager(20, SIZE)
    table = manager.new_table()
    manager.append([table], 6)
    twin = manager.fork(table)
    (given,) = on_hosts(manager, 1)
    growth = append_apart(manager, [table, twin], [9, 0], 0, [[[given]], [[]]])
    (copy,) = growth.copies[0]
    assert (copy.source, copy.tokens) == (twin.chains[0].blocks[1] * SIZE, 2)
    assert table.chains[0].blocks[1:3] == [copy.target // SIZE, given]
    assert growth.pins == [(0, twin.chains[0].blocks[1])]
    manager.unpin(growth.pins)
    manager.check_integrity()


def test_too_little_room_changes_nothing():
    manager = BlockManager(5, SIZE)
    tables = [manager.new_table(), manager.new_table()]
    manager.append(tables, 5)
    given = on_hosts(manager, 1)
    for table in tables:
        table_before = (table.num_tokens, table.chains[0].blocks.copy())
        with pytest.raises(OutOfBlocks) as caught:
            append_apart(manager, [table], [12], 0, [[given]])
        assert (caught.value.wanted, caught.value.wanted_bytes) == (2, 2)
        assert (table.num_tokens, table.chains[0].blocks) == table_before
    manager.pools[0].drop(given)
    manager.check_integrity()


@pytest.mark.parametrize("seed", range(20))
def test_what_falls_out_of_a_window_takes_no_room(seed):
    """In a manager with a full layer and two windows, of rows of random lengths."""
    draw = random.Random(seed)
    windows = (None, draw.randint(1, 9), draw.randint(10, 20))
    counts = [draw.randint(1, 60) for _ in range(3)]
    roomy = BlockManager(60, SIZE, windows)
    expected = [roomy.new_table() for _ in counts]
    roomy.append(expected, counts)
    roomy.trim(expected)

    tight = BlockManager(60, SIZE, windows)
    tight.budget.limit_bytes = (
        3
        + roomy.in_use
        + sum(  # and the block that a window has just left behind
            count > SIZE for count in counts for _ in windows[1:]
        )
    )
    tables = [tight.new_table() for _ in counts]
    append_kept(tight, tables, counts, 0)
    tight.check_integrity()
    tight.trim(tables)
    tight.check_integrity()
    for mine, theirs in zip(tables, expected, strict=True):
        assert [chain.dropped for chain in mine.chains] == [chain.dropped for chain in theirs.chains]
        assert [len(chain.blocks) for chain in mine.chains] == [len(chain.blocks) for chain in theirs.chains]
    assert tight.in_use == roomy.in_use


def test_without_need_or_windows_nothing_is_left_out():
    manager = BlockManager(60, SIZE, (None, 5))
    table = manager.new_table()
    append_kept(manager, [table], [40], 0)
    assert NULL_BLOCK not in table.chains[1].blocks
    full = BlockManager(6, SIZE)
    table = full.new_table()
    assert not any(outdated_blocks(full, table, 40))
    with pytest.raises(OutOfBlocks):
        append_kept(full, [table], [40], 0)
    assert isinstance(table, BlockTable)
    full.check_integrity()
