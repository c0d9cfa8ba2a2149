"""How the KV of one block lies in a record: K and V of the layers of one group, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from hf_paged.core.blocks import NULL_BLOCK
from hf_paged.store import LayerStore
from hf_paged.streams import send_numbers
from hf_paged_kernels.launch import triton_obstacle

# Every piece begins at a multiple of these bytes, so that it can be viewed in any dtype.
_ALIGNMENT = 16
# Past this many stretches of adjacent blocks one indexed copy a layer takes fewer calls than strided ones.
MAX_STRETCHES = 2


class MoveKernels:
    """Copies the blocks of all layers in one launch, to records and back."""

    def __init__(self, memories: Sequence[torch.Tensor], offsets: Sequence[int], block_size: int):
        from hf_paged_kernels import move  # needs Triton

        with torch.inference_mode(False):
            pieces = move.BlockPieces(memories, offsets, block_size)
        self._device = memories[0].device
        self.gather = partial(move.gather_blocks, pieces)
        self.scatter = partial(move.scatter_blocks, pieces)

    def compile(self, record_bytes: int) -> None:
        """Copy the null block to itself: compiling takes a second, which no transfer is to be blamed for."""
        blocks = torch.full((1,), NULL_BLOCK, device=self._device)
        record = torch.empty(1, record_bytes, dtype=torch.uint8, device=self._device)
        self.gather(blocks, record)
        self.scatter(blocks, record)


class BlockIds:
    """Ids of blocks, on the host, and on a device once they were sent there: on the stream that is to read them."""

    def __init__(self, blocks: Sequence[int], device: torch.device):
        self.blocks, self._device = blocks, device
        self._sent: torch.Tensor | None = None

    def send(self) -> None:
        """Begin to copy them to the device; nobody waits."""
        self._sent = send_numbers(self.blocks, self._device)

    def sent(self, part: range) -> torch.Tensor:
        """Those of a part, int64 on the device."""
        return self._sent[part.start : part.stop]


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
        self._kernels: MoveKernels | None = None
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

    def open_kernels(self) -> None:
        """From now on all layers are copied in one launch, where the device can do that."""
        if self._stores and triton_obstacle(self.device) is None:
            memories = [memory for store in self._stores for memory in (store.keys, store.values)]
            offsets = [where.start for places in self._places for where, _, _ in places]
            self._kernels = MoveKernels(memories, offsets, self._block_size)
            self._kernels.compile(self.record_bytes)

    def ids(self, blocks: Sequence[int]) -> BlockIds:
        """These blocks, as `read_blocks` and `write_blocks` take them; to be sent before."""
        return BlockIds(blocks, self.device)

    def read_blocks(self, ids: BlockIds, part: range, records: torch.Tensor) -> None:
        """Fill `records [len(part), record_bytes]` uint8 with the blocks of this part of `ids`."""
        if self._kernels is not None:
            self._kernels.gather(ids.sent(part), records)
            return
        blocks = ids.blocks[part.start : part.stop]
        if self._are_scattered(blocks):
            index = ids.sent(part)
            for inside, memory in self._all_pairs(records):  # [kv_heads, blocks, block_size, dim] each
                inside.copy_(memory.index_select(1, index))
            return
        for inside, memory in self._pairs(blocks, records):
            inside.copy_(memory)

    def write_blocks(self, ids: BlockIds, part: range, records: torch.Tensor) -> None:
        """Fill the blocks of this part of `ids` from their records."""
        if self._kernels is not None:
            self._kernels.scatter(ids.sent(part), records)
            return
        blocks = ids.blocks[part.start : part.stop]
        if self._are_scattered(blocks):
            index = ids.sent(part)
            for inside, memory in self._all_pairs(records):
                memory.index_copy_(1, index, inside)
            return
        for inside, memory in self._pairs(blocks, records):
            memory.copy_(inside)

    def tokens(self, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the first layer in `records [n, record_bytes]`, `[kv_heads, n * block_size, dim]`."""
        keys, values = (_inside(records, place).transpose(0, 1).flatten(1, 2) for place in self._places[0])
        return keys, values

    def set_tokens(self, records: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fill `records` from K and V of the first layer, shaped as `tokens` gives them."""
        for given, place in zip((keys, values), self._places[0], strict=True):
            _inside(records, place).copy_(given.unflatten(1, (len(records), -1)).transpose(0, 1))

    def _are_scattered(self, blocks: Sequence[int]) -> bool:
        return sum(1 for _ in runs(blocks)) > MAX_STRETCHES

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
