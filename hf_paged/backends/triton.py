"""The `triton` backend: attention, and the writes of new K and V, in kernels on a GPU."""

from __future__ import annotations

import torch

from hf_paged.backends.base import AttentionBackend, AttentionCall
from hf_paged.backends.reference import ReferenceBackend
from hf_paged.backends.work import Asked, slot_numbers, slots_key, work_for
from hf_paged.core.plan import StepPlan
from hf_paged.store import LayerStore
from hf_paged_kernels.attend import attend, takes
from hf_paged_kernels.copy import copy_slots, copy_waves
from hf_paged_kernels.store import store_tokens
from hf_paged_kernels.tuning import tiles_for


class TritonBackend(AttentionBackend):
    """One launch for each shape of tile, and one to merge parts; what the kernels do not take goes to `reference`."""

    name = "triton"
    has_fixed_steps = True

    def __init__(self) -> None:
        self._reference = ReferenceBackend()

    def write(self, store: LayerStore, plan: StepPlan, key: torch.Tensor, value: torch.Tensor) -> None:
        """One launch for the new tokens, and one for the copies where there are any."""
        slots = _slots(plan, key.shape[0] * key.shape[2], key.device)
        store_tokens(key, value, store.keys, store.values, slots, store.records)
        self.copy(store, plan)

    def copy(self, store: LayerStore, plan: StepPlan) -> None:
        for copies in _copies(plan, store.keys.device):
            copy_slots(store.keys, store.values, store.keys, store.values, copies)

    def attend(self, query: torch.Tensor, store: LayerStore, plan: StepPlan, call: AttentionCall) -> torch.Tensor:
        """As the others, but the kernels read and write rows in any order."""
        decode = query.shape[2] == 1
        rows = query.squeeze(2) if decode else query.squeeze(0).transpose(0, 1)
        if not takes(rows, store.keys, store.values, store.records):
            return self._reference.attend(query, store, plan, call)
        return self.attend_flat(rows, store, plan, call).unsqueeze(1 if decode else 0)

    def attend_flat(self, query: torch.Tensor, store: LayerStore, plan: StepPlan, call: AttentionCall) -> torch.Tensor:
        heads, kv_heads = query.shape[1], store.keys.shape[0]
        kv_format = None if store.records is None else store.records.kv_format.name
        tiles = tiles_for(query.dtype, store.key_dim, store.value_dim, heads // kv_heads, kv_format)
        work = work_for(plan, Asked(call.window, heads, kv_heads, tiles), query.device)
        return attend(query, store.keys, store.values, work, call.scale, call.softcap, call.sinks, store.records)


def _slots(plan: StepPlan, num_tokens: int, device: torch.device) -> torch.Tensor:
    """The slot of each new token, -1 where it has none."""
    key = slots_key(device)
    if key not in plan.prepared:
        plan.prepared[key] = torch.frombuffer(slot_numbers(plan, num_tokens), dtype=torch.int32).to(device)
    return plan.prepared[key]


def _copies(plan: StepPlan, device: torch.device) -> list[torch.Tensor]:
    """The plan's copies, by launch."""
    if not plan.copies:
        return []
    key = ("triton copies", device)
    if key not in plan.prepared:
        plan.prepared[key] = copy_waves(plan.copies, device)
    return plan.prepared[key]
