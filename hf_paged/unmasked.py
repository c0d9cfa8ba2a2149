"""Attention to dense K and V without a mask: of prompts in stock's shapes, and of encoders of images.

transformers has torch's `scaled_dot_product_attention` do it. A backend may be faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from hf_paged import compat, torch_compat
from hf_paged.backends import backend_for, backend_obstacle
from hf_paged.watched import is_unwatched

if TYPE_CHECKING:
    from hf_paged.runtime import PagedRuntime


def attend_unmasked(
    function: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runtime: PagedRuntime | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """What `function` would return, where nobody looks on; `None` where it is to be asked.

    Args:
        query: `[batch, heads, tokens, dim]`.
        key, value: `[batch, kv_heads, kv_tokens, dim]`.

    Returns:
        `[batch, tokens, heads, value_dim]`, contiguous.
    """
    if query.shape[-2] == 1 or runtime is None or dropout or _is_asked_more(kwargs):  # decode steps have one
        return None
    if function is not compat.SDPA_ATTENTION or not is_unwatched() or not torch_compat.calls_own_attention():
        return None
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    if not _fit(query, key, value, getattr(module, "num_key_value_groups", 1)):
        return None
    if causal and query.shape[2] != key.shape[2]:  # torch aligns these otherwise than one would think
        return None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    name = runtime.config.attention_backend
    if backend_obstacle(name, query.device) is not None:  # a part of the model that is elsewhere
        return None
    return backend_for(name, query.device).attend_dense(query, key, value, scale, causal)


def _is_asked_more(kwargs: dict[str, Any]) -> bool:
    return any(kwargs.get(name) is not None and kwargs[name] is not False for name in compat.BEYOND_SDPA)


def _fit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: int) -> bool:
    """Whether nothing is broadcast, missing or wrong."""
    if not query.dim() == key.dim() == value.dim() == 4 or key.shape[:3] != value.shape[:3] or not key.shape[2]:
        return False
    rows, kv_heads, _, dim = key.shape
    return (rows, kv_heads * group, dim) == (query.shape[0], query.shape[1], query.shape[3])
