"""Attention over latents: K and V of all heads are two products of one short vector a token, which is what blocks hold.

That is multi-head latent attention (MLA, DeepSeek-V2, https://arxiv.org/abs/2405.04434). A token keeps a latent and a
rotated part of K that all heads share; in the store the former is K and the latter V, of one head:

    K of a head = [key weights of the head @ latent, rotated part]        V of a head = value weights @ latent

transformers computes both for all tokens in every step. The products can go to the other side instead: a query meets
latents after it was multiplied by the key weights, and what comes out is multiplied by the value weights. Then all
heads read the same latents, as many heads as one KV head has. For many queries at a time, as prompts have, latents are
cheaper to expand once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from hf_paged.backends.base import AttentionBackend, AttentionCall
from hf_paged.backends.gathered import Gathered
from hf_paged.backends.parts import Result, attend_plan, with_sinks
from hf_paged.core.plan import StepPlan
from hf_paged.store import LayerStore
from hf_paged_kernels import attend_latents

Pair = tuple[torch.Tensor, torch.Tensor]

# Numbers of K and V that are made of latents at a time.
MAX_EXPANDED = 2**28


class Expansion(NamedTuple):
    """How a layer makes K and V of latents.

    Attributes:
        key_weights: `[heads, dim, latent_dim]`, of the part of K that is not rotated.
        value_weights: `[heads, value_dim, latent_dim]`.
        expand: latents `[batch, 1, tokens, latent_dim]` and rotated parts `[batch, 1, tokens, rotated_dim]` to K and V
            `[batch, heads, tokens, dim]`, as the model itself does it.
    """

    key_weights: torch.Tensor
    value_weights: torch.Tensor
    expand: Callable[[torch.Tensor, torch.Tensor], Pair]

    def absorbed(self, query: torch.Tensor) -> torch.Tensor:
        """`query [queries, heads, dim + rotated_dim]` as it meets latents, `[queries, heads, latent_dim + ...]`."""
        dim = self.key_weights.shape[1]
        of_latents = torch.bmm(_wide(query[..., :dim]).transpose(0, 1), _wide(self.key_weights)).transpose(0, 1)
        return torch.cat((of_latents.to(query.dtype), query[..., dim:]), dim=-1)

    def values_of(self, latents: torch.Tensor) -> torch.Tensor:
        """Sums of latents `[queries, heads, latent_dim]` as sums of V, `[queries, heads, value_dim]`."""
        weights = _wide(self.value_weights)
        return torch.bmm(latents.to(weights.dtype).transpose(0, 1), weights.transpose(1, 2)).transpose(0, 1)

    def reads_of(self, plan: StepPlan) -> Gathered | None:
        """The latents that a plan reads, where it is cheaper to expand them than to have queries meet them."""
        heads, dim, latent_dim = self.key_weights.shape
        both = dim + self.value_weights.shape[1]
        # A query that meets a latent takes so many products more; a latent that is expanded, so many for each head.
        more, once = 2 * latent_dim - both, latent_dim * both
        if plan.num_queries * more <= once:
            return None
        found = Gathered.of(plan)
        fits = found.tokens * heads * both <= MAX_EXPANDED
        return found if fits and found.pairs * more > found.tokens * once else None


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least.

    For few rows torch multiplies batches of matrices in lower precision by plain loops or after packing the weights: of
    16 heads and 512 x 128 numbers a row takes 0.6 (bfloat16) to 0.9 ms (float16), 0.1 to 0.2 so (2 cores of Zen 4).
    """
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


class LatentBackend(AttentionBackend):
    """A step of another backend in a model some of whose layers keep latents."""

    reads_latents = True

    def __init__(self, inner: AttentionBackend):
        self.name = inner.name
        self._inner = inner

    def write(self, store: LayerStore, plan: StepPlan, key: torch.Tensor, value: torch.Tensor) -> None:
        self._inner.write(store, plan, key, value)

    def copy(self, store: LayerStore, plan: StepPlan) -> None:
        self._inner.copy(store, plan)

    def attend(self, query: torch.Tensor, store: LayerStore, plan: StepPlan, call: AttentionCall) -> torch.Tensor:
        return self._inner.attend(query, store, plan, call)

    def attend_flat(self, query: torch.Tensor, store: LayerStore, plan: StepPlan, call: AttentionCall) -> torch.Tensor:
        return self._inner.attend_flat(query, store, plan, call)

    def attend_expanded(
        self, query: torch.Tensor, store: LayerStore, plan: StepPlan, call: AttentionCall, expansion: Expansion
    ) -> torch.Tensor:
        """As `attend`, over K and V that `expansion` makes of what the store holds."""
        return LatentAttention(attend_plan, expansion, self._inner).attend(query, store, plan, call)


class LatentAttention(AttentionBackend):
    """Attention in one layer that keeps latents.

    Args:
        attend_parts: has queries meet the latents that a plan reads, as `parts.attend_plan`.
        expansion: expands them.
        dense: attends to K and V where these are expanded; `None`: they are not.
    """

    name = "latents"

    def __init__(
        self, attend_parts: Callable[..., Result], expansion: Expansion, dense: AttentionBackend | None = None
    ):
        self._attend_parts, self._expansion, self._dense = attend_parts, expansion, dense

    def attend_flat(self, query: torch.Tensor, store: LayerStore, plan: StepPlan, call: AttentionCall) -> torch.Tensor:
        expansion = self._expansion
        gathered = None if self._dense is None else expansion.reads_of(plan)
        if gathered is not None:
            return self._dense.attend_flat(query, _Expanded(store, gathered, expansion), gathered.plan, call)
        out, lse = self._attend_parts(expansion.absorbed(query), store, plan, call, attend_latents)
        out = expansion.values_of(out)
        return with_sinks(out, lse, call).to(query.dtype).contiguous()


class _Expanded:
    """K and V of all heads, made of the latents that a plan reads: what a `LayerStore` is to attention."""

    def __init__(self, store: LayerStore, gathered: Gathered, expansion: Expansion):
        latents, rotated = store.read(gathered.view)
        keys, values = expansion.expand(latents.unsqueeze(0), rotated.unsqueeze(0))
        self.keys, self.values = (each.squeeze(0).contiguous() for each in (keys, values))
        self.key_dim, self.value_dim = keys.shape[-1], values.shape[-1]
        self.dtype, self.value_dtype = keys.dtype, values.dtype
        self.records = None

    def read(self, view: Callable[[torch.Tensor], torch.Tensor]) -> Pair:
        """What `view` takes of K and of V."""
        return view(self.keys), view(self.values)
