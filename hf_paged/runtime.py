"""`model.paged`: one patched model's settings, pool, statistics and knowledge of what it can do."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_paged import compat
from hf_paged.backends import backend_for
from hf_paged.cache import PagedCache
from hf_paged.config import PagedConfig
from hf_paged.footprint import footprint
from hf_paged.forward import ModelCall, fast_path_obstacle, run_decode, run_padded
from hf_paged.identity import Sampling
from hf_paged.packed import run_packed
from hf_paged.persist import load_prefixes, read_manifest, save_prefixes
from hf_paged.pool import KVPool
from hf_paged.prefixes import Prefixes, PrefixRoot
from hf_paged.probe import PROBE_SLOTS, Capability, probe
from hf_paged.stats import Counters, PagedStats, format_table
from hf_paged.step import UnsupportedAttentionError
from hf_paged.tiers import DiskTier


class PagedRuntime:
    """What `model.paged` is.

    Attributes:
        config: the `PagedConfig` in force.
    """

    def __init__(self, model: PreTrainedModel, config: PagedConfig):
        # What accelerate has offloaded from memory seems to be on "meta".
        if config.budget_bytes("disk") and model.device.type not in ("cpu", "meta"):
            raise ValueError(f"max_memory['disk']: only models on the CPU have a disk tier, this is on {model.device}")
        self.config = config
        self._model = weakref.ref(model)
        self._lock = threading.RLock()
        self._pool: KVPool | None = None
        self._pool_key: tuple[Any, ...] | None = None
        self._windows = compat.WindowMemo()
        self._capabilities: dict[tuple[Any, ...], Capability] = {}
        self._copied_before = self._evicted_before = 0
        self.counters = Counters()
        self._prefixes = Prefixes(model, config.prefix_caching, self.counters)

    # -- public --------------------------------------------------------------------------------------------------

    def stats(self) -> PagedStats:
        """Counters since patching or the last `reset_stats()`, and gauges that are true now."""
        pool = self._pool
        if pool is None:
            return self.counters.snapshot()
        return self.counters.snapshot(
            evicted_blocks=pool.manager.evicted - self._evicted_before,
            copied_blocks=pool.manager.copied_blocks - self._copied_before,
            blocks_in_use=pool.manager.in_use,
            blocks_cached=pool.manager.cached,
            bytes_in_use=pool.bytes_in_use,
            bytes_reserved=pool.bytes_reserved,
            **({} if pool.tier is None else pool.tier.gauges()),
        )

    def reset_stats(self) -> None:
        """Zero the counters; gauges stay true."""
        self.counters.reset()
        with self._lock:
            if self._pool is not None:
                self._copied_before = self._pool.manager.copied_blocks
                self._evicted_before = self._pool.manager.evicted

    def clear(self) -> None:
        """Forget every cached prefix, on every tier."""
        with self._lock:  # another thread may release the pool meanwhile
            self._prefixes.forget()
            if self._pool is not None:
                self._pool.forget_prefixes()

    def release(self) -> None:
        """Give the pool's memory and its files back to the system, cached prefixes included.

        The next `generate` takes what it needs again.

        Blocks of running calls, and of caches that are still held, stay theirs until they are gone.
        """
        with self._lock:
            self.clear()
            if self._pool is not None:
                self._close_tier(self._pool)
                if not self._pool.manager.in_use:
                    self._drop_pool()

    def save(self, folder: str | os.PathLike[str], cache_salt: str | None = None) -> int:
        """Write the cached prefixes of one salt (or of none) to safetensors files; returns the number of tokens.

        Those in memory: what lies on the disk tier only is not among them. They belong to the model as it is now. The
        folder is made where it does not exist; what an earlier `save` left there is replaced at once, when all is
        written. The manifest holds the salt.
        """
        model, root = self._model(), self._kept_under("save", cache_salt)
        return save_prefixes(model, self._current_pool(model), root, Path(folder))

    def load(self, folder: str | os.PathLike[str]) -> int:
        """Read what `save` has written, under the salt it was saved with; returns the number of tokens.

        Raises `ValueError` and loads nothing where files are missing or damaged, or belong to other weights, another
        dtype or config: it names the file or says what differs.
        """
        model = self._model()
        before = self._kept_under("load", None)
        manifest = read_manifest(model, Path(folder))
        root = self._kept_under("load", manifest["cache_salt"])
        if root.digest != before.digest:
            raise ValueError("load: the model has changed meanwhile; nothing was loaded")
        device = compat.compute_device(model)
        return load_prefixes(self._current_pool(model), root.key, Path(folder), manifest["files"], device)

    def _kept_under(self, what: str, salt: str | None) -> PrefixRoot:
        """Root of the prefixes to save or load; `ValueError` where none are kept."""
        root = self._prefixes.root(salt, self._current_pool(self._model()))
        if root is None:
            raise ValueError(f"{what}: no prefixes are kept for this model: {self._prefixes.obstacle()}")
        return root

    def __repr__(self) -> str:
        model = self._model()
        name = "?" if model is None else type(model).__name__
        backend = self.config.attention_backend
        if model is not None:
            backend = backend_for(backend, compat.compute_device(model)).describe()
        return format_table(
            self.stats(), f"hf_paged on {name} ({backend} attention, {self.config.block_size} tokens a block)"
        )

    # -- for the glue --------------------------------------------------------------------------------------------

    def begin_look(self) -> Sampling | None:
        """Begins to find out, on other threads, whether the weights are as they were; `new_cache` takes the answer."""
        return self._prefixes.begin_look()

    def new_cache(self, room_tokens: int, salt: str | None = None, begun: Sampling | None = None) -> PagedCache:
        """An empty cache on the model's pool for sequences that grow by about `room_tokens`.

        Its rows begin with what calls of the same `salt` have left. `begun`: what `begin_look` gave.
        """
        model = self._model()
        pool = self._current_pool(model)
        cache = PagedCache(model.config, pool=pool, settings=self.config, windows=self.windows())
        cache.room_tokens, cache.held_by_user = room_tokens, False
        cache.root = self._prefixes.root(salt, pool, begun)
        return cache

    def check_root(self, cache: PagedCache, salt: str | None) -> None:
        """A cache that comes back: its rows stay in the prefix index only if model and salt are as they were then."""
        if cache.root is not None and (cache.root.salt != salt or not cache.root.holds()):
            cache.untrack()

    def windows(self) -> list[int | None]:
        """The sliding window of each layer; `ValueError` where a layer keeps something else than K and V."""
        return self._windows.of(self._model().config.get_text_config(decoder=True))

    def _current_pool(self, model: PreTrainedModel) -> KVPool:
        """The pool; a new one where the model has changed its dtype or device."""
        with self._lock:
            device = compat.compute_device(model)
            key = (model.dtype, device, compat.autocast_dtype(device), self.windows())
            if self._pool is not None and self._pool_key != key:
                self._pool.manager.forget_prefixes()  # caches that are still held keep the rest of it alive
                self._drop_pool()
            if self._pool is None:
                self._pool, self._pool_key = self._make_pool(model), key
            self._open_tier(self._pool)
            return self._pool

    def _drop_pool(self) -> None:
        self._close_tier(self._pool)
        self._pool = self._pool_key = None
        self._copied_before = self._evicted_before = 0

    @staticmethod
    def _close_tier(pool: KVPool) -> None:
        if pool.tier is not None:
            pool.tier.close()

    def _open_tier(self, pool: KVPool) -> None:
        """Give the pool a disk tier where it is to have one and has none, or one that `release` has closed."""
        budget_bytes, folder = self.config.budget_bytes("disk"), self.config.offload_folder
        if budget_bytes and (pool.tier is None or pool.tier.is_closed):
            base = None if folder is None else Path(folder)
            pool.tier = DiskTier(pool.manager, pool.stores, budget_bytes, base, self.counters)

    def _make_pool(self, model: PreTrainedModel, max_slots: int | None = None) -> KVPool:
        layer_bytes = footprint(model._hf_paged_original, model.config, model.dtype).layer_bytes
        return KVPool(self.config, self.windows(), layer_bytes, compat.compute_device(model), max_slots)

    def capability(self, call: Callable[..., Any]) -> Capability:
        """What the fast path does for the model as it is now; found out by trying, once."""
        model = self._model()
        key = (
            model.training,
            model.dtype,
            compat.autocast_dtype(compat.compute_device(model)),
            compat.attention_name(model.config),
            self.config.attention_backend,
        )
        found = self._capabilities.get(key)
        if found is None:
            found = self._capabilities[key] = probe(model, call, self._make_pool(model, PROBE_SLOTS), self.config)
        if self.config.verify and found.obstacle is not None:
            raise ValueError(f"verify: the paged path does not reproduce this model's logits: {found.obstacle}")
        return found

    def run(self, call: Callable[..., Any], cache: PagedCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model with a paged cache: fast where that is exact, padded otherwise.

        Raises `PagedMemoryError` where the new tokens do not fit and `ValueError` for a cache of another model or
        batch size.
        """
        model = self._model()
        if args and "input_ids" not in kwargs:
            kwargs, args = {"input_ids": args[0], **kwargs}, args[1:]
        inputs = kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if args or inputs is None or inputs.dim() not in (2, 3):
            return call(*args, **kwargs)
        self._check_owner(cache, model)
        if cache.sequences.pool is None:
            cache.sequences.pool = self._make_pool(model)
        cache.ensure_rows(inputs.shape[0])
        if cache.root is not None and not cache.generating:
            cache.untrack()  # nobody checks what a caller of their own does to the model between two passes
        request = ModelCall(call, kwargs, inputs, _padding(kwargs, inputs), cache.prefilling and not cache.assisted)
        lengths = [table.num_tokens for table in cache.tables]
        try:
            outputs, computed_tokens, reused_tokens = self._run_best(request, cache, lengths)
        except BaseException:
            cache.roll_back(lengths)
            raise
        if cache.prefilling:
            self._count_prompt(request, cache, computed_tokens, reused_tokens)
            cache.end_prompt()
        cache.trim()
        return outputs

    @staticmethod
    def _check_owner(cache: PagedCache, model: PreTrainedModel) -> None:
        """`ValueError` for a cache that another model has filled or was made for."""
        if cache.owner is None:
            if compat.kv_shape(cache.model_config) != compat.kv_shape(model.config.get_text_config(decoder=True)):
                raise ValueError(
                    "past_key_values is a PagedCache for a model of another shape; make one with "
                    "PagedCache(model.config) of the model that generates"
                )
            cache.owner = weakref.ref(model)
        elif cache.owner() is not model:
            raise ValueError(
                "past_key_values is a PagedCache that another model has filled; its K and V mean nothing to this "
                "one. Pass a cache that this model returned, or none"
            )

    def _run_best(self, request: ModelCall, cache: PagedCache, lengths: list[int]) -> tuple[Any, int, int]:
        """The model's outputs, and the numbers of tokens that were computed, and that earlier calls had computed."""
        capability = self.capability(request.call)
        obstacle = capability.obstacle or fast_path_obstacle(request, cache, capability.window_limit)
        backend = backend_for(self.config.attention_backend, request.inputs.device)
        if obstacle is None:
            try:
                if request.tokens == 1:
                    return run_decode(request, cache, backend), request.rows, 0
                return run_packed(request, cache, backend, capability.keeps_logits)
            except UnsupportedAttentionError as error:
                obstacle = str(error)
                cache.roll_back(lengths)
            if lengths and not cache.tables:
                raise RuntimeError(f"past_key_values was lost: {obstacle}, in the middle of a pass") from None
        if cache.chunk_tokens is not None:
            raise UnsupportedAttentionError(obstacle)
        if not cache.fell_back:
            cache.fell_back = True
            self.counters.fall_back(obstacle)
        return run_padded(request, cache), request.real_tokens, 0

    def _count_prompt(self, request: ModelCall, cache: PagedCache, computed_tokens: int, reused_tokens: int) -> None:
        drafted = 0
        if cache.assisted:
            # The first pass of assisted decoding checks a draft too; it is always that of one row.
            drafted = max(0, int(request.kwargs.get("logits_to_keep") or 1) - 1)
            cache.prefilling = False
        self.counters.add(
            prompt_tokens=request.real_tokens - drafted,
            computed_tokens=computed_tokens - drafted,
            reused_tokens=reused_tokens,
            shared_tokens=request.real_tokens - computed_tokens - reused_tokens,
        )


def _padding(kwargs: dict[str, Any], inputs: torch.Tensor) -> torch.Tensor | None:
    """Which new columns are real, `[batch, tokens]` bool on the CPU; `None`: all."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[0] != inputs.shape[0]:
        return None
    columns = mask[:, -inputs.shape[1] :].bool().cpu()
    return None if columns.shape[1] != inputs.shape[1] or columns.all() else columns
