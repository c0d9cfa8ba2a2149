"""What happens when a patched model is called with a `PagedCache`: one decode step, a packed pass, or a padded one.

The caller's view stays that of stock transformers: `[batch, tokens]` in, logits of the asked-for columns out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import PreTrainedModel

from hf_paged import compat
from hf_paged.attention import paged_mask
from hf_paged.backends import AttentionBackend
from hf_paged.cache import PagedCache
from hf_paged.compat import CACHE_NAME
from hf_paged.core.planner import plan_decode
from hf_paged.errors import UnseenLayersError

if TYPE_CHECKING:
    from hf_paged.replay import DecodeGraphs

# Arguments that the fast paths carry over or replace; any other one that is set means the padded path.
KNOWN_ARGUMENTS = frozenset(
    (
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        CACHE_NAME,
        "use_cache",
        "return_dict",
        "logits_to_keep",
        "cache_position",
    )
)
# One number a token. Zeros mostly say what leaving them out says: that there is only text.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
# What the decoder of an encoder-decoder model is given for its cross-attention; no business of the paged cache.
_ENCODER_ARGUMENTS = frozenset(("encoder_outputs", "attention_mask"))
PADDING_SHOWN = "an attention mask that shows padding of before, of which the cache holds nothing"


class InputNames(NamedTuple):
    """What a model calls the inputs of its decoder."""

    ids: str = "input_ids"
    embeds: str = "inputs_embeds"
    mask: str = "attention_mask"
    positions: str = "position_ids"


DECODER_ONLY = InputNames()
ENCODER_DECODER = InputNames(*(f"decoder_{name}" for name in DECODER_ONLY))


@dataclass(slots=True)
class ModelCall:
    """A call of a patched model, taken apart.

    Attributes:
        call: the stock `__call__`.
        kwargs: its keyword arguments.
        inputs: `input_ids [batch, tokens]` or `inputs_embeds [batch, tokens, hidden]`.
        new_columns: `[batch, tokens]` bool on the CPU, False at padding; `None` where there is none.
        hides_nothing: whether the attention mask is one number a column, none of which is zero.
        own_attention: whether no layer attends through the interface of transformers.
        last_only: whether the last column's logits suffice although the call does not say so.
        names: of the inputs.
    """

    call: Callable[..., Any]
    kwargs: dict[str, Any]
    inputs: torch.Tensor
    new_columns: torch.Tensor | None
    last_only: bool
    names: InputNames = DECODER_ONLY
    hides_nothing: bool = False
    own_attention: bool = False

    @property
    def rows(self) -> int:
        """Batch size."""
        return self.inputs.shape[0]

    @property
    def tokens(self) -> int:
        """New columns."""
        return self.inputs.shape[1]

    @property
    def real_tokens(self) -> int:
        """New tokens, padding left out."""
        return self.rows * self.tokens if self.new_columns is None else int(self.new_columns.sum())

    @property
    def input_name(self) -> str:
        """`"input_ids"` or `"inputs_embeds"`, or what the model calls them."""
        return self.names.ids if self.inputs.dim() == 2 else self.names.embeds

    @property
    def mask(self) -> torch.Tensor | None:
        """Attention mask of the decoder."""
        return self.kwargs.get(self.names.mask)

    @property
    def token_types(self) -> list[str]:
        """The arguments for token types that are given."""
        return [name for name in TOKEN_TYPES if self.kwargs.get(name) is not None]

    @property
    def positions(self) -> torch.Tensor | None:
        """Position ids of the decoder."""
        return self.kwargs.get(self.names.positions)


def by_name(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments, with those by position among the others, as the model's forward names them.

    As they are where it has no names for some (`*args`), or where it is the model's own to refuse them. What wraps a
    forward with any arguments hands them on to that of the class.
    """
    for forward in (model.forward, partial(type(model).forward, model)):
        parameters = list(inspect.signature(forward).parameters.values())[: len(args)]
        names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        if len(names) == len(args) and kwargs.keys().isdisjoint(names):
            return (), {**dict(zip(names, args, strict=True)), **kwargs}
        if all(each.kind is not each.VAR_POSITIONAL for each in parameters):
            break
    return args, kwargs


def take_apart(
    call: Callable[..., Any], cache: PagedCache, kwargs: dict[str, Any], own_attention: bool
) -> ModelCall | None:
    """A call of a patched model, as `ModelCall` has its parts; `None` where it gives no tokens to the decoder."""
    names = DECODER_ONLY if kwargs[CACHE_NAME] is cache else ENCODER_DECODER
    inputs = kwargs.get(names.ids)
    if inputs is None:
        inputs = kwargs.get(names.embeds)
    if inputs is None or inputs.dim() not in (2, 3) or not len(inputs):
        return None
    mask = kwargs.get(names.mask)
    hides_nothing = isinstance(mask, torch.Tensor) and mask.dim() == 2 and bool(mask.all())
    new_columns = None if hides_nothing else padding_columns(mask, inputs)
    last_only = cache.prefilling and not cache.assisted
    return ModelCall(call, kwargs, inputs, new_columns, last_only, names, hides_nothing, own_attention)


