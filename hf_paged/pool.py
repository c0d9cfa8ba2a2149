"""A KV pool: block manager and store of one model, sized by a memory budget."""

from __future__ import annotations

import math
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from hf_paged.arena import can_give_back, comes_on_demand
from hf_paged.backends import AttentionBackend
from hf_paged.compat import CACHE_NAME
from hf_paged.config import PagedConfig
from hf_paged.core.apart import append_kept
from hf_paged.core.blocks import OutOfBlocks
from hf_paged.core.capacity import group_costs
from hf_paged.core.manager import BlockManager
from hf_paged.core.plan import Growth, Pin, StepPlan
from hf_paged.core.table import BlockTable
from hf_paged.core.whole import whole
from hf_paged.errors import ForeignKVError, PagedMemoryError, RefusedMemoryError, UnseenLayersError
from hf_paged.free_memory import free_bytes, total_bytes
from hf_paged.kept_states import KeptStates
from hf_paged.limits import DeviceLimits, misplaced_limit
from hf_paged.overflow import Overflow, UnseenLayers
from hf_paged.stats import Counters
from hf_paged.store import POISON, LayerStore
from hf_paged.streams import SideStream, side_stream
from hf_paged.tiers import Tiers, make_levels

Taken = TypeVar("Taken")

# Of the memory that is free or the pool's own; the rest stays for activations and everyone else.
FREE_MEMORY_SHARE = 0.8
# What is noted of each id takes 3 MB a group then. Blocks that were never handed out cost no other memory.
MAX_BLOCKS = 2**18
# Where they do, because all of a pool is allocated at once, and nobody has said how much that may be.
MAX_TOKENS_UNASKED = 2**18
MAX_TOKENS_POISONED = 2**14


