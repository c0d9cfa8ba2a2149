"""Would the same tokens give the same K and V as before? A digest of what else K and V depend on."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_paged import compat
from hf_paged.hooks import hooked, meddle
from hf_paged.sample import Sample
from hf_paged.weights import Tree, any_unreadable, held_tensors, parts, tensor_states, unreadable

PLAIN_KINDS = (bool, int, float, str, np.generic, type(None))
# Attributes of modules that `forward` does not compute with in evaluation mode, or that are looked at elsewhere.
IGNORED_ATTRIBUTES = {*vars(nn.Module())} | {
    "gradient_checkpointing",
    "in_features",
    "out_features",
    "_is_hf_initialized",
}
AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")
# Fields of a config that say where it came from, and that saving fills in.
ORIGIN_FIELDS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


@dataclass(frozen=True, eq=False)
class Sampling:
    """A comparison with a sample that has begun; `differs()` waits for its end."""

    sample: Sample
    differs: Callable[[], bool]


class ModelIdentity:
    """Tells, once a `generate` call, whether anything has changed that K and V depend on besides the tokens.

    The digest covers an *epoch*, the adapters and the circumstances (autocast, matmul precision, training). The epoch
    is a random token, drawn anew where anything of this is not as it was at the last look, and so never comes back:
    modules and tensors (the objects, their names, classes, `forward`s), versions, memory, shapes and dtypes of
    parameters and buffers, a sample of their content, configs, plain attributes of modules (numbers, strings). Adapters
    switched to and fro change no tensor and come back to their digest.

    Not seen: single elements edited through `.data` or numpy that are not in the sample (one element of every row is);
    attributes of modules and tensors that are not plain values, such as a tensor that is no buffer, a list, or the
    `quant_state` of bitsandbytes; a function that somebody else's `forward` calls. After such a change call
    `model.paged.clear()`. A change that is undone between two looks is none.

    May be asked from several threads. Holds the model weakly, and nothing of it alive.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = weakref.ref(model)
        self._lock = threading.Lock()
        self._structure: tuple[Any, ...] | None = None
        self._tensors: list[weakref.ref[torch.Tensor]] = []
        self._alive: list[Any] = []  # weak references, so that no id of `_structure` can be another object's
        self._died: list[Any] = []
        self._state: tuple[Any, ...] | None = None
        self._terms: tuple[Any, ...] | None = None
        self._digest = b""

    def begin_look(self) -> Sampling | None:
        """Has other threads begin with the sample of weights, which is most of the next `look(begun)`.

        For who knows that nothing will write into the weights until then. `None` before the first look, and where
        tensors of the last one are gone.
        """
        with self._lock:
            tensors = [held() for held in self._tensors]
            if not tensors or self._sample is None or any(tensor is None for tensor in tensors):
                return None
            return Sampling(self._sample, self._sample.begin(tensors))

    def digest(self) -> bytes:
        """32 bytes; equal digests mean equal K and V for equal tokens. Samples the weights."""
        with self._lock:
            return self._digest_of(Tree.of(self._model()))

    def look(self, begun: Sampling | None = None) -> tuple[bytes | None, str | None]:
        """`digest()` and `obstacle()` of one walk; no digest where there is an obstacle."""
        with self._lock:
            tree = Tree.of(self._model())
            obstacle = _obstacle(tree)
            return (self._digest_of(tree, begun), None) if obstacle is None else (None, obstacle)

    def glance(self) -> tuple[bytes | None, str | None]:
        """`look` without the sample: for who reads the weights where they lie, whatever their content.

        An identity that is asked for `look` or `digest` too takes the next of these for a change.
        """
        with self._lock:
            tree = Tree.of(self._model())
            obstacle = _obstacle(tree)
            return (self._digest_of(tree, sampled=False), None) if obstacle is None else (None, obstacle)

    def renew(self) -> None:
        """The next digest is a new one, whether or not anything can be seen to have changed."""
        with self._lock:
            self._new_epoch()
            self._digest = b""

    @property
    def epoch(self) -> bytes:
        """The weights' part of the last digest; one that has changed does not come back."""
        return self._epoch

    def unchanged(self, digest: bytes | None = None) -> bool:
        """Whether nothing that can be seen without sampling has changed since the last `digest()`: 0.5 ms, or 1.3
        right after a forward (Zen 4).

        `digest`: what that call must have returned; where several threads generate, the last one may be another's.
        """
        with self._lock:
            return self._stands(Tree.of(self._model()), digest)

    def holds(self, digest: bytes) -> bool:
        """`unchanged(digest)` and no `obstacle()`, of one walk."""
        with self._lock:
            tree = Tree.of(self._model())
            return self._stands(tree, digest) and _obstacle(tree) is None

    def obstacle(self) -> str | None:
        """Why K and V cannot be told from the weights and the tokens, so that nothing may be reused; or None."""
        return _obstacle(Tree.of(self._model()))

    # -- what is compared ----------------------------------------------------------------------------------------

    def _digest_of(self, tree: Tree, begun: Sampling | None = None, *, sampled: bool = True) -> bytes:
        if self._changed(tree):
            self._remember(tree, sampled)
        elif sampled and self._sample_differs(tree, begun):
            self._new_epoch()  # first, so that the change is not forgotten whatever is thrown in between
            self._sample = Sample(tree.tensors)
        terms = self._current_terms(tree)
        if self._terms is None or self._terms != terms:
            self._terms = copy.deepcopy(terms)
            self._digest = _blake(epoch=self._epoch, terms=repr(self._terms).encode())
        return self._digest

    def _sample_differs(self, tree: Tree, begun: Sampling | None) -> bool:
        if self._sample is None:
            return True
        if begun is None or begun.sample is not self._sample:  # another thread has made one anew
            return self._sample.differs(tree.tensors)
        return begun.differs()

    def _stands(self, tree: Tree, digest: bytes | None) -> bool:
        if digest is not None and digest != self._digest:
            return False
        return not self._changed(tree) and self._terms == self._current_terms(tree)

    def _changed(self, tree: Tree) -> bool:
        """Whether anything is not as at the last `_remember`; the rest only makes sense for the same structure."""
        return self._structure != _structure(tree) or bool(self._died) or self._state != self._current_state(tree)

    def _remember(self, tree: Tree, sampled: bool) -> None:
        self._new_epoch()
        self._structure = None  # until all below is of this tree, whatever is thrown in between
        self._died = died = []
        self._alive = [_weak(each, died.append) for each in _objects(tree)]
        self._adapters = [index for index, module in enumerate(tree.modules) if _is_adapter(module)]
        self._attributes = _plain_attributes(tree, set(self._adapters))
        self._configs = _distinct_configs(tree)
        self._state = copy.deepcopy(self._current_state(tree))
        self._tensors, self._sample = list(map(weakref.ref, tree.tensors)), Sample(tree.tensors) if sampled else None
        self._structure = _structure(tree)

    def _new_epoch(self) -> None:
        self._epoch, self._terms = os.urandom(16), None

    def _current_state(self, tree: Tree) -> tuple[Any, ...]:
        attributes = tree.attributes
        return (
            tensor_states(tree.tensors),
            [attributes[index].get(name) for index, name in self._attributes],
            [vars(attributes[index]["config"]) for index in self._configs],
        )

    def _current_terms(self, tree: Tree) -> tuple[Any, ...]:
        return [_adapter_state(tree.modules[index]) for index in self._adapters], _circumstances(tree.modules[0])


