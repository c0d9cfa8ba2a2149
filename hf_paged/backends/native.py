"""Plans as the native kernel reads them: made once per plan and window, used in every layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hf_paged.core.chain import Run
from hf_paged.core.plan import StepPlan
from hf_paged.store import LayerStore
from hf_paged_kernels import NativeKernel, Part, Parts, kernel_for

# Chunks of more query tokens a row are a prefill, which is left to torch's own attention.
MAX_CHUNK_TOKENS = 16
# Query heads that read the same tokens. With more of them attention is a matrix product, and torch's own is faster: one
# thread of Zen 3, 1,024 tokens, shapes 9/3/64 and 32/8/128, time of torch's own over that of the native kernel:
#   rows        3, 4   6, 8   12, 16   24, 32   48, 64   96, 128   192, 256
#   float32      1.5    1.4      1.2      1.0      1.1       0.9        1.0
#   bfloat16     2.0    1.5      1.3      1.0      1.1       1.0        0.9     (the smaller of the two shapes)
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


def parts_for(plan: StepPlan, window: int | None, group: int) -> Parts | None:
    """What the plan's queries read, kept in `plan.prepared`; `None` where torch's own attention is to be used.

    `group` is the number of query heads to a KV head.
    """
    window = plan.still_hiding(window)
    key = ("native", window, group)
    if key not in plan.prepared:
        suits = _is_short(plan) and _is_narrow(plan, group)
        plan.prepared[key] = _parts(plan, window) if suits else None
    return plan.prepared[key]


def _is_short(plan: StepPlan) -> bool:
    return all(segment.length <= MAX_CHUNK_TOKENS for segment in plan.segments)


def _is_narrow(plan: StepPlan, group: int) -> bool:
    return all((piece.stop - piece.start) * group <= MAX_PART_ROWS for piece in plan.shared)


def _parts(plan: StepPlan, window: int | None) -> Parts:
    found = _Found()
    if window is None:
        for piece in (*plan.own, *plan.shared):
            if piece.causal:
                found.add(piece.start, piece.stop, piece.runs, 0)
            else:
                found.add(piece.start, piece.stop, piece.runs)
    else:
        for segment in plan.segments:
            past = segment.kv_len - segment.length
            begin = max(0, past - window + 1)
            runs = segment.chain.runs(begin, segment.kv_len)
            found.add(segment.start, segment.start + segment.length, runs, past - begin, window)
    return Parts(plan.num_queries, found.parts, found.runs)


class _Found:
    """Parts and their runs, one after the other."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.runs: list[Run] = []

    def add(self, start: int, stop: int, runs: Iterable[Run], *visible: int) -> None:
        first = len(self.runs)
        self.runs += runs
        self.parts.append(Part(start, stop, first, len(self.runs), *visible))
