"""Copies of slots on a GPU: copy-on-write within a store, and many blocks to or from another memory, in one launch.

copies                  [copies, 4] int32: source slot, target slot, tokens, 0
keys, values            [kv_heads, slots, dim], where from
to_keys, to_values      the same, where to; for copy-on-write the same tensors
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl

from .language import loop_bound
from .launch import is_interpreted
from .tuning import padded_dim

# Numbers per copy in the layout.
_COPY_NUMBERS = 4
# Elements of K or of V that a program moves at a time.
_TILE_ELEMENTS = 4096


@triton.jit
def _copy_rows(
    p_from, p_to, source, target, tokens, stride_from, stride_to,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """`tokens` rows of one head."""
    o_dim = tl.arange(0, BLOCK_DIM)
    for at in range(0, loop_bound(tokens, INTERPRETED), BLOCK_TOKENS):
        o_token = (at + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
        inside = (o_token < tokens)[:, None] & (o_dim < DIM)[None, :]
        b_rows = tl.load(p_from + ((source + o_token) * stride_from)[:, None] + o_dim[None, :], mask=inside)
        tl.store(p_to + ((target + o_token) * stride_to)[:, None] + o_dim[None, :], b_rows, mask=inside)


@triton.jit
def _copy_kernel(
    p_keys, p_values, p_to_keys, p_to_values, p_copies,
    stride_keys_head, stride_keys_slot, stride_values_head, stride_values_slot,
    stride_to_keys_head, stride_to_keys_slot, stride_to_values_head, stride_to_values_slot,
    COPY: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid `(copies, kv_heads)`."""
    p_copy = p_copies + tl.program_id(0) * COPY
    i_head = tl.program_id(1).to(tl.int64)
    source = tl.load(p_copy).to(tl.int64)
    target = tl.load(p_copy + 1).to(tl.int64)
    tokens = tl.load(p_copy + 2)
    _copy_rows(
        p_keys + i_head * stride_keys_head, p_to_keys + i_head * stride_to_keys_head,
        source, target, tokens, stride_keys_slot, stride_to_keys_slot, KEY_DIM, BLOCK_KEY, BLOCK_TOKENS,
        INTERPRETED,
    )  # fmt: skip
    _copy_rows(
        p_values + i_head * stride_values_head, p_to_values + i_head * stride_to_values_head,
        source, target, tokens, stride_values_slot, stride_to_values_slot, VALUE_DIM, BLOCK_VALUE, BLOCK_TOKENS,
        INTERPRETED,
    )  # fmt: skip


def copy_waves(copies: Iterable[tuple[int, int, int]], device: torch.device) -> list[torch.Tensor]:
    """Copies `(source, target, tokens)` of one memory, to be done in order, as launches for `copy_slots`.

    Copies within a launch run at the same time: one that reads what an earlier one writes, or writes what an earlier
    one reads or writes, comes in a later launch.
    """
    waves: list[list[tuple[int, int, int]]] = []
    reads: set[int] = set()
    writes: set[int] = set()
    for source, target, tokens in copies:
        read, written = range(source, source + tokens), range(target, target + tokens)
        if not waves or not writes.isdisjoint(read) or not writes.isdisjoint(written) or not reads.isdisjoint(written):
            waves.append([])
            reads.clear()
            writes.clear()
        waves[-1].append((source, target, tokens))
        reads.update(read)
        writes.update(written)
    return [pack_copies(wave, device) for wave in waves]


def pack_copies(copies: Sequence[tuple[int, int, int]], device: torch.device) -> torch.Tensor:
    """Copies `(source, target, tokens)` that do not touch each other's slots, as `copy_slots` reads them."""
    flat = array("i", [x for copy in copies for x in (*copy, 0)])
    return torch.frombuffer(flat, dtype=torch.int32).view(-1, _COPY_NUMBERS).to(device)


def copy_slots(
    keys: torch.Tensor, values: torch.Tensor, to_keys: torch.Tensor, to_values: torch.Tensor, copies: torch.Tensor
) -> None:
    """Copy slots of `keys`, `values` to `to_keys`, `to_values`, all `[kv_heads, slots, dim]`."""
    assert (keys.dtype, values.dtype) == (to_keys.dtype, to_values.dtype), "a copy changes no dtype"
    assert all(each.stride(2) == 1 for each in (keys, values, to_keys, to_values)), "dims lie side by side"
    keys, values, to_keys, to_values = map(_as_words, (keys, values, to_keys, to_values))
    block_key, block_value = padded_dim(keys.shape[2]), padded_dim(values.shape[2])
    with torch.cuda.device_of(keys):
        _copy_kernel[(copies.shape[0], keys.shape[0])](
            keys, values, to_keys, to_values, copies,
            *(each.stride(dim) for each in (keys, values, to_keys, to_values) for dim in (0, 1)),
            COPY=_COPY_NUMBERS, KEY_DIM=keys.shape[2], VALUE_DIM=values.shape[2],
            BLOCK_KEY=block_key, BLOCK_VALUE=block_value,
            BLOCK_TOKENS=_TILE_ELEMENTS // max(block_key, block_value), INTERPRETED=is_interpreted(), num_warps=4,
        )  # fmt: skip


def _as_words(memory: torch.Tensor) -> torch.Tensor:
    """Records `[..., bytes]` as words of four bytes where they are whole ones, any other memory as it is.

    Slots of records begin at no multiples of 16 bytes: the kernel would move a byte at a time.
    """
    is_words = memory.dtype == torch.uint8 and memory.shape[-1] % 4 == 0
    return memory.view(torch.int32) if is_words else memory


def copy_slots_reference(
    keys: torch.Tensor, values: torch.Tensor, to_keys: torch.Tensor, to_values: torch.Tensor, copies: torch.Tensor
) -> None:
    """As `copy_slots`, in plain torch."""
    for source, target, tokens, _ in copies.tolist():
        for memory, to_memory in ((keys, to_keys), (values, to_values)):
            to_memory[:, target : target + tokens] = memory[:, source : source + tokens]
