"""The radix trie against a plain one."""

import hypothesis.strategies as st
from hypothesis import given

from hf_paged.core.trie import build_trie, common_prefix

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=6)


@given(SEQUENCES)
def test_every_row_is_spelled_by_its_nodes_and_every_distinct_token_is_in_one(sequences):
    nodes = build_trie(sequences)
    for row, sequence in enumerate(sequences):
        spelled = []
        for node in nodes:
            if row in node.rows:
                assert node.start == len(spelled)
                spelled += sequences[node.rows[0]][node.start : node.stop]
        assert spelled == sequence
    prefixes = {tuple(sequence[:end]) for sequence in sequences for end in range(1, len(sequence) + 1)}
    assert sum(node.stop - node.start for node in nodes) == len(prefixes)


@given(SEQUENCES)
def test_descendants_follow_their_node_without_a_gap(sequences):
    nodes = build_trie(sequences)
    for index, node in enumerate(nodes):
        below = [
            i
            for i, other in enumerate(nodes)
            if i != index and set(other.rows) <= set(node.rows) and other.start >= node.stop
        ]
        assert below == list(range(index + 1, index + 1 + len(below)))
        assert node.parent is None or node.parent < index


def test_rows_keep_the_order_they_came_in():
    assert [node.rows for node in build_trie([[5, 1], [3], [4], [5, 0]])] == [(0, 3), (0,), (3,), (1,), (2,)]


def test_a_thousand_nested_rows_are_no_recursion():
    assert len(build_trie([[0] * length for length in range(1, 2000)])) == 1999


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_common_prefix_of_any_length(common, rest_a, rest_b):
    a, b = [7] * common + [1] * rest_a, [7] * common + [2] * rest_b
    assert common_prefix(a, b) == common
