"""The arithmetic of formats.py on a GPU: device functions that read and write slots of K or V, whatever these hold.

Records are written bit for bit as plain torch does, in kernels that are compiled without fused multiply-adds. Where
`FORMAT` is `None` a slot holds numbers as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .formats import KVRecords
from .rotation import rotated_channels


def constants_of(records: KVRecords | None) -> dict[str, str | int | None]:
    """What kernels are compiled for.

    `FORMAT`, its name; `ROTATION`, channels of K that are rotated together, or 0; `KEY_GROUP` and `VALUE_GROUP`,
    channels that have scales of their own, or 0 where a record has one.
    """
    if records is None:
        return {"FORMAT": None, "ROTATION": 0, "KEY_GROUP": 0, "VALUE_GROUP": 0}
    key_dim, value_dim, (keys, values) = records.key_dim, records.value_dim, records.sides
    return {
        "FORMAT": records.kv_format.name,
        "ROTATION": rotated_channels(key_dim) if keys.is_rotated else 0,
        "KEY_GROUP": keys.group_channels(key_dim),
        "VALUE_GROUP": values.group_channels(value_dim),
    }


def takes_records(records: KVRecords) -> bool:
    """Whether kernels read and write them: there are scales, at addresses that are multiples of four."""
    return all(dim and dim % 4 == 0 for dim in (records.key_dim, records.value_dim))


@triton.jit
def stride_of(stride, FORMAT: tl.constexpr):
    """`stride`, of which the compiler now knows what it needs to move four bytes of a record at once."""
    if FORMAT is None:
        return stride
    else:
        return stride // 4 * 4


@triton.jit
def rotated(b_rows, CHANNELS: tl.constexpr):
    """Rows `[rows, BLOCK]` float32, each rotated in blocks of so many channels (rotation.py)."""
    for i in tl.static_range(16):
        if 1 << i < CHANNELS:
            b_rows = _sums_and_differences(b_rows, 1 << i)
    return b_rows * CHANNELS**-0.5


@triton.jit
def _sums_and_differences(b_rows, APART: tl.constexpr):
    """Of channels that are so far apart, in their places."""
    NUMBERS: tl.constexpr = b_rows.shape[0] * b_rows.shape[1]
    is_first = (tl.arange(0, 2) == 0)[None, :, None]
    pairs = tl.reshape(b_rows, (NUMBERS // (2 * APART), 2, APART))
    total = tl.sum(pairs, 1, keep_dims=True)
    difference = tl.sum(tl.where(is_first, pairs, -pairs), 1, keep_dims=True)
    return tl.reshape(tl.where(is_first, total, difference), (b_rows.shape[0], b_rows.shape[1]))


# -- reading -----------------------------------------------------------------------------------------------------------


@triton.jit
def rows_of(p_memory, i_page, STRIDE: tl.constexpr, PAGE: tl.constexpr):
    """Where slots of pages `i_page [pages]` begin, `[pages * PAGE]`, for slots that are `STRIDE` elements apart."""
    o_slot = i_page[:, None] * PAGE + tl.arange(0, PAGE)[None, :]
    return p_memory + tl.reshape(o_slot, (i_page.shape[0] * PAGE,)).to(tl.int64) * STRIDE


@triton.jit
def load_numbers(
    p_rows, inside, dtype: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """K or V of slots that begin at `p_rows [tokens]`, `[tokens, BLOCK]` of `dtype`, still rotated.

    Zeros where not `inside`, and from `DIM` on.
    """
    p_rows = p_rows[:, None]
    if FORMAT == "int4":
        return _load_nibbles(p_rows, inside, DIM, BLOCK, GROUP, MASKED).to(dtype)
    b_row = load_columns(p_rows, tl.arange(0, BLOCK), inside, DIM, BLOCK, MASKED)
    if FORMAT is None:
        return b_row
    else:
        b_scale = load_words(p_rows + DIM, inside, 1, 1, MASKED).to(tl.float32, bitcast=True)
        return (code_values(b_row.to(tl.int8, bitcast=True), FORMAT) * b_scale).to(dtype)


@triton.jit
def code_values(b_code, FORMAT: tl.constexpr):
    """Bytes of int8 or fp8, as signed integers, in float32."""
    if FORMAT == "int8":
        return _whole(b_code.to(tl.int32) & 255 ^ 128) - 128.0
    else:  # bits of e4m3, moved to where float16 has its own, are numbers 256 times too small
        b_half = ((b_code.to(tl.int16) << 7) & -0x4001).to(tl.float16, bitcast=True)
        return b_half.to(tl.float32) * 256.0


@triton.jit
def _whole(b_number):
    """Whole numbers from 0 to 255 in float32, quicker than a GPU converts them."""
    return (b_number.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0  # 2^23


@triton.jit
def load_columns(
    p_rows, o_column, inside, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Elements `o_column [BLOCK]` of rows; zeros from the `COLUMNS`th on."""
    is_column = tl.arange(0, BLOCK) < COLUMNS
    pointers = p_rows + o_column[None, :]
    if MASKED and COLUMNS != BLOCK:
        return tl.load(pointers, mask=inside[:, None] & is_column[None, :], other=0)
    elif MASKED:
        return tl.load(pointers, mask=inside[:, None], other=0)
    elif COLUMNS != BLOCK:
        return tl.load(pointers, mask=is_column[None, :], other=0)
    else:
        return tl.load(pointers)


