"""A model as it was found, and whether it is still so, as far as can be told without reading weights."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from hf_paged.called import CalledFunctions
from hf_paged.standstill import Standstill, distinct_configs
from hf_paged.weights import PLAIN_KINDS, Tree, tensor_layouts, tensor_places

# Attributes of modules that `forward` does not compute with in evaluation mode, or that are looked at elsewhere.
IGNORED_ATTRIBUTES = {*vars(nn.Module())} | {
    "gradient_checkpointing",
    "in_features",
    "out_features",
    "_is_hf_initialized",
}
# How often in a row something of no importance may be found elsewhere; from then on the model is walked at every look.
_MAX_RESTLESS = 3


class Remembered:
    """What a walk has found. Holds none of the model's modules and tensors."""

    def __init__(self, tree: Tree, obstacle: str | None):
        self._died: list[Any] = []
        # weak references, so that no id of `_structure` can be another object's
        self._alive = [_weak(each, self._died.append) for each in _objects(tree)]
        adapters = [index for index, module in enumerate(tree.modules) if is_adapter(module)]
        self._adapters = [weakref.ref(tree.modules[index]) for index in adapters]
        self._attributes = plain_attributes(tree, set(adapters))
        self._tensors = list(map(weakref.ref, tree.tensors))
        self._places, self._layouts = tensor_places(tree.tensors), tensor_layouts(tree.tensors)
        self._values = copy.deepcopy(self._current_values(tree))
        self._structure = _structure(tree)
        self._called = CalledFunctions(dict.fromkeys(map(type, tree.modules)))
        rewritten = set(map(id, rewritten_tensors(self.adapters())))
        self._rewritten = [index for index, tensor in enumerate(tree.tensors) if id(tensor) in rewritten]
        self._restless = 0
        self._standstill = _standstill(tree, obstacle)

    def adapters(self) -> list[nn.Module | None]:
        """PEFT's modules; `None` for one that is gone."""
        return [each() for each in self._adapters]

    def tensors(self) -> list[torch.Tensor] | None:
        """Those of the walk; `None` where anything of the model is gone."""
        tensors = [each() for each in self._tensors]
        return None if self._died else tensors

    @property
    def is_rewritten(self) -> bool:
        """Whether a pass writes to tensors without changing them."""
        return bool(self._rewritten)

    def in_place(self) -> list[int]:
        """Which of these are as they were found, by number."""
        return [index for index in self._rewritten if self._version(index) == self._places[0][index]]

    def settle(self, indices: list[int] | None = None) -> None:
        """What has happened since to these tensors, or to all such, was not a change."""
        for index in self._rewritten if indices is None else indices:
            self._places[0][index] = self._version(index)

    def _version(self, index: int) -> int | None:
        tensor = self._tensors[index]()
        return None if tensor is None else tensor._version

    def still(self, model: nn.Module, with_layouts: bool) -> list[torch.Tensor] | None:
        """The tensors, where all is as it was and there is no obstacle, seen without a walk.

        `None` says nothing: only a walk can tell. Without layouts, other shapes in the same memory go unseen.
        """
        if self._standstill is None or not self._standstill.holds(model) or not self._called.same():
            return None
        self._restless = 0
        tensors = self.tensors()
        if tensors is None or tensor_places(tensors) != self._places:
            return None
        return tensors if not with_layouts or tensor_layouts(tensors) == self._layouts else None

    def is_of(self, tree: Tree, obstacle: str | None) -> bool:
        """Whether another walk has found the same; `obstacle` is what it has met. For who has asked `still`."""
        is_same = (
            self._structure == _structure(tree)
            and not self._died
            and self._called.same()
            and self._places == tensor_places(tree.tensors)
            and self._layouts == tensor_layouts(tree.tensors)
            and self._values == self._current_values(tree)
        )
        if is_same and obstacle is None and self._restless < _MAX_RESTLESS:
            self._restless += 1
            self._standstill = _standstill(tree, None)
        return is_same

    def _current_values(self, tree: Tree) -> tuple[Any, ...]:
        attributes = tree.attributes
        return (
            [attributes[index].get(name) for index, name in self._attributes],
            [vars(each) for each in distinct_configs(tree).values()],
        )


def _standstill(tree: Tree, obstacle: str | None) -> Standstill | None:
    try:
        return None if obstacle else Standstill(tree)
    except ValueError:
        return None


def plain_attributes(tree: Tree, adapters: set[int]) -> list[tuple[int, str]]:
    """Index of the module and name of each attribute that is a number, a string or None; adapters have a state."""
    return [
        (index, name)
        for index, attributes in enumerate(tree.attributes)
        if index not in adapters
        for name, value in attributes.items()
        if isinstance(value, PLAIN_KINDS) and name not in IGNORED_ATTRIBUTES
    ]


def is_adapter(module: nn.Module) -> bool:
    """Whether the module is one of PEFT's, by its shape; a transformers model has *methods* of these names."""
    kind = type(module)
    return all(isinstance(getattr(kind, name, None), property) for name in ("active_adapters", "disable_adapters"))


def rewritten_tensors(adapters: Iterable[nn.Module]) -> Iterator[torch.Tensor]:
    """Parameters that PEFT's adapters for parameters put aside and back in every pass, which counts as writing."""
    for module in adapters:
        if isinstance(name := vars(module).get("parameter_name"), str) and hasattr(module, "get_param"):
            tensor = getattr(module.get_base_layer(), name, None)
            if isinstance(tensor, torch.Tensor) and not tensor.is_inference():
                yield tensor


def _objects(tree: Tree) -> list[Any]:
    """What must be the same objects: modules, tensors, classes, configs, and the functions that are a `forward`."""
    classes = list(map(type, tree.modules))
    forwards = [each.forward for each in dict.fromkeys(classes)]
    own = [each["forward"] for each in tree.attributes if "forward" in each]
    return [*tree.named, *classes, *forwards, *own, *[each["config"] for each in tree.attributes if "config" in each]]


def _structure(tree: Tree) -> tuple[Any, ...]:
    holders = [("forward" in each, "config" in each) for each in tree.attributes]
    return tree.names, holders, list(map(id, _objects(tree)))


def _weak(value: Any, on_death: Callable[[Any], None]) -> Any:
    try:
        return weakref.ref(value, on_death)
    except TypeError:  # None, and callables made in C
        return value
