"""Finds out by trying whether the fast path reproduces a model's logits, instead of keeping a list of names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_paged import compat
from hf_paged.backends import AttentionBackend, LatentBackend, backend_for
from hf_paged.cache import PagedCache
from hf_paged.compat import CACHE_NAME
from hf_paged.config import PagedConfig
from hf_paged.errors import is_refusal
from hf_paged.foreign import foreign_attention
from hf_paged.forward import ModelCall, run_decode, run_padded
from hf_paged.hooks import hooked, see_shapes
from hf_paged.identity import rotary_depends_on_length
from hf_paged.latent import reads_latents
from hf_paged.packed import run_packed
from hf_paged.pool import KVPool
from hf_paged.step import UnsupportedAttentionError
from hf_paged.token_names import named_tokens
from hf_paged.weights import Tree

# Two prompts with a common beginning that ends inside a block, of unequal length, and one token more for each.
_SHARED_TOKENS, _ROW_TOKENS = 5, (12, 9)
PROBE_SLOTS = 512
_PADDING = 3  # columns
# Columns that a cache is said to hold in the last check: where positions are taken from that number, it shows.
_FAR_COLUMNS = 10_000_000
# Said of models that compute everything anew each step, or keep a cache elsewhere.
CACHE_UNUSED = "the model does not use the cache that generate gives it"
# Largest difference of logits, relative to the largest logit. Stock itself differs by about a tenth of these
# figures between batch shapes; a model that the fast path gets wrong differs by 0.1 to 1.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def tolerance_of(dtype: torch.dtype) -> float:
    """Largest difference, as a part of the largest logit, that is taken for rounding."""
    return TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])


def tolerance_with(model: PreTrainedModel, pool: KVPool) -> float:
    """That of the weights, or of the K and V that `pool` has seen of them, whichever is coarser: autocast rounds."""
    stored = [layer.dtype for layer in pool.stores if layer is not None]
    return max(map(tolerance_of, [model.dtype, *stored]))


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of logits, as a part of the largest that is expected."""
    expected = expected.float()
    return float((actual.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def in_one_line(error: Exception) -> str:
    """What a model has raised, as the reason that is counted."""
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first[:120]}" if first else type(error).__name__


@dataclass(slots=True)
class Later:
    """What only some passes need to know, `None` until the first of them does.

    Attributes:
        may_have_gaps: whether dense K and V may have gaps, as views of the blocks have.
        ignores_padding: whether padding on the left changes nothing for the tokens behind it.
        zeros_matter: by name of an argument for token types, whether zeros say more than leaving it out.
        resumes: why prompts cannot begin with what earlier calls have computed, or `None`; by the names of their media.
        seen: media of these names were seen.
    """

    may_have_gaps: bool | None = None
    ignores_padding: bool | None = None
    zeros_matter: dict[str, bool] = field(default_factory=dict)
    resumes: dict[frozenset[str], str | None] = field(default_factory=dict)
    seen: set[frozenset[str]] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Capability:
    """What the fast path does for a model.

    Attributes:
        obstacle: why it cannot be used, or `None`.
        keeps_logits: whether the model can be told whose logits are wanted.
        window_limit: longest sequence, in tokens, for which the model's attention calls say all that matters;
            `None`: any.
        prompt_obstacle: why several tokens of a row cannot be packed, or `None`; single ones may read the blocks.
        unfit: why not even the padded path can be used, or `None`.
        whole_batches: whether a pass must hold all rows and all of their new tokens, because what is computed for one
            token depends on the highest position in the pass.
        later: what is found out when it is needed, for all that this is known of.
        layer_bytes: of one token's K and V in each layer that keeps any; `None` where stock could not be asked.
        layer_devices: where these K and V lie, likewise.
        sees_shapes: whether code of others must see what stock computes, row by row: hooks, attention.
        has_latents: whether there are layers that keep latents, and attention may read these.
    """

    obstacle: str | None
    keeps_logits: bool = False
    window_limit: int | None = None
    prompt_obstacle: str | None = None
    whole_batches: bool = False
    unfit: str | None = None
    later: Later = field(default_factory=Later)
    layer_bytes: tuple[int, ...] | None = None
    layer_devices: tuple[torch.device, ...] | None = None
    sees_shapes: bool = False
    has_latents: bool = False

    def backend(self, name: str, device: torch.device) -> AttentionBackend:
        """As `backend_for`, of the model's decode steps and packed passes."""
        return step_backend(name, device, self.has_latents)


def step_backend(name: str, device: torch.device, has_latents: bool) -> AttentionBackend:
    """As `backend_for`, for passes on blocks of a model of which some layers keep latents, or none."""
    backend = backend_for(name, device)
    return LatentBackend(backend) if has_latents and backend.takes_latents else backend


def circumstances(model: PreTrainedModel, settings: PagedConfig) -> tuple[Any, ...]:
    """What the fast path may or may not be right in; the last says who of others must see stock's shapes."""
    tree = Tree.of(model)
    kinds = tree.kinds()
    return (
        tuple(kinds),
        model.training,
        model.training and compat.checkpoints_gradients(tree.attributes),  # then some models leave the cache alone
        model.dtype,
        compat.autocast_dtype(compat.compute_device(model)),
        compat.own_forward(model),
        compat.attention_name(model.config),
        settings.attention_backend,
        reads_latents(tree.modules),
        hooked(tree, see_shapes) or foreign_attention(model.config, kinds),
    )


@torch.no_grad()
def probe(model: PreTrainedModel, call: Callable[..., Any], settings: PagedConfig) -> Capability:
    """Compare a packed pass and a decode step with a stock forward of the same tokens, on the model's own weights.

    Where memory is refused, that is raised: it says nothing about the model, which is tried again.
    """
    stock = None
    try:
        rows, obstacle = _prompts(_plain_tokens(model), compat.compute_device(model)), None
        if not compat.takes_position_ids(model):
            rows, obstacle = rows[:1], "model takes no position ids"
        stock = _stock(model, call, rows)
        obstacle = stock.unfit or obstacle
        found = Capability(obstacle) if obstacle else _compare(model, call, settings, rows, stock.logits)
    except UnsupportedAttentionError as error:
        found = Capability(str(error))
    except Exception as error:  # whatever a model does with what it did not expect, the padded path is right
        if is_refusal(error):
            raise
        found = Capability(in_one_line(error))
    if stock is None:
        return found
    return replace(found, unfit=stock.unfit, layer_bytes=stock.layer_bytes, layer_devices=stock.layer_devices)


def _compare(
    model: PreTrainedModel,
    call: Callable[..., Any],
    settings: PagedConfig,
    rows: list[torch.Tensor],
    expected: list[torch.Tensor],
) -> Capability:
    """What the fast path makes of the tokens that stock has made `expected` of."""
    keeps_logits = compat.takes_logits_to_keep(model)

    has_latents = reads_latents(model.modules())
    backend = step_backend(settings.attention_backend, compat.compute_device(model), has_latents)
    cache = _cache(model, settings, len(rows))
    cache.prefilling = True
    longest = max(_ROW_TOKENS)
    inputs = torch.stack([torch.cat([row.new_zeros(longest + 1 - len(row)), row]) for row in rows])
    real = torch.stack([torch.arange(longest, device="cpu") >= longest - tokens for tokens in _ROW_TOKENS])
    positions = (real.cumsum(dim=1) - 1).clamp(min=0).to(inputs.device)
    prompt = {"input_ids": inputs[:, :-1], "position_ids": positions, CACHE_NAME: cache, "use_cache": True}
    windows: dict[int, int | None] = {}
    outputs, *_ = run_packed(ModelCall(call, prompt, inputs[:, :-1], real, True), cache, backend, keeps_logits, windows)
    decode = {
        "input_ids": inputs[:, -1:],
        "position_ids": positions[:, -1:] + 1,
        CACHE_NAME: cache,
        "use_cache": True,
    }
    decoded = run_decode(ModelCall(call, decode, inputs[:, -1:], None, False), cache, backend)
    tolerance = tolerance_with(model, cache.pool)
    for row, reference in enumerate(expected):
        error = difference(torch.stack([outputs.logits[row, -1], decoded.logits[row, -1]]), reference)
        if not error <= tolerance:
            return Capability(f"packed logits differ from stock by {error:.1g} of the largest")
    # A window that only the cache knows is in the mask, which is not looked at; one that only the call knows is not.
    untold = [
        min(each for each in (window, windows.get(layer)) if each is not None)
        for layer, window in enumerate(cache.windows)
        if windows.get(layer) != window
    ]
    cache.release()
    again = ModelCall(
        call, {**prompt, "input_ids": inputs[:1, :-1], "position_ids": positions[:1]}, inputs[:1, :-1], None, True
    )
    counts = _counts_positions(again, cache, backend, keeps_logits, expected[0][0], tolerance)
    return Capability(
        None,
        keeps_logits,
        min(untold, default=None),
        "positions that the model counts itself" if counts else None,
        rotary_depends_on_length(model),
        has_latents=has_latents,
    )


@dataclass(frozen=True, slots=True)
class _Stock:
    """What stock makes of some rows.

    Attributes:
        logits: `[2, vocabulary]` of the last two tokens of each row.
        layer_bytes: of one token's K and V in each layer that keeps any.
        layer_devices: where these lie.
        unfit: why the model's K and V are not those of the tokens, or `None`: cpmant puts a prompt of its own before.
    """

    logits: list[torch.Tensor]
    layer_bytes: tuple[int, ...]
    layer_devices: tuple[torch.device, ...]
    unfit: str | None


def _stock(model: PreTrainedModel, call: Callable[..., Any], rows: list[torch.Tensor]) -> _Stock:
    """One pass over `rows`, the first of which is the longest.

    Shorter ones are filled up behind their end, where none of their tokens looks.
    """
    longest = rows[0]
    tokens = torch.stack([torch.cat([row, longest[len(row) :]]) for row in rows])
    config = model.config.get_text_config(decoder=True)
    cache = compat.stock_cache(config)
    arguments = {"input_ids": tokens, CACHE_NAME: cache, "use_cache": True}
    if compat.takes_position_ids(model):  # told as `generate` does
        arguments["position_ids"] = torch.arange(len(longest), device=tokens.device).expand(tokens.shape)
    outputs = call(**arguments)
    logits = outputs.logits
    layout = compat.cache_layout(config)
    last_two = [each[len(row) - 2 : len(row)].float() for each, row in zip(logits, rows, strict=True)]
    layer_bytes, kept, given = tuple(compat.token_bytes(cache)), compat.kept_tokens(cache), len(longest)
    if added := compat.added_layers(cache, layout):
        unfit = added
    elif outputs.get(CACHE_NAME, cache) is not cache:
        unfit = "the model puts the cache into another one"
    elif max(kept, default=0) == 0:
        unfit = CACHE_UNUSED
    elif max(kept) > given:
        unfit = f"the model keeps K and V of {max(kept)} tokens where it was given {given}"
    else:
        unfit = compat.idle_layer(layout.places, layer_bytes)
    devices = tuple(layer.keys.device for layer in cache.layers if getattr(layer, "keys", None) is not None)
    return _Stock(last_two, layer_bytes, devices, unfit)


@torch.no_grad()
def reads_views(model: PreTrainedModel, call: Callable[..., Any], settings: PagedConfig) -> bool:
    """Whether the padded path is right where dense K and V are views of the blocks: gpt_neox_japanese calls `view`."""
    cache = _cache(model, settings, len(_ROW_TOKENS))
    cache.copies_dense = False
    tokens = torch.stack([row[: min(_ROW_TOKENS)] for row in _prompts(_plain_tokens(model), cache.pool.device)])
    parts = tokens[:, :-1], tokens[:, -1:]
    return _padded_is_right(model, call, cache, tokens, [({"input_ids": part}, None) for part in parts])


@torch.no_grad()
def ignores_padding(model: PreTrainedModel, call: Callable[..., Any], settings: PagedConfig) -> bool:
    """Whether a padded pass gives a row behind padding the logits that stock gives it without: some count columns."""
    cache = _cache(model, settings, 1)
    tokens = _prompts(_plain_tokens(model), cache.pool.device)[0].unsqueeze(0)
    padded = torch.cat([tokens.new_zeros(1, _PADDING), tokens], dim=1)
    mask = (torch.arange(padded.shape[1], device=tokens.device) >= _PADDING).long().unsqueeze(0)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    parts = []
    for start, stop in ((0, _PADDING + _SHARED_TOKENS), (_PADDING + _SHARED_TOKENS, padded.shape[1])):
        given = {"input_ids": padded[:, start:stop], "attention_mask": mask[:, :stop]}
        if compat.takes_position_ids(model):
            given["position_ids"] = positions[:, start:stop]
        real = mask[:, start:stop].bool().cpu()
        parts.append((given, None if real.all() else real))
    return _padded_is_right(model, call, cache, tokens, parts)


def _padded_is_right(
    model: PreTrainedModel,
    call: Callable[..., Any],
    cache: PagedCache,
    tokens: torch.Tensor,
    parts: Sequence[tuple[dict[str, torch.Tensor], torch.Tensor | None]],
) -> bool:
    """Whether padded passes over `parts` of `tokens`, arguments and new columns, end in stock's logits.

    The cache is given up.
    """
    try:
        expected = call(input_ids=tokens, use_cache=False).logits[:, -1]
        for given, columns in parts:
            kwargs = {**given, CACHE_NAME: cache, "use_cache": True}
            outputs = run_padded(ModelCall(call, kwargs, given["input_ids"], columns, False), cache)
        return difference(outputs.logits[:, -1], expected) <= tolerance_with(model, cache.pool)
    except Exception as error:  # whatever a model does with what it did not expect, the other way is right
        if is_refusal(error):
            raise
        return False
    finally:
        cache.release()


@torch.no_grad()
def zeros_matter(model: PreTrainedModel, call: Callable[..., Any], name: str) -> bool:
    """Whether token types of zeros change what the model computes: gpt2 takes them for tokens, and adds these."""
    tokens = _prompts(_plain_tokens(model), compat.compute_device(model))[0].unsqueeze(0)
    given = {"input_ids": tokens, "use_cache": False}
    try:
        typed, plain = call(**given, **{name: torch.zeros_like(tokens)}).logits, call(**given).logits
    except Exception as error:  # whatever a model does with what it did not expect, keeping nothing is right
        if is_refusal(error):
            raise
        return True
    return not difference(typed, plain) <= tolerance_of(model.dtype)


def _counts_positions(
    request: ModelCall,
    cache: PagedCache,
    backend: AttentionBackend,
    keeps_logits: bool,
    expected: torch.Tensor,
    tolerance: float,
) -> bool:
    """Whether the model looks at the length of the cache although it is told the positions of one row's tokens.

    In a packed pass that length is no token's position. With few tokens this need not show: llama4 scales its queries
    by one step every 8,192 tokens. So the same tokens come again, with a cache that claims to be long.
    """
    cache.ensure_rows(1)
    cache.dense_len = _FAR_COLUMNS
    for layer in cache.paged_layers:
        layer.seen = _FAR_COLUMNS
    try:
        outputs, *_ = run_packed(request, cache, backend, keeps_logits)
        return not difference(outputs.logits[0, -1], expected) <= tolerance
    except Exception as error:  # of a table of positions that is not that long, for one
        if is_refusal(error):
            raise
        return True


def _cache(model: PreTrainedModel, settings: PagedConfig, rows: int) -> PagedCache:
    """An empty cache of so many rows on a pool of its own, whose only bound is its number of slots."""
    layout = compat.cache_layout(model.config.get_text_config(decoder=True))
    same_bytes = [1] * len(layout.windows)
    pool = KVPool(settings, layout.windows, same_bytes, compat.compute_device(model), PROBE_SLOTS)
    cache = PagedCache(model.config, pool=pool, settings=settings, layout=layout)
    cache.ensure_rows(rows)
    return cache


def _plain_tokens(model: PreTrainedModel) -> Callable[[int], int]:
    """Maps any number to a token id that the config has no name for: a name may stand for an image."""
    vocabulary, named = compat.vocabulary_size(model.config), set().union(*named_tokens(model.config).values())

    def plain(number: int) -> int:
        return next((token for i in range(vocabulary) if (token := (number + i) % vocabulary) not in named), 0)

    return plain


def _prompts(plain: Callable[[int], int], device: torch.device) -> list[torch.Tensor]:
    """Fixed token ids that spread over the vocabulary; no random state is touched."""
    shared = [plain(3 + 7 * i * i) for i in range(_SHARED_TOKENS)]
    return [
        torch.tensor(
            shared + [plain(11 + 13 * i + 5 * i * i + row) for i in range(tokens + 1 - _SHARED_TOKENS)], device=device
        )
        for row, tokens in enumerate(_ROW_TOKENS)
    ]
