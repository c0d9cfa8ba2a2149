"""Whole blocks to and from records in one launch, against plain torch: compiled on a GPU, else interpreted."""

import random

import pytest
import torch

from hf_paged_kernels.launch import triton_obstacle

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
if triton_obstacle(DEVICE):
    pytest.skip(triton_obstacle(DEVICE), allow_module_level=True)  # says why these kernels cannot run here

from hf_paged_kernels.move import (  # noqa: E402 (behind the skip: imports triton)
    BlockPieces,
    gather_blocks,
    gather_blocks_reference,
    scatter_blocks,
    scatter_blocks_reference,
)

# Of each layer: heads, and what a token takes of K and of V: numbers, or the bytes of a record of quantized KV.
SHAPES = {
    "float32": (torch.float32, [(2, 5, 3), (1, 4, 8)]),
    "bfloat16": (torch.bfloat16, [(2, 128, 128), (8, 64, 80)]),
    "float16, dims of one": (torch.float16, [(3, 1, 1)]),
    "int8 records": (torch.uint8, [(2, 66, 66), (1, 132, 37)]),
    "long": (torch.float32, [(1, 300, 257)]),
}


def block_memories(dtype, layers, slots, block_size):
    """K and V of layers, full of numbers and of NaN, and where they lie in a record, with gaps between them."""
    memories, offsets, at = [], [], 0
    for heads, *dims in layers:
        for dim in dims:
            memory = torch.randint(0, 256, (heads, slots, dim * dtype.itemsize), dtype=torch.uint8).to(DEVICE)
            memories.append(memory.view(dtype))
            offsets.append(at)
            at += -(-heads * block_size * dim * dtype.itemsize // 16) * 16
    return BlockPieces(memories, offsets, block_size), at


def copied(pieces):
    """The same blocks in memory of their own."""
    return BlockPieces([memory.clone() for memory in pieces.memories], pieces.offsets, pieces.block_size)


def bits(memory):
    return memory.view(torch.uint8)


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_go_and_come_back(shape, block_size):
    """Every byte, whatever it stands for, in any order of blocks; nothing beside them is touched."""
    dtype, layers = SHAPES[shape]
    pieces, record_bytes = block_memories(dtype, layers, 11 * block_size + 3, block_size)
    blocks = torch.tensor(random.Random(1).sample(range(11), 5), device=DEVICE)
    room = torch.full((2, 7, record_bytes), 255, dtype=torch.uint8, device=DEVICE)  # reads as NaN
    gather_blocks(pieces, blocks, room[0, 1:6])
    gather_blocks_reference(pieces, blocks, room[1, 1:6])
    assert torch.equal(room[0], room[1])
    assert room[0, 1:6].ne(255).any()
    targets = [copied(pieces) for _ in range(2)]
    for each in targets:
        for memory in each.memories:
            bits(memory).fill_(255)
    other = blocks.flip(0) if block_size == 4 else (blocks + 3) % 11
    scatter_blocks(targets[0], other, room[0, 1:6])
    scatter_blocks_reference(targets[1], other, room[0, 1:6])
    for actual, expected, before in zip(*(each.memories for each in (*targets, pieces)), strict=True):
        assert torch.equal(bits(actual), bits(expected))
        for here, there in zip(other.tolist(), blocks.tolist(), strict=True):
            come, gone = (slice(each * block_size, (each + 1) * block_size) for each in (here, there))
            assert torch.equal(bits(actual[:, come]), bits(before[:, gone]))


def test_records_that_begin_anywhere():
    """Words are as wide as the records' own place allows."""
    pieces, record_bytes = block_memories(torch.bfloat16, [(2, 16, 16)], 8 * 8, 8)
    blocks, room = torch.tensor([6, 1], device=DEVICE), torch.zeros(2 * record_bytes + 8, dtype=torch.uint8)
    room, expected = room.to(DEVICE), torch.zeros(2, record_bytes, dtype=torch.uint8, device=DEVICE)
    gather_blocks_reference(pieces, blocks, expected)
    for begin in (1, 2, 4):
        records = room.zero_()[begin : begin + 2 * record_bytes].view(2, record_bytes)
        gather_blocks(pieces, blocks, records)
        assert torch.equal(records, expected)
        assert not room[:begin].any()


def test_blocks_beyond_32_bits():
    """Blocks whose bytes lie beyond 2^32; pages that nobody touches cost nothing."""
    block_size, dim, far = 8, 16, 2**24 + 5
    memory = torch.empty(2, (far + 2) * block_size, dim, dtype=torch.float16, device=DEVICE)
    pieces = BlockPieces([memory], [0], block_size)
    slots = slice(far * block_size, (far + 1) * block_size)
    memory[:, slots] = expected = torch.randn(2, block_size, dim).to(DEVICE, torch.float16)
    records = torch.zeros(1, 2 * block_size * dim * 2, dtype=torch.uint8, device=DEVICE)
    blocks = torch.tensor([far], device=DEVICE)
    gather_blocks(pieces, blocks, records)
    memory[:, slots] = 0
    scatter_blocks(pieces, blocks, records)
    assert torch.equal(memory[:, slots], expected)
