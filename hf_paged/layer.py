"""One layer of a `PagedCache`: where transformers hands over K and V and asks for lengths."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from hf_paged import compat
from hf_paged.compat import CACHE_NAME
from hf_paged.dense import DenseView
from hf_paged.errors import ForeignKVError
from hf_paged.lazy import PagedKV
from hf_paged.store import LayerStore

if TYPE_CHECKING:
    from hf_paged.cache import PagedCache
    from hf_paged.step import Step

# What `PagedLayer` itself sets; a layer that also keeps a state has more.
PAGED_ATTRIBUTES = frozenset(("_cache", "index", "window", "sliding_window", "record_past", "seen", "kept", "done"))


class PagedLayer(CacheLayerMixin):
    """One layer of a `PagedCache`. Layers move together: their rows and lengths are those of the cache.

    An operation called layer by layer takes effect with the first layer and is ticked off by the others.

    Args:
        cache: the layer's cache.
        index: its number among the layers that keep K and V.
    """

    is_croppable = True
    is_compileable = False

    def __init__(self, cache: PagedCache, index: int):
        self._cache = weakref.ref(cache)
        self.index = index
        self.window = cache.windows[index]
        if self.window is not None:
            self.sliding_window = self.window
        self.record_past = False
        self.seen = 0  # dense columns
        self.kept = 0  # of these, what stock's window layer would still hold
        self.done = 0  # operations of the cache's pending ones

    @property
    def cache(self) -> PagedCache:
        """The cache that the layer belongs to."""
        cache = self._cache()
        if cache is None:
            raise ReferenceError("the PagedCache of this layer is gone; keep it alive while its layers are used")
        return cache

    @property
    def store(self) -> LayerStore | None:
        """The layer's memory, `None` before the first update."""
        pool = self.cache.sequences.pool
        return None if pool is None else pool.stores[self.index]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new K and V `[batch, kv_heads, tokens, dim]`; returns those of all tokens.

        Raises `ValueError` for K and V of another model or batch size, or that need gradients.
        """
        if (key_states.requires_grad or value_states.requires_grad) and torch.is_grad_enabled():
            raise ValueError(
                f"{CACHE_NAME}: a PagedCache carries no gradients; call the model under torch.no_grad(), or train "
                "with use_cache=False or a DynamicCache"
            )
        key_states, value_states = compat.as_attended(key_states, value_states)
        cache = self.cache
        step = cache.step
        if step is not None and step.fast:
            plan = step.plans[self.index]
            self._check_tokens(key_states, plan.num_queries)
            store = cache.sequences.pool.layer(self.index, key_states, value_states)
            if step.reads_rows and plan.span is not None:
                return store.append_rows(plan.span, key_states, value_states)
            step.backend.write(store, plan, key_states, value_states)
            return (
                PagedKV(key_states, step, store, self.index, False),
                PagedKV(value_states, step, store, self.index, True),
            )
        if step is None or (not step.planned and self.seen == cache.dense_len):
            cache.begin_unplanned(key_states)
            step = cache.step
        elif not step.planned and self.seen + step.tokens_per_row != cache.dense_len:
            raise ValueError(f"layer {self.index} of {CACHE_NAME} has seen {self.seen} of {cache.dense_len} tokens")
        self._check_tokens(key_states, len(cache.tables) * step.tokens_per_row)
        store = cache.pool.layer(self.index, key_states, value_states)
        visible, _ = self.get_mask_sizes(step.tokens_per_row)
        self.move_to(self.seen + step.tokens_per_row)
        if step.keeps_nothing:
            return key_states, value_states
        reader = step.readers.get(store.group)
        if reader is not None:
            keys, values = reader.update(store, step.plans[self.index], key_states, value_states)
        else:
            store.write(step.plans[self.index], key_states, value_states)
            dense = step.dense(store.group)
            keys, values = store.read(lambda memory: dense.of(memory, visible))
        if step.hands_out:
            return keys.clone(), values.clone()
        return (keys.contiguous(), values.contiguous()) if cache.copies_dense else (keys, values)

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedLayer:
        """A cache is copied as a whole; models that copy layers alone put them beside those that there are."""
        raise ValueError(
            f"a layer of {CACHE_NAME} is to be copied: a PagedCache has the layers that the config names, a "
            "DynamicCache takes more; copy the cache as a whole"
        )

    def _check_tokens(self, key_states: torch.Tensor, expected: int) -> None:
        given = key_states.shape[0] * key_states.shape[2]
        if given != expected:
            raise ForeignKVError(
                f"layer {self.index} of {CACHE_NAME} is given K and V of {given} tokens in a pass over {expected}; "
                "a PagedCache keeps those of the sequence only, a DynamicCache takes any"
            )

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: memory comes with the first update."""

    @property
    def is_initialized(self) -> bool:
        """Whether the layer has stored anything."""
        return self.store is not None and self.seen > 0

    @property
    def keys(self) -> torch.Tensor | None:
        """Dense keys `[batch, kv_heads, tokens, dim]`, `None` before the first update."""
        return None if not self.is_initialized else self._own(self.store.read_keys(self._view))

    @property
    def values(self) -> torch.Tensor | None:
        """Dense values `[batch, kv_heads, tokens, dim]`, `None` before the first update."""
        return None if not self.is_initialized else self._own(self.store.read_values(self._view))

    def _own(self, dense: torch.Tensor) -> torch.Tensor:
        return dense if self.store.records else dense.clone()  # others may hold these blocks

    def _view(self, memory: torch.Tensor) -> torch.Tensor:
        return self._dense_view().of(memory, self.kept)

    def _dense_view(self) -> DenseView:
        cache = self.cache
        if cache.step is not None and cache.step.planned:
            return self._view_meanwhile(cache.step)
        cache.pool.bring_back(cache.tables)
        return DenseView(cache.tables, self.store.group, cache.dense_len, cache.columns)

    def _view_meanwhile(self, step: Step) -> DenseView:
        """For a model that does not only `update` (dory reads the past first): what the layer has seen by now."""
        whole = step.dense(self.store.group)  # or a refusal
        if self.seen == step.dense_len:
            return whole
        self.store.copy(step.plans[self.index])  # rows whose tails the update is to copy
        columns = None if step.columns is None else step.columns[:, : self.seen]
        lengths = [self.seen] * len(step.tables) if columns is None else columns.sum(dim=1).tolist()
        return DenseView(step.tables, self.store.group, self.seen, columns, lengths)

    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense keys and values as `keys` and `values` give them, where possible without a copy: only to be read."""
        dense = self._dense_view()
        return self.store.read(lambda memory: dense.of(memory, self.kept))

    def move_to(self, seen: int) -> None:
        """The layer has seen `seen` dense columns now."""
        added = seen - self.seen
        self.seen = seen
        self.kept += added
        if self.window is not None and not (added > 0 and self.record_past):
            self.kept = min(self.kept, self.window - 1)
        self.kept = max(0, min(self.kept, seen))

    @property
    def cumulative_length(self) -> int:
        """Dense columns seen; the name that stock's window layers use."""
        return self.seen

    @property
    def dtype(self) -> torch.dtype | None:
        """Of K and V, `None` before the first update."""
        return None if self.store is None else self.store.dtype

    @property
    def device(self) -> torch.device | None:
        """Of K and V, `None` before the first update."""
        return None if self.store is None else self.store.keys.device

    @property
    def is_sliding(self) -> bool:
        """Whether the layer attends to a window."""
        return self.window is not None

    def get_seq_length(self) -> int:
        """Dense columns seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the K and V that an update with `query_length` tokens will return."""
        if self.window is None:
            return self.seen + query_length, 0
        kept = min(self.seen, self.window - 1)
        return kept + query_length, self.seen - kept

    def get_max_length(self) -> int:
        """The sliding window in tokens, -1 where there is none."""
        return -1 if self.window is None else self.window

    get_max_cache_shape = get_max_length

    def offload(self) -> None:
        """Nothing to do: blocks move between tiers, not layers."""

    def prefetch(self) -> None:
        """Nothing to do: blocks move between tiers, not layers."""

    def activate_past_recording(self) -> None:
        """Show all columns of a window layer until the next `crop`, as stock's layers then hold them."""
        self.record_past = self.window is not None

    def reset(self) -> None:
        """Empty the layer (with the others)."""
        self._together("reset")

    def crop(self, tokens_to_remove: int) -> None:
        """As `PagedCache.crop` (with the other layers)."""
        self._together("crop", tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """As `PagedCache.reorder_cache` (with the other layers)."""
        self._together("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As `PagedCache.batch_repeat_interleave` (with the other layers)."""
        self._together("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Any) -> None:
        """As `PagedCache.batch_select_indices` (with the other layers)."""
        self._together("batch_select_indices", indices)

    def _together(self, operation: str, *arguments: Any) -> None:
        """Carry out an operation that every layer is about to be asked for, once."""
        cache = self.cache
        key = (operation, *(a.tolist() if isinstance(a, torch.Tensor) else a for a in arguments))
        if self.done == len(cache.pending):
            getattr(cache, operation)(*arguments)
            cache.pending.append(key)
        elif cache.pending[self.done] != key:
            raise ValueError(
                f"layers of a PagedCache move together: layer {self.index} was asked for {key}, others for "
                f"{cache.pending[self.done]}; call the method on {CACHE_NAME} instead"
            )
        self.done += 1
        if all(layer.done == len(cache.pending) for layer in cache.paged_layers):
            cache.pending.clear()
            for layer in cache.paged_layers:
                layer.done = 0