def fingerprint(model: PreTrainedModel) -> str:
    """Hex sha256 of the content of everything `ModelIdentity` watches, the same in another process; reads every byte.

    Covers all adapters that are loaded, active or not, numbers that modules have for attributes, and what
    `describe_config` and `describe_circumstances` say.
    """
    tree = Tree.of(model)
    digest = hashlib.sha256()
    numbers = [
        (index, name, repr(tree.attributes[index][name]))
        for index, name in sorted(_plain_attributes(tree, set()))  # modules may name theirs in the order of a set
        if type(tree.attributes[index][name]) in (int, float) and not name.startswith("_")
    ]
    adapters = [_adapter_state(module) for module in tree.modules if _is_adapter(module)]
    header = [type(model).__name__, describe_config(model), describe_circumstances(model), adapters, numbers]
    _feed(digest, json.dumps(header, sort_keys=True, default=encodable).encode())
    tensors = {
        f"{path}.{name}": tensor
        for path, module in model.named_modules()
        for name, tensor in held_tensors(module, from_disk=True)
    }
    for name, tensor in sorted(tensors.items()):
        for part in parts(tensor):
            if unreadable(part):
                raise ValueError(f"{name} has no content that could be read: device {part.device}, {part.layout}")
            _feed(digest, f"{name} {part.dtype} {tuple(part.shape)}".encode())
            _feed(digest, _content(part))
    return digest.hexdigest()


def describe_circumstances(model: PreTrainedModel) -> dict[str, Any]:
    """What computes differently with the same weights and config."""
    attention = [str(compat.attention_name(each) or "") for each in compat.attention_configs(model)]
    training, autocast, precision = _circumstances(model)
    return {"attention": attention, "training": training, "autocast": autocast, "matmul_precision": precision}


def describe_config(model: PreTrainedModel) -> dict[str, Any]:
    """The config without the fields that say where it came from."""
    return {name: value for name, value in model.config.to_dict().items() if name not in ORIGIN_FIELDS}


