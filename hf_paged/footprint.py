"""What K and V of one token take in each layer of a model, found out without its weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel

from hf_paged import compat
from hf_paged_kernels import TokenFormat

_MEASURED_DTYPE = torch.bfloat16  # the one in which every operation has a form for tensors without memory


@dataclass(frozen=True)
class Footprint:
    """Bytes of K and V of one token.

    Attributes:
        layer_bytes: in each layer that keeps K and V, in order.
        estimated: why these come from fields of the config instead of the shapes of real K and V, or `None`.
        weight_bytes: of all parameters in that dtype, `None` where that is not known.
    """

    layer_bytes: tuple[int, ...]
    estimated: str | None = None
    weight_bytes: int | None = None


def footprint(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    token_format: TokenFormat | None = None,
) -> Footprint:
    """What a model of class `kind` keeps, were its weights of `dtype`, and KV stored in `token_format`.

    One token goes through a model without memory, once a process and config: 0.3 s of CPU time for the 30 layers of
    SmolLM2-135M. Where that cannot be done, the usual fields of the config are believed.
    """
    reason = f"{kind.__name__} is not one of transformers' own classes"
    if compat.is_transformers_class(kind):
        try:
            sizes = _measure(_Build(kind, repr(config.to_dict()), config))
            return Footprint(sizes.layer_bytes(dtype, token_format), None, sizes.weight_elements * dtype.itemsize)
        except Exception as error:  # whatever a model does with numbers that are not there
            reason = f"{kind.__name__} cannot be tried without weights: {type(error).__name__}"
    decoder = config.get_text_config(decoder=True)
    num_layers = len(compat.cache_layout(decoder).windows)
    item_bytes = dtype.itemsize if token_format is None else 1  # scales left out
    return Footprint((compat.estimated_kv_elements(decoder) * item_bytes,) * num_layers, reason)


@dataclass(frozen=True)
class _Build:
    """A model to be made; equal where class and content of the config are."""

    kind: type[PreTrainedModel]
    content: str
    config: PreTrainedConfig = field(compare=False)


@dataclass(frozen=True)
class _Sizes:
    """Per layer, elements of one token's K and V in the dtype of the weights, and bytes of those in other dtypes.

    `shapes` are heads and dim of K and of V, in whatever dtype.
    """

    elements: tuple[int, ...]
    fixed_bytes: tuple[int, ...]
    shapes: tuple[tuple[tuple[int, int], ...], ...]
    weight_elements: int

    def layer_bytes(self, dtype: torch.dtype, token_format: TokenFormat | None) -> tuple[int, ...]:
        if token_format is not None:
            return tuple(sum(heads * token_format.record_bytes(dim) for heads, dim in each) for each in self.shapes)
        pairs = zip(self.elements, self.fixed_bytes, strict=True)
        return tuple(count * dtype.itemsize + fixed for count, fixed in pairs)


@functools.lru_cache(maxsize=64)
@torch.no_grad()
def _measure(build: _Build) -> _Sizes:
    model = compat.build_on_meta(build.kind, build.config)
    one = torch.zeros(1, 1, dtype=torch.long, device="meta")
    decoder = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=decoder)
    if model.config.is_encoder_decoder:
        both = EncoderDecoderCache(cache, DynamicCache(config=decoder))
        model(input_ids=one, decoder_input_ids=one, past_key_values=both, use_cache=True)
    else:
        model(input_ids=one, attention_mask=one + 1, past_key_values=cache, use_cache=True)
    elements, fixed_bytes, shapes = [], [], []
    layers = zip(cache.layers, compat.cache_layout(decoder).places, strict=True)
    for layer in (layer for layer, place in layers if place is not None):
        # Layers that read the K and V of another one keep none.
        kept = [] if layer.keys is None else [layer.keys, layer.values]
        counts = [(tensor.shape[1] * tensor.shape[3], tensor.dtype) for tensor in kept]
        shapes.append(tuple(tensor.shape[1::2] for tensor in kept))
        elements.append(sum(count for count, dtype in counts if dtype == _MEASURED_DTYPE))
        fixed_bytes.append(sum(count * dtype.itemsize for count, dtype in counts if dtype != _MEASURED_DTYPE))
    weight_elements = sum(tensor.numel() for tensor in model.parameters())
    return _Sizes(tuple(elements), tuple(fixed_bytes), tuple(shapes), weight_elements)
