"""Plans as the native kernel reads them: made once per plan and window, used in every layer."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch

from hf_paged.backends.base import AttentionCall
from hf_paged.core.chain import Run
from hf_paged.core.plan import Segment, StepPlan, joined
from hf_paged.store import LayerStore
from hf_paged_kernels import NativeKernel, Part, Parts, flash_takes, kernel_for, native_kernels

# Chunks of more query tokens a row are a prefill: without `multiplies` left to torch's own attention, with it read
# segment by segment.
MAX_CHUNK_TOKENS = 16
# Without `multiplies`: more query heads that read the same tokens are a product of matrices, and left to torch, too.
MAX_PART_ROWS = 128


def kernel_of(key: torch.Tensor, value: torch.Tensor) -> NativeKernel | None:
    """The native kernel for K and V `[..., dim]`, `None` where torch's own attention is to be used."""
    if key.dtype != value.dtype:
        return None
    return kernel_for(key.dtype, key.shape[-1], value.shape[-1])


def kernel_of_store(store: LayerStore) -> NativeKernel | None:
    """The same for what a layer's memory holds; records are decoded by the kernel."""
    if store.dtype != store.value_dtype:
        return None
    kv_format = None if store.records is None else store.records.kv_format
    return kernel_for(store.dtype, store.key_dim, store.value_dim, kv_format)


def multiplies(store: LayerStore, call: AttentionCall) -> bool:
    """Whether the native kernel also takes what is a product of matrices: prompts, and rows of many samples.

    Where it was measured against torch's own flash attention, and where that would not do it.
    """
    torch_takes = store.records is None and flash_takes(store.dtype, store.key_dim, store.value_dim, call.softcap)
    return native_kernels().multiplies or not torch_takes


def parts_for(plan: StepPlan, window: int | None, group: int, multiplies: bool) -> Parts | None:
    """What the plan's queries read, kept in `plan.prepared`; `None` where torch's own attention is to be used.

    `group` is the number of query heads to a KV head.
    """
    window = plan.still_hiding(window)
    key = ("native", window, group, multiplies)
    if key not in plan.prepared:
        suits = multiplies or (_is_short(plan) and _is_narrow(plan, group))
        plan.prepared[key] = _parts(plan, window) if suits else None
    return plan.prepared[key]


def attend_dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> torch.Tensor | None:
    """As `AttentionBackend.attend_dense`; `None` where torch's own attention is to be used."""
    tensors = (query, key, value)
    if not all(type(each) is torch.Tensor and each.is_cpu and each.layout is torch.strided for each in tensors):
        return None
    kernel = kernel_of(key, value) if query.dtype == key.dtype else None
    if kernel is None or query.shape[2] <= MAX_CHUNK_TOKENS:
        return None
    if not native_kernels().multiplies and flash_takes(key.dtype, key.shape[-1], value.shape[-1]):
        return None
    if query.stride(3) != 1:
        tensors = (query.contiguous(), key, value)
    parts = _dense_parts(query.shape[2], key.shape[2], causal)
    rows = [
        kernel.attend(q.transpose(0, 1), _adjacent(k), _adjacent(v), parts, scale)
        for q, k, v in zip(*tensors, strict=True)
    ]
    return torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0)


@functools.lru_cache(maxsize=32)
def _dense_parts(queries: int, tokens: int, causal: bool) -> Parts:
    return Parts(queries, [Part(0, queries, 0, 1, *([0] if causal else []))], [(0, tokens)])


def _adjacent(memory: torch.Tensor) -> torch.Tensor:
    """`[heads, tokens, dim]` with tokens one after the other, as the kernel reads K and V.

    `contiguous` would leave the stride of a single token as it is.
    """
    is_adjacent = memory.stride()[1:] == (memory.shape[2], 1)
    return memory if is_adjacent else memory.clone(memory_format=torch.contiguous_format)


def _is_short(plan: StepPlan) -> bool:
    return all(segment.length <= MAX_CHUNK_TOKENS for segment in plan.segments)


def _is_narrow(plan: StepPlan, group: int) -> bool:
    return all((piece.stop - piece.start) * group <= MAX_PART_ROWS for piece in plan.shared)


def _parts(plan: StepPlan, window: int | None) -> Parts:
    found = _Found()
    # Long segments have work enough of their own: what they share is read anew, and nothing is merged.
    if window is not None or plan.num_queries > len(plan.segments) * MAX_CHUNK_TOKENS:
        _add_segments(found, joined(plan.segments), window)
    else:
        for piece in (*plan.own, *plan.shared):
            found.add(piece.start, piece.stop, piece.runs, *([0] if piece.causal else []))
    return Parts(plan.num_queries, found.parts, found.runs)


def _add_segments(found: _Found, segments: Sequence[Segment], window: int | None) -> None:
    for segment in segments:
        past = segment.kv_len - segment.length
        begin = segment.chain.first_token if window is None else max(0, past - window + 1)
        runs = segment.chain.runs(begin, segment.kv_len)
        hidden = () if window is None else (window,)
        found.add(segment.start, segment.start + segment.length, runs, past - begin, *hidden)


class _Found:
    """Parts and their runs, one after the other."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.runs: list[Run] = []

    def add(self, start: int, stop: int, runs: Iterable[Run], *visible: int) -> None:
        first = len(self.runs)
        self.runs += runs
        self.parts.append(Part(start, stop, first, len(self.runs), *visible))
