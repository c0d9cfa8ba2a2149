"""Attention over codes of int4, in bfloat16, without making numbers of records one by one (see packed.py).

Two bytes of a record are four codes: those of channels `2 u` and `2 u + 1`, in low bits, and of channels
`64 + 2 u` and `65 + 2 u`, in high ones. `128 + code` takes one instruction to make in bfloat16, for two tokens (or two
places in a record) at once. Steps and minima of groups of channels are left to products, and so is the 128:

    score            Σ_group step (query · (128 + code)) + (minimum - 128 step) Σ query
    sum of values    Σ_token (weight step) (128 + code) + weight minimum - 128 (weight step)

Records are of 128 channels: groups of 32 in keys, and of 64, which is a half, in values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_formats import load_columns
from .language import dot

# Codes `j` of the two bytes of two elements, side by side in $4, to bfloat16 in $j.
_INT4_PAIRS = tl.constexpr(
    "{ .reg .b32 codes, ones; mov.b32 ones, 0x43004300;"
    "lop3.b32 $0, $4, 0x000f000f, ones, 0xea;"  # a & b | c
    + "".join(f"shr.u32 codes, $4, {4 * j}; lop3.b32 ${j}, codes, 0x000f000f, ones, 0xea;" for j in (1, 2, 3))
    + "}"
)


@triton.jit
def nibble_query(b_query):
    """What `nibble_scores` wants of queries `[rows, 128]`: even channels of each group, odd ones, and sums of both."""
    parts = tl.reshape(b_query, (b_query.shape[0], 2, 2, 16, 2))  # half, group in it, unit, even or odd
    even, odd = tl.split(tl.permute(parts, (0, 3, 2, 1, 4)))
    low_even, high_even = tl.split(even)
    low_odd, high_odd = tl.split(odd)
    q0, q1 = tl.split(low_even)
    q2, q3 = tl.split(high_even)
    q4, q5 = tl.split(low_odd)
    q6, q7 = tl.split(high_odd)
    return q0, q1, q2, q3, q4, q5, q6, q7, _total(q0, q4), _total(q1, q5), _total(q2, q6), _total(q3, q7)


@triton.jit
def _total(b_even, b_odd):
    """Of a group of channels of queries, `[rows]` float32."""
    return tl.sum(b_even.to(tl.float32) + b_odd.to(tl.float32), 1)


@triton.jit
def nibble_scores(queries, p_rows, inside, MASKED: tl.constexpr, INTERPRETED: tl.constexpr):
    """Products `[rows, tokens]` of queries with keys of `p_rows [tokens]`."""
    b_score = tl.zeros([queries[0].shape[0], p_rows.shape[0]], dtype=tl.float32)
    for i in tl.static_range(2):  # of the groups of each half
        b_unit = tl.trans(_load_units(p_rows + i * 32, inside, 16, MASKED))
        codes = _unpacked(b_unit, INTERPRETED)
        for half in tl.static_range(2):
            b_product = tl.zeros(b_score.shape, dtype=tl.float32)
            b_product = dot(queries[2 * half + i], codes[half], b_product, INTERPRETED)
            b_product = dot(queries[4 + 2 * half + i], codes[2 + half], b_product, INTERPRETED)
            b_step, b_least = _load_group(p_rows + 64 + 4 * (2 * half + i), inside, MASKED)
            b_score += (
                b_product * b_step[None, :] + (b_least - 128.0 * b_step)[None, :] * queries[8 + 2 * half + i][:, None]
            )
    return b_score


@triton.jit
def nibble_sums(b_weight, p_rows, inside, sums, b_decay, MASKED: tl.constexpr, INTERPRETED: tl.constexpr):
    """`sums * b_decay`, and values of `p_rows [tokens]` times `b_weight [rows, tokens]`.

    Sums are `[rows, 32]` of low and high codes of even and of odd bytes, and what is to be added to all channels
    of a half, `[rows, tokens]`, of which the sum over tokens is still to be taken.
    """
    codes = _unpacked(_load_units(p_rows, inside, 32, MASKED), INTERPRETED)
    b_low, b_low_rest = _weighted(b_weight, p_rows + 64, inside, MASKED)
    b_high, b_high_rest = _weighted(b_weight, p_rows + 68, inside, MASKED)
    b_decay = b_decay[:, None]
    return (
        dot(b_low, codes[0], sums[0] * b_decay, INTERPRETED),
        dot(b_high, codes[1], sums[1] * b_decay, INTERPRETED),
        dot(b_low, codes[2], sums[2] * b_decay, INTERPRETED),
        dot(b_high, codes[3], sums[3] * b_decay, INTERPRETED),
        sums[4] * b_decay + b_low_rest,
        sums[5] * b_decay + b_high_rest,
    )


@triton.jit
def nibbles_in_order(sums):
    """Sums of `nibble_sums` as `[rows, 128]`."""
    b_low = tl.reshape(tl.join(sums[0], sums[2]), (sums[0].shape[0], 64)) + tl.sum(sums[4], 1)[:, None]
    b_high = tl.reshape(tl.join(sums[1], sums[3]), (sums[0].shape[0], 64)) + tl.sum(sums[5], 1)[:, None]
    return tl.reshape(tl.permute(tl.join(b_low, b_high), (0, 2, 1)), (sums[0].shape[0], 128))


@triton.jit
def _weighted(b_weight, p_group, inside, MASKED: tl.constexpr):
    """Weights times steps of a group of channels, in bfloat16, and what is to be added to their sums."""
    b_step, b_least = _load_group(p_group, inside, MASKED)
    b_stepped = (b_weight * b_step[None, :]).to(tl.bfloat16)
    return b_stepped, b_weight * b_least[None, :] - 128.0 * b_stepped.to(tl.float32)


@triton.jit
def _load_units(p_rows, inside, UNITS: tl.constexpr, MASKED: tl.constexpr):
    """So many times two bytes from `p_rows [tokens]` on, int16 `[tokens, UNITS]`."""
    p_units = p_rows[:, None].to(tl.pointer_type(tl.int16), bitcast=True)
    return load_columns(p_units, tl.arange(0, UNITS), inside, UNITS, UNITS, MASKED)


@triton.jit
def _load_group(p_group, inside, MASKED: tl.constexpr):
    """Steps and minima of a group of channels, `[tokens]` float32; zeros where not `inside`."""
    p_words = p_group.to(tl.pointer_type(tl.int32), bitcast=True)
    b_both = tl.load(p_words, mask=inside, other=0) if MASKED else tl.load(p_words)
    b_step = b_both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return b_step, (b_both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _unpacked(b_unit, INTERPRETED: tl.constexpr):
    """128 + the codes of each two bytes, as bfloat16: low and high ones of the first byte, then of the second."""
    if INTERPRETED:
        return (
            (128.0 + (b_unit & 15).to(tl.float32)).to(tl.bfloat16),
            (128.0 + (b_unit >> 4 & 15).to(tl.float32)).to(tl.bfloat16),
            (128.0 + (b_unit >> 8 & 15).to(tl.float32)).to(tl.bfloat16),
            (128.0 + (b_unit >> 12 & 15).to(tl.float32)).to(tl.bfloat16),
        )
    else:
        return tl.inline_asm_elementwise(
            _INT4_PAIRS, "=r,=r,=r,=r,r", [b_unit],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
