"""How large the tiles of the GPU kernels are, and into how many parts long sequences are split.

None of these figures has been tuned on a GPU yet. What is known comes from compiling the kernels for one (sm_90, triton
3.6, `tests/kernels_ops/compile_kernels.py`): these shapes take up to 128 KiB of shared memory (on sm_80,
88 KiB), and in bfloat16 at most 4 bytes of registers spill. `benchmarks/gpu.py` is there to check the rest.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# Slots per entry of a page table. Runs of slots are cut at multiples of it; the default block is as long.
PAGE_TOKENS = 16
# Parts shorter than this cost more to start and merge than they read.
_MIN_PART_TOKENS = 128
# The float32 partial result of a row is written and read once per part; K and V of as many tokens outweigh it.
_PART_TOKENS_PER_ROW = 8
# Programs per processor that even out parts of unequal length.
_PROGRAMS_PER_PROCESSOR = 8
# Processors that the interpreter pretends to have.
_INTERPRETED_PROCESSORS = 1
MAX_DIM = 256
MAX_GROUP = 128
# float32 has no tensor cores to go to: with more rows the sums do not fit into registers.
MAX_GROUP_FLOAT32 = 32


class Tile(NamedTuple):
    """One compiled shape: `rows` of queries times heads against `tokens` of K and V at a time."""

    rows: int
    tokens: int
    warps: int
    stages: int


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()


def padded_dim(dim: int) -> int:
    """Width of a tile for a head dim: a power of two of at least 16."""
    return max(16, next_power_of_two(dim))


def max_group(dtype: torch.dtype) -> int:
    """Most query heads to a KV head."""
    return MAX_GROUP_FLOAT32 if dtype == torch.float32 else MAX_GROUP


@functools.cache
def tiles_for(dtype: torch.dtype, key_dim: int, value_dim: int, group: int) -> tuple[Tile, ...]:
    """The shapes for a dtype, head dims and number of query heads to a KV head, fewest rows first."""
    token_bytes = (padded_dim(key_dim) + padded_dim(value_dim)) * dtype.itemsize
    narrow = max(16, next_power_of_two(group))
    if dtype == torch.float32:
        return tuple(Tile(rows, 16, 8, 2) for rows in sorted({narrow, MAX_GROUP_FLOAT32}))
    wide = (64, 128) if token_bytes <= 512 else (64,)
    return tuple(_tile(rows, token_bytes) for rows in (narrow, *(rows for rows in wide if rows > narrow)))


def _tile(rows: int, token_bytes: int) -> Tile:
    stages = 2
    if token_bytes <= 512:
        # Tiles of few rows wait for memory: five stages keep two tiles of K and V on their way, three keep one.
        stages = 5 if rows <= 32 else 3
    tokens = 32 if rows > 32 and token_bytes > 768 else 64  # more do not fit into registers
    return Tile(rows, tokens, 8 if rows >= 128 else 4, stages)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def part_tokens(tokens: list[int], rows: int, kv_heads: int, num_processors: int) -> int:
    """Tokens of K and V per program, for tiles of `rows` rows that read `tokens` each.

    Tiles that fill the device and do not differ much in length, such as those of a long prompt, stay whole.
    """
    programs = len(tokens) * kv_heads
    longest = max(tokens)
    if rows >= 64 and programs >= 2 * num_processors and longest * len(tokens) <= 3 * sum(tokens):
        return longest
    share = sum(tokens) * kv_heads // (num_processors * _PROGRAMS_PER_PROCESSOR)
    least = max(_MIN_PART_TOKENS, _PART_TOKENS_PER_ROW * rows)
    return max(least, -(-share // _MIN_PART_TOKENS) * _MIN_PART_TOKENS)
