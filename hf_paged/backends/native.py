"""Plans as the native kernel reads them: made once per plan and window, used in every layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hf_paged.core.chain import Run
from hf_paged.core.plan import StepPlan
from hf_paged_kernels import NativeKernel, Part, Parts, kernel_for

# Chunks of more query tokens a row are a prefill: matrix products, which torch's own attention does faster.
MAX_CHUNK_TOKENS = 16


def kernel_of(key: torch.Tensor, value: torch.Tensor) -> NativeKernel | None:
    """The native kernel for K and V `[..., dim]`, `None` where torch's own attention is to be used."""
    if key.dtype != value.dtype:
        return None
    return kernel_for(key.dtype, key.shape[-1], value.shape[-1])


def parts_for(plan: StepPlan, window: int | None) -> Parts | None:
    """What the plan's queries read, kept in `plan.prepared`; `None` where the plan is a prefill."""
    window = plan.still_hiding(window)
    key = ("native", window)
    if key not in plan.prepared:
        plan.prepared[key] = _parts(plan, window)
    return plan.prepared[key]


def _parts(plan: StepPlan, window: int | None) -> Parts | None:
    if any(segment.length > MAX_CHUNK_TOKENS for segment in plan.segments):
        return None
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
