"""New K and V into their slots by the native library, as they are or as records of them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from struct import Struct
from typing import Any

import torch

from .formats import KVRecords
from .native_library import CPU, DTYPES, NativeError, error_of, load

# As `StoreCall` in native.h: what a layer's memory and new tokens look like, and where the tokens go.
_LOOK, _PLACE = Struct("=Q6qQ6q6q"), Struct("=2Q4q")
# New tokens are encoded so many numbers at a time.
_ENCODED_LANES = 4


class Writes:
    """Where new tokens go, laid out for the library.

    Args:
        writes: `(source, tokens, slot, step)`: new tokens `[source, source + tokens)` go to `slot, slot + step, ...`.
        copies: `(source, target, tokens)`: slots that are copied after that, in order.

    Attributes:
        place: the end of a call.
    """

    __slots__ = ("_copies", "_writes", "place")

    def __init__(self, writes: Sequence[tuple[int, int, int, int]], copies: Sequence[tuple[int, int, int]]):
        self._writes = array("q", [x for write in writes for x in write])
        self._copies = array("q", [x for copy in copies for x in copy])
        self.place = _PLACE.pack(
            self._writes.buffer_info()[0], self._copies.buffer_info()[0], len(writes), len(copies), 0, 1
        )


def place_from(slot: int, step: int) -> bytes:
    """The end of a call without copies, token `i` to slot `slot + i * step`."""
    return _PLACE.pack(0, 0, 0, 0, slot, step)


class NativeStore:
    """The library's store of new tokens in one layer's memory.

    Args:
        keys, values: `[kv_heads, slots, dim]` of any dtype, or records.
        records: what they are.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, records: KVRecords | None = None):
        if keys.shape[:2] != values.shape[:2]:
            raise NativeError("keys and values differ in heads or slots")
        self._keys, self._values, self._records = keys, values, records
        self._store = load().hf_paged_store
        # What K and V looked like last and the call for them: one attribute, as threads may write at the same time.
        self._last: tuple[tuple[Any, ...], bytes | None] = ((), None)

    def write(self, key: torch.Tensor, value: torch.Tensor, writes: Writes) -> bool:
        """Write new K and V `[rows, kv_heads, n, dim]`, numbered row by row, and do the copies.

        Returns False, having done nothing, where a token's elements do not lie side by side or cannot be encoded here.
        """
        return self._write(key, value, writes.place)

    def write_rows(self, key: torch.Tensor, value: torch.Tensor, slot: int, step: int) -> bool:
        """The same without copies, token `i` to slot `slot + i * step`."""
        return self._write(key, value, place_from(slot, step))

    def _write(self, key: torch.Tensor, value: torch.Tensor, place: bytes) -> bool:
        call = self.call_for(key, value)
        if call is None:
            return False
        self.run(call + place, key, value)
        return True

    def call_for(self, key: torch.Tensor, value: torch.Tensor) -> bytes | None:
        """The begin of a call for `run`, the same for all K and V that look like these; a place makes it whole.

        `None` where `write` returns False.
        """
        seen = (key.shape, key.stride(), key.dtype, key.device, value.shape, value.stride(), value.dtype, value.device)
        last, call = self._last
        if seen != last:
            call = self._lay_out(key, value) if self._takes(key, value) else None
            self._last = seen, call
        return call

    def run(self, call: bytes, key: torch.Tensor, value: torch.Tensor) -> None:
        """Carry out a whole call on K and V that look as they did then."""
        error = self._store(call, key.data_ptr(), value.data_ptr())
        if error:
            raise error_of(error)

    def _takes(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        if self._records is not None:
            dims = (key.shape[3], value.shape[3])
            if key.dtype != value.dtype or key.dtype not in DTYPES or any(dim % _ENCODED_LANES for dim in dims):
                return False
            if not all(8 <= dim <= 256 for dim in dims):
                return False
        return key.stride(3) == value.stride(3) == 1

    def _lay_out(self, key: torch.Tensor, value: torch.Tensor) -> bytes:
        """`StoreCall` without where new tokens go."""
        heads, slots, _ = self._keys.shape
        rows, _, tokens, _ = key.shape
        if value.shape[:3] != key.shape[:3]:
            raise NativeError("key and value differ in rows, heads or tokens")
        records = self._records
        key_bytes, value_bytes = (None, None) if records is None else (records.key_bytes, records.value_bytes)
        sides = _side(self._keys, key, key_bytes) + _side(self._values, value, value_bytes)
        kinds = (0, 0) if records is None else (DTYPES[key.dtype], records.kv_format.storage)
        return _LOOK.pack(*sides, *kinds, heads, slots, tokens, rows * tokens)


def _side(memory: torch.Tensor, new: torch.Tensor, record_bytes: int | None) -> tuple[int, ...]:
    """`StoreSide`: the memory and the strides in bytes."""
    heads, _, size = memory.shape
    dim = new.shape[3]
    expected, dtype = (dim, new.dtype) if record_bytes is None else (record_bytes, torch.uint8)
    head_stride, *dense = memory.stride()
    row, head, token, last = new.stride()
    if dense != [size, 1] or last != 1 or new.shape[1] != heads or size != expected:
        raise NativeError("new tokens do not fit the memory, or one of the two is not contiguous in its last dims")
    if memory.dtype != dtype or not (new.device == memory.device == CPU):
        raise NativeError(f"new tokens in {new.dtype} on {new.device}, memory in {memory.dtype} on {memory.device}")
    item, fresh = memory.element_size(), new.element_size()
    return memory.data_ptr(), dim, size * item, head_stride * item, row * fresh, head * fresh, token * fresh
