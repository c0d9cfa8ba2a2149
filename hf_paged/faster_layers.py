"""Which layers of a patched model may be multiplied by others than torch: they have other classes until it is not.

By their names, and outside of `multiplied_faster`, these classes are the originals.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from hf_paged import experts, linear, matmul, torch_compat
from hf_paged.core.forks import new_lock

# Of a class of ours: that which it stands for.
_ORIGINAL = "_hf_paged_stands_for"
# Whose they are: models may have layers in common.
_models_of: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
_lock = new_lock()


def take_layers(model: nn.Module) -> None:
    """Let the linear layers and experts of a model be multiplied faster in `multiplied_faster`, where that can be."""
    if not matmul.is_faster():
        return
    for each in model.modules():
        with _lock:
            if is_taken(each) or _is_to_be_taken(each):
                _models_of.setdefault(each, WeakSet()).add(model)
                each.__class__ = _taken_class(type(each))


def is_taken(layer: nn.Module) -> bool:
    """Whether a layer has a class of ours."""
    return _ORIGINAL in vars(type(layer))


def _is_to_be_taken(layer: nn.Module) -> bool:
    """Whether somebody multiplies it faster, and it computes as its class says."""
    is_known = type(layer) in linear.TAKEN or experts.are_experts(layer)
    return is_known and "forward" not in vars(layer) and bool(_ways(layer))


def _taken_class(found: type[nn.Module]) -> type[nn.Module]:
    if _ORIGINAL in vars(found):
        return found
    taken = linear.TAKEN.get(found) or experts.taken_class(found)
    if _ORIGINAL not in vars(taken):
        for name in ("__name__", "__qualname__", "__module__"):
            setattr(taken, name, getattr(found, name))
        setattr(taken, _ORIGINAL, found)
    return taken


def _ways(layer: nn.Module) -> list[str]:
    """Who may multiply it faster, as its weights are now."""
    return (linear if isinstance(layer, tuple(linear.TAKEN)) else experts).ways(layer)


def give_layers_back(model: nn.Module) -> None:
    """Undo `take_layers`, also of layers that have left the model; not where another model has taken them, too."""
    with _lock:
        for layer, models in list(_models_of.items()):
            models.discard(model)
            if not models:
                del _models_of[layer]
                layer.__class__ = vars(type(layer)).get(_ORIGINAL, type(layer))


def describe(model: nn.Module) -> str:
    """Who multiplies in a patched model's passes, for people."""
    ways = {way for each in model.modules() if is_taken(each) for way in _ways(each)}
    if torch_compat.OBSTACLE is not None or matmul.is_replaced() or not ways:
        return "torch's choice"
    return ", ".join(sorted(ways))
