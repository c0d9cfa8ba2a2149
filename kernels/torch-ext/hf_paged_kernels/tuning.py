"""How large the tiles of the GPU kernels are, and into how many parts long sequences are split.

Measured on an H200 in bfloat16 with 32 query and 8 KV heads of dim 128 (`benchmarks/gpu.py --only tiles`); other dims
and dtypes go by what their tiles have in bytes. All fit the shared memory of an A100 (sm_80), by compiling them for one
(`tests/kernels_ops/compile_kernels.py`).
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
# Parts end at multiples of this; it is a multiple of the tokens of tiles.
_PART_STEP_TOKENS = 64
# Programs per processor. With 3 to 4 of them, one row of 16,384 tokens is read at 0.55 of the copy bandwidth, one of
# 131,072 at 0.87, eight of 4,096 at 0.75; with 8, at 0.43, 0.82 and 0.69: parts are short, and there are more to merge.
_PROGRAMS_PER_PROCESSOR = 4
# Processors that the interpreter pretends to have.
_INTERPRETED_PROCESSORS = 1
MAX_DIM = 256
MAX_GROUP = 128
# float32 has no tensor cores to go to: with more rows the sums do not fit into registers.
MAX_GROUP_FLOAT32 = 32


class Tile(NamedTuple):
    """One compiled shape: `rows` of queries times heads against `tokens` of K and V at a time.

    `registers` is the most that a thread may have, `None` what the compiler likes.
    """

    rows: int
    tokens: int
    warps: int
    stages: int
    registers: int | None = None


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
def tiles_for(
    dtype: torch.dtype, key_dim: int, value_dim: int, group: int, kv_format: str | None = None
) -> tuple[Tile, ...]:
    """The shapes for queries of a dtype, head dims and number of query heads to a KV head, fewest rows first.

    `kv_format` is what K and V are stored in, `None`: the queries' dtype.
    """
    token_bytes = (padded_dim(key_dim) + padded_dim(value_dim)) * dtype.itemsize
    narrow = max(16, next_power_of_two(group))
    if dtype == torch.float32:
        return tuple(Tile(rows, 16, 8, 2) for rows in sorted({narrow, MAX_GROUP_FLOAT32}))
    wide = (64, 128) if token_bytes <= 512 else (64,)
    return tuple(_tile(rows, token_bytes, kv_format) for rows in (narrow, *(rows for rows in wide if rows > narrow)))


def _tile(rows: int, token_bytes: int, kv_format: str | None) -> Tile:
    if token_bytes > 512:
        return Tile(rows, 32 if rows > 32 and token_bytes > 768 else 64, 4, 2)  # more does not fit into registers
    if rows >= 128:
        return Tile(rows, 128, 8, 2) if kv_format is None else Tile(rows, 64, 8, 3)
    if rows > 16:
        return Tile(rows, 64, 4, 3)
    # With more than 128 registers a processor has three programs, not four: 64 rows come in two waves then, which
    # costs a fifth. int4 cannot do with so few. Five stages cost a processor a program, too, but for records.
    stages = 3 if kv_format is None else 5
    return Tile(rows, 64, 4, stages, None if kv_format == "int4" else 128)


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
    return max(least, -(-share // _PART_STEP_TOKENS) * _PART_STEP_TOKENS)
