"""The modules and tensors of a model as they are now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PLAIN_TENSORS = {torch.Tensor, nn.Parameter}


@dataclass
class Tree:
    """Everything below a model, in the order of a walk. Made anew at each look, so that it keeps nothing alive.

    Attributes:
        modules: each under every name it has, the model first.
        attributes: the `__dict__` of each module.
        tensors: parameters and buffers; those behind accelerate's placeholders and inside tensor subclasses.
        names: of submodules, parameters and buffers, each group followed by the index of the module whose they are.
        named: what `names` stand for, which may be `None`: submodules, then tensors.
    """

    modules: list[nn.Module]
    attributes: list[dict[str, Any]]
    tensors: list[torch.Tensor]
    names: list[str | int]
    named: list[nn.Module | torch.Tensor | None]

    @classmethod
    def of(cls, model: nn.Module) -> Tree:
        """Walks the model: 0.1 ms for 400 modules and 300 tensors."""
        modules, attributes, names, children, held = [model], [], [], [], []
        for index, module in enumerate(modules):  # which grows meanwhile
            own = module.__dict__
            attributes.append(own)
            if submodules := own["_modules"]:
                names += submodules
                names.append(index)
                children += submodules.values()
                modules += [child for child in submodules.values() if child is not None]
            for tensors in (own["_parameters"], own["_buffers"]):
                if tensors:
                    names += tensors
                    names.append(index)
                    held += tensors.values()
        tensors = [tensor for tensor in held if tensor is not None]
        if not set(map(type, tensors)) <= PLAIN_TENSORS or any(tensor.is_meta for tensor in tensors):
            held = tensors = [part for each in modules for _, tensor in held_tensors(each) for part in parts(tensor)]
        return cls(modules, attributes, tensors, names, children + held)

    def kinds(self) -> list[Any]:
        """What computes: the class of each module, and the code of each `forward` that was put in its place."""
        own = [each["forward"] for each in self.attributes if "forward" in each]
        return [*map(type, self.modules), *(getattr(each, "__code__", type(each)) for each in own)]


def held_tensors(module: nn.Module, from_disk: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """The module's own parameters and buffers; what accelerate has offloaded from memory, or from disk too if asked."""
    for held in (module._parameters, module._buffers):
        for name, tensor in held.items():
            if tensor is not None:
                yield name, _offloaded(module, name, tensor, from_disk) if tensor.is_meta else tensor


def parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with memory that a tensor subclass (torchao's, DTensor) is made of; the tensor itself elsewhere."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        inside = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        for each in inside:
            if isinstance(each, torch.Tensor):  # a DTensor names its device mesh, too
                yield from parts(each)
    else:
        yield tensor


def _offloaded(module: nn.Module, name: str, placeholder: torch.Tensor, from_disk: bool) -> torch.Tensor:
    """The weight behind accelerate's placeholder, or the placeholder, a new one after each forward, where on disk."""
    hook = getattr(module, "_hf_hook", None)
    for weights in (getattr(each, "weights_map", None) for each in getattr(hook, "hooks", [hook])):
        if weights is not None and from_disk:
            return weights[name]
        # a dict, behind a view of the keys with one prefix, behind a loader that prefers memory to disk
        key, weights = getattr(weights, "prefix", "") + name, getattr(weights, "dataset", weights)
        weights = getattr(weights, "state_dict", weights)
        if isinstance(weights, dict) and isinstance(weights.get(key), torch.Tensor):
            return weights[key]
    return placeholder


def unreadable(tensor: torch.Tensor) -> bool:
    """Whether there is no memory to sample: on disk, or not laid out by strides."""
    return tensor.is_meta or tensor.layout is not torch.strided


def tensor_states(tensors: list[torch.Tensor]) -> tuple[Any, ...]:
    """What changes with ops in place, a new `.data` or dtype; not with `requires_grad`."""
    try:
        versions = [tensor._version for tensor in tensors]
    except RuntimeError:  # those made in inference mode have none
        versions = [None if tensor.is_inference() else tensor._version for tensor in tensors]
    places, strides = [tensor.data_ptr() for tensor in tensors], [tensor.stride() for tensor in tensors]
    return versions, places, strides, [tensor.shape for tensor in tensors], [tensor.dtype for tensor in tensors]
