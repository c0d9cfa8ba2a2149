"""What modules keep from pass to pass beside their weights: where they do, no pass is run again to try something."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_paged import compat
from hf_paged.weights import PLAIN_KINDS, PLAIN_TENSORS, unreadable

# Why nothing is tried, as it is counted.
OWN_STATE = "modules that keep a state of their own"


class OwnState:
    """The plain attributes, tensors and buffers of a model's modules, as they are when this is made."""

    def __init__(self, model: nn.Module):
        self._model, self._before = model, _attributes(model)

    def is_changed(self) -> bool:
        """Whether anything is another object now, or was written to; what lists and `.data` hold is not seen."""
        before, after = self._before, _attributes(self._model)
        return before.keys() != after.keys() or not all(_same(each, after[name]) for name, each in before.items())


def _attributes(model: nn.Module) -> dict[tuple[int, str], tuple[Any, Any]]:
    """What modules hold, by number of the module and name: values, and their types or what changes with a write."""
    return {
        (index, name): (value, _version(value) if isinstance(value, torch.Tensor) else type(value))
        for index, module in enumerate(model.modules())
        for name, value in (*vars(module).items(), *module._buffers.items())
        if isinstance(value, (torch.Tensor, *PLAIN_KINDS)) and name not in compat.NOTED_ONCE
    }


def _same(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    (value, version), (now, version_now) = one, other
    return version == version_now and (value is now or (not isinstance(value, torch.Tensor) and value == now))


def _version(tensor: torch.Tensor) -> Any:
    """Of tensors that were made in inference mode, where writes are not counted: what they hold."""
    if not tensor.is_inference():
        return tensor._version
    if type(tensor) not in PLAIN_TENSORS or unreadable(tensor):
        return None
    return tensor.detach().resolve_conj().resolve_neg().cpu().flatten().view(torch.uint8).numpy().tobytes()
