"""Dense K and V of some rows: as a view where their blocks allow it, else gathered."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_paged.core.blocks import NULL_BLOCK
from hf_paged.core.plan import RowSpan, row_span
from hf_paged.core.table import BlockTable
from hf_paged.store import run_slots


class DenseView:
    """Reads rows as `[batch, kv_heads, columns, dim]`, zeros at columns that are not stored.

    Args:
        tables: one per row, as long as they are when the view is made.
        num_columns: dense columns.
        columns: `[batch, num_columns]` bool, which columns are stored; `None`: all of them.
    """

    def __init__(self, tables: Sequence[BlockTable], num_columns: int, columns: torch.Tensor | None):
        self._rows = [(table, table.num_tokens) for table in tables]
        self._num_columns = num_columns
        self._columns = columns
        self._slots: torch.Tensor | None = None
        self._span = self._find_span()

    def _find_span(self) -> RowSpan | None:
        """The rows' span, where each is one run of all columns."""
        runs = [list(table.runs(0, num_tokens)) for table, num_tokens in self._rows]
        if any(len(row) != 1 or row[0].tokens != self._num_columns for row in runs):
            return None
        return row_span([row[0] for row in runs])

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        """The rows' part of `memory [kv_heads, slots, dim]`."""
        heads, slots, dim = memory.shape
        if self._span is not None:
            rows, slot, step, tokens = self._span
            return memory.as_strided((rows, heads, tokens, dim), (step * dim, slots * dim, dim, 1), slot * dim)
        gathered = memory.index_select(1, self._dense_slots(memory.device))
        return gathered.view(heads, len(self._rows), self._num_columns, dim).transpose(0, 1)

    def _dense_slots(self, device: torch.device) -> torch.Tensor:
        if self._slots is None:
            # Slot 0 belongs to the null block, which is always zero.
            slots = torch.full((len(self._rows), self._num_columns), NULL_BLOCK, dtype=torch.long)
            for row, (table, num_tokens) in enumerate(self._rows):
                stored = run_slots(list(table.runs(0, num_tokens)), slots.device)
                if self._columns is None:
                    slots[row] = stored
                else:
                    slots[row, self._columns[row]] = stored
            self._slots = slots.flatten().to(device)
        return self._slots
