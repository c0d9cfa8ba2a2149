"""Steps over sequences of which some blocks lie on the host: what is there is staged layer by layer, and merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from hf_paged.backends.base import AttentionBackend, AttentionCall
from hf_paged.backends.latent import Expansion, LatentAttention
from hf_paged.backends.parts import Result, attend_plan, attend_tokens, merged, with_sinks
from hf_paged.core.chain import Run
from hf_paged.core.overflow import HOST_BLOCKS
from hf_paged.core.plan import StepPlan
from hf_paged.staging import Staging, reads_by_part
from hf_paged.step import UnsupportedAttentionError
from hf_paged.store import LayerStore, run_slots
from hf_paged_kernels import attend_partial

# Tokens that are attended to at once: bounds the scores that torch operations hold (256 queries of a prompt with 32
# heads: 128 MiB), and the K and V that they make float32 of.
MAX_PART_TOKENS = 4096
# The same of rows that decode, which are attended to together, as a share of that; no row gets less.
MIN_OWN_TOKENS = 256


class HostReads(NamedTuple):
    """Queries `[start, stop)` see tokens `[tokens]` of one part, counted in slots of that part."""

    start: int
    stop: int
    slots: torch.Tensor


class StagedBackend(AttentionBackend):
    """One step of another backend, in one group of which blocks lie on the host. Holds that step's state.

    What lies on the device is read there, while the first part of what does not is on its way.

    Args:
        inner: the backend; writes, copies, and attends in the other groups.
        plan: of the group, with blocks on the host among those that it reads.
        stores: of the group's layers.
        staging: of the blocks.
        reads: of each part of `staging`.
    """

    def __init__(
        self,
        inner: AttentionBackend,
        plan: StepPlan,
        stores: Sequence[LayerStore],
        staging: Staging,
        reads: Sequence[Sequence[HostReads]],
    ):
        self.name = inner.name
        self.obstacle_to_graphs = "blocks on the host" if inner.has_fixed_steps else None
        self.reads_latents = inner.reads_latents
        self._inner, self._plan, self._stores, self._staging, self._reads = inner, plan, stores, staging, reads
        self._local = _on_device(plan)

    def write(self, store: LayerStore, plan: StepPlan, key: torch.Tensor, value: torch.Tensor) -> None:
        self._inner.write(store, plan, key, value)

    def copy(self, store: LayerStore, plan: StepPlan) -> None:
        self._inner.copy(store, plan)

    def attend(self, query: torch.Tensor, store: LayerStore, plan: StepPlan, call: AttentionCall) -> torch.Tensor:
        attend = super().attend if plan is self._plan else self._inner.attend
        return attend(query, store, plan, call)

    def attend_expanded(
        self, query: torch.Tensor, store: LayerStore, plan: StepPlan, call: AttentionCall, expansion: Expansion
    ) -> torch.Tensor:
        if plan is not self._plan:
            return self._inner.attend_expanded(query, store, plan, call, expansion)
        return LatentAttention(self.attend_parts, expansion).attend(query, store, plan, call)

    def attend_flat(self, query: torch.Tensor, store: LayerStore, plan: StepPlan, call: AttentionCall) -> torch.Tensor:
        out, lse = self.attend_parts(query, store, plan, call)
        return with_sinks(out, lse, call).to(query.dtype).contiguous()

    def attend_parts(
        self,
        query: torch.Tensor,
        store: LayerStore,
        plan: StepPlan,
        call: AttentionCall,
        attend: Callable[..., Result] = attend_partial,
    ) -> Result:
        """As `parts.attend_plan`, in the group that has blocks on the host."""
        if plan.still_hiding(call.window) is not None:
            raise UnsupportedAttentionError("a sliding window over blocks on the host")
        out, lse = attend_plan(query, store, self._local, call, attend)
        out = out.float()
        layer = next(i for i, each in enumerate(self._stores) if each is store)
        for reads, (keys, values) in zip(self._reads, self._staging.read(layer), strict=True):
            for start, stop, slots in reads:
                key, value = (memory.index_select(1, slots) for memory in (keys, values))
                key, value = store.keys_of(key), store.values_of(value)
                other = attend_tokens(query[start:stop], key, value, call, attend=attend)
                out, lse = merged(out, lse, other, start, stop)
        return out, lse


def blocks_read_on_host(plan: StepPlan, block_size: int) -> list[int]:
    """The blocks on the host that a plan reads, each once."""
    runs = [run for piece in plan.shared for run in piece.runs if _is_on_host(run)]
    blocks = (range(run.slot // block_size, -(-(run.slot + run.tokens) // block_size)) for run in runs)
    return list(dict.fromkeys(block for each in blocks for block in each))


def host_reads(
    plan: StepPlan, blocks: Sequence[int], part_blocks: int, block_size: int, device: torch.device
) -> list[list[HostReads]]:
    """What the plan's queries read of `blocks` on the host, which are staged in this order, by part."""
    reads: list[list[HostReads]] = [[] for _ in range(0, len(blocks), part_blocks)]
    for piece in plan.shared:
        slots = run_slots([run for run in piece.runs if _is_on_host(run)], torch.device("cpu"))
        if not len(slots):
            continue
        for found, (_, inside) in zip(reads, reads_by_part(slots, blocks, part_blocks, block_size), strict=True):
            if len(inside):
                found.append(HostReads(piece.start, piece.stop, inside.to(device)))
    return reads


def _on_device(plan: StepPlan) -> StepPlan:
    """The plan without what lies on the host, in runs that are not too long to be attended to at once."""
    most = max(MIN_OWN_TOKENS, MAX_PART_TOKENS // plan.num_queries)  # rows of one token are taken together
    own, shared = [], []
    for piece in plan.own:
        (run,) = piece.runs
        surplus = 0 if piece.causal else max(0, run.tokens - most)
        own.append(piece._replace(runs=(Run(run.slot + surplus, run.tokens - surplus),)))
        if surplus:
            shared.append(piece._replace(runs=tuple(_cut(Run(run.slot, surplus)))))
    for piece in plan.shared:
        runs = tuple(cut for run in piece.runs if not _is_on_host(run) for cut in _cut(run))
        if runs:
            shared.append(piece._replace(runs=runs))
    return replace(plan, own=own, shared=shared, prepared={})


def _cut(run: Run) -> Iterator[Run]:
    for at in range(0, run.tokens, MAX_PART_TOKENS):
        yield Run(run.slot + at, min(MAX_PART_TOKENS, run.tokens - at))


def _is_on_host(run: Run) -> bool:
    return run.slot >= HOST_BLOCKS
