"""Seeing that nothing below a model was put in another's place, without a walk."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedConfig

from hf_paged.weights import PLAIN_KINDS, Tree
from hf_paged_kernels import ModuleEntries


class Standstill:
    """What a walk has found, where it has found no hooks: each name stands for what it stood for, settings are equal.

    The native library compares addresses. They can be trusted because of what matters nothing leaves its address
    unnoticed: names, plain values and settings are held; modules, tensors, configs, classes and functions are not, and
    whoever asks watches for their end. What tensors hold, and where, is not looked at.

    Raises:
        ValueError: if addresses do not tell, or nothing here can read them.
    """

    def __init__(self, tree: Tree):
        if any(tree.hooks) or any(tree.pre_hooks):
            raise ValueError("another hook may come to lie where one was")
        if tree.looked_behind:
            raise ValueError("no name stands for a tensor inside another one")
        values = [value for each in tree.attributes for value in each.values()]
        self._held = [*set().union(*tree.attributes), *filter(None, tree.names)]
        self._held += [value for value in values if isinstance(value, PLAIN_KINDS)]
        self._ropes = [each["rope_type"] for each in tree.attributes if isinstance(each.get("rope_type"), dict)]
        self._configs = list(map(weakref.ref, distinct_configs(tree).values()))
        self._settings = copy.deepcopy(self._current_settings())
        self._classes = list(dict.fromkeys(map(type, tree.modules)))
        self._forwards = self._current_forwards()
        self._entries = ModuleEntries(tree.modules[0], len(tree.modules))

    def holds(self, model: nn.Module) -> bool:
        """Whether all is as it was."""
        return (
            self._entries.same(model)
            and not torch_module._global_forward_hooks
            and not torch_module._global_forward_pre_hooks
            and self._forwards == self._current_forwards()
            and self._settings == self._current_settings()
        )

    def _current_forwards(self) -> list[int]:
        return [id(each.forward) for each in self._classes]

    def _current_settings(self) -> list[dict[str, Any]]:
        return [*(vars(config()) for config in self._configs), *self._ropes]


def distinct_configs(tree: Tree) -> dict[int, PreTrainedConfig]:
    """The configs of all modules, each by the index of the first that holds it."""
    found: dict[int, tuple[int, PreTrainedConfig]] = {}
    for index, attributes in enumerate(tree.attributes):
        if isinstance(config := attributes.get("config"), PreTrainedConfig):
            found.setdefault(id(config), (index, config))
    return dict(found.values())
