"""One forward pass over a cache, as its layers carry it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hf_paged.backends import AttentionBackend
from hf_paged.core.plan import StepPlan
from hf_paged.core.table import BlockTable
from hf_paged.dense import DenseView
from hf_paged.dense_host import AsComputed, OverHost


class UnsupportedAttentionError(Exception):
    """The fast path cannot do what the model asks for; the padded path can."""


@dataclass(slots=True, eq=False)
class Step:
    """One forward pass.

    Attributes:
        plans: what is written and read, by layer; layers of one group have the same one.
        dense_len: dense columns after the pass.
        tokens_per_row: dense columns that the pass adds.
        tables: of the rows that the pass computes, or `None` where queries are packed and have no rows.
        columns: `[rows, dense_len]` bool, which dense columns are stored; `None`: all.
        reads_rows: whether rows that lie in one span go to attention as tensors.
        backend: reads the blocks; `None`: layers return dense K and V.
        planned: False where the pass began with a layer's `update`, by an unpatched model.
        windows_seen: sliding window of each layer's attention call, by layer.
        readers: who gives layers dense K and V where the device does not hold all of them, by group.
        keeps_nothing: whether layers store nothing, and return what they are given.
        hands_out: whether the model hands dense K and V out to its caller, for whom they stay as they are.
    """

    plans: Sequence[StepPlan]
    dense_len: int
    tokens_per_row: int
    tables: Sequence[BlockTable] | None = None
    columns: torch.Tensor | None = None
    backend: AttentionBackend | None = None
    reads_rows: bool = False
    planned: bool = True
    windows_seen: dict[int, int | None] = field(default_factory=dict)
    readers: dict[int, AsComputed | OverHost] = field(default_factory=dict)
    keeps_nothing: bool = False
    hands_out: bool = False
    _dense: dict[int, DenseView] = field(default_factory=dict)

    @property
    def fast(self) -> bool:
        """Whether attention reads the blocks."""
        return self.backend is not None

    def dense(self, group: int) -> DenseView:
        """The dense view of a group's K and V that other code than our attention function gets."""
        if group not in self._dense:
            if self.tables is None or (self.fast and self.backend.reads_latents):
                raise UnsupportedAttentionError("K and V are read outside the attention function")
            if any(table.chains[group].reaches_host for table in self.tables):
                raise UnsupportedAttentionError("K and V on the host are read outside the attention function")
            self._dense[group] = DenseView(self.tables, group, self.dense_len, self.columns)
        return self._dense[group]
