"""The plans of the next decode step, made while the device still computes this one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hf_paged.core.manager import BlockManager
from hf_paged.core.plan import StepPlan
from hf_paged.core.planner import decode_plans
from hf_paged.core.table import BlockTable


class Foreseen(NamedTuple):
    """What a step will be if it only appends a token to each of some tables.

    Attributes:
        plans: one a group.
        state: of the tables when the tokens are there.
    """

    plans: list[StepPlan]
    state: list[Any]

    def holds(self, tables: Sequence[BlockTable]) -> bool:
        """Whether that is what has become of `tables`."""
        return self.state == _state(tables)


def foresee(manager: BlockManager, tables: Sequence[BlockTable]) -> Foreseen | None:
    """What comes next; `None` where tails have to be left, or blocks taken that are nobody's yet.

    The tables grow by a token, as it will be, and shrink again.
    """
    grown: list[tuple[BlockTable, list[int] | None]] = []
    with manager.lock:
        try:
            for table in tables:
                if not _grow(manager, table, grown):
                    return None
            return Foreseen(decode_plans(manager, tables), _state(tables))
        finally:
            for table, versions in reversed(grown):
                _shrink(table, versions)


def _grow(manager: BlockManager, table: BlockTable, grown: list[tuple[BlockTable, list[int] | None]]) -> bool:
    """One token more, in the last block, or in those that are kept for the table; whether that could be."""
    if table.tail_tokens:
        if manager.must_leave_tail(table):
            return False
        grown.append((table, None))
    else:
        following = [chain.blocks[-1] + 1 if chain.blocks else 0 for chain in table.chains]
        if not all(chain.has_claimed(block) for chain, block in zip(table.chains, following, strict=True)):
            return False
        grown.append((table, [chain.version for chain in table.chains]))
        for chain, block in zip(table.chains, following, strict=True):
            chain.extend([block])
    table.num_tokens += 1
    return True


def _shrink(table: BlockTable, versions: list[int] | None) -> None:
    table.num_tokens -= 1
    if versions is not None:
        for chain, version in zip(table.chains, versions, strict=True):
            chain.truncate(len(chain.blocks) - 1)
            chain.version = version


def _state(tables: Sequence[BlockTable]) -> list[Any]:
    return [
        (id(table), table.num_tokens, *((chain.version, chain.blocks[-1]) for chain in table.chains))
        for table in tables
    ]
