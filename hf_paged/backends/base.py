"""What an attention backend is given and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from hf_paged.core.plan import StepPlan
from hf_paged.store import LayerStore

if TYPE_CHECKING:
    from hf_paged.backends.prepared import PreparedDecode
    from hf_paged.step import Step


class AttentionCall(NamedTuple):
    """The arguments of one attention call that change its result.

    Attributes:
        scale: factor on the scores.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        window: a query sees itself and the `window - 1` tokens before it.
        sinks: `[heads]` logits that take part in the softmax and carry no value.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: torch.Tensor | None = None


class AttentionBackend(ABC):
    """Writes the KV of a plan and reads that of its queries.

    Holds no state: what it derives from a plan lives in `plan.prepared`.
    """

    name: str
    # Whether decode rows that lie in one span go to `attend_rows` as tensors instead.
    reads_rows: bool = False
    # Whether its steps may be those of a `LatentBackend`.
    takes_latents: bool = False
    # Whether it is one, or a step of one: layers that keep latents go to its `attend_expanded`.
    reads_latents: bool = False
    # Whether decode steps read all their numbers from `plan.prepared`: `FixedStep` fills it for captured passes.
    has_fixed_steps: bool = False
    # Why a step does not although others of the backend do, where that may come as a surprise.
    obstacle_to_graphs: str | None = None

    def describe(self) -> str:
        """What runs, for people."""
        return self.name

    def attend(self, query: torch.Tensor, store: LayerStore, plan: StepPlan, call: AttentionCall) -> torch.Tensor:
        """Attention of `query [batch, heads, tokens, dim]`, one row of packed tokens or one token a row.

        Returns `[batch, tokens, heads, value_dim]`, contiguous.
        """
        decode = query.shape[2] == 1
        flat = query.squeeze(2) if decode else query.squeeze(0).transpose(0, 1)
        if plan.order is not None:
            flat = flat.index_select(0, _order(plan, query.device)[0])
        out = self.attend_flat(flat, store, plan, call)
        if plan.order is not None:
            out = out.index_select(0, _order(plan, query.device)[1])
        return out.unsqueeze(1 if decode else 0)

    def attend_dense(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
    ) -> torch.Tensor | None:
        """Attention of `query [batch, heads, tokens, dim]` to dense K and V `[batch, kv_heads, tokens, dim]`.

        `causal`: query `i` sees tokens up to `i`. Returns `[batch, tokens, heads, value_dim]`, contiguous, or `None`
        where torch's own is not slower.
        """
        return None

    def prepare(self, stores: Sequence[LayerStore | None], step: Step) -> PreparedDecode | None:
        """The layers of a decode step in which nothing but attention is asked for, where that saves time."""
        return None

    def write(self, store: LayerStore, plan: StepPlan, key: torch.Tensor, value: torch.Tensor) -> None:
        """New K and V `[batch, kv_heads, tokens, dim]` into their slots, and the plan's copies."""
        store.write(plan, key, value)

    def copy(self, store: LayerStore, plan: StepPlan) -> None:
        """The plan's copies alone."""
        store.copy(plan)

    @abstractmethod
    def attend_flat(self, query: torch.Tensor, store: LayerStore, plan: StepPlan, call: AttentionCall) -> torch.Tensor:
        """`query [queries, heads, dim]`, numbered as in the plan, to `[queries, heads, value_dim]`, contiguous."""


def _order(plan: StepPlan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of the queries, and the queries of the rows."""
    key = ("order", device)
    if key not in plan.prepared:
        rows = torch.tensor(plan.order, device=device)
        plan.prepared[key] = (rows, torch.argsort(rows))
    return plan.prepared[key]
