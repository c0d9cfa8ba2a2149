"""New K and V into their slots on a GPU, as they are or as records of them (formats.py), one launch a layer.

key, value      [batch, kv_heads, tokens, dim], any strides; token `t` of row `b` is number `b * tokens + t`
keys, values    [kv_heads, slots, dim, or bytes of a record], any strides of heads and slots
slots           [batch * tokens] int32; negative: the token is not stored
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device_formats import constants_of, store_numbers, stride_of, takes_records
from .formats import KVRecords
from .tuning import next_power_of_two, padded_dim

# Elements of K or of V per program.
_TILE_ELEMENTS = 4096


@triton.jit
def _store_heads(
    p_new, p_memory, i_head, slot, stride_head, stride_memory_head, stride_memory_slot,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    FORMAT: tl.constexpr, ROTATION: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Some heads of one token, `[heads, dim]`."""
    o_dim = tl.arange(0, BLOCK_DIM)
    is_head = i_head < HEADS
    inside = is_head[:, None] & (o_dim < DIM)[None, :]
    b_new = tl.load(p_new + (i_head * stride_head)[:, None] + o_dim[None, :], mask=inside, other=0)
    p_rows = p_memory + slot * stride_of(stride_memory_slot, FORMAT)
    p_rows = p_rows + (i_head * stride_of(stride_memory_head, FORMAT))[:, None]
    store_numbers(p_rows, b_new, is_head, DIM, BLOCK_DIM, FORMAT, ROTATION, GROUP)


@triton.jit(do_not_specialize=["tokens"])
def _store_kernel(
    p_key, p_value, p_keys, p_values, p_slots, tokens,
    stride_key_row, stride_key_head, stride_key_token, stride_value_row, stride_value_head, stride_value_token,
    stride_keys_head, stride_keys_slot, stride_values_head, stride_values_slot,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    FORMAT: tl.constexpr, ROTATION: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
):  # fmt: skip
    """Grid `(batch * tokens, blocks of heads)`."""
    i_token = tl.program_id(0)
    slot = tl.load(p_slots + i_token).to(tl.int64)
    if slot >= 0:
        i_row = (i_token // tokens).to(tl.int64)
        i_column = (i_token % tokens).to(tl.int64)
        i_head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
        _store_heads(
            p_key + i_row * stride_key_row + i_column * stride_key_token, p_keys, i_head, slot,
            stride_key_head, stride_keys_head, stride_keys_slot, HEADS, KEY_DIM, BLOCK_KEY,
            FORMAT, ROTATION, KEY_GROUP,
        )  # fmt: skip
        _store_heads(
            p_value + i_row * stride_value_row + i_column * stride_value_token, p_values, i_head, slot,
            stride_value_head, stride_values_head, stride_values_slot, HEADS, VALUE_DIM, BLOCK_VALUE,
            FORMAT, 0, VALUE_GROUP,
        )  # fmt: skip


def store_tokens(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    records: KVRecords | None = None,
) -> None:
    """Write new `key`, `value [batch, kv_heads, tokens, dim]` to `slots` of `keys`, `values [kv_heads, slots, dim]`.

    Where these hold `records`, K and V are encoded on the way: to the bit as plain torch does, which those that the
    kernel does not take are left to.
    """
    batch, heads, tokens, _ = key.shape
    assert (slots.dtype, slots.shape) == (torch.int32, (batch * tokens,)), "one slot per token"
    if records is not None and not takes_records(records):
        key, value, records = records.encode_keys(key), records.encode_values(value), None
    assert records is not None or (key.dtype, value.dtype) == (keys.dtype, values.dtype), "the dtype of what comes"
    key, value = (each if each.stride(3) == 1 else each.contiguous() for each in (key, value))
    key_dim, value_dim = key.shape[3], value.shape[3]
    block_key, block_value = padded_dim(key_dim), padded_dim(value_dim)
    block_heads = min(next_power_of_two(heads), max(1, _TILE_ELEMENTS // max(block_key, block_value)))
    with torch.cuda.device_of(keys):
        _store_kernel[(batch * tokens, triton.cdiv(heads, block_heads))](
            key, value, keys, values, slots, tokens,
            *(each.stride(dim) for each in (key, value) for dim in (0, 1, 2)),
            *(each.stride(dim) for each in (keys, values) for dim in (0, 1)),
            HEADS=heads, KEY_DIM=key_dim, VALUE_DIM=value_dim,
            BLOCK_HEADS=block_heads, BLOCK_KEY=block_key, BLOCK_VALUE=block_value, **constants_of(records),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def store_tokens_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    records: KVRecords | None = None,
) -> None:
    """As `store_tokens`, in plain torch."""
    if records is not None:
        key, value = records.encode_keys(key), records.encode_values(value)
    stored = slots >= 0
    for new, memory in ((key, keys), (value, values)):
        memory[:, slots[stored].long()] = new.transpose(0, 1).flatten(1, 2)[:, stored]
