"""Attention over codes of records in bfloat16, without making numbers of them one by one.

Codes are exact in bfloat16, and one scale goes with all codes of a token: products with codes are scaled, the codes
are not. What is left is to make bfloat16 of bytes, which takes most of the time on a GPU:

    int8, fp8   Words of four codes, so that codes of two tokens (or of two words of a query) come to lie side by
                side in a register in one instruction. `Σ_w query[4 w + j] key[4 w + j]` is a product of its own
                for each `j`, and so are channels `4 w + j` of values.
    int4        The same in units of two bytes: nibbles.py.

Compiled for sm_90 with triton 3.6, in tiles of 16 rows and 64 tokens and dims of 128: 4.8 (int8), 5.3 (fp8) and 5.7
(int4) instructions a code and thread, where numbers made one by one took 9.8, 12.3 and 15.9.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device_formats import code_values, load_words
from .formats import KVRecords
from .language import dot
from .nibbles import nibble_query, nibble_scores, nibble_sums, nibbles_in_order
from .tuning import padded_dim

_MOST_ROWS_INT4 = 16

# Bytes `j` of words $4 and $5 to bfloat16, side by side in $j. 128 + its low seven bits, less 128, or 256 if negative.
_INT8_PAIRS = tl.constexpr(
    "{ .reg .b32 codes, low, high, ones, minus; mov.b32 ones, 0x43004300; mov.b32 minus, 0xbf80bf80;"
    + "".join(
        f"prmt.b32 codes, $4, $5, 0x{4 + j}{4 + j}{j}{j};"
        "lop3.b32 low, codes, 0x007f007f, ones, 0xea;"  # a & b | c
        "lop3.b32 high, codes, 0x00800080, ones, 0xea;"
        f"fma.rn.bf16x2 ${j}, high, minus, low;"
        for j in range(4)
    )
    + "}"
)
# The same of e4m3. Its bits, moved to where bfloat16 has its own, are numbers 2^120 times too small.
_E4M3_PAIRS = tl.constexpr(
    "{ .reg .b32 codes, bits, factor, zero; mov.b32 factor, 0x7b807b80; mov.b32 zero, 0x80008000;"
    + "".join(
        f"prmt.b32 codes, $4, $5, 0x{4 + j}{4 + j}{j}{j};"
        "shr.u32 bits, codes, 4;"
        "and.b32 bits, bits, 0x07f007f0;"
        "lop3.b32 bits, codes, 0x80008000, bits, 0xea;"
        f"fma.rn.bf16x2 ${j}, bits, factor, zero;"
        for j in range(4)
    )
    + "}"
)


def is_packed(records: KVRecords | None, dtype: torch.dtype, rows: int) -> bool:
    """Whether attention of queries of `dtype` goes this way, in tiles of so many rows.

    A product takes at least 16 words of keys or values. Of int4, sums of more rows do not fit into registers.
    """
    if records is None or dtype != torch.bfloat16:
        return False
    if records.kv_format.name == "int4":
        return records.key_dim == records.value_dim == 128 and rows <= _MOST_ROWS_INT4
    return min(padded_dim(records.key_dim), padded_dim(records.value_dim)) >= 64


@triton.jit
def packed_query(b_query, FORMAT: tl.constexpr):
    """What `packed_scores` wants of queries `[rows, BLOCK]`: a tuple of operands, and a factor for each row."""
    if FORMAT == "int4":
        return nibble_query(b_query), tl.full([b_query.shape[0]], 1.0, dtype=tl.float32)
    else:
        pairs = tl.reshape(b_query, (b_query.shape[0], b_query.shape[1] // 4, 2, 2))
        even, odd = tl.split(pairs)
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return (first, second, third, fourth), tl.full([b_query.shape[0]], 1.0, dtype=tl.float32)


@triton.jit
def packed_scores(
    queries, p_rows, inside,
    DIM: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Products `[rows, tokens]` of queries with keys of `p_rows [tokens]`, but for the queries' factors."""
    if FORMAT == "int4":
        return nibble_scores(queries, p_rows, inside, MASKED, INTERPRETED)
    else:
        b_word = tl.trans(load_words(p_rows[:, None], inside, DIM // 4, BLOCK // 4, MASKED))
        codes = _unpacked(b_word, FORMAT, INTERPRETED)
        b_score = tl.zeros([queries[0].shape[0], p_rows.shape[0]], dtype=tl.float32)
        for j in tl.static_range(4):
            b_score = dot(queries[j], codes[j], b_score, INTERPRETED)
        return b_score * _load_scales(p_rows + DIM, inside, MASKED)[None, :]


@triton.jit
def packed_sums(
    b_weight, p_rows, inside, sums, b_decay,
    DIM: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """`sums * b_decay`, and values of `p_rows [tokens]` times `b_weight [rows, tokens]`: `[rows, BLOCK / 4]` each."""
    if FORMAT == "int4":
        return nibble_sums(b_weight, p_rows, inside, sums, b_decay, MASKED, INTERPRETED)
    else:
        b_word = load_words(p_rows[:, None], inside, DIM // 4, BLOCK // 4, MASKED)
        codes = _unpacked(b_word, FORMAT, INTERPRETED)
        b_weight = (b_weight * _load_scales(p_rows + DIM, inside, MASKED)[None, :]).to(tl.bfloat16)
        return (
            dot(b_weight, codes[0], sums[0] * b_decay[:, None], INTERPRETED),
            dot(b_weight, codes[1], sums[1] * b_decay[:, None], INTERPRETED),
            dot(b_weight, codes[2], sums[2] * b_decay[:, None], INTERPRETED),
            dot(b_weight, codes[3], sums[3] * b_decay[:, None], INTERPRETED),
        )


@triton.jit
def no_sums(ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr):
    """What `packed_sums` begins with."""
    b_sum = tl.zeros([ROWS, BLOCK // 4], dtype=tl.float32)
    if FORMAT == "int4":
        b_rest = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
        return b_sum, b_sum, b_sum, b_sum, b_rest, b_rest
    else:
        return b_sum, b_sum, b_sum, b_sum


@triton.jit
def in_order(sums, FORMAT: tl.constexpr):
    """Sums of `packed_sums` as `[rows, BLOCK]`."""
    if FORMAT == "int4":
        return nibbles_in_order(sums)
    else:
        b_sums = tl.join(tl.join(sums[0], sums[2]), tl.join(sums[1], sums[3]))
        return tl.reshape(b_sums, (sums[0].shape[0], sums[0].shape[1] * 4))


@triton.jit
def _unpacked(b_word, FORMAT: tl.constexpr, INTERPRETED: tl.constexpr):
    """The four codes of each word as bfloat16."""
    if INTERPRETED:
        return (
            code_values((b_word << 24) >> 24, FORMAT).to(tl.bfloat16),
            code_values((b_word << 16) >> 24, FORMAT).to(tl.bfloat16),
            code_values((b_word << 8) >> 24, FORMAT).to(tl.bfloat16),
            code_values(b_word >> 24, FORMAT).to(tl.bfloat16),
        )
    else:
        return tl.inline_asm_elementwise(
            _INT8_PAIRS if FORMAT == "int8" else _E4M3_PAIRS, "=r,=r,=r,=r,r,r", [b_word],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def _load_scales(p_scales, inside, MASKED: tl.constexpr):
    """`[tokens]` float32; zeros where not `inside`."""
    pointers = p_scales.to(tl.pointer_type(tl.float32), bitcast=True)
    if MASKED:
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers)
