"""The attention function that patched models name, and how it hands over to the one they had."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from hf_paged import compat
from hf_paged.backends import PREPARED, AttentionCall, attend_rows
from hf_paged.compat import CACHE_NAME
from hf_paged.cross import attend_shared
from hf_paged.foreign import is_foreign
from hf_paged.lazy import ExpandedKV, PagedKV, SharedRows
from hf_paged.step import UnsupportedAttentionError
from hf_paged.training import make_way
from hf_paged.unmasked import attend_unmasked

if TYPE_CHECKING:
    from hf_paged.runtime import PagedRuntime


class PagedName(str):
    """The name of an attention implementation that ours has taken the place of; it is equal to that name.

    Models look at the name of their attention, not only look it up (`_attn_implementation in ("eager", "sdpa")`), and
    take other ways where it is none that they know. So ours reads, compares, prints, pickles and saves as the name that
    the model had before. Only its hash is another one: in the tables of attention and mask functions, which are
    dictionaries, it finds our function.

    Attributes:
        runtime: weakly, that of the model whose config has the name.
        others: those of more models with this very config.
    """

    __slots__ = ("others", "runtime")
    runtime: weakref.ref[PagedRuntime]
    others: weakref.WeakSet[PagedRuntime]
    __eq__ = str.__eq__

    def __hash__(self) -> int:
        return hash(("hf_paged", str(self)))

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)

    def __deepcopy__(self, memo: dict[int, object]) -> str:
        return str(self)


# Keywords of an attention call that are honoured, and those that carry no instruction of their own once a plan says
# what each query sees.
_KNOWN = frozenset(
    (
        "softcap",
        "sliding_window",
        "s_aux",
        "is_causal",
        "position_ids",
        "cache_position",
        "position_embeddings",
        "use_cache",
        CACHE_NAME,
        "past_key_value",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
        "head_mask",
        "layer_head_mask",
        "training",
    )
)


def patched_name(original: str, runtime: PagedRuntime) -> PagedName:
    """Name of the attention function that hands over to `original`."""
    name = PagedName(original)
    name.runtime, name.others = weakref.ref(runtime), weakref.WeakSet()
    compat.register_attention(name, partial(paged_attention_forward, original), original)
    return name


def take_names(configs: Iterable[PreTrainedConfig], runtime: PagedRuntime, of_others: bool = False) -> None:
    """Has the models of `configs` attend with our function in the place of the one that each names.

    `of_others`: names of another runtime are replaced, too, at once: a call that runs meanwhile never meets stock's.
    """
    for config in configs:
        name = compat.attention_name(config)
        is_ours = isinstance(name, PagedName) and not (of_others and name.runtime() is not runtime)
        if name is not None and not is_ours:
            compat.set_attention_name(config, patched_name(str(name), runtime))
        elif name is not None and name.runtime() is not runtime:
            name.others.add(runtime)


def give_names_back(configs: Iterable[PreTrainedConfig], runtime: PagedRuntime) -> None:
    """Has the models of `configs` attend with what each names, as stock has them.

    But where others that are patched have the same config: their passes may be under way.
    """
    for config in configs:
        name = compat.attention_name(config)
        if isinstance(name, PagedName):
            name.others.discard(runtime)
            if name.runtime() not in (runtime, None):
                continue
            if name.others:
                name.runtime = weakref.ref(name.others.pop())
            else:
                compat.set_attention_name(config, str(name))


def paged_mask(device: torch.device) -> torch.Tensor:
    """The attention mask of the fast path: `[1, 1, 1, 0]`, so that any other use of it fails loudly.

    transformers hands 4-D masks through unchanged, which also saves building one a step.
    """
    return torch.empty(1, 1, 1, 0, dtype=torch.bool, device=device)


def paged_attention_forward(
    original: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over blocks where K and V come from a plan, else the model's `original` attention.

    Args:
        query: `[batch, heads, tokens, dim]`.
        key, value: `[batch, kv_heads, kv_tokens, dim]`, dense or `PagedKV`.

    Returns:
        `[batch, tokens, heads, value_dim]`, and the weights where the original returns them.
    """
    # A compiled layer calls us, and goes on behind us; an exported model is the one that was patched.
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return _uncompiled(
            original, module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if isinstance(key, SharedRows):
        function = compat.original_attention(original, module)
        kwargs = {"scaling": scaling, "dropout": dropout, **kwargs}
        if is_foreign(function, module):
            return function(module, query, key.to_dense(), value.to_dense(), attention_mask, **kwargs)
        return attend_shared(function, module, query, key, value, attention_mask, **kwargs)
    if attention_mask is None or attention_mask.shape[-1] != 0:
        runtime = _runtime_of(module)
        make_way(module, runtime)
        function = compat.original_attention(original, module)
        if attention_mask is None:
            out = attend_unmasked(function, module, query, key, value, runtime, scaling, dropout, kwargs)
            if out is not None:
                return out, None
        return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    call = _attention_call(module, query, scaling, dropout, kwargs)
    prepared = getattr(key, PREPARED, None)
    if prepared is not None and prepared is getattr(value, PREPARED, None):
        out = prepared.attend(query, call)
        if out is not None:
            return out, None
    dtype = compat.autocast_dtype(query.device)
    if dtype is None:
        return _attend(query, key, value, call), None
    query = query.to(dtype)
    with torch.autocast(query.device.type, enabled=False):  # which would round sums that are kept in float32
        return _attend(query, key, value, call), None


_uncompiled = torch.compiler.disable(paged_attention_forward)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    if isinstance(key, ExpandedKV):
        read, attend = key.latents, partial(key.latents.step.backend.attend_expanded, expansion=key.expansion)
    elif isinstance(key, PagedKV):
        read, attend = key, key.step.backend.attend
    else:
        return attend_rows(query, key, value, call)
    step = read.step
    step.windows_seen[read.layer_index] = call.window
    return attend(query, read.store, step.plans[read.layer_index], call)


def _runtime_of(module: torch.nn.Module) -> PagedRuntime | None:
    """The runtime of the model that an attention layer belongs to; trainers and PEFT call parts of it by themselves."""
    config = getattr(module, "config", None)
    name = None if config is None else compat.attention_name(config)
    return name.runtime() if isinstance(name, PagedName) else None


def _attention_call(
    module: torch.nn.Module, query: torch.Tensor, scaling: float | None, dropout: float, kwargs: dict[str, Any]
) -> AttentionCall:
    is_causal = kwargs.get("is_causal") is not False and getattr(module, "is_causal", True) is not False
    if not is_causal and query.shape[2] > 1:  # the newest token of a sequence sees all of it either way
        raise UnsupportedAttentionError("attention is not causal")
    if dropout:
        raise UnsupportedAttentionError("attention dropout")
    if not kwargs.keys() <= _KNOWN:
        for name in kwargs.keys() - _KNOWN:
            if kwargs[name] is not None and kwargs[name] is not False:
                raise UnsupportedAttentionError(f"attention argument {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return AttentionCall(scale, kwargs.get("softcap"), kwargs.get("sliding_window"), kwargs.get("s_aux"))
