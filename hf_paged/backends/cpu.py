"""The `cpu` backend: the native kernel for decode and short chunks, torch's own flash attention for everything else.

Where there is no native kernel, torch's attention reads zero-copy views of adjacent blocks: `schedule` says which,
`hf_paged_kernels.partial` does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hf_paged.backends.base import AttentionBackend, AttentionCall
from hf_paged.backends.native import kernel_of, kernel_of_store, parts_for
from hf_paged.backends.prepared import PreparedDecode
from hf_paged.backends.schedule import Batch, Part, Schedule, schedule_for
from hf_paged.core.plan import RowSpan, StepPlan
from hf_paged.store import LayerStore, span_view, strided_view
from hf_paged_kernels import attend_all, attend_partial, merge_partial, native

if TYPE_CHECKING:
    from hf_paged.step import Step

Result = tuple[torch.Tensor, torch.Tensor]  # [queries, heads, dim], log-sum-exp [queries, heads]


def attend_rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Decode rows, `[rows, heads, 1, dim]`, each over all of its `key`, `value [rows, kv_heads, tokens, dim]`.

    Returns `[rows, 1, heads, value_dim]`.
    """
    if call.window is not None and key.shape[2] > call.window:
        key, value = key[:, :, -call.window :], value[:, :, -call.window :]
    kernel = kernel_of(key, value)
    if kernel is not None:
        return kernel.attend_rows(query, key, value, call.scale, call.softcap, call.sinks)
    if call.softcap is None and call.sinks is None:
        return attend_all(query, key, value, call.scale).transpose(1, 2)
    out, lse = attend_partial(query, key, value, call.scale, softcap=call.softcap)
    if call.sinks is not None:
        out = (out * torch.sigmoid(lse - call.sinks.float().unsqueeze(1)).unsqueeze(-1)).to(query.dtype)
    return out.transpose(1, 2)


class CPUBackend(AttentionBackend):
    """Without a native kernel: own pieces first, one result a query; then shared pieces, read once and merged."""

    name = "cpu"
    reads_rows = True

    def describe(self) -> str:
        """The name, and which native kernel runs or why none does."""
        return f"{self.name} ({native().reason})"

    def prepare(self, stores: Sequence[LayerStore | None], step: Step) -> PreparedDecode | None:
        """The layers of a decode step, where the native kernel runs."""
        return PreparedDecode(stores, step) if native().kernels else None

    def attend_flat(self, query: torch.Tensor, store: LayerStore, plan: StepPlan, call: AttentionCall) -> torch.Tensor:
        kernel = kernel_of_store(store)
        group = query.shape[1] // store.keys.shape[0]
        parts = None if kernel is None else parts_for(plan, call.window, group)
        if parts is not None:
            return kernel.attend(
                query, store.keys, store.values, parts, call.scale, call.softcap, call.sinks, store.records
            )
        schedule = schedule_for(plan, call.window)
        out, lse = _attend_own(query, store, schedule, call)
        if schedule.shared:
            out = out.float()
            for part in schedule.shared:
                other, other_lse = _attend_part(query, store, part, call)
                if part.stop - part.start == out.shape[0]:
                    out, lse = merge_partial(out, lse, other.float(), other_lse)
                else:
                    rows = slice(part.start, part.stop)
                    out[rows], lse[rows] = merge_partial(out[rows], lse[rows], other.float(), other_lse)
        if call.sinks is not None:
            out = out * torch.sigmoid(lse - call.sinks.float()).unsqueeze(-1)
        return out.to(query.dtype).contiguous()


def _attend_own(query: torch.Tensor, store: LayerStore, schedule: Schedule, call: AttentionCall) -> Result:
    results = [_attend_batch(query, store, batch, call) for batch in schedule.batches]
    results += [_attend_part(query, store, part, call) for part in schedule.own]
    if len(results) == 1:
        return results[0]
    return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])


def _attend_batch(query: torch.Tensor, store: LayerStore, batch: Batch, call: AttentionCall) -> Result:
    """Decode rows of equal length at equal distance, over one strided view of K and one of V."""
    rows = batch.stop - batch.start
    if rows != query.shape[0]:
        query = query[batch.start : batch.stop]
    key, value = _batch_views(store, batch)
    out, lse = attend_partial(query.unsqueeze(2), key, value, call.scale, softcap=call.softcap)
    return out.squeeze(2), lse.squeeze(2)


def _batch_views(store: LayerStore, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a batch, `[rows, kv_heads, tokens, dim]`."""
    span = RowSpan(batch.stop - batch.start, batch.slot, batch.step, batch.tokens)
    return store.read(lambda memory: span_view(memory, span))


def _attend_part(query: torch.Tensor, store: LayerStore, part: Part, call: AttentionCall) -> Result:
    """Queries over the same tokens."""
    if part.run is not None:
        key, value = store.read(lambda memory: strided_view(memory, part.run))
    else:
        key, value = store.read(lambda memory: memory.index_select(1, part.slots))
    out, lse = attend_partial(
        query[part.start : part.stop].transpose(0, 1).unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        call.scale,
        part.causal,
        call.softcap,
        part.mask,
    )
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0).transpose(0, 1)