class KVPool:
    """Blocks and their memory.

    Args:
        settings: block size and memory budget.
        windows: the sliding window of each layer that keeps KV, in tokens; `None` where it keeps all. Layers of equal
            windows form a group, with blocks of its own.
        layer_bytes: estimate of the bytes of K and V of one token in each layer; the true figures replace it when the
            first tokens are written.
        device: where the first layer's KV lies.
        max_slots: no more slots than these, whatever the budget.
        layer_devices: where each layer's KV lies, if that is known before the first tokens are written.
    """

    def __init__(
        self,
        settings: PagedConfig,
        windows: Sequence[int | None],
        layer_bytes: Sequence[int],
        device: torch.device,
        max_slots: int | None = None,
        layer_devices: Sequence[torch.device] | None = None,
    ):
        self.block_size = block_size = settings.block_size
        self.kv_format = settings.kv_format
        self.device = device
        self.stores: list[LayerStore | None] = [None] * len(windows)
        groups = group_costs(layer_bytes, windows)
        kinds = [group.window for group in groups]
        self.layer_groups = [kinds.index(window) for window in windows]
        block_bytes = [group.block_bytes(block_size) for group in groups]
        self.limits, devices = DeviceLimits(settings, device), {device}
        if layer_devices is not None and len(layer_devices) == len(windows):
            self.limits.place(zip(self.layer_groups, layer_bytes, layer_devices, strict=True))
            devices.update(layer_devices)
        allowed_bytes, on_demand = self.limits.allowed_bytes, all(map(comes_on_demand, devices))
        self._takes_all_unasked = not on_demand and allowed_bytes is None
        most_slots = most_tokens(block_size, self._takes_all_unasked) if max_slots is None else max_slots
        self._most_blocks = most_blocks = most_slots // block_size + 1
        limit_bytes = self._find_limit(0)
        self.most_bytes = limit_bytes
        if on_demand:  # what is free may yet grow, up to all there is
            self.most_bytes = min(sum(map(total_bytes, devices)), allowed_bytes or sys.maxsize)
        self._is_bounded = max_slots is not None
        self.manager = BlockManager(
            # Each group may need all of the budget. A given number of slots is the only bound.
            [
                most_blocks if self._is_bounded else max(1, min(self.most_bytes // each, most_blocks))
                for each in block_bytes
            ],
            block_size,
            kinds,
            block_bytes,
            most_blocks * sum(block_bytes) if self._is_bounded else limit_bytes,
            _weak(self._find_limit) if on_demand and not (self.limits.is_set or self._is_bounded) else None,
        )
        self.kept_states = KeptStates(self.manager)
        self._refusal: RefusedMemoryError | None = None
        if device.type == "cpu" and can_give_back():
            self.manager.budget.on_give_back = _weak(self._give_back)
        if POISON:
            for group, pool in enumerate(self.manager.pools):
                pool.on_free = partial(self._poison, group)
        self._side: SideStream | None = None
        self.tiers: Tiers | None = None
        self.overflow: Overflow | None = None
        self._abandoned: deque[tuple[Sequence[BlockTable], Sequence[Pin]]] = deque()

    @classmethod
    def of_cache(cls, settings: PagedConfig, windows: Sequence[int | None], key: torch.Tensor) -> KVPool:
        """The pool of a cache on its own, whose first K `[batch, kv_heads, tokens, dim]` says what layers keep.

        Raises `ValueError` for a limit of another device: there are no tiers.
        """
        misplaced = misplaced_limit(settings, [key.device], has_tiers=False)
        if misplaced is not None:
            raise ValueError(misplaced)
        return cls(settings, windows, [2 * key.shape[1] * key.shape[3] * key.element_size()] * len(windows), key.device)

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in all layers."""
        return sum(pool.block_bytes for pool in self.manager.pools) // self.block_size

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the blocks that running sequences hold."""
        return sum(pool.in_use * pool.block_bytes for pool in self.manager.pools)

    @property
    def bytes_reserved(self) -> int:
        """Bytes of the blocks that were handed out and whose memory has not been given back since.

        In whole blocks; where several share a page, the system holds up to a page a head more at the ends of a run.
        With the states that are kept for later calls, and what blocks pass through on their way to and from the host.
        """
        pools = self.manager.pools
        written = [layer for layer in self.stores if layer is not None]
        staging = sum(each.staging_bytes for each in (self.tiers, self.overflow) if each is not None)
        kept = staging + self.manager.budget.guest_bytes
        return kept + sum(pools[each.group].touched * self.block_size * each.bytes_per_token for each in written)

    def _find_limit(self, touched_bytes: int) -> int:
        """The budget: where none was set, most of what is free now, beside what the pool has taken itself."""
        allowed_bytes = self.limits.allowed_bytes
        if self.limits.is_set:
            return allowed_bytes
        most_of_free = int((free_bytes(self.device) + touched_bytes) * FREE_MEMORY_SHARE)
        return most_of_free if allowed_bytes is None else min(most_of_free, allowed_bytes)

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> LayerStore:
        """The store of a layer; made when first asked for, to fit `key` and `value` `[batch, kv_heads, tokens, dim]`.

        Raises `ForeignKVError` where it was made for another shape, dtype or device.
        """
        store = self.stores[index]
        if store is None:
            with self.manager.lock:
                store = self.stores[index]
                if store is None:
                    self.stores[index] = store = self._make_store(self.layer_groups[index], key, value)
                    self._keep_to_budget()
        if not store.accepts(key, value):
            raise ForeignKVError(
                f"key_states of layer {index} have {key.shape[1]} KV heads of dim {key.shape[3]} in {key.dtype} on "
                f"{key.device}; this PagedCache holds {store.keys.shape[0]} heads of dim {store.key_dim} in "
                f"{store.dtype} on {store.keys.device}. Was {CACHE_NAME} made for another model? Make a new "
                "PagedCache(model.config)."
            )
        return store

    def _make_store(self, group: int, key: torch.Tensor, value: torch.Tensor) -> LayerStore:
        """A layer's store, with memory for the blocks of its group that have some. Raises `RefusedMemoryError`."""
        pool = self.manager.pools[group]
        store = LayerStore(pool.num_blocks * self.block_size, self.block_size, key, value, group, self.kv_format)
        pool.page_blocks = math.lcm(pool.page_blocks, store.whole_page_blocks)
        if store.step_blocks is not None:
            if pool.extents is None:
                pool.ask_for_memory(store.step_blocks, partial(_weak(self._back), group))
                self.manager.budget.on_give_back = _weak(self._give_back)
            for blocks in pool.extents.runs:
                store.back(blocks)
        return store

    def _back(self, group: int, blocks: range) -> bool:
        """Whether every layer of a group has got memory for these blocks."""
        try:
            with ExitStack() as undo:
                for layer in self._layers(group):
                    layer.back(blocks)
                    undo.callback(layer.give_back, blocks)
                undo.pop_all()
        except RefusedMemoryError as error:
            self._refusal = error
            return False
        return True

    def _keep_to_budget(self) -> None:
        """Once every layer's K and V were seen, blocks cost what they are, where they are."""
        if self._is_bounded or any(layer is None for layer in self.stores):
            return
        self.limits.place((layer.group, layer.bytes_per_token, layer.keys.device) for layer in self.stores)
        for group, pool in enumerate(self.manager.pools):
            layers = [layer for layer in self.stores if layer.group == group]
            pool.block_bytes = sum(layer.bytes_per_token for layer in layers) * self.block_size
            pool.limit_ids(self.most_bytes // pool.block_bytes)
        allowed_bytes = self.limits.allowed_bytes
        if allowed_bytes is not None:
            self.manager.budget.resize(allowed_bytes)

    def memory_error(self, error: OutOfBlocks, num_tokens: int) -> PagedMemoryError:
        """The error that tells a user what to raise."""
        fit = error.available * self.block_size
        need = f"{num_tokens} more tokens need {error.wanted} blocks of {self.block_size} tokens"
        if error.refused:
            return RefusedMemoryError(
                f"{self._refusal}: {need}, {fit} tokens fit. {self._more_on_host()}shorten the input or lower the "
                "batch size."
            )
        kind = UnseenLayersError if isinstance(error, UnseenLayers) else PagedMemoryError
        return kind(
            f"{need}, but only {fit} tokens ({error.available} blocks) fit beside the {self.manager.in_use} blocks in "
            f"use: {self._bound(error)}shorten the input or lower the batch size."
        )

    def _more_on_host(self) -> str:
        """What lets blocks go on in host memory, where they can."""
        if self.limits.key == "cpu" or None not in self.manager.windows:
            return "Free memory there, "
        return f"Free memory there, {'set' if self.overflow is None else 'raise'} max_memory['cpu'], "

    def _bound(self, error: OutOfBlocks) -> str:
        """What there is too little of, and which setting is for that."""
        limit_bytes, num_blocks = self.manager.budget.limit_bytes, self._most_blocks - 1
        has_all_ids = any(pool.num_blocks == self._most_blocks for pool in self.manager.pools)
        lacks_bytes = error.wanted_bytes > self.manager.budget.free_bytes
        if lacks_bytes or not has_all_ids:
            below = "" if self.overflow is None else " or max_memory['cpu']"
            key = self.limits.tightest if lacks_bytes else self.limits.key  # by which ids were bounded
            return f"the budget is {limit_bytes} bytes. Raise max_memory[{key!r}]{below}, "
        if self._takes_all_unasked:
            return (
                f"all memory of a pool is taken at once here, {num_blocks} blocks at most unless it is said how much. "
                f"Set max_memory[{self.limits.key!r}], "
            )
        return f"a pool has {num_blocks} blocks at most, whatever the budget. Raise block_size (up to 256), "

    def gauges(self) -> dict[str, float]:
        """Fields of `PagedStats` that are true now, of the tiers below."""
        gauges = {} if self.tiers is None else self.tiers.gauges()
        if self.overflow is not None:
            gauges["blocks_host"] = gauges.get("blocks_host", 0) + len(self.overflow)
        return gauges

    def make_room(self, tables: Sequence[BlockTable], error: OutOfBlocks) -> bool:
        """Whether blocks of `tables` have made room on the device for what was wanted and not available."""
        return self.overflow is not None and self.overflow.make_room(tables, error)

    def with_room(self, tables: Sequence[BlockTable], take: Callable[[], Taken], num_tokens: int) -> Taken:
        """What `take` returns, which appends to tables of a cache that holds `tables`; they make room as they can.

        Raises `PagedMemoryError` where that is not enough for `num_tokens` tokens.
        """
        if self.overflow is not None:
            self.overflow.bring_back_where_ample(tables)
        while True:
            try:
                self.own_tails(tables)
                return take()
            except OutOfBlocks as error:
                if not self.make_room(tables, error):
                    raise self.memory_error(error, num_tokens) from None

    def own_tails(self, tables: Sequence[BlockTable]) -> None:
        """Have the blocks that `tables` write to next on the device. Raises `OutOfBlocks`."""
        if self.overflow is not None:
            self.overflow.bring_back_tails(tables)

    def append_dense(self, tables: Sequence[BlockTable], counts: Sequence[int], room_tokens: int) -> Growth:
        """`BlockManager.append`, for passes that read all of `tables` on the device. Raises `PagedMemoryError`."""
        self.bring_back(tables)
        try:
            return self.manager.append(tables, counts, room_tokens)
        except OutOfBlocks as error:
            raise self.memory_error(error, sum(counts)) from None

    def appending(self, keeps_past: bool) -> Callable[..., Growth]:
        """`BlockManager.append`, for stock-shaped passes that `dense_readers` give their K and V.

        Unless it `keeps_past`, windows need no room for what falls out of them with the last token of a first prompt.
        """
        if self.overflow is not None:
            return partial(self.overflow.append, keeps_past=keeps_past)
        return self.manager.append if keeps_past else partial(append_kept, self.manager)

    def bring_back(self, tables: Sequence[BlockTable]) -> None:
        """Have all blocks of `tables` on the device, for code that reads them there. Raises `PagedMemoryError`."""
        if self.overflow is not None:
            try:
                self.overflow.bring_back(tables)
            except OutOfBlocks as error:
                raise self.memory_error(error, error.wanted * self.block_size) from None

    def over_host(self, backend: AttentionBackend, plans: Sequence[StepPlan]) -> AttentionBackend:
        """The backend of a step with these plans, of which some may read blocks on the host."""
        return backend if self.overflow is None else self.overflow.over_host(backend, plans)

    def match(self, table: BlockTable, tokens: Sequence[int], limit: int) -> int:
        """`BlockManager.match`, and what the tiers below bring back for it."""
        pins = [] if self.tiers is None else self.tiers.fetch(table.root, tokens, limit)
        try:
            return self.manager.match(table, tokens, limit)
        finally:
            self.manager.unpin(pins[::-1])

    def open_tiers(self, settings: PagedConfig, counters: Counters, takes_evicted: bool = True) -> None:
        """Have tiers where there is a budget for some and there are none, or such that were closed.

        `takes_evicted`: whether cached blocks go there.
        """
        host_bytes = None if self.limits.key == "cpu" else settings.budget_bytes("cpu")
        disk_bytes, folder = settings.budget_bytes("disk"), settings.offload_folder
        if (host_bytes or disk_bytes) and (self.tiers is None or self.tiers.is_closed):
            if self.tiers is None:
                self._side = side_stream(self.device)
            base = None if folder is None else Path(folder)
            levels = make_levels(host_bytes, disk_bytes, base, self.manager.lock, self._side, counters)
            self.tiers = Tiers(self.manager, self.stores, levels, self._side, counters, takes_evicted)
            if self.overflow is None and host_bytes and None in self.manager.windows:
                group = self.manager.windows.index(None)
                self.overflow = Overflow(self.manager, group, self.stores, self._side, host_bytes, counters)
            if self.overflow is not None:
                self.overflow.lender = self.tiers

    def close_tiers(self) -> None:
        """Give up what lies on them, with its memory and files."""
        if self.tiers is not None:
            self.tiers.close()
        if self.overflow is not None:
            self.overflow.give_back()

    def forget_prefixes(self) -> None:
        """Give up everything that is kept for later calls, on every tier."""
        self.free(())
        self.kept_states.clear()
        self.manager.forget_prefixes()
        if self.tiers is not None:
            self.tiers.clear()

    def free(self, tables: Sequence[BlockTable]) -> None:
        """Give up sequences; memory that lies idle then goes back to the system."""
        _free(self.manager, self._abandoned, tables)

    def free_soon(self, tables: Sequence[BlockTable], pins: Sequence[Pin]) -> None:
        """Give up sequences, and blocks that they have pinned, from a finalizer.

        It may run anywhere: in the midst of an operation of the manager's, or in a thread that one waits for. Then the
        next that is freed takes them along.
        """
        self._abandoned.append((tables, pins))
        lock = self.manager.lock
        if not lock._is_owned() and lock.acquire(blocking=False):
            try:
                self.free(())
            finally:
                lock.release()

    def _layers(self, group: int) -> list[LayerStore]:
        return [layer for layer in self.stores if layer is not None and layer.group == group]

    def _give_back(self, group: int, runs: Sequence[range]) -> None:
        for blocks in runs:
            self._before_reuse(group, blocks)
        for layer in self._layers(group):
            for blocks in runs:
                layer.give_back(blocks)

    def _before_reuse(self, group: int, blocks: Iterable[int]) -> None:
        before_reuse = self.manager.pools[group].before_reuse
        if before_reuse is not None:
            before_reuse(blocks)

    def _poison(self, group: int, block: int) -> None:
        self._before_reuse(group, [block])
        for layer in self._layers(group):
            layer.poison(range(block, block + 1))


@whole
def _free(
    manager: BlockManager,
    abandoned: deque[tuple[Sequence[BlockTable], Sequence[Pin]]],
    tables: Sequence[BlockTable],
) -> None:
    while abandoned:
        orphans, pins = abandoned.popleft()
        manager.unpin(pins)
        for table in orphans:
            manager.free(table)
    for table in tables:
        manager.free(table)
    manager.settle()


def _weak(method: Callable[..., Taken]) -> Callable[..., Taken]:
    """A method that does not keep its pool alive: whose memory goes as soon as nobody holds it."""
    found = weakref.WeakMethod(method)
    return lambda *arguments: found()(*arguments)


def most_tokens(block_size: int, takes_all_unasked: bool = False) -> int:
    """Tokens that a pool keeps at most, whatever the budget.

    Fewer where it `takes_all_unasked`: all of its memory at once, with no limit set by the user.
    """
    most = min(MAX_BLOCKS * block_size, MAX_TOKENS_UNASKED if takes_all_unasked else sys.maxsize)
    return min(most, MAX_TOKENS_POISONED) if POISON else most
