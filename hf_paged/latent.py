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
from hf_paged.copied import STANDS_FOR, can_stand_for, copied_as_original
from hf_paged.foreign import is_of_transformers
from hf_paged.lazy import ExpandedKV, PagedKV
from hf_paged.watched import modes_look_on

_EXPAND = "expand_kv"
_PRODUCT = "kv_b_proj"

_classes: WeakValueDictionary[type[nn.Module], type[nn.Module]] = WeakValueDictionary()


def keeps_latents(layer: nn.Module) -> bool:
    """Whether a layer expands what comes back from the cache, as transformers' own do; also while its class is ours."""
    return may_keep(type(layer)) and _PRODUCT in layer._modules


def may_keep(kind: type[nn.Module]) -> bool:
    """Whether layers of a class do."""
    kind = vars(kind).get(STANDS_FOR, kind)
    expand = getattr(kind, _EXPAND, None)
    code = getattr(expand, "__code__", None)
    return code is not None and is_of_transformers(code) and can_stand_for(kind)


def reads_latents(modules: Iterable[nn.Module]) -> bool:
    """Whether some layers of a model keep latents, and nobody but attention needs to expand these."""
    modules = list(modules)
    kinds = set(filter(may_keep, set(map(type, modules))))
    if not kinds or matmul.is_replaced() or modes_look_on():
        return False
    return all(_is_known(each) for each in modules if type(each) in kinds)


def taken_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class that such layers of a patched model have; but for `expand_kv` it does what the original does."""
    if (made := _classes.get(original)) is None:
        made = _classes[original] = _make_class(original)
    return made


def _make_class(original: type[nn.Module]) -> type[nn.Module]:
    class TakenLatents(original):
        __reduce_ex__ = copied_as_original
        _hf_paged_expand = getattr(original, _EXPAND)

        def expand_kv(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            if len(args) == 2 and not kwargs and isinstance(args[0], PagedKV):
                is_compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
                expanded = (_lazily_uncompiled if is_compiled else _lazily)(self, *args)
                if expanded is not None:
                    return expanded
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


def _lazily(layer: nn.Module, latents: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """K and V that are not made yet; `None` where the layer is to make them itself."""
    expansion = _expansion(layer, latents, rotated)
    if expansion is None:
        return None
    return ExpandedKV(latents, rotated, expansion, False), ExpandedKV(latents, rotated, expansion, True)


_lazily_uncompiled = torch.compiler.disable(_lazily)


def _expansion(layer: nn.Module, latents: PagedKV, rotated: torch.Tensor) -> Expansion | None:
    """How a layer expands what its cache has given it, where that is known and can wait."""
    if not isinstance(rotated, PagedKV) or not latents.step.backend.reads_latents or not _is_known(layer):
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
