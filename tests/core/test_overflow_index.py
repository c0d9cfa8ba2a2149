"""What later sequences find of one whose blocks lie on the host: what the device has, and never what it has not."""

import pytest

from hf_paged.core.manager import BlockManager
from hf_paged.core.overflow import HOST_BLOCKS, movable, on_host, relocate
from hf_paged.core.table import BlockTable

TOKENS = list(range(18))


class Somewhere:
    def free(self):
        pass


def moved(num_indexed=0) -> tuple[BlockManager, BlockTable]:
    """A table of four full blocks and a bit, of which all full ones lie on the host; some were indexed before."""
    manager = BlockManager(9, 4)
    table = manager.new_table(b"root")
    manager.append([table], 4 * num_indexed, tokens=[TOKENS[: 4 * num_indexed]])
    manager.index_table(table, True)
    manager.append([table], 18 - 4 * num_indexed, tokens=[TOKENS[4 * num_indexed :]])
    blocks = movable(manager, [table], 0)
    relocate(manager, [table], 0, {block: manager.pools[0].overflow.add(Somewhere()) for block in blocks})
    assert len(on_host([table], 0)) == 4
    return manager, table


def found(manager) -> int:
    manager.check_integrity()
    assert all(block < HOST_BLOCKS for block in manager.index.by_block[0])
    return manager.index.match(b"root", TOKENS, 18).num_tokens


@pytest.mark.parametrize("num_indexed", range(5))
def test_what_was_indexed_before_it_moved_is_found(num_indexed):
    manager, table = moved(num_indexed)
    manager.index_table(table, True)
    assert manager.cached == num_indexed, "those that were moved stay until their memory is needed"
    assert found(manager) == (18 if num_indexed == 4 else 4 * num_indexed)
    manager.budget.evict(9)
    assert found(manager) == 0
    manager.free(table)
    assert found(manager) == 0


@pytest.mark.parametrize("keep", range(1, 16))
def test_a_sequence_that_was_cut_within_a_block_on_the_host_is_not_found(keep):
    manager, table = moved()
    manager.crop(table, keep)
    manager.index_table(table, True)
    assert found(manager) == 0
    manager.free(table)
    manager.check_integrity()
