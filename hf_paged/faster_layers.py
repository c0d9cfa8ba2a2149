"""Which layers of a patched model may be multiplied by others than torch: they have other classes until it is not.

By their names, and outside of `multiplied_faster`, these classes are the originals.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from hf_paged import experts, linear, matmul, torch_compat
from hf_paged.core.forks import new_lock

# Of the classes that such layers have.
_originals: dict[type[nn.Module], type[nn.Module]] = {}
# Whose they are: models may have layers in common.
_models_of: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
_lock = new_lock()


def take_layers(model: nn.Module) -> None:
    """Let the linear layers and experts of a model be multiplied faster in `multiplied_faster`, where that can be."""
    if not matmul.is_faster():
        return
    for each in model.modules():
        with _lock:
            taken = type(each) if is_taken(each) else _class_for(each)
            if taken is not None:
                _models_of.setdefault(each, WeakSet()).add(model)
                each.__class__ = taken


def is_taken(layer: nn.Module) -> bool:
    """Whether a layer has a class of ours."""
    return type(layer) in _originals


def _class_for(layer: nn.Module) -> type[nn.Module] | None:
    """The class in which it may be multiplied faster; `None` where nobody does it, or it computes otherwise."""
    original = type(layer)
    taken = linear.TAKEN.get(original) or experts.taken_class(original)
    if taken is None or "forward" in vars(layer) or not _ways(layer):
        return None
    if taken not in _originals:
        taken.__name__, taken.__qualname__ = original.__name__, original.__qualname__
        taken.__module__ = original.__module__
        _originals[taken] = original
    return taken


def _ways(layer: nn.Module) -> list[str]:
    return (linear if isinstance(layer, tuple(linear.TAKEN)) else experts).ways(layer)


def give_layers_back(model: nn.Module) -> None:
    """Undo `take_layers`, also of layers that have left the model; not where another model has taken them, too."""
    with _lock:
        for layer, models in list(_models_of.items()):
            models.discard(model)
            if not models:
                del _models_of[layer]
                layer.__class__ = _originals.get(type(layer), type(layer))


def describe(model: nn.Module) -> str:
    """Who multiplies in a patched model's passes, for people."""
    ways = {way for each in model.modules() if is_taken(each) for way in _ways(each)}
    if torch_compat.OBSTACLE is not None or matmul.is_replaced() or not ways:
        return "torch's choice"
    return ", ".join(sorted(ways))
