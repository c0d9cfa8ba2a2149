"""Which layers of a patched model compute in other ways than their own: they have other classes until it is not.

By their names, and outside of a patched model's passes, these classes are the originals.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from hf_paged import experts, latent, linear, matmul, torch_compat
from hf_paged.copied import STANDS_FOR
from hf_paged.core.forks import new_lock

# Whose they are: models may have layers in common.
_models_of: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
_lock = new_lock()


def take_layers(model: nn.Module) -> None:
    """Let linear layers and experts be multiplied faster, where that can be, and latents be read where they lie."""
    for each in model.modules():
        with _lock:
            if is_taken(each) or _is_to_be_taken(each):
                _models_of.setdefault(each, WeakSet()).add(model)
                each.__class__ = _taken_class(type(each))


def is_taken(layer: nn.Module) -> bool:
    """Whether a layer has a class of ours."""
    return STANDS_FOR in vars(type(layer))


def _is_to_be_taken(layer: nn.Module) -> bool:
    """Whether there is a faster way, and it computes as its class says."""
    if latent.keeps_latents(layer):
        return True
    is_known = type(layer) in linear.TAKEN or experts.are_experts(layer)
    return is_known and matmul.is_faster() and "forward" not in vars(layer) and bool(_ways(layer))


def _taken_class(found: type[nn.Module]) -> type[nn.Module]:
    if STANDS_FOR in vars(found):
        return found
    taken = linear.TAKEN.get(found) or (latent if latent.may_keep(found) else experts).taken_class(found)
    if STANDS_FOR not in vars(taken):
        for name in ("__name__", "__qualname__", "__module__"):
            setattr(taken, name, getattr(found, name))
        setattr(taken, STANDS_FOR, found)
    return taken


def _ways(layer: nn.Module) -> list[str]:
    """Who may multiply it faster, as its weights are now."""
    if latent.keeps_latents(layer):
        return []
    return (linear if isinstance(layer, tuple(linear.TAKEN)) else experts).ways(layer)


def give_layers_back(model: nn.Module) -> None:
    """Undo `take_layers`, also of layers that have left the model; not where another model has taken them, too."""
    with _lock:
        for layer, models in list(_models_of.items()):
            models.discard(model)
            if not models:
                del _models_of[layer]
                layer.__class__ = vars(type(layer)).get(STANDS_FOR, type(layer))


def describe(model: nn.Module) -> str:
    """Who multiplies in a patched model's passes, for people."""
    ways = {way for each in model.modules() if is_taken(each) for way in _ways(each)}
    if torch_compat.OBSTACLE is not None or matmul.is_switched_off() or not ways:
        return "torch's choice"
    return ", ".join(sorted(ways))
