"""What K and V of one token take in each layer of a model, found out without its weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel

from hf_paged import compat
from hf_paged.compat import CACHE_NAME
from hf_paged_kernels import FORMATS, KVFormat

_MEASURED_DTYPE = torch.bfloat16  # the one in which every operation has a form for tensors without memory
_USUAL_DIM = 64  # for estimates


@dataclass(frozen=True)
class Footprint:
    """Bytes of K and V of one token.

    Attributes:
        layer_bytes: in each layer that keeps K and V, in order.
        estimated: why these come from fields of the config instead of the shapes of real K and V, or `None`.
        weight_bytes: of all parameters in that dtype, `None` where that is not known.
        added_layers: that there are layers besides, which blocks cannot take the place of; or `None`.
    """

    layer_bytes: tuple[int, ...]
    estimated: str | None = None
    weight_bytes: int | None = None
    added_layers: str | None = None


def footprint(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    kv_format: KVFormat | None = None,
) -> Footprint:
    """What a model of class `kind` keeps, were its weights of `dtype`, and KV stored in `kv_format`.

    One token goes through a model without memory, once a process and config: 0.3 s of CPU time for the 30 layers of
    SmolLM2-135M. Where that cannot be done, the usual fields of the config are believed.

    Raises `ValueError` where the format is not there for K and V of these dims.
    """
    reason = f"{kind.__name__} is not one of transformers' own classes"
    if compat.is_transformers_class(kind):
        try:
            sizes = _measure(_Build(kind, repr(config.to_dict()), config))
        except Exception as error:  # whatever a model does with numbers that are not there
            reason = f"{kind.__name__} cannot be tried without weights: {type(error).__name__}"
        else:
            weight_bytes = sizes.weight_elements * dtype.itemsize
            return Footprint(sizes.layer_bytes(dtype, kv_format), None, weight_bytes, sizes.added_layers)
    decoder = config.get_text_config(decoder=True)
    num_layers = len(compat.cache_layout(decoder).windows)
    item_bytes = dtype.itemsize if kv_format is None else _bytes_per_number(kv_format)
    return Footprint((int(compat.estimated_kv_elements(decoder) * item_bytes),) * num_layers, reason)


def footprint_of(model: PreTrainedModel, kv_format: KVFormat | None = None) -> Footprint:
    """The same for a model that is there, patched or not."""
    return footprint(getattr(model, "_hf_paged_original", type(model)), model.config, model.dtype, kv_format)


def formats_for(model: PreTrainedModel) -> list[KVFormat]:
    """The formats that are there for K and V of the model's dims, all of them where these are not known."""
    found = []
    for kv_format in FORMATS.values():
        try:
            footprint_of(model, kv_format)
        except ValueError:
            continue
        found.append(kv_format)
    return found


def _bytes_per_number(kv_format: KVFormat) -> float:
    """With a share of the scales, at a usual dim."""
    sides = (kv_format.keys, kv_format.values)
    return sum(side.record_bytes(_USUAL_DIM) for side in sides) / (len(sides) * _USUAL_DIM)


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
    added_layers: str | None

    def layer_bytes(self, dtype: torch.dtype, kv_format: KVFormat | None) -> tuple[int, ...]:
        if kv_format is not None:
            return tuple(_record_bytes(kv_format, each) for each in self.shapes)
        pairs = zip(self.elements, self.fixed_bytes, strict=True)
        return tuple(count * dtype.itemsize + fixed for count, fixed in pairs)


def _record_bytes(kv_format: KVFormat, shapes: tuple[tuple[int, int], ...]) -> int:
    """Of one token in a layer, whose K and V have these heads and dims; none where it keeps none."""
    if not shapes:
        return 0
    (key_heads, key_dim), (value_heads, value_dim) = shapes
    kv_format.check(key_dim, value_dim)
    return key_heads * kv_format.keys.record_bytes(key_dim) + value_heads * kv_format.values.record_bytes(value_dim)


@functools.lru_cache(maxsize=64)
@torch.no_grad()
def _measure(build: _Build) -> _Sizes:
    model = compat.build_on_meta(build.kind, build.config)
    one = torch.zeros(1, 1, dtype=torch.long, device="meta")
    decoder = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=decoder)
    if model.config.is_encoder_decoder:
        both = EncoderDecoderCache(cache, DynamicCache(config=decoder))
        given = {"decoder_input_ids": one, CACHE_NAME: both}
    else:
        given = {"attention_mask": one + 1, CACHE_NAME: cache}
    model(input_ids=one, **given, use_cache=True)
    elements, fixed_bytes, shapes = [], [], []
    layout = compat.cache_layout(decoder)
    layers = zip(cache.layers, layout.places, strict=False)  # there may be more of them by now
    for layer in (layer for layer, place in layers if place is not None):
        # Layers that read the K and V of another one keep none.
        kept = [] if layer.keys is None else [layer.keys, layer.values]
        counts = [(tensor.shape[1] * tensor.shape[3], tensor.dtype) for tensor in kept]
        shapes.append(tuple(tensor.shape[1::2] for tensor in kept))
        elements.append(sum(count for count, dtype in counts if dtype == _MEASURED_DTYPE))
        fixed_bytes.append(sum(count * dtype.itemsize for count, dtype in counts if dtype != _MEASURED_DTYPE))
    weight_elements = sum(tensor.numel() for tensor in model.parameters())
    added = compat.added_layers(cache, layout)
    return _Sizes(tuple(elements), tuple(fixed_bytes), tuple(shapes), weight_elements, added)