def padding_columns(mask: Any, inputs: torch.Tensor) -> torch.Tensor | None:
    """Which new columns are real by an attention mask, `[batch, tokens]` bool on the CPU; `None`: all."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[0] != inputs.shape[0]:
        return None
    columns = mask[:, -inputs.shape[1] :].bool().cpu()
    return None if columns.shape[1] != inputs.shape[1] or columns.all() else columns


def fast_path_obstacle(request: ModelCall, cache: PagedCache, window_limit: int | None = None) -> str | None:
    """Why this call must take the padded path, or `None`.

    Args:
        request: the call.
        cache: its cache.
        window_limit: longest sequence for which the model's attention is known to be what the backends compute.
    """
    if not request.tokens:
        return "no tokens"
    kwargs, known = request.kwargs, KNOWN_ARGUMENTS
    if request.names == ENCODER_DECODER:
        known = known | frozenset(request.names) | _ENCODER_ARGUMENTS
    for name, value in kwargs.items():
        if name not in known and not says_nothing(name, value, request):
            return f"argument {name}"
    if kwargs.get("return_dict") is False:
        return "argument return_dict=False"
    mask, positions = request.mask, request.positions
    if mask is not None:
        if mask.dim() != 2 or mask.shape[1] != cache.dense_len + request.tokens:
            return "custom attention mask"
        if not (request.hides_nothing and cache.columns is None):
            stored = mask[:, : cache.dense_len].bool().cpu()
            if not (stored.all() if cache.columns is None else torch.equal(stored, cache.columns)):
                return "attention mask differs from what is cached"
    elif cache.columns is not None:
        return "attention mask differs from what is cached"
    new, tokens = request.new_columns, request.tokens
    if positions is not None and positions.is_floating_point():
        return "position ids that may be fractions"
    if positions is not None and positions.dim() < 2:
        return "position ids of one dimension"
    if positions is not None and positions.dim() > 2 and tokens > 1 and not _planes_agree(positions, new):
        return "position ids of several dimensions"
    if new is not None and not bool(new[:, -1].all()):
        return "padding on the right"
    if window_limit is not None and cache.dense_len + tokens > window_limit:
        return "sliding window that attention is not told of"
    if any(cache.windows) and _has_holes(cache.columns_with(new, tokens)):
        return "holes in the attention mask of a sliding-window model"
    keep = kwargs.get("logits_to_keep")
    if isinstance(keep, torch.Tensor):
        return "argument logits_to_keep as a tensor"
    keep = keep or (1 if request.last_only else 0)
    if tokens > 1 and not keep and (new is not None or request.rows > 1):
        return "logits of all tokens"
    if new is not None and not bool(new[:, -keep:].all()):
        return "logits of padding"
    return None


def shows_padding(request: ModelCall, cache: PagedCache) -> bool:
    """Whether the first pass of a call is to attend to columns that were padding and hold nothing.

    Stock has K and V there, of whatever token was taken for padding, that no mask has hidden then.
    """
    if cache.columns is None or (cache.generating and not cache.prefilling):
        return False
    mask, padding = request.mask, ~cache.columns
    if mask is None:
        return bool(padding.any())
    if mask.dim() != 2 or mask.shape[1] < cache.dense_len:
        return False
    return bool((mask[:, : cache.dense_len].bool().cpu() & padding).any())


def says_nothing(name: str, value: Any, request: ModelCall) -> bool:
    """Whether an argument might as well be left out."""
    if name in TOKEN_TYPES and isinstance(value, torch.Tensor):
        # Some versions of transformers give those of earlier columns, too.
        return value.dim() == 2 and len(value) == request.rows and not bool(value.any())
    return value is None or value is False or (isinstance(value, dict | list | tuple) and not value)


def _planes_agree(positions: torch.Tensor, new: torch.Tensor | None) -> bool:
    """Whether position ids `[planes, rows, tokens]` are the same in each plane, where tokens are real."""
    if positions.dim() != 3:
        return False
    differ = (positions != positions[:1]).any(dim=0)
    return not bool(differ.any() if new is None else (differ.expand(new.shape).cpu() & new).any())


def _has_holes(columns: torch.Tensor | None) -> bool:
    """Whether padding follows a stored column."""
    return columns is not None and bool((columns[:, :-1] & ~columns[:, 1:]).any())


def run_decode(
    request: ModelCall,
    cache: PagedCache,
    backend: AttentionBackend,
    windows_seen: dict[int, int | None] | None = None,
    graphs: DecodeGraphs | None = None,
) -> Any:
    """One new token a row. Rows that have finished are neither computed nor stored; their logits are zero.

    `windows_seen` is filled with the sliding window of each layer's attention call. `graphs`: where the step may come
    from a graph.
    """
    active = cache.active_rows
    some = len(active) < request.rows
    tables = [cache.tables[row] for row in active] if some else cache.tables
    tokens = usual_tokens(request, cache)
    if tokens is not None and some:
        tokens = [tokens[row] for row in active]
    pool = cache.pool
    foreseen = None if graphs is None else graphs.foreseen(cache)
    append = partial(plan_decode, pool.manager, tables, tokens, cache.room_tokens, foreseen)
    plans, pins = pool.with_room(cache.sequences.movable, append, len(tables))
    cache.sequences.pins += pins
    cache.is_copying = bool(pins)
    backend = pool.over_host(backend, plans)
    outputs = None if graphs is None else graphs.step(request, cache, backend, plans, active, tables)
    if outputs is not None:
        cache.finish(None, 1)
        return outputs
    columns = cache.columns_with(None, 1)
    columns = None if columns is None else columns[active]
    as_given = cache.pool.kv_format is None
    reads_rows = backend.reads_rows and as_given and columns is None and windows_seen is None
    cache.begin(plans, cache.dense_len + 1, 1, tables, columns, backend, reads_rows)
    if windows_seen is None:
        cache.prepared = backend.prepare(cache.pool.stores, cache.step)
    kwargs = {**request.kwargs, request.names.mask: paged_mask(request.inputs.device)}
    if some:
        index = torch.tensor(active, device=request.inputs.device)
        kwargs[request.input_name] = request.inputs[index]
        for name in (request.names.positions, *TOKEN_TYPES):
            if kwargs.get(name) is not None and kwargs[name].shape[-2] == request.rows:
                kwargs[name] = kwargs[name].index_select(-2, index)
    outputs = request.call(**kwargs)
    if windows_seen is not None:
        windows_seen.update(cache.step.windows_seen)
    if graphs is not None:
        graphs.learn(cache, backend, plans)
    cache.finish(None, 1)
    if some:
        outputs.logits = spread_rows(outputs.logits, index, request.rows)
    return outputs


def usual_tokens(request: ModelCall, cache: PagedCache) -> list[list[int]] | None:
    """Ids of each row's new tokens, where they are to be found again and have the positions that ids imply."""
    if cache.root is None or request.input_name != "input_ids" or not at_usual_positions(request, cache):
        return None
    return request.inputs.tolist()


