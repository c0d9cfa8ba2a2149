"""One forward pass over a cache, as its layers carry it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hf_paged.backends import AttentionBackend
from hf_paged.core.plan import RowSpan, StepPlan
from hf_paged.core.table import BlockTable
from hf_paged.dense import DenseView


class UnsupportedAttentionError(Exception):
    """The fast path cannot do what the model asks for; the padded path can."""


@dataclass(slots=True, eq=False)
class Step:
    """One forward pass.

    Attributes:
        plan: what is written and read.
        dense_len: dense columns after the pass.
        tokens_per_row: dense columns that the pass adds.
        tables: of the rows that the pass computes, or `None` where queries are packed and have no rows.
        columns: `[rows, dense_len]` bool, which dense columns are stored; `None`: all.
        span: where the rows lie, if each is one run of all its columns and the backend reads such rows as tensors.
        backend: reads the blocks; `None`: layers return dense K and V.
        planned: False where the pass began with a layer's `update`, by an unpatched model.
        windows_seen: sliding window of each layer's attention call, by layer.
    """

    plan: StepPlan
    dense_len: int
    tokens_per_row: int
    tables: Sequence[BlockTable] | None = None
    columns: torch.Tensor | None = None
    backend: AttentionBackend | None = None
    span: RowSpan | None = None
    planned: bool = True
    windows_seen: dict[int, int | None] = field(default_factory=dict)
    _dense: DenseView | None = None

    @property
    def fast(self) -> bool:
        """Whether attention reads the blocks."""
        return self.backend is not None

    def dense(self) -> DenseView:
        """The dense view of K and V that other code than our attention function gets."""
        if self._dense is None:
            if self.tables is None:
                raise UnsupportedAttentionError("K and V are read outside the attention function")
            self._dense = DenseView(self.tables, self.dense_len, self.columns)
        return self._dense