def encodable(value: Any) -> Any:
    """`value` in a form that JSON takes and that is the same in every process, whatever its seed of hashes."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def rotary_depends_on_length(model: nn.Module) -> bool:
    """Whether the K of a token depends on how long the sequence, or the longest one beside it, is."""
    return any(
        _rope_depends_on_length(vars(module)["rope_type"]) for module in model.modules() if "rope_type" in vars(module)
    )


def _obstacle(tree: Tree) -> str | None:
    hooks = hooked(tree, meddle)
    if hooks is not None:
        return hooks
    if any(tree.training):
        for module, is_training in zip(tree.modules, tree.training, strict=True):
            if is_training and type(module) is not nn.Identity:
                return f"{type(module).__name__} in training mode; call model.eval()"
    if any(_rope_depends_on_length(each["rope_type"]) for each in tree.attributes if "rope_type" in each):
        return "rotary embedding that depends on the length of the sequence"
    if any_unreadable(tree.tensors):
        return "weights offloaded to disk, or in a layout without strides"
    return None


def _objects(tree: Tree) -> list[Any]:
    """What must be the same objects: modules, tensors, classes, configs, and the functions that are a `forward`."""
    classes = list(map(type, tree.modules))
    forwards = [each.forward for each in dict.fromkeys(classes)]
    own = [each["forward"] for each in tree.attributes if "forward" in each]
    return [*tree.named, *classes, *forwards, *own, *[each["config"] for each in tree.attributes if "config" in each]]


def _structure(tree: Tree) -> tuple[Any, ...]:
    holders = [("forward" in each, "config" in each) for each in tree.attributes]
    return tree.names, holders, list(map(id, _objects(tree)))


def _weak(value: Any, on_death: Any) -> Any:
    try:
        return weakref.ref(value, on_death)
    except TypeError:  # None, and callables made in C
        return value


def _distinct_configs(tree: Tree) -> list[int]:
    """For each config, the index of the first module that holds it."""
    holders: dict[int, int] = {}
    for index, attributes in enumerate(tree.attributes):
        if isinstance(config := attributes.get("config"), PreTrainedConfig):
            holders.setdefault(id(config), index)
    return list(holders.values())


def _plain_attributes(tree: Tree, adapters: set[int]) -> list[tuple[int, str]]:
    """Index of the module and name of each attribute that is a number, a string or None; adapters have a state."""
    return [
        (index, name)
        for index, attributes in enumerate(tree.attributes)
        if index not in adapters
        for name, value in attributes.items()
        if isinstance(value, PLAIN_KINDS) and name not in IGNORED_ATTRIBUTES
    ]


def _is_adapter(module: nn.Module) -> bool:
    """Whether the module is one of PEFT's, by its shape; a transformers model has *methods* of these names."""
    kind = type(module)
    return all(isinstance(getattr(kind, name, None), property) for name in ("active_adapters", "disable_adapters"))


def _adapter_state(layer: Any) -> tuple[Any, ...]:
    """All that is read from PEFT: which adapters are active, disabled, merged, and every setting by adapter."""
    attributes = vars(layer)
    settings = [attributes.get(name) for name in getattr(type(layer), "other_param_names", ())]
    return (
        layer.active_adapters,
        layer.disable_adapters,
        attributes.get("merged_adapters"),
        [
            {adapter: _plain(value) for adapter, value in each.items() if not isinstance(value, nn.Module)}
            for each in settings
            if type(each) is dict
        ],
    )


def _plain(setting: Any) -> Any:
    """A setting of an adapter in a form that can be compared and written: a rank, a scaling in whatever type."""
    if isinstance(setting, (torch.Tensor, np.ndarray, np.generic)):
        return setting.tolist()
    return setting if isinstance(setting, PLAIN_KINDS) else repr(setting)


def _circumstances(model: nn.Module) -> tuple[Any, ...]:
    """What computes differently with the same weights. Numbers of threads and choices of kernels only round."""
    autocast = [
        (kind, str(torch.get_autocast_dtype(kind))) for kind in AUTOCAST_DEVICES if torch.is_autocast_enabled(kind)
    ]
    return model.training, autocast, torch.get_float32_matmul_precision()


def _rope_depends_on_length(rope_type: str | dict[str, str]) -> bool:
    """Whether the frequencies of a token's K depend on how many follow; `rope_type` may be one for each layer type."""
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def _blake(**named: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for name, value in named.items():
        _feed(digest, name.encode())
        _feed(digest, value)
    return digest.digest()


def _feed(digest: Any, value: Any) -> None:
    """Length first, so that no two sequences of parts are the same bytes."""
    digest.update(memoryview(value).nbytes.to_bytes(8, "little"))
    digest.update(value)


def _content(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor, in the order of its elements."""
    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy()
