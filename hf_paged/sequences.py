"""The block tables of a cache, apart from it, so that they can be freed when it is gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_paged.compat import CACHE_NAME
from hf_paged.core.manager import BlockManager
from hf_paged.core.plan import Pin
from hf_paged.core.table import BlockTable
from hf_paged.core.whole import whole
from hf_paged.pool import KVPool


class Sequences:
    """The tables of a cache and the pool they are in; freed with the cache.

    Attributes:
        twin: sequences that no pass is under way over while there is one over these, and which hold much of the same.
    """

    def __init__(self, pool: KVPool | None):
        self.pool = pool
        self.tables: list[BlockTable] = []
        self.pins: list[Pin] = []
        self.twin: Sequences | None = None

    @property
    def is_torn(self) -> bool:
        """Whether nobody knows any more what the tables hold: all of the pool is given up then, by and by."""
        return self.pool is not None and self.pool.manager.is_torn

    @property
    def movable(self) -> list[BlockTable]:
        """Tables whose blocks a pass over these may move."""
        return self.tables if self.twin is None else [*self.tables, *self.twin.tables]

    def keep_first(self, lengths: Sequence[int]) -> bool:
        """Keep so many tokens of each row, at most; `False`, and nothing changes, where some of them are gone."""
        if not self.tables:
            return True
        counts = [min(length, table.num_tokens) for table, length in zip(self.tables, lengths, strict=False)]
        if self.is_torn or not all(map(self.pool.manager.reaches, self.tables, counts)):
            return False
        for table, count in zip(self.tables, counts, strict=False):
            self.pool.manager.crop(table, count)
        return True

    def unpin(self) -> None:
        """Let go of the blocks that the last pass has copied from."""
        if self.pins and not self.is_torn:
            _unpin(self.pool.manager, self)

    def free(self) -> None:
        """Give every block back."""
        if self.pool is not None and not self.is_torn:
            self.unpin()
            self.pool.free(self.tables)
        self.tables.clear()
        self.pins.clear()

    def abandon(self) -> None:
        """Give every block back without waiting for anyone: the cache is garbage."""
        if (self.tables or self.pins) and not self.is_torn:
            self.pool.free_soon(self.tables, self.pins)

    def select(self, rows: Sequence[int]) -> None:
        """Row `i` goes on with what row `rows[i]` holds: tables are moved and forked, no data is."""
        _select(self.pool.manager, self, rows)


@whole
def _unpin(manager: BlockManager, sequences: Sequences) -> None:
    pins, sequences.pins = sequences.pins, []  # first, so that nobody lets go of them twice
    manager.unpin(pins)


@whole
def _select(manager: BlockManager, sequences: Sequences, rows: Sequence[int]) -> None:
    kept: dict[int, BlockTable] = {}
    tables: list[BlockTable] = []
    for row in rows:
        if row in kept:
            tables.append(manager.fork(kept[row]))
        else:
            kept[row] = sequences.tables[row]
            tables.append(kept[row])
    sequences.pool.free([table for row, table in enumerate(sequences.tables) if row not in kept])
    sequences.tables[:] = tables


def chosen_rows(indices: Any, count: int) -> list[int]:
    """Numbers of the rows that are chosen among `count`, as one chooses from a tensor: by numbers or by a mask.

    Raises `ValueError` for numbers beyond them; negative ones count from the end.
    """
    indices = torch.as_tensor(indices, device="cpu")
    rows = (indices.nonzero().flatten() if indices.dtype == torch.bool else indices).tolist()
    if not all(-count <= row < count for row in rows):
        raise ValueError(f"indices {rows} reach beyond the {count} rows that {CACHE_NAME} holds")
    return [row % count for row in rows]
