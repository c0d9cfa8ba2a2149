"""K and V that look dense and are not: read where they lie by our attention function, gathered for anyone else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from hf_paged.backends import Expansion
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
        read = self.store.read_values if self.is_value else self.store.read_keys
        return read(self.step.dense(self.store.group).of)

    def __repr__(self) -> str:  # the default one would gather
        return f"PagedKV(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_to_dense, (args, kwargs or {}))
        return func(*args, **kwargs)


class ExpandedKV(torch.Tensor):
    """K or V that a layer makes of latents, logically `[batch, heads, tokens, dim]`, in truth the latents.

    Our attention function has queries meet these; any other operation gets K or V, expanded when it asks.

    Attributes:
        latents: as blocks hold them, in the place of K.
        rotated: the same of what all heads share of K, in the place of V.
        expansion: makes K and V of both.
    """

    latents: PagedKV
    rotated: PagedKV
    expansion: Expansion
    is_value: bool
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, latents: PagedKV, rotated: PagedKV, expansion: Expansion, is_value: bool) -> ExpandedKV:
        heads, dim, _ = expansion.key_weights.shape
        dim = expansion.value_weights.shape[1] if is_value else dim + rotated.shape[3]
        shape = latents.shape[0], heads, latents.shape[2], dim
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=latents.dtype, device=latents.device)
        self.__dict__ = {"latents": latents, "rotated": rotated, "expansion": expansion, "is_value": is_value}
        return self

    def to_dense(self) -> torch.Tensor:
        """The tensor that this one stands for."""
        return self.expansion.expand(self.latents.to_dense(), self.rotated.to_dense())[self.is_value]

    def __repr__(self) -> str:  # the default one would gather
        return f"ExpandedKV(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_to_dense, (args, kwargs or {}))
        return func(*args, **kwargs)


class SharedRows(torch.Tensor):
    """K or V `[rows, kv_heads, tokens, dim]` of which several rows are the same, each distinct one stored once.

    Attributes:
        distinct: `[distinct rows, kv_heads, tokens, dim]`.
        owners: which of these each row is.
    """

    distinct: torch.Tensor
    owners: list[int]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, distinct: torch.Tensor, owners: list[int]) -> SharedRows:
        shape = (len(owners), *distinct.shape[1:])
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=distinct.dtype, device=distinct.device)
        self.__dict__ = {"distinct": distinct, "owners": owners}
        return self

    def to_dense(self) -> torch.Tensor:
        """The tensor that this one stands for."""
        if len(self.distinct) == 1:
            return self.distinct.expand(len(self.owners), -1, -1, -1)
        return self.distinct.index_select(0, torch.tensor(self.owners, device=self.distinct.device))

    def __repr__(self) -> str:  # the default one would gather
        return f"SharedRows(shape={tuple(self.shape)}, distinct={len(self.distinct)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_to_dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def _to_dense(value: Any) -> Any:
    return value.to_dense() if isinstance(value, PagedKV | ExpandedKV | SharedRows) else value
