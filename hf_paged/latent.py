"""Layers that keep latents in the place of K and V: in passes on blocks, nobody expands these.

transformers' models of this kind (deepseek_v2 and _v3, and what is built like them) hand latents to their cache, and
expand what comes back in a method of its own, `expand_kv`, on its way to attention. In a patched model that method
gives attention the latents and the weights instead (`backends.latent`), where it is known what it would do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from hf_paged import linear, matmul
from hf_paged.backends import Expansion
from hf_paged.copied import STANDS_FOR, copied_as_original
from hf_paged.lazy import ExpandedKV, PagedKV

_EXPAND = "expand_kv"
_PRODUCT = "kv_b_proj"

_classes: WeakValueDictionary[type[nn.Module], type[nn.Module]] = WeakValueDictionary()


def keeps_latents(layer: nn.Module) -> bool:
    """Whether a layer expands what comes back from the cache, as transformers' own do; also while its class is ours."""
    return may_keep(type(layer)) and _PRODUCT in layer._modules


def may_keep(kind: type[nn.Module]) -> bool:
    """Whether layers of a class do."""
    expand = getattr(vars(kind).get(STANDS_FOR, kind), _EXPAND, None)
    return str(getattr(expand, "__module__", "")).startswith("transformers.models.")


def reads_latents(modules: Iterable[nn.Module]) -> bool:
    """Whether some layers of a model keep latents, and nobody but attention needs to expand these."""
    modules = list(modules)
    kinds = set(filter(may_keep, set(map(type, modules))))
    if not kinds or matmul.is_replaced():
        return False
    return all(_is_known(each) for each in modules if type(each) in kinds)


def taken_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class that such layers of a patched model have instead; it does what the original does, but for `_expand`."""
    if (made := _classes.get(original)) is None:
        made = _classes[original] = _make_class(original)
    return made


def _make_class(original: type[nn.Module]) -> type[nn.Module]:
    class TakenLatents(original):
        __reduce_ex__ = copied_as_original
        _hf_paged_expand = getattr(original, _EXPAND)

        def expand_kv(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            if len(args) == 2 and not kwargs and not torch.compiler.is_compiling():
                expansion = _expansion(self, *args)
                if expansion is not None:
                    keys, values = (ExpandedKV(*args, expansion, is_value) for is_value in (False, True))
                    return keys, values
            return getattr(original, _EXPAND)(self, *args, **kwargs)

    return TakenLatents


def _is_known(layer: nn.Module) -> bool:
    """Whether a layer has a class of ours, and K and V are plainly products of latents and of its weights."""
    kind = type(layer)
    own, product = vars(kind).get("_hf_paged_expand"), layer._modules.get(_PRODUCT)
    if own is None or _EXPAND in vars(layer) or getattr(vars(kind).get(STANDS_FOR), _EXPAND, None) is not own:
        return False
    if type(product) not in (nn.Linear, linear.TAKEN[nn.Linear]):
        return False
    weight = product._parameters.get("weight")
    return (
        type(weight) is nn.Parameter
        and weight.layout is torch.strided
        and weight.is_contiguous()
        and weight.dim() == 2
        and weight.shape[0] % (layer.qk_nope_head_dim + layer.v_head_dim) == 0
        and product._parameters.get("bias") is None
        and "forward" not in vars(product)
        and not product._forward_hooks
        and not product._forward_pre_hooks
    )


def _expansion(layer: nn.Module, latents: torch.Tensor, rotated: torch.Tensor) -> Expansion | None:
    """How a layer expands what its cache has given it; `None` where it is to do so itself, as in most passes."""
    is_read = isinstance(latents, PagedKV) and isinstance(rotated, PagedKV) and latents.step.backend.reads_latents
    if not is_read or not _is_known(layer):
        return None
    weight, dim = layer.kv_b_proj.weight, layer.qk_nope_head_dim
    fits = (
        weight.dtype is latents.dtype
        and weight.device == latents.device
        and latents.shape[1] == rotated.shape[1] == 1
        and weight.shape[1] == latents.shape[-1]
        and rotated.shape[-1] == layer.qk_rope_head_dim
    )
    if not fits:
        return None
    by_head = weight.view(-1, dim + layer.v_head_dim, weight.shape[1])
    return Expansion(by_head[:, :dim], by_head[:, dim:], layer._hf_paged_expand)
