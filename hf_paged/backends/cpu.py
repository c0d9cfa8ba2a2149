"""The `cpu` backend: torch's own flash attention on zero-copy views of adjacent blocks.

Query heads are packed by KV head, so K and V are read once per KV head (see `schedule` for which views, and
`hf_paged_kernels.partial` for the arithmetic). No compiler is needed.
"""

from __future__ import annotations

import torch
from hf_paged_kernels import attend_partial, merge_partial

from hf_paged.backends.base import AttentionBackend, AttentionCall
from hf_paged.backends.schedule import Batch, Part, Schedule, schedule_for
from hf_paged.core.plan import StepPlan
from hf_paged.store import LayerStore, strided_view

# Up to this many packed query rows the heads of a group go into one matrix; beyond it they are a batch of their
# own over the same K and V, which saves a copy of the queries.
MAX_PACKED_ROWS = 256


class CPUBackend(AttentionBackend):
    """Own pieces first, one result a query; then shared pieces, read once for all their queries and merged."""

    name = "cpu"

    def attend_flat(self, query: torch.Tensor, store: LayerStore, plan: StepPlan, call: AttentionCall) -> torch.Tensor:
        schedule = schedule_for(plan, call.window)
        kv_heads = store.keys.shape[0]
        grouped = query.unflatten(1, (kv_heads, query.shape[1] // kv_heads))  # [queries, kv_heads, group, dim]
        out, lse = self._own(grouped, store, schedule, call)
        if schedule.shared:
            out = out.float()
            for part in schedule.shared:
                other, other_lse = _attend_part(grouped[part.start : part.stop], store, part, call)
                if part.stop - part.start == out.shape[0]:
                    out, lse = merge_partial(out, lse, other.float(), other_lse)
                else:
                    rows = slice(part.start, part.stop)
                    out[rows], lse[rows] = merge_partial(out[rows], lse[rows], other.float(), other_lse)
        if call.sinks is not None:
            sinks = call.sinks.float().view(kv_heads, -1)
            out = out * torch.sigmoid(lse - sinks).unsqueeze(-1)
        return out.to(query.dtype).flatten(1, 2).contiguous()

    @staticmethod
    def _own(
        grouped: torch.Tensor, store: LayerStore, schedule: Schedule, call: AttentionCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        results = [_attend_batch(grouped[batch.start : batch.stop], store, batch, call) for batch in schedule.batches]
        results += [_attend_part(grouped[part.start : part.stop], store, part, call) for part in schedule.own]
        if len(results) == 1:
            return results[0]
        return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])


def _attend_batch(
    grouped: torch.Tensor, store: LayerStore, batch: Batch, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode rows of equal length at equal distance: `[rows, kv_heads, group, dim]` over one strided view."""
    rows = batch.stop - batch.start

    def view(memory: torch.Tensor) -> torch.Tensor:
        heads, slots, dim = memory.shape
        return memory.as_strided(
            (rows, heads, batch.tokens, dim), (batch.step * dim, slots * dim, dim, 1), batch.slot * dim
        )

    return attend_partial(grouped, view(store.keys), view(store.values), call.scale, softcap=call.softcap)


def _attend_part(
    grouped: torch.Tensor, store: LayerStore, part: Part, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[queries, kv_heads, group, dim]` over the same tokens; returns `[queries, kv_heads, group, ...]`."""
    queries, kv_heads, group, dim = grouped.shape
    if part.run is not None:
        key, value = strided_view(store.keys, part.run), strided_view(store.values, part.run)
    else:
        key, value = store.gather(part.slots)
    if part.causal or part.mask is not None or queries * group > MAX_PACKED_ROWS:
        query = grouped.permute(2, 1, 0, 3)  # [group, kv_heads, queries, dim]
        out, lse = attend_partial(
            query,
            key.expand(group, *key.shape),
            value.expand(group, *value.shape),
            call.scale,
            part.causal,
            call.softcap,
            part.mask,
        )
        return out.permute(2, 1, 0, 3), lse.permute(2, 1, 0)
    query = grouped.transpose(0, 1).reshape(1, kv_heads, queries * group, dim)
    out, lse = attend_partial(query, key.unsqueeze(0), value.unsqueeze(0), call.scale, softcap=call.softcap)
    return (
        out.reshape(kv_heads, queries, group, -1).transpose(0, 1),
        lse.reshape(kv_heads, queries, group).transpose(0, 1),
    )
