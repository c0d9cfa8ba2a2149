"""Dense K and V of some rows: as a view where their blocks allow it, else gathered."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_paged.core.blocks import NULL_BLOCK
from hf_paged.core.plan import RowSpan, row_span
from hf_paged.core.table import BlockTable
from hf_paged.store import run_slots


class DenseView:
    """Reads rows as `[batch, kv_heads, columns, dim]`, zeros at columns that are not stored, or not any more.

    Args:
        tables: one per row, as long as they are when the view is made.
        group: of the layers that are read.
        num_columns: dense columns.
        columns: `[batch, num_columns]` bool, which columns are stored; `None`: all of them.
    """

    def __init__(self, tables: Sequence[BlockTable], group: int, num_columns: int, columns: torch.Tensor | None):
        self._rows = [(table.chains[group], table.num_tokens) for table in tables]
        self._num_columns = num_columns
        self._columns = columns
        self._slots: torch.Tensor | None = None
        self._span = self._find_span()

    def _find_span(self) -> RowSpan | None:
        """The rows' span, where each is one run of all columns."""
        runs = [list(chain.runs(min(chain.first_token, num_tokens), num_tokens)) for chain, num_tokens in self._rows]
        if any(len(row) != 1 or row[0].tokens != self._num_columns for row in runs):
            return None
        return row_span([row[0] for row in runs])

    def of(self, memory: torch.Tensor, last_columns: int | None = None) -> torch.Tensor:
        """The rows' part of `memory [kv_heads, slots, dim]`; of the last columns only where their number is given."""
        heads, slots, dim = memory.shape
        skipped = 0 if last_columns is None else self._num_columns - last_columns
        if self._span is not None:
            rows, slot, step, tokens = self._span
            strides = (step * dim, slots * dim, dim, 1)
            return memory.as_strided((rows, heads, tokens - skipped, dim), strides, (slot + skipped) * dim)
        wanted = self._dense_slots(memory.device)[:, skipped:].flatten()
        return memory.index_select(1, wanted).view(heads, len(self._rows), -1, dim).transpose(0, 1)

    def _dense_slots(self, device: torch.device) -> torch.Tensor:
        if self._slots is None:
            # Slot 0 belongs to the null block, which is always zero.
            slots = torch.full((len(self._rows), self._num_columns), NULL_BLOCK, dtype=torch.long, device="cpu")
            for row, (chain, num_tokens) in enumerate(self._rows):
                first = min(chain.first_token, num_tokens)
                held = torch.zeros(num_tokens, dtype=torch.long, device="cpu")
                held[first:] = run_slots(list(chain.runs(first, num_tokens)), slots.device)
                if self._columns is None:
                    slots[row] = held
                else:
                    slots[row, self._columns[row]] = held
            self._slots = slots.to(device)
        return self._slots
