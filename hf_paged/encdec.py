"""The cache of an encoder-decoder model: decoder tokens in blocks, and K and V of each encoder input once."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from hf_paged.cache import PagedCache
from hf_paged.lazy import SharedRows
from hf_paged.portable import as_stock, dense_copy, reduced
from hf_paged.sequences import chosen_rows


class PagedEncoderDecoderCache(EncoderDecoderCache):
    """Self-attention in a `PagedCache`; cross-attention in blocks of the same pool.

    Args:
        decoder: an empty cache on the model's pool.
    """

    self_attention_cache: PagedCache
    cross_attention_cache: CrossCache

    def __init__(self, decoder: PagedCache):
        decoder.keeps_rows = True  # each row belongs to an encoder input
        super().__init__(decoder, CrossCache(decoder))

    def note_inputs(self, encoder_outputs: Any) -> None:
        """Before the first pass: which rows have the same encoder output `[rows, tokens, hidden]`, given as the first.

        Without outputs, rows are taken to be different.
        """
        rows = self.cross_attention_cache.rows
        if encoder_outputs is not None and not rows.owners:
            rows.note(encoder_outputs[0])

    def release(self) -> None:
        """Give every block back at once; the cache is empty then."""
        self.self_attention_cache.release()
        self.cross_attention_cache.reset()
        self.is_updated = dict.fromkeys(self.is_updated, False)

    def reset(self) -> None:
        """Empty the cache; its blocks go back to the pool."""
        self.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedEncoderDecoderCache:
        twin = memo[id(self)] = object.__new__(PagedEncoderDecoderCache)
        vars(twin).update(deepcopy(vars(self), memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        decoder = self.self_attention_cache
        cross = as_stock(decoder, self.cross_attention_cache.layers)
        return reduced(EncoderDecoderCache(as_stock(decoder), cross))

    def check_dynamic_cache(self, method: str) -> None:
        """Both caches can do all that a `DynamicCache` can."""


class CrossRows:
    """The encoder's outputs of a batch.

    Attributes:
        inputs: the distinct ones, a row of tokens each; empty before the first update.
        owners: which of them each row of the batch reads.
    """

    def __init__(self, inputs: PagedCache):
        self.inputs = inputs
        self.owners: list[int] = []

    def note(self, states: torch.Tensor) -> None:
        """Find the distinct ones among the encoder's outputs `[rows, tokens, hidden]`."""
        firsts: list[int] = []
        self.owners = []
        for row in range(len(states)):
            candidates = range(len(firsts) - 1, -1, -1)  # a copy comes right after its original
            owner = next((each for each in candidates if torch.equal(states[firsts[each]], states[row])), len(firsts))
            if owner == len(firsts):
                firsts.append(row)
            self.owners.append(owner)

    def firsts(self, num_rows: int) -> list[int]:
        """The first row of each distinct output; where nothing was noted, rows are taken to be distinct."""
        if not self.owners:
            self.owners = list(range(num_rows))
        return [self.owners.index(each) for each in range(max(self.owners) + 1)]


class CrossCache(Cache):
    """K and V of the encoder's output: one sequence in blocks for each distinct one, whatever the number of rows.

    Beams and samples of an input read the same blocks; when beams change places, only `rows.owners` does.
    """

    layers: list[CrossLayer]

    def __init__(self, decoder: PagedCache):
        layout = replace(decoder.layout, windows=[None] * len(decoder.windows))
        pool, settings = decoder.sequences.pool, decoder.settings
        self.rows = CrossRows(PagedCache(decoder.model_config, pool=pool, settings=settings, layout=layout))
        self.rows.inputs.room_tokens = 0
        super().__init__(layers=[CrossLayer(self.rows, index) for index in range(len(decoder.layers))])

    def reset(self) -> None:
        """Empty the cache; its blocks go back to the pool."""
        self.rows.inputs.release()
        self.rows.owners = []
        self._forget_views()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `i` goes on with the encoder input of row `beam_idx[i]`."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times in a row."""
        self._select([row for row in range(len(self.rows.owners)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the rows `indices`: numbers or a mask, in a tensor or a list."""
        self._select(indices)

    def _select(self, indices: Any) -> None:
        before = self.rows.owners
        if before and before != (owners := [before[row] for row in chosen_rows(indices, len(before))]):
            self.rows.owners = owners
            self._forget_views()

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, None]]:
        """Of each layer K and V of all rows, copied, and that there is no window."""
        for layer in self.layers:
            keys, values = (None if each is None else dense_copy(each) for each in (layer.keys, layer.values))
            yield keys, values, None

    def _forget_views(self) -> None:
        for layer in self.layers:
            layer.views = None

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to do: decoder tokens are not kept here."""

    def __repr__(self) -> str:
        return f"CrossCache(rows={len(self.rows.owners)}, distinct={len(self.rows.inputs.tables)})"


class CrossLayer(CacheLayerMixin):
    """One layer of a `CrossCache`."""

    is_sliding = False
    is_croppable = True

    def __init__(self, rows: CrossRows, index: int):
        self._rows = rows
        self._index = index
        self.views: tuple[SharedRows, ...] | None = None  # K and V as they were last asked for

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store K and V `[rows, kv_heads, tokens, dim]` of the encoder's output, once; returns them for all rows."""
        firsts = self._rows.firsts(len(key_states))
        if len(firsts) < len(key_states):
            index = torch.tensor(firsts, device=key_states.device)
            key_states, value_states = key_states.index_select(0, index), value_states.index_select(0, index)
        self._rows.inputs.update(key_states, value_states, self._index)
        self.views = None
        return self.keys, self.values

    def _view(self, number: int) -> SharedRows | None:
        if not self.is_initialized:
            return None
        if self.views is None:
            distinct = self._rows.inputs.layers[self._index].views()
            self.views = tuple(SharedRows(each, self._rows.owners) for each in distinct)
        return self.views[number]

    @property
    def keys(self) -> torch.Tensor | None:
        """`[rows, kv_heads, tokens, dim]`, `None` before the first update."""
        return self._view(0)

    @property
    def values(self) -> torch.Tensor | None:
        """`[rows, kv_heads, tokens, dim]`, `None` before the first update."""
        return self._view(1)

    @property
    def is_initialized(self) -> bool:
        """Whether the encoder's K and V are stored."""
        return self.get_seq_length() > 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: memory comes with the first update."""

    def get_seq_length(self) -> int:
        """Encoder tokens."""
        return self._rows.inputs.layers[self._index].seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the K and V."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """There is no limit: -1."""
        return -1

    get_max_cache_shape = get_max_length

    def __deepcopy__(self, memo: dict[int, Any]) -> CrossLayer:
        return CrossLayer(deepcopy(self._rows, memo), self._index)


def paged_part(cache: object) -> PagedCache | None:
    """The cache of the decoder's tokens in whatever a patched model is called with; `None` where that is not ours."""
    if isinstance(cache, PagedEncoderDecoderCache):
        return cache.self_attention_cache
    return cache if isinstance(cache, PagedCache) else None
