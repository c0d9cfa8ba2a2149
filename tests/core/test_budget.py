"""Groups under one budget: memory that one has no use for makes room for another before content is lost."""

import pytest

from hf_paged.core.blocks import OutOfBlocks
from hf_paged.core.manager import BlockManager

ROOT = b"root"


def manager_with_idle_memory(num_blocks: int, budget: int, page_blocks: int = 1) -> tuple[BlockManager, list]:
    """Both groups have touched `num_blocks` blocks; the full group holds all of its, the window group two at most."""
    manager = BlockManager(40, 4, (None, 4), (1, 1), budget)
    given_back = []
    manager.budget.on_give_back = lambda group, runs: given_back.extend((group, run) for run in runs)
    for pool in manager.pools:
        pool.page_blocks = page_blocks
    table = manager.new_table(ROOT)
    append(manager, table, 4 * num_blocks)
    manager.trim([table])
    assert manager.budget.touched_bytes == 2 * num_blocks
    assert manager.pools[1].idle >= num_blocks - 2
    return manager, [table, given_back]


def append(manager: BlockManager, table, num_tokens: int, first: int = 0) -> None:
    manager.append([table], num_tokens, 0, [[first + table.num_tokens + i for i in range(num_tokens)]])


def test_idle_memory_goes_back_before_anything_is_evicted():
    """There is room for 8 more blocks a group beside what is held and cached, but not beside idle memory, too."""
    manager, (table, given_back) = manager_with_idle_memory(15, budget=39)
    other = manager.new_table(ROOT)
    append(manager, other, 8, first=1000)
    manager.index_table(other, True)
    manager.free(other)
    assert (manager.cached, given_back) == (4, [])
    append(manager, table, 32)
    assert {group for group, _ in given_back} == {1}
    assert (manager.evicted, manager.cached) == (0, 4)
    manager.check_integrity()


def test_no_call_fails_for_memory_that_cannot_go_back():
    """Blocks that share a page with one in use; what is cached goes before they come on top of the budget."""
    manager, (table, given_back) = manager_with_idle_memory(15, budget=39, page_blocks=64)
    other = manager.new_table(ROOT)
    append(manager, other, 8, first=1000)
    manager.index_table(other, True)
    manager.free(other)
    append(manager, table, 40)
    assert (manager.cached, manager.evicted, given_back) == (0, 4, [])
    assert manager.budget.touched_bytes == 25 + 15 > manager.budget.limit_bytes
    manager.check_integrity()


def test_a_budget_is_filled_to_the_last_block_whatever_shares_its_pages():
    manager, (table, _) = manager_with_idle_memory(15, budget=39, page_blocks=64)
    assert manager.available == 10
    with pytest.raises(OutOfBlocks):
        append(manager, table, 44)
    append(manager, table, 40)
    manager.check_integrity()


@pytest.mark.parametrize(("num_rows", "row_blocks", "kept"), [(1, 9, 1), (8, 1, 1), (8, 40, 5), (4, 80, 4)])
def test_running_sequences_keep_few_free_blocks_beside_their_own(num_rows, row_blocks, kept):
    """One each at most, and no more than a 64th of those in use; one at least. The rest goes back."""
    manager = BlockManager(1000, 4, (None,), (1,), 1000)
    given_back = []
    manager.budget.on_give_back = lambda group, runs: given_back.extend(runs)
    tables = [manager.new_table(ROOT) for _ in range(num_rows + 2)]
    for first, table in enumerate(tables[:-1]):
        append(manager, table, 4 * (row_blocks if first < num_rows else kept), first * 1000)
    manager.free(tables[-2])
    manager.settle()
    assert (manager.pools[0].idle, given_back) == (kept, [])
    append(manager, tables[-1], 4 * (kept + 1), 9000)
    manager.free(tables[-1])
    manager.settle()
    assert manager.pools[0].idle == 0
    assert given_back
    manager.check_integrity()


def test_memory_that_is_asked_for_has_room_for_what_is_to_come_and_a_window_for_no_more_than_one():
    manager = BlockManager(65, 8, (None, 8))
    for pool in manager.pools:
        pool.ask_for_memory(4, lambda run: True)
    manager.append([manager.new_table()], 20, room_tokens=200)
    whole, window = (pool.touched for pool in manager.pools)
    assert 220 // 8 <= whole <= 220 // 8 + 4
    assert window < 8


