"""The native CPU kernel: finds the library, says which instruction set runs, checks a call and hands it over.

The library (`kernels/native`, loaded with ctypes) knows neither Python nor torch. It is built when the package is
installed; without it, or where it is not known to be faster, attention is torch's own. `HF_PAGED_NATIVE=off` switches
it off, `HF_PAGED_NATIVE=portable` (or another name of a variant) forces one.
"""

from __future__ import annotations

import ctypes
import functools
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import torch  # first, so that its OpenMP runtime is loaded

from .formats import KVFormat, KVRecords

_LIBRARY = Path(__file__).with_name("_native.so")
_SWITCH = "HF_PAGED_NATIVE"

# Which variants run unasked, the first that fits: those that were measured against SDPA (`make bench-attention`). Not
# here, as nobody has measured them: avx512 (where avx2 runs as well) and neon; nor portable, which is for the tests.
_MEASURED = ("avx2",)

_CPU = torch.device("cpu")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# As `AttentionCall` and `StoreCall` in native.h.
_ATTENTION = Struct("=3q2Q14q2d")
_STORE = Struct("=Q6qQ6q6q")
# New tokens are encoded so many numbers at a time.
_ENCODED_LANES = 4
# Laid out calls that a kernel keeps: those of a few steps of a few models.
_MAX_CALLS = 64
_ERRORS = {
    1: "a size or dim is out of range",
    2: "a run reaches beyond the slots",
    3: "a part names queries or runs that do not exist",
    4: "the variant does not do this dtype or dim on this CPU",
    5: "out of memory",
    6: "a write or copy reaches beyond the slots or the new tokens",
}
# `first` of a part whose queries see all of its tokens, and `window` of one without.
SEES_ALL = 2**60
UNLIMITED = 2**61


class Part(NamedTuple):
    """Queries `[query, query_stop)` over the tokens of runs `[run, run_stop)`, numbered from 0.

    Query `i` of the part sees token `t` where `first + i - window < t <= first + i`.
    """

    query: int
    query_stop: int
    run: int
    run_stop: int
    first: int = SEES_ALL
    window: int = UNLIMITED


class Parts:
    """What the queries of a call read, laid out for the library: parts, and runs `(slot, tokens)`."""

    __slots__ = ("_parts", "_runs", "calls", "num_queries", "pointers")

    def __init__(self, num_queries: int, parts: Sequence[Part], runs: Sequence[tuple[int, int]]):
        self.num_queries = num_queries
        self._parts = array("q", [x for part in parts for x in part])
        self._runs = array("q", [x for run in runs for x in run])
        self.pointers = (self._parts.buffer_info()[0], self._runs.buffer_info()[0], len(parts), len(runs))
        self.calls: dict[tuple[Any, ...], bytes] = {}  # laid out, by what the tensors of the call look like


class Writes:
    """Where new tokens go, laid out for the library.

    Args:
        writes: `(source, tokens, slot, step)`: new tokens `[source, source + tokens)` go to `slot, slot + step, ...`.
        copies: `(source, target, tokens)`: slots that are copied after that, in order.
    """

    __slots__ = ("_copies", "_writes", "pointers")

    def __init__(self, writes: Sequence[tuple[int, int, int, int]], copies: Sequence[tuple[int, int, int]]):
        self._writes = array("q", [x for write in writes for x in write])
        self._copies = array("q", [x for copy in copies for x in copy])
        self.pointers = (self._writes.buffer_info()[0], self._copies.buffer_info()[0], len(writes), len(copies))


class NativeError(ValueError):
    """The library has refused a call."""


