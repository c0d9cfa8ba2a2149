"""How the KV of one block lies in a record: K and V of the layers of one group, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hf_paged.store import LayerStore

# Every piece begins at a multiple of these bytes, so that it can be viewed in any dtype.
_ALIGNMENT = 16
# Past this many stretches of adjacent blocks one indexed copy a layer takes fewer calls than strided ones.
MAX_STRETCHES = 2


class RecordLayout:
    """Copies blocks to and from records `[record_bytes]` on the device of the blocks.

        layer 0: K [kv_heads, block_size, dim]  V [kv_heads, block_size, dim]   layer 1: K ...

    Args:
        stores: of the group's layers.
        block_size: tokens per block.

    Attributes:
        record_bytes: of one block.
        device: of the blocks; `None` where there are no layers.

    Raises `ValueError` where the layers lie on several devices.
    """

    def __init__(self, stores: Sequence[LayerStore], block_size: int):
        self._stores, self._block_size = list(stores), block_size
        self._places: list[list[tuple[slice, torch.Size, torch.dtype]]] = []
        devices = {store.keys.device for store in self._stores}
        if len(devices) > 1:
            raise ValueError(f"blocks lie on several devices: {', '.join(sorted(map(str, devices)))}")
        self.device = next(iter(devices), None)
        at = 0
        for store in self._stores:
            places = []
            for block in store.blocks(0, 1, block_size):
                num_bytes = block.numel() * block.element_size()
                places.append((slice(at, at + num_bytes), block.shape[1:], block.dtype))
                at += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
            self._places.append(places)
        self.record_bytes = at

    def read_blocks(self, blocks: Sequence[int], records: torch.Tensor) -> None:
        """Fill `records [len(blocks), record_bytes]` uint8 with these blocks."""
        if self._are_scattered(blocks):
            index = self._index(blocks)
            for inside, memory in self._all_pairs(records):  # [kv_heads, blocks, block_size, dim] each
                inside.copy_(memory.index_select(1, index))
            return
        for inside, memory in self._pairs(blocks, records):
            inside.copy_(memory)

    def write_blocks(self, blocks: Sequence[int], records: torch.Tensor) -> None:
        """Fill these blocks from their records."""
        if self._are_scattered(blocks):
            index = self._index(blocks)
            for inside, memory in self._all_pairs(records):
                memory.index_copy_(1, index, inside)
            return
        for inside, memory in self._pairs(blocks, records):
            memory.copy_(inside)

    def _are_scattered(self, blocks: Sequence[int]) -> bool:
        return sum(1 for _ in runs(blocks)) > MAX_STRETCHES

    def _index(self, blocks: Sequence[int]) -> torch.Tensor:
        return torch.tensor(blocks).to(self.device, non_blocking=True)  # so few bytes are read at once

    def _pairs(self, blocks: Sequence[int], records: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The same K or V `[count, kv_heads, block_size, dim]` in records and in memory, by run of adjacent blocks."""
        for first, count in runs(blocks):
            part = records[first : first + count]
            for store, places in zip(self._stores, self._places, strict=True):
                views = store.blocks(blocks[first], count, self._block_size)
                for memory, place in zip(views, places, strict=True):
                    yield _inside(part, place), memory

    def _all_pairs(self, records: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """K or V in records, `[kv_heads, records, block_size, dim]`, and all blocks of it in memory."""
        for store, places in zip(self._stores, self._places, strict=True):
            views = store.blocks(0, store.keys.shape[1] // self._block_size, self._block_size)
            for memory, place in zip(views, places, strict=True):
                yield _inside(records, place).transpose(0, 1), memory.transpose(0, 1)


def _inside(records: torch.Tensor, place: tuple[slice, torch.Size, torch.dtype]) -> torch.Tensor:
    """K or V of one layer in records, `[records, kv_heads, block_size, dim]`."""
    where, shape, dtype = place
    return records[:, where].view(dtype).unflatten(1, shape)


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Index and length of the stretches in which each number is the one before and one."""
    start = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            yield start, end - start
            start = end
