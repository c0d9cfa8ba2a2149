"""The modules and tensors of a model as they are now, and a sample of what the tensors hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# How many elements of a tensor are read at least, or all; of one without rows (vectors, the packed columns of
# bitsandbytes); and how far apart at most. These and not the bookkeeping are what a look at a model costs: 5 ns a read.
MIN_SAMPLES, MIN_VECTOR_SAMPLES, MAX_STEP = 256, 65536, 2048
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


def held_tensors(module: nn.Module, from_disk: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """The module's own parameters and buffers; what accelerate has offloaded from memory, or from disk too if asked."""
    for held in (module._parameters, module._buffers):
        for name, tensor in held.items():
            if tensor is not None:
                yield name, _offloaded(module, name, tensor, from_disk) if tensor.is_meta else tensor


def parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with memory that a tensor subclass (torchao's, DTensor) is made of; the tensor itself elsewhere."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts(getattr(tensor, name))
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


class Sample:
    """The bytes of at least one element of every row (last dim) of each tensor, in a column that varies with the row.

    One strided view a tensor and one `cat` for all of one dtype and device. The 240,000 reads of SmolLM2-135M take
    1.3 ms on one CPU core, 2.7 ms where a forward has just emptied its caches. `_foreach_copy_` into buffers is as
    fast, indices take half as long again, views made once save 0.2 ms but keep replaced weights alive: here no tensor
    of the model is held.
    """

    def __init__(self, tensors: list[torch.Tensor]):
        groups: dict[tuple[torch.device, torch.dtype], dict[int, int]] = {}
        for index, tensor in enumerate(tensors):
            if tensor.numel() and not unreadable(tensor):
                # the first of several that are one, such as tied embeddings
                groups.setdefault((tensor.device, tensor.dtype), {}).setdefault(id(tensor), index)
        with torch.inference_mode():
            self._groups = [_Group(list(indices.values()), tensors) for indices in groups.values()]
        self.differs(tensors)

    def differs(self, tensors: list[torch.Tensor]) -> bool:
        """Read again, from tensors of the same states; whether any byte is another than at the last reading."""
        with torch.inference_mode(), torch._C.DisableTorchFunctionSubclass():
            return sum([group.differs(tensors) for group in self._groups]) > 0  # all are read, whichever differs


class _Group:
    """The tensors of one device and dtype."""

    def __init__(self, indices: list[int], tensors: list[torch.Tensor]):
        self._reads = [(index, *_places(tensors[index])) for index in indices]
        first = tensors[indices[0]]
        # a multiple of 8 elements, to be compared as int64: twice as fast as in their own type, and exact with NaN
        self._padding = torch.zeros(-sum(read[1] for read in self._reads) % 8, dtype=first.dtype, device=first.device)
        self._last: torch.Tensor | None = None

    def differs(self, tensors: list[torch.Tensor]) -> bool:
        views = [
            tensors[index].as_strided((count,), (step,)) if places is None else tensors[index][places]
            for index, count, step, places in self._reads
        ]
        now, before = torch.cat([*views, self._padding]).view(torch.int64), self._last
        self._last = now
        return before is None or not torch.equal(now, before)


def _places(tensor: torch.Tensor) -> tuple[int, int, tuple[torch.Tensor, ...] | None]:
    """How many elements to read, every how many, and at which indices where the tensor is not contiguous."""
    columns, size = tensor.shape[-1] if tensor.dim() else 1, tensor.numel()
    if columns in (1, size):
        step = min(size // MIN_VECTOR_SAMPLES, MAX_STEP)
    else:
        step = min(columns - 1, size // MIN_SAMPLES, MAX_STEP)
    while step > 1 and math.gcd(step, columns) > 1:  # else the same columns come back
        step -= 1
    step = max(step, 1)
    count = -(-size // step)
    if tensor.is_contiguous():
        return count, step, None
    return count, step, torch.unravel_index(torch.arange(0, size, step, device=tensor.device), tensor.shape)