@triton.jit
def load_words(p_rows, inside, WORDS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """So many times four bytes from `p_rows` on, int32 `[rows, BLOCK]`."""
    p_words = p_rows.to(tl.pointer_type(tl.int32), bitcast=True)
    return load_columns(p_words, tl.arange(0, BLOCK), inside, WORDS, BLOCK, MASKED)


@triton.jit
def _load_nibbles(
    p_rows, inside, DIM: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Numbers of int4 in float32. A byte is loaded for each of its two channels, the second time from a cache."""
    HALF: tl.constexpr = DIM // 2
    GROUPS: tl.constexpr = BLOCK // GROUP
    o_dim = tl.arange(0, BLOCK)
    b_byte = load_columns(p_rows, o_dim % HALF, inside, DIM, BLOCK, MASKED)
    b_code = _whole(tl.where((o_dim < HALF)[None, :], b_byte & 15, b_byte >> 4))
    b_both = load_words(p_rows + HALF, inside, DIM // GROUP, GROUPS, MASKED)
    b_step = b_both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    b_least = (b_both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    b_number = tl.reshape(b_code, (b_code.shape[0], GROUPS, GROUP)) * b_step[:, :, None] + b_least[:, :, None]
    return tl.reshape(b_number, (b_code.shape[0], BLOCK))


# -- writing -----------------------------------------------------------------------------------------------------------


@triton.jit
def store_numbers(
    p_rows, b_number, is_row,
    DIM: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr, ROTATION: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """K or V `[rows, BLOCK]`, zeros from `DIM` on, to slots that begin at `p_rows [rows, 1]`."""
    o_dim = tl.arange(0, BLOCK)
    if FORMAT is None:
        tl.store(p_rows + o_dim[None, :], b_number, mask=is_row[:, None] & (o_dim < DIM)[None, :])
    else:
        b_number = b_number.to(tl.float32)
        if ROTATION > 0:
            b_number = rotated(b_number, ROTATION)
        b_number = tl.where(b_number == b_number, b_number, float("inf"))  # maxima pass over NaN
        if FORMAT == "int4":
            _store_nibbles(p_rows, b_number, is_row, DIM, BLOCK, GROUP)
        else:
            _store_codes(p_rows, b_number, is_row, DIM, BLOCK, FORMAT)


@triton.jit
def _store_codes(p_rows, b_number, is_row, DIM: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr):
    """Records of int8 or fp8."""
    LARGEST: tl.constexpr = 127.0 if FORMAT == "int8" else 448.0
    o_dim = tl.arange(0, BLOCK)
    b_most = tl.max(tl.abs(b_number), 1, keep_dims=True)
    b_scale = tl.div_rn(b_most, LARGEST) + (b_most - b_most)  # NaN where the largest is infinite
    b_scale = tl.where(b_scale < 1.1754943508222875e-38, 0.0, b_scale)  # the smallest normal number
    b_scaled = tl.div_rn(b_number, tl.where(b_scale == 0.0, 1.0, b_scale))
    b_scaled = tl.where(b_scaled == b_scaled, b_scaled, 0.0)
    b_code = _rounded(b_scaled) if FORMAT == "int8" else _e4m3(b_scaled)
    tl.store(p_rows + o_dim[None, :], b_code.to(tl.uint8), mask=is_row[:, None] & (o_dim < DIM)[None, :])
    _store_words(p_rows + DIM, b_scale.to(tl.int32, bitcast=True), is_row, 1, 1)


@triton.jit
def _rounded(b_number):
    """Numbers below 2^22 to the nearest whole ones, in the low bits of int32, half to even."""
    return (b_number + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # 1.5 * 2^23


@triton.jit
def _e4m3(b_number):
    """The nearest number of e4m3, in the low eight bits of int32, of numbers up to its largest."""
    b_bits = b_number.to(tl.int32, bitcast=True)
    b_sign = (b_bits >> 24) & 0x80
    b_bits = b_bits & 0x7FFFFFFF
    b_normal = (b_bits - 0x3C000000 + 0x7FFFF + ((b_bits >> 20) & 1)) >> 20
    # 2^14 has steps of 2^-9 behind it, as numbers below 2^-6 have in e4m3.
    b_subnormal = (tl.abs(b_number) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return b_sign | tl.where(b_bits < 0x3C800000, b_subnormal, b_normal)


@triton.jit
def _store_nibbles(p_rows, b_number, is_row, DIM: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Records of int4."""
    HALF: tl.constexpr = DIM // 2
    GROUPS: tl.constexpr = BLOCK // GROUP
    o_dim = tl.arange(0, BLOCK)
    b_number = tl.reshape(b_number, (b_number.shape[0], GROUPS, GROUP))
    b_most, b_least = tl.max(b_number, 2), tl.min(b_number, 2)
    b_step = tl.div_rn(b_most - b_least, 15.0).to(tl.float16).to(tl.float32)
    b_least = b_least.to(tl.float16).to(tl.float32)
    b_largest = tl.max(tl.maximum(b_step, tl.abs(b_least)), 1, keep_dims=True)
    b_nothing = b_largest - b_largest  # NaN where float16 does not hold all; and no negative zeros
    b_step, b_least = b_step + b_nothing, b_least + b_nothing
    has_step = (b_step > 0.0)[:, :, None]
    b_counted = tl.div_rn(b_number - b_least[:, :, None], tl.where(has_step, b_step[:, :, None], 1.0))
    b_counted = tl.where(has_step, tl.minimum(tl.maximum(b_counted, 0.0), 15.0), 0.0)
    b_code = tl.reshape(_rounded(b_counted), (b_number.shape[0], BLOCK))
    o_high = tl.broadcast_to(((o_dim + HALF) % BLOCK)[None, :], b_code.shape)
    b_byte = b_code | tl.gather(b_code, o_high, 1) << 4
    tl.store(p_rows + o_dim[None, :], b_byte.to(tl.uint8), mask=is_row[:, None] & (o_dim < HALF)[None, :])
    b_both = _half_bits(b_step) | _half_bits(b_least) << 16
    _store_words(p_rows + HALF, b_both, is_row, DIM // GROUP, GROUPS)


@triton.jit
def _half_bits(b_number):
    """Bits of float16 in the low half of int32."""
    return b_number.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)


@triton.jit
def _store_words(p_rows, b_words, is_row, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """`b_words [rows, BLOCK]`, the first `WORDS` of a row, from `p_rows` on."""
    o_word = tl.arange(0, BLOCK)
    p_words = p_rows.to(tl.pointer_type(tl.int32), bitcast=True) + o_word[None, :]
    tl.store(p_words, b_words, mask=is_row[:, None] & (o_word < WORDS)[None, :])
