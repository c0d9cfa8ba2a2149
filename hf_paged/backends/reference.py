"""The `reference` backend: gather and mask, for any device, the yardstick of the others."""

from __future__ import annotations

import torch

from hf_paged.backends.base import AttentionBackend, AttentionCall
from hf_paged.core.plan import StepPlan
from hf_paged.store import LayerStore, run_slots
from hf_paged_kernels import paged_attention_reference


class ReferenceBackend(AttentionBackend):
    """Every segment on its own, all in float32."""

    name = "reference"
    takes_latents = True

    def attend_flat(self, query: torch.Tensor, store: LayerStore, plan: StepPlan, call: AttentionCall) -> torch.Tensor:
        key = ("segments", query.device)
        if key not in plan.prepared:
            plan.prepared[key] = [
                (length, run_slots(list(chain.runs(chain.first_token, kv_len)), query.device))
                for chain, _, length, kv_len in plan.segments
            ]
        return paged_attention_reference(
            query,
            store.keys,
            store.values,
            plan.prepared[key],
            call.scale,
            call.softcap,
            call.window,
            call.sinks,
            store.records,
        )
