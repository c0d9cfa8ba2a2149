"""Attention over the parts of a plan's schedule, in torch operations: each part on its own, merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_paged.backends.base import AttentionCall
from hf_paged.backends.schedule import Batch, Part, Schedule, schedule_for
from hf_paged.core.plan import RowSpan, StepPlan
from hf_paged.store import LayerStore, span_view, strided_view
from hf_paged_kernels import attend_partial, merge_partial

Result = tuple[torch.Tensor, torch.Tensor]  # [queries, heads, dim], log-sum-exp [queries, heads]


def attend_plan(
    query: torch.Tensor,
    store: LayerStore,
    plan: StepPlan,
    call: AttentionCall,
    attend: Callable[..., Result] = attend_partial,
) -> Result:
    """`query [queries, heads, dim]` over all that a plan reads, sinks left out; in float32 where that is several parts.

    `attend`: `attend_partial`, or what does as much with other K and V.
    """
    schedule = schedule_for(plan, call.window)
    out, lse = _attend_own(query, store, schedule, call, attend)
    if schedule.shared:
        out = out.float()
        for part in schedule.shared:
            other = _attend_part(query, store, part, call, attend)
            out, lse = merged(out, lse, other, part.start, part.stop)
    return out, lse


def merged(out: torch.Tensor, lse: torch.Tensor, other: Result, start: int, stop: int) -> Result:
    """The results of all queries, `out` in float32, with those of queries `[start, stop)` over another part."""
    other_out, other_lse = other
    if stop - start == out.shape[0]:
        return merge_partial(out, lse, other_out.float(), other_lse)
    rows = slice(start, stop)
    out[rows], lse[rows] = merge_partial(out[rows], lse[rows], other_out.float(), other_lse)
    return out, lse


def with_sinks(out: torch.Tensor, lse: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """The result of all parts, `[queries, heads, dim]`, with the call's sinks."""
    if call.sinks is None:
        return out
    return out * torch.sigmoid(lse - call.sinks.float()).unsqueeze(-1)


def attend_tokens(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: AttentionCall,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    attend: Callable[..., Result] = attend_partial,
) -> Result:
    """`query [queries, heads, dim]` over the same `key`, `value [kv_heads, tokens, dim]`."""
    out, lse = attend(
        query.transpose(0, 1).unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), call.scale, causal, call.softcap, mask
    )
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0).transpose(0, 1)


def _attend_own(
    query: torch.Tensor, store: LayerStore, schedule: Schedule, call: AttentionCall, attend: Callable[..., Result]
) -> Result:
    results = [_attend_batch(query, store, batch, call, attend) for batch in schedule.batches]
    results += [_attend_part(query, store, part, call, attend) for part in schedule.own]
    if len(results) == 1:
        return results[0]
    return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])


def _attend_batch(
    query: torch.Tensor, store: LayerStore, batch: Batch, call: AttentionCall, attend: Callable[..., Result]
) -> Result:
    """Decode rows of equal length at equal distance, over one strided view of K and one of V."""
    rows = batch.stop - batch.start
    if rows != query.shape[0]:
        query = query[batch.start : batch.stop]
    key, value = _batch_views(store, batch)
    out, lse = attend(query.unsqueeze(2), key, value, call.scale, softcap=call.softcap)
    return out.squeeze(2), lse.squeeze(2)


def _batch_views(store: LayerStore, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a batch, `[rows, kv_heads, tokens, dim]`."""
    span = RowSpan(batch.stop - batch.start, batch.slot, batch.step, batch.tokens)
    return store.read(lambda memory: span_view(memory, span))


def _attend_part(
    query: torch.Tensor, store: LayerStore, part: Part, call: AttentionCall, attend: Callable[..., Result]
) -> Result:
    """Queries over the same tokens."""
    if part.run is not None:
        key, value = store.read(lambda memory: strided_view(memory, part.run))
    else:
        slots = part.slots.to(store.keys.device)
        key, value = store.read(lambda memory: memory.index_select(1, slots))
    return attend_tokens(query[part.start : part.stop], key, value, call, part.causal, part.mask, attend)
