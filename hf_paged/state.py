"""A layer that keeps a convolutional or recurrent state beside its K and V."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from hf_paged import compat
from hf_paged.layer import PAGED_ATTRIBUTES, PagedLayer

if TYPE_CHECKING:
    from hf_paged.cache import PagedCache


class PagedStateLayer(LinearAttentionLayer, PagedLayer):
    """K and V in blocks, the state as stock keeps it.

    Args:
        cache: the layer's cache.
        index: its number among the layers that keep K and V.
        stock: the layer that stock would have.
    """

    is_compileable = False
    # Of the state, which its first update sets; K and V say theirs in `store`.
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def __init__(self, cache: PagedCache, index: int, stock: Any):
        compat.init_state(self, stock)
        PagedLayer.__init__(self, cache, index)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Make room for a state, which is given by name; memory for K and V comes with their first update."""
        if kwargs:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def get_max_length(self) -> int:
        """The sliding window in tokens, -1 where there is none."""
        return PagedLayer.get_max_length(self)

    def activate_past_recording(self) -> None:
        """Keep what is needed to go back, until the next `crop`."""
        self.record_past = True

    def reset(self) -> None:
        """Empty the layer (its K and V with those of the others)."""
        PagedLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """As `PagedCache.crop` (with the other layers)."""
        PagedLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """As `PagedCache.reorder_cache` (with the other layers)."""
        PagedLayer.reorder_cache(self, beam_idx)

    def offload(self) -> None:
        """Nothing to do: blocks move between tiers, and states are small."""

    def prefetch(self) -> None:
        """Nothing to do: blocks move between tiers, and states are small."""


def state_of(layer: LinearAttentionLayer) -> dict[str, Any]:
    """What a layer keeps besides K and V, by attribute."""
    return {name: value for name, value in vars(layer).items() if name not in PAGED_ATTRIBUTES}


def is_whole(layer: LinearAttentionLayer) -> bool:
    """Whether a state is what later tokens need, and neither more nor less because some may be taken back."""
    if not getattr(layer, "record_past", False):
        return True
    return all(
        state is None or state.shape[-1] == layer.conv_kernel_size[index] for index, state in layer.conv_states.items()
    )


def put_states(layers: Sequence[LinearAttentionLayer], states: Sequence[dict[str, Any]]) -> None:
    """Let layers go on from `states`, one of each, as `state_of` gives them."""
    for layer, state in zip(layers, states, strict=True):
        vars(layer).update(state)


def select_states(layers: Iterable[LinearAttentionLayer], rows: Sequence[int]) -> None:
    """Let row `i` go on from what row `rows[i]` was in."""
    for layer in layers:
        LinearAttentionLayer.reorder_cache(layer, torch.tensor(rows, device="cpu"))


def make_layers(cache: PagedCache) -> list[Any]:
    """The layers of a cache: K and V in blocks, states as stock keeps them."""
    places = cache.layout.places
    if not cache.layout.has_states and None not in places:
        return [PagedLayer(cache, place) for place in places]
    layers = []
    for place, stock in zip(places, compat.stock_cache(cache.model_config).layers, strict=True):
        if place is None:
            layers.append(stock)
        else:
            both = compat.keeps_state(stock)
            layers.append(PagedStateLayer(cache, place, stock) if both else PagedLayer(cache, place))
    return layers
