"""Dense K and V of some rows: as a view where their blocks allow it, else gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hf_paged.core.blocks import NULL_BLOCK
from hf_paged.core.overflow import HOST_BLOCKS
from hf_paged.core.plan import Copy, RowSpan, StepPlan, Write, matched_writes, row_span
from hf_paged.core.table import BlockTable
from hf_paged.store import run_slots


class DenseView:
    """Reads rows as `[batch, kv_heads, columns, dim]`, zeros at columns that are not stored, or not any more.

    Args:
        tables: one per row, as long as they are when the view is made.
        group: of the layers that are read.
        num_columns: dense columns.
        columns: `[batch, num_columns]` bool, which columns are stored; `None`: all of them.
        lengths: tokens of each row that are looked at; `None`: all.
    """

    def __init__(
        self,
        tables: Sequence[BlockTable],
        group: int,
        num_columns: int,
        columns: torch.Tensor | None,
        lengths: Sequence[int] | None = None,
    ):
        if lengths is None:
            lengths = [table.num_tokens for table in tables]
        self._rows = [(table.chains[group], length) for table, length in zip(tables, lengths, strict=True)]
        self._num_columns = num_columns
        self._columns = columns
        self._slots: torch.Tensor | None = None
        self._span = self._find_span()

    @property
    def shape(self) -> torch.Size:
        """`[batch, num_columns]`."""
        return torch.Size((len(self._rows), self._num_columns))

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
        if self._slots is None:
            self._slots = self.slots().to(memory.device)
        wanted = self._slots[:, skipped:].flatten()
        return memory.index_select(1, wanted).view(heads, len(self._rows), -1, dim).transpose(0, 1)

    def slots(self) -> torch.Tensor:
        """`[batch, num_columns]` on the CPU: where the columns lie, slot 0 for those that do not."""
        slots = torch.full(self.shape, NULL_BLOCK, dtype=torch.long, device="cpu")  # which is always zero
        for row, (chain, num_tokens) in enumerate(self._rows):
            first = min(chain.first_token, num_tokens)
            held = torch.zeros(num_tokens, dtype=torch.long, device="cpu")
            held[first:] = run_slots(list(chain.runs(first, num_tokens)), slots.device)
            if self._columns is None:
                slots[row] = held
            else:
                slots[row, self._columns[row]] = held
        return slots


class NewElsewhere(NamedTuple):
    """New tokens that go to no block of the device.

    Attributes:
        sources, slots: they fill new blocks on the host: token `sources[i]` of the pass goes to `slots[i]`.
        left_out: how many are not kept.
    """

    sources: list[int]
    slots: list[int]
    left_out: int


def dense_plan(
    tables: Sequence[BlockTable],
    group: int,
    copies: list[Copy],
    sources: Sequence[Sequence[int]],
    tokens_per_row: int,
) -> tuple[StepPlan, NewElsewhere]:
    """Where the newest tokens of each row go: those of the columns `sources[row]`, as far as they are kept."""
    writes: list[Write] = []
    on_host: list[tuple[int, int]] = []
    left_out = 0
    for row, (table, columns) in enumerate(zip(tables, sources, strict=True)):
        chain, begin = table.chains[group], table.num_tokens - len(columns)
        first = min(max(begin, chain.first_token), table.num_tokens)
        slots = [run.slot + i for run in chain.runs(first, table.num_tokens) for i in range(run.tokens)]
        given = [row * tokens_per_row + column for column in columns[first - begin :]]
        left_out += first - begin
        if chain.reaches_host:
            pairs = list(zip(given, slots, strict=True))
            on_host += [pair for pair in pairs if pair[1] >= HOST_BLOCKS]
            here = [pair for pair in pairs if pair[1] < HOST_BLOCKS]
            given, slots = [source for source, _ in here], [slot for _, slot in here]
        writes += matched_writes(given, slots)
    plan = StepPlan(
        num_queries=len(tables) * tokens_per_row,
        writes=writes,
        copies=copies,
        own=[],
        shared=[],
        segments=[],
        kv_len=max(table.num_tokens for table in tables),
    )
    return plan, NewElsewhere([source for source, _ in on_host], [slot for _, slot in on_host], left_out)