def at_usual_positions(request: ModelCall, cache: PagedCache) -> bool:
    """Whether every row's new tokens have the positions that its past implies."""
    positions, new = request.positions, range(request.tokens)
    if positions is None:
        planes = [[[cache.dense_len + column for column in new]]]
    else:
        planes = positions.reshape(-1, *positions.shape[-2:]).tolist()
    shifts = [table.shifts or [0] * len(planes) for table in cache.tables]
    if any(len(each) != len(planes) for each in shifts):
        return False
    firsts = [
        [table.num_tokens + each for table, each in zip(cache.tables, plane, strict=True)]
        for plane in zip(*shifts, strict=True)
    ]
    given = [plane * (len(cache.tables) // len(plane)) for plane in planes]
    return all(
        row in cache.finished or plane[row] == [first + column for column in new]
        for plane, stored in zip(given, firsts, strict=True)
        for row, first in enumerate(stored)
    )


def spread_rows(logits: torch.Tensor, rows: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Logits of some rows among those of all; zeros for the others."""
    return logits.new_zeros(batch_size, *logits.shape[1:]).index_copy_(0, rows, logits)


def run_padded(request: ModelCall, cache: PagedCache, tokens: Sequence[Sequence[int]] | None = None) -> Any:
    """The stock-shaped pass: real tokens go to blocks, attention is the model's own over dense K and V.

    `tokens`: each row's, where their ids say all that K and V depend on, and there is no padding. A model that leaves
    the cache alone (older ones do with gradient checkpointing) leaves it as it was.
    """
    cache.readmit_rows()
    lengths = [table.num_tokens for table in cache.tables]
    stored = request.new_columns
    # Stock attends to padding where a row or a window holds nothing else, and in falcon where attentions are asked for.
    is_empty = stored is not None and not bool(request.mask.bool().any(dim=1).all())
    # Attention of a model's own may have windows, too, and prophetnet's steps attend to all of a decoder's prompt.
    columns = cache.columns_with(stored, request.tokens)
    only_padding = is_empty or ((any(cache.windows) or request.own_attention) and _has_holes(columns))
    only_padding |= request.own_attention and request.names == ENCODER_DECODER
    if request.kwargs.get("output_attentions") or only_padding:
        stored = None
    try:
        cache.begin_dense(request.tokens, stored, over_host=True, tokens=tokens)
    except UnseenLayersError:
        _look_at_layers(request, cache)
        cache.begin_dense(request.tokens, stored, over_host=True, tokens=tokens)
    cache.step.hands_out = bool(request.kwargs.get(compat.KV_WANTED))
    outputs = request.call(**request.kwargs)
    if any(layer.seen != cache.dense_len for layer in cache.paged_layers):
        cache.finish(stored, request.tokens)
    else:
        cache.roll_back(lengths)
    return outputs


def _look_at_layers(request: ModelCall, cache: PagedCache) -> None:
    """Learn what each layer's K and V look like: the pass, without keeping anything of it.

    Only where a first prompt does not fit the device: its blocks have no place on the host before that is known.
    """
    cache.begin_dense(0)
    cache.step.tokens_per_row, cache.step.keeps_nothing = request.tokens, True
    try:
        request.call(**request.kwargs)
    finally:
        cache.forget()
