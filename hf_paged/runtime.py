"""`model.paged`: one patched model's settings, pool, statistics and knowledge of what it can do."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_paged import compat
from hf_paged.backends import backend_for, plain_torch_reason
from hf_paged.cache import PagedCache
from hf_paged.capabilities import Capabilities
from hf_paged.config import PagedConfig
from hf_paged.core.forks import new_rlock, tell_forks
from hf_paged.encdec import PagedEncoderDecoderCache
from hf_paged.equal_rows import share_equal_rows
from hf_paged.errors import PoolInUseError
from hf_paged.faster_layers import describe, take_layers
from hf_paged.footprint import footprint_of
from hf_paged.forward import (
    PADDING_SHOWN,
    ModelCall,
    fast_path_obstacle,
    run_decode,
    shows_padding,
    take_apart,
)
from hf_paged.identity import Sampling
from hf_paged.limits import compute_devices, misplaced_limit
from hf_paged.matmul import multiplied_faster
from hf_paged.noted import fast_or_padded, note_padded, note_unkept
from hf_paged.packed import run_packed, would_cut
from hf_paged.persist import load_prefixes, read_manifest, save_prefixes
from hf_paged.pool import KVPool
from hf_paged.prefixes import Prefixes, PrefixRoot
from hf_paged.probe import Capability
from hf_paged.replay import DecodeGraphs
from hf_paged.resume import StockShaped
from hf_paged.running import RunningCalls
from hf_paged.stats import Counters, PagedStats, format_table
from hf_paged.stepwise import Stepwise
from hf_paged.streams import TIERED_DEVICES
from hf_paged.verify import Verification
from hf_paged.watched import one_pass


class PagedRuntime:
    """What `model.paged` is.

    Attributes:
        config: the `PagedConfig` in force.
        attention_configs: of the model and its parts; each names an implementation of attention.
        calls: that run on the model, begun before this was made or after that.
        is_leaving: whether the model is unpatched at the end of these, or was patched anew.
    """

    def __init__(self, model: PreTrainedModel, config: PagedConfig, calls: RunningCalls | None = None):
        # What accelerate has offloaded from memory seems to be on "meta".
        for key in ("cpu", "disk"):
            if config.budget_bytes(key) and model.device.type not in (*TIERED_DEVICES, "meta"):
                raise ValueError(f"max_memory[{key!r}]: only models on the CPU or a CUDA device, not on {model.device}")
        misplaced = misplaced_limit(config, compute_devices(model))
        if misplaced is not None:
            raise ValueError(misplaced)
        backend_for(config.attention_backend, compat.compute_device(model))  # says why, where it does not run
        if config.kv_format is not None:
            footprint_of(model, config.kv_format)  # says so where the format is not there for the model's dims
        self.config = config
        self.attention_configs = list(compat.attention_configs(model))
        self.calls = calls or RunningCalls()
        self.is_leaving = False
        self._model = weakref.ref(model)
        self._lock = new_rlock()
        tell_forks(self, self._lock)
        self._pool: KVPool | None = None
        self._pool_key: tuple[Any, ...] | None = None
        self._caches: weakref.WeakSet[PagedCache] = weakref.WeakSet()  # of calls that run, and such as were returned
        self._layout = compat.LayoutMemo()
        self._looked_at: tuple[compat.CacheLayout, str | None] | None = None  # and which layer of it is not used
        self._capabilities = Capabilities(config)
        self._copied_before = self._evicted_before = 0
        self._warned: set[str] = set()
        self._verification = Verification(config)
        self.counters = Counters()
        self._stock_shaped = StockShaped(self._capabilities, self.counters)
        self._stepwise = Stepwise(config, self._capabilities, self._stock_shaped, self.counters)
        self._prefixes = Prefixes(model, config.prefix_caching, self.counters)
        self._graphs = DecodeGraphs(model, config.cuda_graphs, self.counters)

    # -- public --------------------------------------------------------------------------------------------------

    def stats(self) -> PagedStats:
        """Counters since patching or the last `reset_stats()`, and gauges that are true now."""
        pool = self._pool
        if pool is None:
            return self.counters.snapshot(evicted_blocks=-self._evicted_before, copied_blocks=-self._copied_before)
        return self.counters.snapshot(
            evicted_blocks=pool.manager.evicted - self._evicted_before,
            copied_blocks=pool.manager.copied_blocks - self._copied_before,
            blocks_in_use=pool.manager.in_use,
            blocks_cached=pool.manager.cached,
            bytes_in_use=pool.bytes_in_use,
            bytes_reserved=pool.bytes_reserved,
            **pool.gauges(),
        )

    def reset_stats(self) -> None:
        """Zero the counters; gauges stay true."""
        self.counters.reset()
        with self._lock:
            self._copied_before = self._evicted_before = 0
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
        """Give the pool's memory back to the system, on every tier and with its files, cached prefixes included.

        CUDA graphs go with it. The next `generate` takes what it needs again. Blocks of running calls, and of caches
        that are still held, stay theirs until they are gone.
        """
        with self._lock:
            self._graphs.clear()
            if self._pool is not None:
                self.clear()
                self._pool.close_tiers()
                if not self._pool.manager.in_use:
                    self._drop_pool()

    def save(self, folder: str | os.PathLike[str], cache_salt: str | None = None) -> int:
        """Write the cached prefixes of one salt (or of none) to safetensors files; returns the number of tokens.

        Those in the pool: what lies only on the tiers below is not among them. They belong to the model as it is now.
        The folder is made where it does not exist; what an earlier `save` left there is replaced at once, when all is
        written. The manifest holds the salt.

        Raises `ValueError` where no prefixes are kept, or where this is not the model's runtime any more.
        """
        with self.calls.one_more():  # the model is not unpatched meanwhile
            model, root = self._model(), self._kept_under("save", cache_salt)
            return save_prefixes(model, self._current_pool(model), root, Path(folder))

    def load(self, folder: str | os.PathLike[str]) -> int:
        """Read what `save` has written, under the salt it was saved with; returns the number of tokens.

        Raises `ValueError` as `save` does, and loads nothing where files are missing or damaged, or belong to other
        weights, another dtype or config: it names the file or says what differs.
        """
        with self.calls.one_more():
            model, before = self._model(), self._kept_under("load", None)
            pool = self._current_pool(model)
            manifest = read_manifest(model, pool, Path(folder))
            root = self._kept_under("load", manifest["cache_salt"])
            if root.digest != before.digest:
                raise ValueError("load: the model has changed meanwhile; nothing was loaded")
            device = compat.compute_device(model)
            return load_prefixes(pool, root.key, Path(folder), manifest["files"], device)

    def _kept_under(self, what: str, salt: str | None) -> PrefixRoot:
        """Root of the prefixes to save or load; `ValueError` where there are none."""
        if self.is_leaving:
            raise ValueError(f"{what}: the model is not patched any more, or was patched anew: ask its model.paged")
        obstacle = self._prompt_obstacle()
        if obstacle is not None:
            raise ValueError(f"{what}: prefixes of this model are not written to files: {obstacle}")
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
        stored = "" if self.config.kv_format is None else f", {self.config.kv_cache_dtype} KV"
        products = "" if model is None else f"; linear layers: {describe(model)}"
        how = f"{backend} attention, {self.config.block_size} tokens a block{stored}{products}"
        return format_table(self.stats(), f"hf_paged on {name} ({how})")

    # -- for the glue --------------------------------------------------------------------------------------------

    def begin_look(self) -> Sampling | None:
        """Begins to find out, on other threads, whether the weights are as they were; `new_cache` takes the answer."""
        return self._prefixes.begin_look()

    def new_cache(
        self, room_tokens: int, salt: str | None = None, begun: Sampling | None = None
    ) -> PagedCache | PagedEncoderDecoderCache:
        """An empty cache on the model's pool for sequences that grow by about `room_tokens`.

        Its rows begin with what calls of the same `salt` have left. `begun`: what `begin_look` gave.
        Raises `PoolInUseError` where others need the pool that is there, and this call another one.
        """
        model = self._model()
        with self._lock:
            pool = self._current_pool(model)
            cache = PagedCache(model.config, pool=pool, settings=self.config, layout=self.layout())
            cache.room_tokens, cache.held_by_user = room_tokens, False
            self._caches.add(cache)
        if not model.config.is_encoder_decoder:
            cache.root = self._prefixes.root(salt, pool, begun)
        elif self.config.prefix_caching:
            self.counters.fall_back(f"prefixes not reused: {self._prompt_obstacle()}")
        if cache.states and pool.tiers is not None:
            self.counters.fall_back("no prefixes on lower tiers: layers that keep a state")
        slow = plain_torch_reason(self.config.attention_backend, pool.device)
        if slow is not None:
            self.counters.fall_back(slow)
        return PagedEncoderDecoderCache(cache) if model.config.is_encoder_decoder else cache

    def check_root(self, cache: PagedCache, salt: str | None) -> None:
        """A cache that comes back: its rows stay in the prefix index only if model and salt are as they were then."""
        if cache.root is not None and (cache.root.salt != salt or not cache.root.holds()):
            cache.untrack()

    def layout(self) -> compat.CacheLayout:
        """What each layer keeps; `ValueError` where that cannot be kept in a `PagedCache`."""
        return self._layout.of(self._model().config.get_text_config(decoder=True))

    def unfit(self, call: Callable[..., Any]) -> str | None:
        """Why the model cannot be run on blocks at all, or `None`. `call`: its stock `__call__`."""
        try:
            layout = self.layout()
        except ValueError as error:
            return str(error)
        if self._prompt_obstacle() is None:
            found = self.capability(call)
            if found.unfit is not None or found.layer_bytes is not None:
                return found.unfit
        if self._looked_at is None or self._looked_at[0] is not layout:
            sizes = footprint_of(self._model())
            self._looked_at = layout, sizes.added_layers or compat.idle_layer(layout.places, sizes.layer_bytes)
        return self._looked_at[1]

    def _prompt_obstacle(self) -> str | None:
        """Why prompts of the model are never packed, and nothing of them is written to files; or `None`."""
        if self._model().config.is_encoder_decoder:
            return "encoder-decoder model"
        return "layers that keep a state" if self.layout().has_states else None

    def _current_pool(self, model: PreTrainedModel) -> KVPool:
        """The pool; a new one where the model has changed its dtype or device. Raises `PoolInUseError`."""
        with self._lock:
            device = compat.compute_device(model)
            key = (model.dtype, device, compat.autocast_dtype(device), compat.own_forward(model), self.layout().windows)
            self.mend()
            if self._pool is not None and self._pool_key != key:
                self._check_unused()
                self._pool.forget_prefixes()  # caches that are still held keep the rest of it alive
                self._drop_pool()
            if self._pool is None:
                self._pool, self._pool_key = self._make_pool(model), key
                take_layers(model)  # again: they may have been elsewhere, or in another dtype
            # Of no use are K and V without a state behind them, and states go before their blocks, and not to tiers.
            self._pool.open_tiers(self.config, self.counters, takes_evicted=not self.layout().has_states)
            return self._pool

    def _check_unused(self) -> None:
        """`PoolInUseError` where calls of other threads need the pool: autocast is on or off in each thread alone."""
        is_used = any(not cache.held_by_user for cache in self._caches)
        if is_used and self.calls.in_other_threads():
            raise PoolInUseError(
                "calls of other threads keep K and V of another dtype (autocast), or elsewhere, or of another forward"
            )

    def mend(self) -> None:
        """Have done with a pool of which nobody knows any more who holds what; other calls on it run to their ends."""
        with self._lock:
            if self._pool is not None and self._pool.manager.is_torn:
                self._graphs.clear()
                self._drop_pool()

    def after_fork(self, was_locked: bool) -> None:
        """In a forked process nobody gives back what the calls of other threads hold: it is left with their pool."""
        if (self.calls.forget_other_threads() or was_locked) and self._pool is not None:
            self._drop_pool()

    def _drop_pool(self) -> None:
        self._pool.close_tiers()
        self._copied_before -= self._pool.manager.copied_blocks  # the next pool begins at zero, the counters go on
        self._evicted_before -= self._pool.manager.evicted
        self._pool = self._pool_key = None

    def _make_pool(self, model: PreTrainedModel, config: PagedConfig | None = None) -> KVPool:
        config, windows = config or self.config, self.layout().windows
        misplaced = misplaced_limit(config, compute_devices(model))
        if misplaced is not None:  # the model has moved since it was patched
            self.counters.fall_back(misplaced)
            self._warn("takes what memory is free", misplaced)
        seen = self._capabilities.seen(model)
        layer_bytes, layer_devices = (None, None) if seen is None else (seen.layer_bytes, seen.layer_devices)
        if config.kv_format or layer_bytes is None or len(layer_bytes) != len(windows):
            layer_bytes = footprint_of(model, config.kv_format).layer_bytes
        first = layer_devices[0] if layer_devices else compat.compute_device(model)
        return KVPool(config, windows, layer_bytes, first, layer_devices=layer_devices)

    def capability(self, call: Callable[..., Any]) -> Capability:
        """What the fast path does for the model as it is now; found out by trying, once."""
        found, is_news = self._capabilities.of(self._model(), call)
        if is_news and found.obstacle is not None and found.unfit is None:
            self._warn("takes the padded path, right but not faster than stock", found.obstacle)
        return found

    def hand_over(self, reason: str) -> None:
        """Count a `generate` that is left to stock, and say so once."""
        self.counters.fall_back(f"stock generate: {reason}")
        self._warn("is left to stock generate", reason)

    def _warn(self, what: str, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"hf_paged: {type(self._model()).__name__} {what}: {reason}", stacklevel=2)

    def verify(self) -> None:
        """What `config.verify` asks for, once: `ValueError` where the model does not answer as it should."""
        self._verification.run(self._model())

    def run(self, call: Callable[..., Any], cache: PagedCache, kwargs: dict[str, Any]) -> Any:
        """Call the model with a paged cache: fast where that is exact, padded otherwise.

        Raises `PagedMemoryError` where the new tokens do not fit and `ValueError` for a cache of another model or
        batch size.
        """
        request = take_apart(call, cache, kwargs, own_attention=not self.attention_configs)
        if request is None:
            return call(**kwargs)
        self._begin_pass(request, cache)
        lengths = [table.num_tokens for table in cache.tables]
        try:
            with self._prefixes.passing(), self._graphs.passing(), one_pass(), multiplied_faster():
                outputs, computed_tokens, reused_tokens = self._run_best(request, cache, lengths)
        except BaseException:
            cache.roll_back(lengths)
            both = kwargs[compat.CACHE_NAME]
            if both is not cache and cache.dense_len == 0:
                both.release()
            raise
        if cache.prefilling:
            if cache.fell_back and cache.dense_len == request.tokens > cache.pool.block_size:
                self._share_equal_rows(cache)
            self._count_prompt(request, cache, computed_tokens, reused_tokens)
            cache.end_prompt()
        cache.trim()
        return outputs

    def _begin_pass(self, request: ModelCall, cache: PagedCache) -> None:
        """Have an owner, a pool and rows for the cache. Raises `ValueError` for that of another model or batch size."""
        model, both = self._model(), request.kwargs[compat.CACHE_NAME]
        self._check_owner(cache, model)
        if both is not cache:
            both.note_inputs(request.kwargs.get("encoder_outputs"))
        if cache.sequences.pool is None:
            own = cache.settings
            if misplaced := misplaced_limit(own, compute_devices(model), has_tiers=False):
                raise ValueError(misplaced)
            budget = own.max_memory or self.config.max_memory
            cache.sequences.pool = self._make_pool(model, replace(own, max_memory=budget))
        cache.ensure_rows(request.rows)
        if cache.root is not None and not cache.generating:
            cache.untrack()  # nobody checks what a caller of their own does to the model between two passes
        if shows_padding(request, cache):
            self.counters.fall_back(PADDING_SHOWN)
            self._warn("does not answer as stock", PADDING_SHOWN)

    @staticmethod
    def _check_owner(cache: PagedCache, model: PreTrainedModel) -> None:
        """`ValueError` for a cache that another model has filled or was made for."""
        if cache.owner is None:
            if compat.kv_shape(cache.model_config) != compat.kv_shape(model.config.get_text_config(decoder=True)):
                raise ValueError(
                    f"{compat.CACHE_NAME} is a PagedCache for a model of another shape; make one with "
                    "PagedCache(model.config) of the model that generates"
                )
            cache.owner = weakref.ref(model)
        elif cache.owner() is not model:
            raise ValueError(
                f"{compat.CACHE_NAME} is a PagedCache that another model has filled; its K and V mean nothing to this "
                "one. Pass a cache that this model returned, or none"
            )

    def _run_best(self, request: ModelCall, cache: PagedCache, lengths: list[int]) -> tuple[Any, int, int]:
        """The model's outputs, and the numbers of tokens that were computed, and that earlier calls had computed."""
        if request.tokens > 1 and cache.generating and not (cache.prefilling or cache.assisted):
            return self._run_unplanned(request, cache), request.real_tokens, 0
        capability = cache.capability if cache.generating else None
        if capability is None:
            prompt_obstacle = self._prompt_obstacle()
            if prompt_obstacle is not None:
                return self._stepwise.run(self._model(), request, cache, lengths, prompt_obstacle)
            capability = cache.capability = self.capability(request.call)
        cache.keeps_rows |= capability.whole_batches
        note_unkept(self._capabilities, self.counters, self._model(), request, cache, capability)
        obstacle = capability.obstacle or fast_path_obstacle(request, cache, capability.window_limit)
        if obstacle is None and request.tokens > 1:
            obstacle = capability.prompt_obstacle
            if obstacle is None and capability.whole_batches and would_cut(request, cache):
                obstacle = "rotary embedding that depends on the length, in a prompt that does not go in one piece"

        def fast() -> tuple[Any, int, int]:
            backend = capability.backend(self.config.attention_backend, request.inputs.device)
            if request.tokens == 1:
                return run_decode(request, cache, backend, graphs=self._graphs), request.rows, 0
            return run_packed(request, cache, backend, capability.keeps_logits, in_one_pass=capability.whole_batches)

        padded = partial(self._stock_shaped.run, self._model(), request, cache, capability)
        return fast_or_padded(fast, padded, self.counters, cache, lengths, obstacle)

    def _run_unplanned(self, request: ModelCall, cache: PagedCache) -> Any:
        """A decode step of a model that is given all tokens in each: only it knows which of them are new (xlm)."""
        note_padded(self.counters, cache, "all tokens are given in each step")
        cache.readmit_rows()
        outputs = request.call(**request.kwargs)
        cache.step = None
        return outputs

    def _share_equal_rows(self, cache: PagedCache) -> None:
        """After a padded prompt, unless decode steps are known to be padded, too: they read each row on its own."""
        known = cache.capability
        obstacle = known.obstacle if known else self._stepwise.obstacle(self._model(), cache)
        if obstacle is None and len(cache.tables) > 1:
            share_equal_rows(cache)

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
