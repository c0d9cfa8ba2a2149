"""A KV pool: block manager and store of one model, sized by a memory budget."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from hf_paged.config import PagedConfig
from hf_paged.core.blocks import OutOfBlocks
from hf_paged.core.manager import BlockManager
from hf_paged.core.table import BlockTable
from hf_paged.errors import PagedMemoryError
from hf_paged.store import POISON, LayerStore

# Of the memory that is free when the pool is made; the rest stays for activations and everyone else.
FREE_MEMORY_SHARE = 0.8
# Enough for any prompt of today on a CPU, and block ids stay small; untouched blocks cost no memory.
MAX_SLOTS = 2**21
# Devices other than the CPU have no untouched pages: their pool is allocated at once, so it starts smaller.
MAX_SLOTS_ALLOCATED = 2**17
MAX_SLOTS_POISONED = 2**14


class KVPool:
    """Blocks and their memory.

    Args:
        settings: block size and memory budget.
        num_layers: layers that keep KV.
        token_bytes: estimate of the bytes of K and V of one token in all layers; the true figure replaces it
            when the first tokens are written.
        device: where the first layer's KV lies; its budget counts.
        max_slots: no more slots than these, whatever the budget.
    """

    def __init__(
        self,
        settings: PagedConfig,
        num_layers: int,
        token_bytes: int,
        device: torch.device,
        max_slots: int | None = None,
    ):
        self.block_size = block_size = settings.block_size
        self.device_key: str | int = "cpu" if device.type == "cpu" else (device.index or 0)
        budget_bytes = settings.budget_bytes(self.device_key)
        self.budget_bytes = int(free_bytes(device) * FREE_MEMORY_SHARE) if budget_bytes is None else budget_bytes
        self.num_layers = num_layers
        self._is_bounded = max_slots is not None
        self._token_bytes = token_bytes
        self.stores: list[LayerStore | None] = [None] * num_layers
        most = MAX_SLOTS_POISONED if POISON else MAX_SLOTS if device.type == "cpu" else MAX_SLOTS_ALLOCATED
        slots = min(self.budget_bytes // token_bytes, most) if max_slots is None else max_slots
        self.manager = BlockManager(slots // block_size + 1, block_size)
        if POISON:
            self.manager.pool.on_free = self._poison
        # An odd number of slots keeps the heads of a layer from falling into the same cache sets.
        self._num_slots = (slots // block_size + 1) * block_size + 1

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        known = [layer.bytes_per_token for layer in self.stores if layer is not None]
        token_bytes = sum(known) if len(known) == self.num_layers else self._token_bytes
        return token_bytes * self.block_size

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the blocks that running sequences hold."""
        return self.manager.pool.in_use * self.block_bytes

    @property
    def bytes_reserved(self) -> int:
        """Bytes of every block that was ever written."""
        written = [layer for layer in self.stores if layer is not None]
        return self.manager.pool.high_water * self.block_size * sum(layer.bytes_per_token for layer in written)

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> LayerStore:
        """The store of a layer; made when first asked for, to fit `key` and `value` `[batch, kv_heads, tokens, dim]`.

        Raises `ValueError` where it was made for another shape, dtype or device.
        """
        store = self.stores[index]
        if store is None:
            with self.manager.lock:
                store = self.stores[index]
                if store is None:
                    store = self.stores[index] = LayerStore(self._num_slots, self.block_size, key, value)
                    self._limit_to_budget()
        if not store.accepts(key, value):
            raise ValueError(
                f"key_states of layer {index} have {key.shape[1]} KV heads of dim {key.shape[3]} in {key.dtype} on "
                f"{key.device}; this PagedCache holds {store.keys.shape[0]} heads of dim {store.keys.shape[2]} in "
                f"{store.keys.dtype} on {store.keys.device}. Was past_key_values made for another model? Make a new "
                "PagedCache(model.config)."
            )
        return store

    def _limit_to_budget(self) -> None:
        if not self._is_bounded and all(layer is not None for layer in self.stores):
            self.manager.pool.limit_to(self.budget_bytes // self.block_bytes - 1)  # the null block counts

    def memory_error(self, error: OutOfBlocks, num_tokens: int) -> PagedMemoryError:
        """The error that tells a user what to raise."""
        fit = error.available * self.block_size
        return PagedMemoryError(
            f"{num_tokens} more tokens need {error.wanted} blocks of {self.block_size} tokens, but only {fit} tokens "
            f"({error.available} blocks) fit beside the {self.manager.pool.in_use} blocks in use: the budget is "
            f"{self.budget_bytes} bytes. Raise max_memory[{self.device_key!r}], shorten the input or lower the batch "
            "size."
        )

    def free(self, tables: Sequence[BlockTable]) -> None:
        """Give up sequences."""
        with self.manager.lock:
            for table in tables:
                self.manager.free(table)

    def _poison(self, block: int) -> None:
        for layer in self.stores:
            if layer is not None and layer.keys.dtype.is_floating_point:
                layer.poison(block, self.block_size)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
