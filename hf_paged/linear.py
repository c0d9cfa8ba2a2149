"""What linear layers of a patched model do instead of calling torch, where that is faster (`matmul.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_paged import matmul
from hf_paged.matmul import Product, is_plain
from hf_paged.watched import is_unwatched

_ABSENT = object()


class _TakenLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if matmul.may_choose():
            multiply = way_to_take(input, self._parameters, 1)
            if multiply is not None:
                return multiply(input, self._parameters["weight"], self._parameters["bias"])
        return nn.Linear.forward(self, input)  # by name: accelerate calls this method of layers that were given back

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and files have the original class, and need no hf_paged."""
        if type(self) is not _TakenLinear:
            return super().__reduce_ex__(protocol)
        return nn.Linear, (1, 1, False, "meta"), self.__getstate__()  # which draws no numbers


class _TakenConv1D(Conv1D):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`; weights are `[in_features, out_features]`."""
        if matmul.may_choose():
            multiply = way_to_take(x, self._parameters, 0)
            if multiply is not None:
                return multiply(x, self._parameters["weight"].T, self._parameters["bias"])
        return Conv1D.forward(self, x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As above."""
        if type(self) is not _TakenConv1D:
            return super().__reduce_ex__(protocol)
        return object.__new__, (Conv1D,), self.__getstate__()


# The classes that layers of a patched model have; outside of `multiplied_faster` they do what the originals do.
TAKEN = {nn.Linear: _TakenLinear, Conv1D: _TakenConv1D}


def way_to_take(input: torch.Tensor, parameters: Mapping[str, Any], axis: int) -> Product | None:
    """Who multiplies faster than torch, where nobody sees that it is asked; else `None`.

    `axis`: of a layer's weights, that of features in. Asked of each layer in each step; it takes 2 us, more where
    caches are cold.
    """
    weight, bias = parameters.get("weight"), parameters.get("bias", _ABSENT)
    fits = (
        is_plain(weight)
        and weight.dim() == 2
        and (
            bias is None or (is_plain(bias) and bias.dtype is weight.dtype and bias.shape == (weight.shape[1 - axis],))
        )
        and type(input) is torch.Tensor
        and input.dtype is weight.dtype
        and input.is_cpu
        and input.layout is torch.strided
        and not input.is_neg()
        and input.dim()
    )
    if not fits or input.shape[-1] != (features := weight.shape[axis]) or not is_unwatched():
        return None
    return matmul.fastest(input.numel() // features, weight, is_transposed=axis == 0)


def ways(layer: nn.Module) -> list[str]:
    """Who may multiply faster by a layer's weights, as they are now."""
    weight = layer._parameters.get("weight")
    return matmul.ways(weight, isinstance(layer, Conv1D)) if is_plain(weight) and weight.dim() == 2 else []
