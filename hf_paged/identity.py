"""Would the same tokens give the same K and V as before? A digest of what else K and V depend on."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_paged import compat
from hf_paged.core.forks import new_lock
from hf_paged.hooks import hooked, meddle
from hf_paged.remembered import Remembered, is_adapter, plain_attributes
from hf_paged.sample import Sample
from hf_paged.weights import PLAIN_KINDS, Tree, any_unreadable, held_tensors, parts, unreadable

AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")
# Fields of a config that say where it came from, and that saving fills in.
ORIGIN_FIELDS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}

_NOTHING = nullcontext()


@dataclass(frozen=True, eq=False)
class Sampling:
    """A comparison with a sample that has begun; `differs()` waits for its end."""

    sample: Sample
    differs: Callable[[], bool]


class Seen(NamedTuple):
    """What one look has found.

    Attributes:
        model: looked at.
        tensors: parameters and buffers.
        obstacle: to any reuse.
        change: all of it, where it is not what was remembered.
    """

    model: PreTrainedModel
    tensors: list[torch.Tensor]
    obstacle: str | None
    change: Tree | None


class ModelIdentity:
    """Tells, once a `generate` call, whether anything has changed that K and V depend on besides the tokens.

    The digest covers an *epoch*, the adapters and the circumstances (autocast, matmul precision, training). The epoch
    is a random token, drawn anew where anything of this is not as it was at the last look, and so never comes back:
    modules and tensors (the objects, their names, classes, `forward`s), versions, memory, shapes and dtypes of
    parameters and buffers, a sample of their content, configs, plain attributes of modules (numbers, strings). Adapters
    switched to and fro change no tensor and come back to their digest.

    Not seen: single elements edited through `.data` or numpy that are not in the sample (one element of every row is);
    attributes of modules and tensors that are not plain values, such as a tensor that is no buffer, a list, or the
    `quant_state` of bitsandbytes; what a `forward` calls, but for functions under names of its own file
    (`CalledFunctions`). After such a change call `model.paged.clear()`. A change that is undone between two looks is
    none.

    May be asked from several threads. Holds the model weakly, and nothing of it alive.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = weakref.ref(model)
        self._lock = new_lock()
        self._remembered: Remembered | None = None
        self._sample: Sample | None = None
        self._terms: tuple[Any, ...] | None = None
        self._digest = b""

    def begin_look(self) -> Sampling | None:
        """Has other threads begin with the sample of weights, which is most of the next `look(begun)`.

        For who knows that nothing will write into the weights until then. `None` before the first look, and where
        tensors of the last one are gone.
        """
        with self._lock:
            tensors = None if self._remembered is None else self._remembered.tensors()
            if not tensors or self._sample is None:
                return None
            return Sampling(self._sample, self._sample.begin(tensors))

    def digest(self) -> bytes:
        """32 bytes; equal digests mean equal K and V for equal tokens. Samples the weights."""
        with self._lock:
            return self._digest_of(self._see())

    def look(self, begun: Sampling | None = None) -> tuple[bytes | None, str | None]:
        """`digest()` and `obstacle()` of one look; no digest where there is an obstacle."""
        with self._lock:
            seen = self._see()
            return (self._digest_of(seen, begun), None) if seen.obstacle is None else (None, seen.obstacle)

    def glance(self) -> tuple[bytes | None, str | None]:
        """`look` without the sample: for who reads the weights where they lie, whatever their content.

        An identity that is asked for `look` or `digest` too takes the next of these for a change.
        """
        with self._lock:
            seen = self._see()
            return (self._digest_of(seen, sampled=False), None) if seen.obstacle is None else (None, seen.obstacle)

    def passing(self) -> AbstractContextManager[None]:
        """Around a pass of the model: that PEFT puts parameters aside for it, and back, is no change of them.

        Only a sample of these parameters can tell whether other threads write to them meanwhile.
        """
        before = self._remembered
        return _NOTHING if before is not None and not before.is_rewritten else self._settling(before)

    @contextmanager
    def _settling(self, before: Remembered | None) -> Iterator[None]:
        untouched = [] if before is None else before.in_place()
        yield
        with self._lock:
            if self._remembered is before and before is not None:
                before.settle(untouched)
            elif self._remembered is not None:  # the look was in the midst, before the model was called
                self._remembered.settle()

    def renew(self) -> None:
        """The next digest is a new one, whether or not anything can be seen to have changed."""
        with self._lock:
            self._new_epoch()
            self._digest = b""

    @property
    def epoch(self) -> bytes:
        """The weights' part of the last digest; one that has changed does not come back."""
        return self._epoch

    def holds(self, digest: bytes) -> bool:
        """Whether the last digest was this one, and nothing has changed since then that a look in the middle of a call
        can see; no `obstacle()` either.

        The weights are not sampled. Nor need other shapes and dtypes in the same memory be seen, which the next digest
        will see: that leaves 0.6 ms right after a pass of 400 modules and 300 tensors (Zen 4), 0.1 less.
        """
        with self._lock:
            seen = self._see(with_layouts=False)
            stands = seen.change is None and digest == self._digest and self._terms == self._current_terms(seen.model)
            return stands and seen.obstacle is None

    def obstacle(self) -> str | None:
        """Why K and V cannot be told from the weights and the tokens, so that nothing may be reused; or None."""
        return _obstacle(Tree.of(self._model()))

    # -- what is compared ----------------------------------------------------------------------------------------

    def _see(self, with_layouts: bool = True) -> Seen:
        model = self._model()
        remembered = self._remembered
        if remembered is not None and (tensors := remembered.still(model, with_layouts)) is not None:
            return Seen(model, tensors, None, None)
        tree = Tree.of(model)
        obstacle = _obstacle(tree)
        is_known = remembered is not None and remembered.is_of(tree, obstacle)
        return Seen(model, tree.tensors, obstacle, None if is_known else tree)

    def _digest_of(self, seen: Seen, begun: Sampling | None = None, *, sampled: bool = True) -> bytes:
        if seen.change is not None:
            self._remember(seen.change, seen.obstacle, sampled)
        elif sampled and self._sample_differs(seen.tensors, begun):
            self._new_epoch()  # first, so that the change is not forgotten whatever is thrown in between
            self._sample = Sample(seen.tensors)
        terms = self._current_terms(seen.model)
        if self._terms is None or self._terms != terms:
            self._terms = copy.deepcopy(terms)
            self._digest = _blake(epoch=self._epoch, terms=repr(self._terms).encode())
        return self._digest

    def _sample_differs(self, tensors: list[torch.Tensor], begun: Sampling | None) -> bool:
        if self._sample is None:
            return True
        if begun is None or begun.sample is not self._sample:  # another thread has made one anew
            return self._sample.differs(tensors)
        return begun.differs()

    def _remember(self, tree: Tree, obstacle: str | None, sampled: bool) -> None:
        self._new_epoch()
        self._remembered = None  # until all of it is of this tree, whatever is thrown in between
        self._sample = Sample(tree.tensors) if sampled else None
        self._remembered = Remembered(tree, obstacle)

    def _new_epoch(self) -> None:
        self._epoch, self._terms = os.urandom(16), None

    def _current_terms(self, model: PreTrainedModel) -> tuple[Any, ...]:
        return [_adapter_state(each) for each in self._remembered.adapters()], _circumstances(model)


def fingerprint(model: PreTrainedModel) -> str:
    """Hex sha256 of the content of everything `ModelIdentity` watches, the same in another process; reads every byte.

    Covers all adapters that are loaded, active or not, numbers that modules have for attributes, and what
    `describe_config` and `describe_circumstances` say.
    """
    tree = Tree.of(model)
    digest = hashlib.sha256()
    numbers = [
        (index, name, repr(tree.attributes[index][name]))
        for index, name in sorted(plain_attributes(tree, set()))  # modules may name theirs in the order of a set
        if type(tree.attributes[index][name]) in (int, float) and not name.startswith("_")
    ]
    adapters = [_adapter_state(module) for module in tree.modules if is_adapter(module)]
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
