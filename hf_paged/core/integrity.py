"""Proof that a manager's pools and its index agree with the live tables; for tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hf_paged.core.plan import Pin
from hf_paged.core.table import BlockTable

if TYPE_CHECKING:
    from hf_paged.core.manager import BlockManager


def check_integrity(manager: BlockManager, tables: Iterable[BlockTable], pinned: Counter[Pin]) -> None:
    """Raises `AssertionError` where a block of `manager` is not in exactly one state, or not held as it says it is."""
    assert not manager.is_torn, "an operation was left half done"
    held = +pinned
    for table in tables:
        assert table.root is None or len(table.tokens) == table.num_tokens, "token ids were lost"
        assert manager.reaches(table, table.num_tokens), "a window has lost tokens that are still seen"
        for group, chain in enumerate(table.chains):
            chain.check_integrity()
            held.update((group, block) for block in chain.held)
    for group, pool in enumerate(manager.pools):
        owned = {block: count for (owner, block), count in held.items() if owner == group}
        pool.check_integrity(owned)
        indexed = manager.index.by_block[group]
        for block in range(1, pool.num_blocks):
            assert block in indexed or not pool.is_cached(block), f"block {block} is kept for nobody"
            assert block not in indexed or block in owned or pool.is_cached(block), f"block {block} is gone"
    manager.index.check_integrity()
    spent = sum((pool.in_use + pool.cached + 1) * pool.block_bytes for pool in manager.pools)
    assert spent + manager.budget.guest_bytes <= manager.budget.limit_bytes, "over the budget"
