"""K and V that look dense and are not: what `update` returns on the fast path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from hf_paged.step import Step
    from hf_paged.store import LayerStore


class PagedKV(torch.Tensor):
    """K or V of one layer, logically `[batch, kv_heads, tokens, dim]`, in truth a step's view of the blocks.

    Our attention function reads the blocks. Any other operation gets the dense tensor, gathered when it asks.
    """

    step: Step
    store: LayerStore
    layer_index: int
    is_value: bool
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, like: torch.Tensor, step: Step, store: LayerStore, layer_index: int, is_value: bool) -> PagedKV:
        batch, heads, _, dim = like.shape
        self = torch.Tensor._make_wrapper_subclass(
            cls, (batch, heads, step.dense_len, dim), dtype=like.dtype, device=like.device
        )
        self.__dict__ = {"step": step, "store": store, "layer_index": layer_index, "is_value": is_value}
        return self

    def to_dense(self) -> torch.Tensor:
        """The tensor that this one stands for."""
        return self.step.dense(self.store.group).of(self.store.values if self.is_value else self.store.keys)

    def __repr__(self) -> str:  # the default one would gather
        return f"PagedKV(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_to_dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def _to_dense(value: Any) -> Any:
    return value.to_dense() if isinstance(value, PagedKV) else value
