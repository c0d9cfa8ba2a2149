"""The prefix index: what is found, what is not, and in which order blocks are given up."""

import itertools

import pytest

from hf_paged.core.manager import BlockManager
from hf_paged.core.prefix import PrefixIndex, root_key

ROOT = root_key(b"model", None)
A, B = list(range(10, 18)), list(range(30, 34))  # two blocks and one


def leave(manager, tokens, with_tail=True, root=ROOT):
    """A whole call: begin with what is there, store the rest, leave everything for others. Returns the hit."""
    table = manager.new_table(root)
    hit = manager.match(table, tokens, len(tokens))
    manager.unpin(manager.append([table], len(tokens) - hit, 0, [tokens[hit:]]).pins)
    manager.index_table(table, with_tail)
    manager.free(table)
    manager.check_integrity()
    return hit


@pytest.fixture(name="manager")
def small_manager():
    return BlockManager(num_blocks=20, block_size=4)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ([*A, *B], 12),
        ([*A, *B, 1, 2], 12),
        ([*A, 1], 8),
        ([*A, *B[:2], 1], 10),
        (A[:6], 6),
        (A[:3], 3),
        ([*A[:5], 1], 5),
        ([1, *A[1:]], 0),
        (A[1:], 0),
        (B, 0),
        ([], 0),
    ],
)
def test_the_longest_common_beginning_is_found(manager, asked, found):
    assert leave(manager, [*A, *B]) == 0
    assert leave(manager, asked) == found


def test_no_more_than_the_limit_is_taken(manager):
    leave(manager, A)
    for limit in range(-1, 9):
        table = manager.new_table(ROOT)
        assert manager.match(table, A, limit) == max(limit, 0)
        manager.free(table)


def test_a_tail_is_found_only_where_it_was_indexed(manager):
    leave(manager, [*A, *B[:3]], with_tail=False)
    assert leave(manager, [*A, *B]) == 8


def test_a_longer_tail_takes_the_place_of_a_shorter_one(manager):
    leave(manager, A[:2])
    leave(manager, A[:3])
    assert (manager.cached, len(manager.index)) == (1, 1)
    leave(manager, A[:2])
    assert (manager.cached, len(manager.index)) == (1, 1)


def test_roots_do_not_see_each_other(manager):
    roots = [
        root_key(identity, salt) for identity, salt in itertools.product((b"m", b"ms"), (None, "", "s", "none", "salt"))
    ]
    assert len(set(roots)) == len(roots)
    for root in roots:
        assert leave(manager, A[:4], root=root) == 0
        assert leave(manager, A[:4], root=root) == 4


@pytest.mark.parametrize("tokens", [[-1, 2, 3, 4], [2**32, 2, 3, 4], [1, 2, 3, 2**62]])
def test_numbers_that_are_no_token_ids_are_not_indexed(manager, tokens):
    assert leave(manager, tokens) == 0
    assert leave(manager, tokens) == 0
    assert len(manager.index) == 0


def test_samples_that_part_behind_a_tail_are_found_again(manager):
    """The prompt of 6 tokens leaves its second block half filled; each sample goes on in a block of its own."""
    first = manager.new_table(ROOT)
    manager.append([first], 6, 0, [A[:6]])
    second = manager.fork(first)
    copies, pins = manager.append([first, second], 3, 0, [[1, 2, 3], [4, 5, 6]], may_part=True)
    assert (copies, pins, manager.in_use) == ([[]], [], 4)
    for table in (first, second):
        manager.index_table(table, with_tail=True)
        manager.free(table)
    manager.check_integrity()
    assert leave(manager, [*A[:6], 1, 2, 3, 9]) == 9
    assert leave(manager, [*A[:6], 4, 5, 9]) == 8
    assert leave(manager, [*A[:6], 1, 2, 3, 9, 8]) == 10
    assert leave(manager, A) == 6


def test_least_recently_used_first_and_ends_before_roots(manager):
    leave(manager, [*A, *B])
    leave(manager, [*B, *A])
    leave(manager, A)  # used again, its end is not
    manager.budget.evict(1)
    assert [manager.index.match(ROOT, tokens, 12).num_tokens for tokens in ([*A, *B], [*B, *A])] == [8, 12]
    manager.budget.evict(2)
    assert [manager.index.match(ROOT, tokens, 12).num_tokens for tokens in ([*A, *B], [*B, *A])] == [8, 4]
    manager.budget.evict(2)
    assert [manager.index.match(ROOT, tokens, 12).num_tokens for tokens in ([*A, *B], [*B, *A])] == [4, 0]


def test_a_root_that_another_computed_too_outlives_its_ends(manager):
    """Two calls at once store the same beginning; one of the copies stays, and counts as used by both."""
    short, long = manager.new_table(ROOT), manager.new_table(ROOT)
    manager.append([short], 8, 0, [A])
    manager.append([long], 12, 0, [[*A, *B]])
    for table in (short, long):
        manager.index_table(table, with_tail=True)
    manager.free(short)
    manager.free(long)
    assert manager.cached == 3
    manager.budget.evict(1)
    assert leave(manager, [*A, *B]) == 8


def test_blocks_in_use_are_never_given_up(manager):
    leave(manager, A)
    table = manager.new_table(ROOT)
    assert manager.match(table, A, 8) == 8
    other = manager.new_table(ROOT)
    manager.append([other], 17 * 4, 0, [list(range(17 * 4))])
    assert manager.evicted == 0
    assert [manager.pools[0].references(block) for block in table.chains[0].blocks] == [1, 1]


def test_below_lists_parents_first_and_nothing_of_other_roots():
    index = PrefixIndex(4)
    parent = ROOT
    for block, packed in enumerate((b"a" * 16, b"b" * 16, b"c" * 8), start=1):
        parent = index.add(parent, packed, [block])
    index.add(root_key(b"model", "salt"), b"a" * 16, [9])
    assert [entry.blocks for entry in index.below(ROOT)] == [[1], [2], [3]]
