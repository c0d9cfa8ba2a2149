"""Whole blocks of many layers to and from records, in one launch.

pieces   [pieces, 3] int64: address of one head's K or V in one layer, bytes of it in a block, where it lies in a record
blocks   [blocks] int64
records  [blocks, record_bytes] uint8

A head's slots lie side by side, so a piece of a block is one stretch of bytes, at `address + block * bytes`:

    record   [ layer 0: K of head 0 | K of head 1 | … | V of head 0 | …  layer 1: K of head 0 | … ]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .language import loop_bound
from .launch import is_interpreted

_PIECE_NUMBERS = 3
# Of a piece, that a program moves at a time: K of 16 tokens of 128 numbers in bfloat16.
_TILE_BYTES = 4096
_WORDS = {
    8: (torch.int64, tl.int64), 4: (torch.int32, tl.int32), 2: (torch.int16, tl.int16), 1: (torch.uint8, tl.uint8),
}  # fmt: skip


# One variant each way: it is compiled before the first transfer, not when some part of one is aligned in another way.
@triton.jit(do_not_specialize=["record_words"], do_not_specialize_on_alignment=["p_blocks", "p_records"])
def _move_kernel(
    p_pieces, p_blocks, p_records, record_words,
    PIECE: tl.constexpr, WORD: tl.constexpr, WORD_BYTES: tl.constexpr, TILE: tl.constexpr,
    TO_RECORDS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid `(blocks, pieces)`."""
    i_block = tl.program_id(0).to(tl.int64)
    p_piece = p_pieces + tl.program_id(1) * PIECE
    num_bytes = tl.load(p_piece + 1)
    address = tl.load(p_piece) + tl.load(p_blocks + i_block) * num_bytes
    p_pool = address.to(tl.pointer_type(WORD), bitcast=True)
    p_record = p_records + i_block * record_words + tl.load(p_piece + 2) // WORD_BYTES
    words = num_bytes // WORD_BYTES
    for at in range(0, loop_bound(words, INTERPRETED), TILE):
        o_word = at + tl.arange(0, TILE)
        inside = o_word < words
        if TO_RECORDS:
            tl.store(p_record + o_word, tl.load(p_pool + o_word, mask=inside), mask=inside)
        else:
            tl.store(p_pool + o_word, tl.load(p_record + o_word, mask=inside), mask=inside)


class BlockPieces:
    """K and V of the layers of one group, and where they lie in a record.

    Args:
        memories: `[kv_heads, slots, dim]` each, contiguous, all on one device; they stay where they are.
        offsets: of each in a record, in bytes.
        block_size: tokens per block.
    """

    def __init__(self, memories: Sequence[torch.Tensor], offsets: Sequence[int], block_size: int):
        assert all(memory.is_contiguous() for memory in memories), "slots of a head lie side by side"
        self.memories, self.offsets, self.block_size = list(memories), list(offsets), block_size
        rows = []
        for memory, offset in zip(memories, offsets, strict=True):
            slot_bytes = memory.shape[2] * memory.element_size()
            for head in range(memory.shape[0]):
                address = memory.data_ptr() + head * memory.shape[1] * slot_bytes
                rows.append((address, block_size * slot_bytes, offset + head * block_size * slot_bytes))
        self.word_bytes = math.gcd(max(_WORDS), *(number for row in rows for number in row))
        self.table = torch.tensor(rows, dtype=torch.int64).to(memories[0].device)


def gather_blocks(pieces: BlockPieces, blocks: torch.Tensor, records: torch.Tensor) -> None:
    """Fill `records [blocks, record_bytes]` uint8 from `blocks` int64."""
    _launch(pieces, blocks, records, True)


def scatter_blocks(pieces: BlockPieces, blocks: torch.Tensor, records: torch.Tensor) -> None:
    """Fill `blocks` int64, which differ, from `records [blocks, record_bytes]` uint8."""
    _launch(pieces, blocks, records, False)


def _launch(pieces: BlockPieces, blocks: torch.Tensor, records: torch.Tensor, to_records: bool) -> None:
    assert (records.dtype, blocks.dtype) == (torch.uint8, torch.int64), "records are bytes, blocks int64"
    assert records.shape[0] == blocks.shape[0], "a record a block"
    assert records.is_contiguous(), "records lie side by side"
    word_bytes = math.gcd(pieces.word_bytes, records.shape[1], records.data_ptr())
    stored_as, word = _WORDS[word_bytes]
    grid = blocks.shape[0], pieces.table.shape[0]
    with torch.cuda.device_of(records):
        _move_kernel[grid](
            pieces.table, blocks, records.view(stored_as), records.shape[1] // word_bytes,
            PIECE=_PIECE_NUMBERS, WORD=word, WORD_BYTES=word_bytes, TILE=_TILE_BYTES // word_bytes,
            TO_RECORDS=to_records, INTERPRETED=is_interpreted(), num_warps=4,
        )  # fmt: skip


def gather_blocks_reference(pieces: BlockPieces, blocks: torch.Tensor, records: torch.Tensor) -> None:
    """As `gather_blocks`, in plain torch."""
    for inside, memory in _pairs(pieces, records):
        inside.copy_(memory[:, blocks].transpose(0, 1))


def scatter_blocks_reference(pieces: BlockPieces, blocks: torch.Tensor, records: torch.Tensor) -> None:
    """As `scatter_blocks`, in plain torch."""
    for inside, memory in _pairs(pieces, records):
        memory[:, blocks] = inside.transpose(0, 1)


def _pairs(pieces: BlockPieces, records: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Bytes of the same K or V in records, `[blocks, kv_heads, piece]`, and in memory, `[kv_heads, blocks, piece]`."""
    pairs = []
    for memory, offset in zip(pieces.memories, pieces.offsets, strict=True):
        heads, slots, _ = memory.shape
        whole = memory[:, : slots // pieces.block_size * pieces.block_size]
        seen = whole.view(torch.uint8).unflatten(1, (-1, pieces.block_size)).flatten(2)
        inside = records[:, offset : offset + heads * seen.shape[2]].unflatten(1, (heads, -1))
        pairs.append((inside, seen))
    return pairs