class Guest:
    """Parts of 3 bytes each."""

    block_bytes = 3

    def __init__(self, manager: BlockManager):
        self.budget, self.parts = manager.budget, {}
        self.budget.admit(self)

    @property
    def cached(self) -> int:
        return len(self.parts)

    def add(self, name: str) -> bool:
        if self.budget.has_room(self.block_bytes):
            self.parts[name] = self.budget.stamp()
        return name in self.parts

    def oldest_first(self):
        return self.parts.items()

    def give_up(self, part: str) -> None:
        del self.parts[part]


def cached_blocks(manager: BlockManager, count: int, first: int) -> None:
    table = manager.new_table(ROOT)
    append(manager, table, 4 * count, first)
    manager.index_table(table, True)
    manager.free(table)


def test_what_a_guest_caches_goes_when_it_is_the_oldest():
    manager = BlockManager(40, 4, (None,), (1,), budget_bytes=11)  # the null block is one
    guest = Guest(manager)
    assert guest.add("first")
    cached_blocks(manager, 3, first=100)
    assert guest.add("second")
    assert (manager.budget.uncached_bytes, manager.cached) == (1, 3)
    cached_blocks(manager, 2, first=200)
    assert (set(guest.parts), manager.cached) == ({"second"}, 5)
    assert guest.add("third")
    assert (set(guest.parts), manager.cached) == ({"second", "third"}, 4), "the blocks were older"
    table = manager.new_table(ROOT)
    append(manager, table, 40, first=300)
    assert (guest.parts, manager.cached) == ({}, 0), "what runs comes first"
    assert not guest.add("fourth")
    manager.check_integrity()


def test_a_guest_for_whom_there_is_no_room_drives_nobody_out():
    manager = BlockManager(40, 4, (None,), (1,), budget_bytes=11)
    guest = Guest(manager)
    append(manager, manager.new_table(ROOT), 32)
    cached_blocks(manager, 1, first=100)
    assert not guest.add("one")
    assert manager.cached == 1


def test_idle_memory_goes_back_for_a_guest():
    manager, (_, given_back) = manager_with_idle_memory(15, budget=32)
    guest = Guest(manager)
    assert guest.add("one")
    assert {group for group, _ in given_back} == {1}
    assert manager.budget.touched_bytes <= manager.budget.limit_bytes
    assert guest.add("two")


def full_of_blocks(manager: BlockManager) -> int:
    """A block is in use, and what else there is room for is cached; returns how many."""
    append(manager, manager.new_table(ROOT), 4)
    for first in range(100, 1000, 100):
        cached_blocks(manager, 3, first)
    return manager.cached


def test_a_guest_where_no_memory_ever_goes_back():
    manager = BlockManager(40, 4, (None,), (1,), budget_bytes=21)
    guest, before = Guest(manager), full_of_blocks(manager)
    for number, name in enumerate(("first", "second", "third"), start=1):
        assert guest.add(name)
        assert manager.cached >= before - 3 * number
    manager.check_integrity()


def test_blocks_do_not_all_go_for_a_guest_where_their_pages_are_shared():
    manager = BlockManager(40, 4, (None,), (1,), budget_bytes=21)
    manager.budget.on_give_back = lambda group, runs: None
    manager.pools[0].page_blocks = 64
    guest, before = Guest(manager), full_of_blocks(manager)
    assert not guest.add("first")
    assert manager.cached >= before - 2 * guest.block_bytes
    manager.check_integrity()


def test_guests_make_room_among_themselves_where_pages_of_blocks_are_shared():
    """Two blocks, the oldest of all, make room first; of their memory nothing goes back."""
    manager = BlockManager(40, 4, (None,), (1,), budget_bytes=21)
    manager.budget.on_give_back = lambda group, runs: None
    manager.pools[0].page_blocks = 64
    guest = Guest(manager)
    append(manager, manager.new_table(ROOT), 4)
    cached_blocks(manager, 9, first=100)
    for name in ("first", "second", "third"):
        assert guest.add(name)
    assert guest.add("fourth")
    assert (set(guest.parts), manager.cached) == ({"second", "third", "fourth"}, 7)
    manager.check_integrity()
