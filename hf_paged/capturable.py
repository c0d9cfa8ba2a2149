"""Which models and calls can be captured in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_paged import compat
from hf_paged.backends.fixed import UncapturableError
from hf_paged.compat import CACHE_NAME
from hf_paged.forward import TOKEN_TYPES, ModelCall
from hf_paged.weights import PLAIN_TENSORS, Tree

# Tensors that may be other ones in every step; with one column, and a row for each row of the call or for all.
_INPUTS = frozenset(("input_ids", "position_ids", *TOKEN_TYPES))
# What a captured pass is given in its own way.
_REPLACED = frozenset((CACHE_NAME, "attention_mask"))


def model_obstacle(model: PreTrainedModel, device: torch.device) -> str | None:
    """Why nothing of the model is captured, besides what its `ModelIdentity` knows, or `None`.

    A graph repeats what a forward pass does on the device; what it does besides, such as fetching weights, is left out.
    """
    tree = Tree.of(model)
    if model._compiled_call_impl is not None:  # parts of it may be: their kernels are captured like any others
        return f"{type(model).__name__} is compiled"
    if compat.autocast_dtype(device) is not None:
        return "autocast"
    if any(each.device != device for each in tree.tensors):
        return "weights on other devices"
    if not set(map(type, tree.tensors)) <= PLAIN_TENSORS:
        return "weights in a tensor subclass"
    for module, attributes in zip(tree.modules, tree.attributes, strict=True):
        if "forward" in attributes:  # accelerate's hooks, too
            return f"{type(module).__name__} with a forward of its own"
    return None


def inputs_of(request: ModelCall) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a decode step `[..., rows or 1, 1]`, and what must be the same in all replays of one graph.

    Raises `UncapturableError` for a call with something else.
    """
    tensors: dict[str, torch.Tensor] = {}
    constants: dict[str, Any] = {}
    for name, value in request.kwargs.items():
        if name in _REPLACED:
            continue
        if name in _INPUTS and isinstance(value, torch.Tensor):
            if value.dim() < 2 or value.shape[-2] not in (1, request.rows) or value.shape[-1] != 1:
                raise UncapturableError(f"{name} of shape {tuple(value.shape)}")
            tensors[name] = value
        elif value is None or isinstance(value, bool | int | float | str):
            constants[name] = value
        else:
            raise UncapturableError(f"argument {name}")
    for name in ("input_ids", "position_ids"):
        if name not in tensors:
            raise UncapturableError(f"no {name}")
    return tensors, constants
