"""The `cpu` backend: the native kernel, or torch's own flash attention.

Where the native kernel is not there, or not known to be faster, torch's attention reads zero-copy views of adjacent
blocks: `schedule` says which, `parts` puts them together, `hf_paged_kernels.partial` does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hf_paged import torch_compat
from hf_paged.backends.base import AttentionBackend, AttentionCall
from hf_paged.backends.native import attend_dense, kernel_of, kernel_of_store, multiplies, parts_for
from hf_paged.backends.parts import attend_plan, with_sinks
from hf_paged.backends.prepared import PreparedDecode
from hf_paged.core.plan import StepPlan
from hf_paged.store import LayerStore
from hf_paged_kernels import attend_all, attend_partial, native_kernels

if TYPE_CHECKING:
    from hf_paged.step import Step


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
    takes_latents = True
    reads_rows = True

    def describe(self) -> str:
        """The name, which native kernel runs or why none does, and why it is not asked for all that it might be."""
        return f"{self.name} ({'; '.join(filter(None, (native_kernels().reason, torch_compat.OBSTACLE)))})"

    def prepare(self, stores: Sequence[LayerStore | None], step: Step) -> PreparedDecode | None:
        """The layers of a decode step, where the native kernel runs."""
        return PreparedDecode(stores, step) if native_kernels().kernels else None

    def attend_dense(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
    ) -> torch.Tensor | None:
        return attend_dense(query, key, value, scale, causal)

    def attend_flat(self, query: torch.Tensor, store: LayerStore, plan: StepPlan, call: AttentionCall) -> torch.Tensor:
        kernel = kernel_of_store(store)
        group = query.shape[1] // store.keys.shape[0]
        parts = None if kernel is None else parts_for(plan, call.window, group, multiplies(store, call))
        if parts is not None:
            return kernel.attend(
                query, store.keys, store.values, parts, call.scale, call.softcap, call.sinks, store.records
            )
        out, lse = attend_plan(query, store, plan, call)
        return with_sinks(out, lse, call).to(query.dtype).contiguous()
