"""The prefix index: what is found, what is not, and in which order blocks are given up."""

import itertools

import pytest

from benchmarks import dialogues
from hf_paged.core.manager import BlockManager
from hf_paged.core.prefix import PrefixIndex, chain_key, pack_tokens, root_key

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


def test_a_sample_that_parts_inside_a_full_block_of_another_is_found_again(manager):
    """The block of the longer one stands for its beginning too, behind which the other went on."""
    first = manager.new_table(ROOT)
    manager.append([first], 8, 0, [A])
    second = manager.fork(first, 6)
    growth = manager.append([second], 3, 0, [[1, 2, 3]], may_part=True)
    assert (growth.pins, manager.in_use) == ([], 3)
    for table in (first, second):
        manager.index_table(table, with_tail=True)
        manager.free(table)
    manager.check_integrity()
    assert leave(manager, [*A[:6], 1, 2, 3, 9]) == 9
    assert leave(manager, [*A, 9]) == 8
    manager.budget.evict(manager.cached)
    assert len(manager.index) == 0


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


# -- groups of layers: blocks of 4 tokens, windows in tokens -----------------------------------------------------------


def windowed(*windows, num_blocks=40):
    return BlockManager(num_blocks, 4, windows)


def test_a_window_needs_only_its_own_blocks():
    """All layers have a window of 6: what lies before it may be gone, root included."""
    manager = windowed(6)
    leave(manager, [*A, *B])
    (root_block,) = manager.index.blocks_of(chain_key(ROOT, pack_tokens(A[:4])))
    manager.index.forget(0, root_block)
    manager.pools[0].discard(root_block)
    table = manager.new_table(ROOT)
    assert manager.match(table, [*A, *B, 1], 12) == 12
    assert table.chains[0].blocks[0] == 0  # the null block
    assert len(table.chains[0].held) == 2
    manager.free(table)
    manager.check_integrity()


def test_layers_that_keep_all_tokens_need_every_block():
    manager = windowed(None, 6)
    leave(manager, [*A, *B])
    manager.pools[0].evict(3)
    assert leave(manager, [*A, *B]) == 0


def test_a_gap_in_a_window_ends_the_hit_before_it():
    manager = windowed(None, 6)
    leave(manager, [*A, *B])
    chain = manager.index.match(ROOT, [*A, *B], 12).blocks[1]
    assert chain[0] == 0, "the first block lies outside the window"
    manager.pools[1].discard(chain[1])
    manager.index.forget(1, chain[1])
    assert leave(manager, [*A, *B]) == 4


def test_what_falls_out_of_a_window_stays_cached_only_if_it_was_indexed():
    manager = windowed(None, 6)
    table = manager.new_table(ROOT)
    manager.append([table], 12, 0, [[*A, *B]])
    manager.index_table(table, with_tail=False)
    manager.trim([table])
    assert (manager.pools[1].in_use, manager.pools[1].cached) == (2, 1)
    manager.append([table], 12, 0, [[*A, *B]])
    manager.trim([table])
    assert (manager.pools[0].in_use, manager.pools[1].in_use, manager.pools[1].cached) == (6, 2, 3)
    manager.free(table)
    manager.check_integrity()


def test_the_oldest_blocks_of_all_groups_make_room_first():
    manager = BlockManager(40, 4, (None, 6), (3, 1), 3 * 8 + 8)
    leave(manager, [*A, *B])
    leave(manager, [*B, *A])
    # 24 of 28 are taken by 6 blocks of either group; a third sequence needs 12 more: two ends of the first one go.
    assert leave(manager, [5, 5, 5, 5, *A]) == 0
    assert (manager.pools[0].cached, manager.pools[1].cached) == (7, 7)
    assert leave(manager, [*A, *B]) == 4


def test_blocks_that_come_from_elsewhere_are_found_like_others():
    manager = windowed(None, 6)
    first, second = (pack_tokens(tokens) for tokens in (A[:4], A[4:]))
    below = chain_key(ROOT, first)
    blocks, is_new = manager.take_blocks(ROOT, first, (True, False), (0, 0))
    assert (is_new, blocks[1]) == ([True, False], 0)
    others, is_new = manager.take_blocks(below, second, (True, True), blocks)
    assert is_new == [True, True]
    assert others[0] == blocks[0] + 1
    manager.index_blocks(ROOT, first, blocks)
    manager.index_blocks(below, second, others)
    assert manager.take_blocks(below, second, (True, True), blocks) == (others, [False, False])
    manager.unpin([(0, blocks[0]), *enumerate(others), *enumerate(others)])
    manager.check_integrity()
    assert manager.in_use == 0
    assert leave(manager, [*A, 1]) == 0, "the window of 6 reaches into the first block, which it lacks"


def test_what_a_long_sequence_leaves_in_a_window_is_connected_to_its_root():
    manager = windowed(6)
    table = manager.new_table(ROOT)
    for token in range(40):
        manager.append([table], 1, 0, [[token]])
        manager.trim([table])
    assert manager.pools[0].high_water <= 2 * (2 + 6 // 4) + 1, "blocks that have fallen out are used again"
    manager.index_table(table, with_tail=True)
    manager.free(table)
    manager.check_integrity()
    assert (manager.cached, len(manager.index)) == (2, 10)
    assert leave(manager, list(range(41))) == 40
    manager.budget.evict(manager.cached)
    assert len(manager.index) == 0


def test_the_benchmark_of_a_large_index_runs():
    """It sees for itself that all of its prompts are found."""
    assert dialogues.look_up_seconds() > 0
