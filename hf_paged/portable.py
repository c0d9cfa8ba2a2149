"""Caches in files and other processes, where there is no pool: as stock's own, which need no hf_paged to be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from hf_paged import compat
from hf_paged.lazy import SharedRows
from hf_paged.state import state_of

if TYPE_CHECKING:
    from hf_paged.cache import PagedCache


def as_stock(cache: PagedCache, layers: Sequence[Any] | None = None) -> DynamicCache:
    """What `layers` hold (those of `cache` where `None`), dense, in a cache that stock would make for the model.

    K and V of padding are zeros.
    """
    stock = compat.stock_cache(cache.model_config)
    for mine, theirs in zip(cache.layers if layers is None else layers, stock.layers, strict=True):
        if compat.keeps_state(mine):
            vars(theirs).update(state_of(mine))
        if getattr(mine, "keys", None) is not None:
            compat.fill_layer(theirs, dense_copy(mine.keys), dense_copy(mine.values), mine.get_seq_length())
    return stock


def reduced(stock: Cache) -> tuple[Any, ...]:
    """What `__reduce_ex__` of another class returns to be `stock` afterwards."""
    return object.__new__, (type(stock),), vars(stock)


def dense_copy(kv: torch.Tensor) -> torch.Tensor:
    """The tensor alone: a view would take all of the pool's memory along."""
    return (kv.to_dense() if isinstance(kv, SharedRows) else kv).clone(memory_format=torch.contiguous_format)
