"""How the KV of one block lies in a record: K and V of the layers of one group, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hf_paged.store import LayerStore

# Every piece begins at a multiple of these bytes, so that it can be viewed in any dtype.
_ALIGNMENT = 16


class RecordLayout:
    """Copies blocks to and from records `[record_bytes]`.

        layer 0: K [kv_heads, block_size, dim]  V [kv_heads, block_size, dim]   layer 1: K ...

    Args:
        stores: of the group's layers.
        block_size: tokens per block.

    Raises `ValueError` where the layers' memory is not that of the CPU.
    """

    def __init__(self, stores: Sequence[LayerStore], block_size: int):
        self._stores, self._block_size = list(stores), block_size
        self._places: list[list[tuple[slice, torch.Size, torch.dtype]]] = []
        at = 0
        for store in self._stores:
            places = []
            for block in store.blocks(0, 1, block_size):
                if block.device.type != "cpu":
                    raise ValueError(f"there is none for blocks on {block.device}")
                num_bytes = block.numel() * block.element_size()
                places.append((slice(at, at + num_bytes), block.shape[1:], block.dtype))
                at += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
            self._places.append(places)
        self.record_bytes = at

    def empty(self, num_records: int) -> torch.Tensor:
        """Room for records, `[num_records, record_bytes]` uint8."""
        return torch.empty(num_records, self.record_bytes, dtype=torch.uint8)

    def read_blocks(self, blocks: Sequence[int]) -> torch.Tensor:
        """Records of these blocks, `[len(blocks), record_bytes]`."""
        records = self.empty(len(blocks))
        for inside, memory in self._pairs(blocks, records, [True] * len(blocks)):
            inside.copy_(memory)
        return records

    def write_blocks(self, blocks: Sequence[int], records: torch.Tensor, chosen: Sequence[bool]) -> None:
        """Fill the chosen ones of these blocks from their records."""
        for inside, memory in self._pairs(blocks, records, chosen):
            memory.copy_(inside)

    def _pairs(
        self, blocks: Sequence[int], records: torch.Tensor, chosen: Sequence[bool]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The same K or V `[count, kv_heads, block_size, dim]` in records and in memory, by run of adjacent blocks."""
        for first, count in _runs(blocks, chosen):
            part = records[first : first + count]
            for store, places in zip(self._stores, self._places, strict=True):
                views = store.blocks(blocks[first], count, self._block_size)
                for memory, (place, shape, dtype) in zip(views, places, strict=True):
                    yield part[:, place].view(dtype).unflatten(1, shape), memory


def _runs(blocks: Sequence[int], chosen: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Index and length of the stretches of chosen blocks that are adjacent."""
    start = 0
    for end in range(1, len(blocks) + 1):
        if end == len(blocks) or blocks[end] != blocks[end - 1] + 1 or chosen[end] != chosen[start]:
            if chosen[start]:
                yield start, end - start
            start = end