class NativeKernel:
    """One variant of the library.

    Checking a call takes longer than a short one itself, and all layers of a step make the same: what a call says
    beside its pointers is checked and laid out once, and found again by the tensors' shapes and strides.

    Attributes:
        name: of the variant.
        lanes: head dims must be a multiple of this.
    """

    def __init__(self, library: ctypes.CDLL, index: int, name: str, lanes: int):
        self.name, self.lanes = name, lanes
        self._index = index
        self._attend = library.hf_paged_attend
        self._row_calls: dict[tuple[Any, ...], bytes] = {}

    def takes(self, dtype: torch.dtype, key_dim: int, value_dim: int, kv_format: KVFormat | None = None) -> bool:
        """Whether the variant does K and V of this dtype and these dims, stored in this format."""
        # A vector of codes is read from each part of a record whose codes share bytes.
        parts = 1 if kv_format is None else kv_format.keys.codes_per_byte
        multiple = parts * max(8, self.lanes)
        return dtype in _DTYPES and all(8 <= dim <= 256 and dim % multiple == 0 for dim in (key_dim, value_dim))

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        parts: Parts,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        records: KVRecords | None = None,
    ) -> torch.Tensor:
        """Attention of `query [queries, heads, key_dim]` over `keys`, `values [kv_heads, slots, dim]`, or records.

        Returns `[queries, heads, value_dim]`, contiguous. `NativeError` for what the library does not do.
        """
        signature = (*_look_of(query, keys, values), scale, softcap, self._index, records)
        call = parts.calls.get(signature)
        if call is None:
            call = parts.calls[signature] = self.parts_call(query, keys, values, parts, scale, softcap, records)
        queries, heads, _ = query.shape
        value_dim = values.shape[2] if records is None else records.value_dim
        out = torch.empty((queries, heads, value_dim), dtype=query.dtype)
        self.run(call, query, keys.data_ptr(), values.data_ptr(), out, sinks)
        return out

    def parts_call(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        parts: Parts,
        scale: float,
        softcap: float | None,
        records: KVRecords | None,
    ) -> bytes:
        """The call of `attend` for `run`: the same for all tensors that look like these."""
        if query.shape[0] != parts.num_queries:
            raise NativeError(f"query has {query.shape[0]} queries, the parts are for {parts.num_queries}")
        if keys.shape[:2] != values.shape[:2]:
            raise NativeError("keys and values differ in heads or slots")
        return self._lay_out(query, keys, values, parts.pointers, (keys.shape[1], 0, 0), scale, softcap, records)

    def attend_rows(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of `query [rows, heads, 1, key_dim]`, each over all of its `key`, `value [rows, kv_heads, n, dim]`.

        The rows lie equally far apart, a whole number of tokens. Returns `[rows, 1, heads, value_dim]`, contiguous.
        """
        signature = (*_look_of(query, key, value), scale, softcap)
        call = self._row_calls.get(signature)
        if call is None:
            if len(self._row_calls) >= _MAX_CALLS:
                self._row_calls.clear()
            call = self._row_calls[signature] = self.rows_call(query, key, value, scale, softcap)
        rows, heads, _, _ = query.shape
        out = torch.empty((rows, 1, heads, value.shape[3]), dtype=query.dtype)
        self.run(call, query, key.data_ptr(), value.data_ptr(), out, sinks)
        return out

    def rows_call(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float | None
    ) -> bytes:
        """The call of `attend_rows` for `run`: the same for all tensors that look like these."""
        rows, _, tokens, key_dim = key.shape
        step, odd = divmod(key.stride(0), key_dim)
        if key.shape[:3] != value.shape[:3] or query.shape[0] != rows or query.shape[2] != 1:
            raise NativeError("query, key and value differ in rows, heads or tokens")
        if odd or value.stride(0) != step * value.shape[3] or step < 0:
            raise NativeError("the rows of key and value do not lie equally far apart")
        extent = ((rows - 1) * step + tokens, tokens, step)
        return self._lay_out(query.squeeze(2), key[0], value[0], (0, 0, 0, 0), extent, scale, softcap, None)

    def run(
        self,
        call: bytes,
        query: torch.Tensor,
        key_at: int,
        value_at: int,
        out: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> None:
        """Carry out a call on a query that looks as it did then, K and V at these addresses.

        `out [..., heads, value_dim]` is contiguous. Only the sinks are checked: what lies at the addresses must look as
        it did, too.
        """
        sinks_at = 0
        if sinks is not None:
            sinks = sinks.float().contiguous()
            heads = out.shape[-2]
            if sinks.shape != (heads,) or sinks.device != _CPU:
                raise NativeError(f"sinks must be [{heads}] on the CPU, got {tuple(sinks.shape)} on {sinks.device}")
            sinks_at = sinks.data_ptr()
        error = self._attend(
            call, query.data_ptr(), key_at, value_at, out.data_ptr(), sinks_at, torch.get_num_threads()
        )
        if error:
            raise NativeError(_ERRORS[error])

    def _lay_out(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        parts: tuple[int, int, int, int],
        extent: tuple[int, int, int],
        scale: float,
        softcap: float | None,
        records: KVRecords | None,
    ) -> bytes:
        """`AttentionCall` without its pointers; `extent` is slots, tokens of a row and the step between rows."""
        queries, heads, key_dim = query.shape
        kv_heads, _, value_size = values.shape
        query_stride, head_stride, last = query.stride()
        key_stride, value_stride = keys.stride(), values.stride()
        if last != 1 or key_stride[1:] != (keys.shape[2], 1) or value_stride[1:] != (value_size, 1):
            raise NativeError("query, keys or values are not contiguous in their last dims, or differ in dim")
        dtype = query.dtype
        sizes = dims = (keys.shape[2], value_size)
        stored, storage = dtype, _DTYPES.get(dtype)
        if records is not None:
            sizes, dims = (records.key_bytes, records.value_bytes), (records.key_dim, records.value_dim)
            stored, storage = torch.uint8, records.kv_format.storage
        if keys.dtype != stored or values.dtype != stored or dtype not in _DTYPES or heads % kv_heads:
            raise NativeError(f"cannot attend {heads} heads in {dtype} to {kv_heads} KV heads in {keys.dtype}")
        if dims[0] != key_dim or sizes != (keys.shape[2], value_size):
            raise NativeError(f"query has dim {key_dim}, keys have {dims[0]}, or records are of other dims")
        if not (query.device == keys.device == values.device == _CPU):
            raise NativeError("query, keys or values are not on the CPU")
        return _ATTENTION.pack(
            self._index, _DTYPES[dtype], storage, *parts,
            queries, kv_heads, heads // kv_heads, *dims,
            query_stride, head_stride, key_stride[0], value_stride[0], *extent, scale, softcap or 0.0,
        )  # fmt: skip


def _look_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[Any, ...]:
    """All of the tensors that a laid out call depends on."""
    return (
        query.shape, query.stride(), query.dtype, query.device,
        key.shape, key.stride(), key.dtype, key.device,
        value.shape, value.stride(), value.dtype, value.device,
    )  # fmt: skip


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
        self._store = _load().hf_paged_store
        # What K and V looked like last and the call for them: one attribute, as threads may write at the same time.
        self._last: tuple[tuple[Any, ...], bytes | None] = ((), None)

    def write(self, key: torch.Tensor, value: torch.Tensor, writes: Writes) -> bool:
        """Write new K and V `[rows, kv_heads, n, dim]`, numbered row by row, and do the copies.

        Returns False, having done nothing, where a token's elements do not lie side by side or cannot be encoded here.
        """
        return self._write(key, value, *writes.pointers, 0, 1)

    def write_rows(self, key: torch.Tensor, value: torch.Tensor, slot: int, step: int) -> bool:
        """The same without copies, token `i` to slot `slot + i * step`."""
        return self._write(key, value, 0, 0, 0, 0, slot, step)

    def _write(self, key: torch.Tensor, value: torch.Tensor, *where: int) -> bool:
        call = self.call_for(key, value)
        if call is None:
            return False
        self.run(call, key, value, *where)
        return True

    def call_for(self, key: torch.Tensor, value: torch.Tensor) -> bytes | None:
        """The call for `run`, the same for all K and V that look like these; `None` where `write` returns False."""
        seen = (key.shape, key.stride(), key.dtype, key.device, value.shape, value.stride(), value.dtype, value.device)
        last, call = self._last
        if seen != last:
            call = self._lay_out(key, value) if self._takes(key, value) else None
            self._last = seen, call
        return call

    def run(self, call: bytes, key: torch.Tensor, value: torch.Tensor, *where: int) -> None:
        """Carry out a call on K and V that look as they did then; `where` is `Writes.pointers`, slot and step."""
        error = self._store(call, key.data_ptr(), value.data_ptr(), *where)
        if error:
            raise NativeError(_ERRORS[error])

    def _takes(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        if self._records is not None:
            dims = (key.shape[3], value.shape[3])
            if key.dtype != value.dtype or key.dtype not in _DTYPES or any(dim % _ENCODED_LANES for dim in dims):
                return False
            if not all(8 <= dim <= 256 for dim in dims):
                return False
        return key.stride(3) == value.stride(3) == 1

    def _lay_out(self, key: torch.Tensor, value: torch.Tensor) -> bytes:
        """`StoreCall` without what changes from call to call."""
        heads, slots, _ = self._keys.shape
        rows, _, tokens, _ = key.shape
        if value.shape[:3] != key.shape[:3]:
            raise NativeError("key and value differ in rows, heads or tokens")
        records = self._records
        key_bytes, value_bytes = (None, None) if records is None else (records.key_bytes, records.value_bytes)
        sides = _side(self._keys, key, key_bytes) + _side(self._values, value, value_bytes)
        kinds = (0, 0) if records is None else (_DTYPES[key.dtype], records.kv_format.storage)
        return _STORE.pack(*sides, *kinds, heads, slots, tokens, rows * tokens)


def _side(memory: torch.Tensor, new: torch.Tensor, record_bytes: int | None) -> tuple[int, ...]:
    """`StoreSide`: the memory and the strides in bytes."""
    heads, _, size = memory.shape
    dim = new.shape[3]
    expected, dtype = (dim, new.dtype) if record_bytes is None else (record_bytes, torch.uint8)
    head_stride, *dense = memory.stride()
    row, head, token, last = new.stride()
    if dense != [size, 1] or last != 1 or new.shape[1] != heads or size != expected:
        raise NativeError("new tokens do not fit the memory, or one of the two is not contiguous in its last dims")
    if memory.dtype != dtype or not (new.device == memory.device == _CPU):
        raise NativeError(f"new tokens in {new.dtype} on {new.device}, memory in {memory.dtype} on {memory.device}")
    item, fresh = memory.element_size(), new.element_size()
    return memory.data_ptr(), dim, size * item, head_stride * item, row * fresh, head * fresh, token * fresh


class Availability(NamedTuple):
    """The variants that this CPU runs and nobody has switched off, in order of preference, and what to tell people."""

    kernels: tuple[NativeKernel, ...]
    reason: str

    def store_for(
        self, keys: torch.Tensor, values: torch.Tensor, records: KVRecords | None = None
    ) -> NativeStore | None:
        """The native store for one layer's memory, `None` where torch is to copy."""
        suits = keys.device == values.device == _CPU and keys.shape[:2] == values.shape[:2]
        return NativeStore(keys, values, records) if self.kernels and suits else None


@functools.cache
def native() -> Availability:
    """What of the library can be used; looked at once a process."""
    return _look(os.environ.get(_SWITCH))


@functools.cache
def kernel_for(
    dtype: torch.dtype, key_dim: int, value_dim: int, kv_format: KVFormat | None = None
) -> NativeKernel | None:
    """The variant for K and V on the CPU, `None` where torch's own attention is to be used."""
    return next((kernel for kernel in native().kernels if kernel.takes(dtype, key_dim, value_dim, kv_format)), None)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, for what every CPU runs; `None` where it was not built, cannot be loaded or is switched off."""
    if os.environ.get(_SWITCH) == "off":
        return None
    try:
        return _load()
    except OSError:
        return None


def variants() -> dict[str, NativeKernel]:
    """All variants that this CPU can run, by name; empty without the library."""
    try:
        library = _load()
    except OSError:
        return {}
    found: dict[str, NativeKernel] = {}
    lanes = ctypes.c_int64()
    index = 0
    while (name := library.hf_paged_variant(index, ctypes.byref(lanes))) is not None:
        if lanes.value:
            found[name.decode()] = NativeKernel(library, index, name.decode(), lanes.value)
        index += 1
    return found


def _look(switch: str | None) -> Availability:
    if switch == "off":
        return Availability((), f"native kernel off: {_SWITCH}=off")
    if not _LIBRARY.exists():
        return Availability((), "native kernel not built: no C++ compiler when the package was installed")
    found = variants()
    if not found:
        return Availability((), f"native kernel not usable: {_LIBRARY.name} cannot be loaded here")
    if switch:
        if switch not in found:
            return Availability((), f"native kernel off: {_SWITCH}={switch} is none of {', '.join(found)}")
        return Availability((found[switch],), f"native kernel, {switch} ({_SWITCH})")
    kernels = tuple(found[name] for name in _MEASURED if name in found)
    if not kernels:
        return Availability((), f"native kernel off: not measured on this CPU ({', '.join(found)})")
    return Availability(kernels, f"native kernel, {kernels[0].name}")


@functools.cache
def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_LIBRARY))
    address, integer = ctypes.c_void_p, ctypes.c_int64
    library.hf_paged_attend.argtypes = (ctypes.c_char_p, *[address] * 5, integer)
    library.hf_paged_attend.restype = ctypes.c_int64
    library.hf_paged_store.argtypes = (ctypes.c_char_p, *[address] * 4, *[integer] * 4)
    library.hf_paged_store.restype = ctypes.c_int64
    library.hf_paged_sample_begin.argtypes = (ctypes.c_char_p, integer, integer, ctypes.POINTER(ctypes.c_void_p))
    library.hf_paged_sample_begin.restype = ctypes.c_int64
    library.hf_paged_sample_end.argtypes = (ctypes.c_void_p,)
    library.hf_paged_sample_end.restype = ctypes.c_int64
    library.hf_paged_variant.argtypes = (ctypes.c_int64, ctypes.POINTER(ctypes.c_int64))
    library.hf_paged_variant.restype = ctypes.c_char_p
    library.hf_paged_use_threads.argtypes = (ctypes.c_void_p,)
    library.hf_paged_use_threads.restype = None
    library.hf_paged_use_threads(_openmp_entry())
    return library


def _openmp_entry() -> ctypes.c_void_p | None:
    """Where the OpenMP runtime that torch has loaded starts threads; `None`: the library uses one thread."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError, TypeError):  # another runtime; Windows has no global namespace
        return None
