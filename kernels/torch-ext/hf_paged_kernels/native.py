"""Attention on the native library: says which instruction set runs, checks a call and hands it over.

Without the library, or where it is not known to be faster, attention is torch's own. `HF_PAGED_NATIVE=off` switches it
off, `HF_PAGED_NATIVE=portable` (or another name of a variant) forces one.
"""

from __future__ import annotations

import ctypes
import functools
import os
from array import array
from collections.abc import Sequence
from struct import Struct
from typing import Any, NamedTuple

import torch

from .formats import KVFormat, KVRecords
from .native_library import CPU, DTYPES, LIBRARY, SWITCH, NativeError, error_of, load
from .native_linear import NativeLinear
from .native_store import NativeStore
from .processor import beats_mkl

# Which variants run unasked, the first that fits: those that were measured against SDPA (`make bench-attention`). Not
# here: neon, as nobody has measured it; nor portable, which is for the tests.
_MEASURED = ("avx512_bf16", "avx512", "avx2")
# Of these, whose linear layers were measured (`make bench-linear`).
_MEASURED_LINEAR = ("avx512_bf16", "avx512")

# As `AttentionCall` in native.h: what a call looks like, and where K and V are.
_LOOK, _PLACE = Struct("=3q2Q14q2d"), Struct("=3Qq")
# Laid out calls that a kernel keeps: those of a few steps of a few models.
_MAX_CALLS = 64
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


class NativeKernel:
    """One variant of the library.

    Checking a call takes longer than a short one itself, and all layers of a step make the same: what a call says
    beside its pointers is checked and laid out once, and found again by the tensors' shapes and strides.

    Attributes:
        name: of the variant.
        lanes: head dims must be a multiple of this.
        linear: what the variant does of linear layers.
    """

    def __init__(self, library: ctypes.CDLL, index: int, name: str, lanes: int):
        self.name, self.lanes = name, lanes
        self._index = index
        self._attend = library.hf_paged_attend
        self.linear = NativeLinear(library, index, lanes)
        self._row_calls: dict[tuple[Any, ...], bytes] = {}

    def takes(self, dtype: torch.dtype, key_dim: int, value_dim: int, kv_format: KVFormat | None = None) -> bool:
        """Whether the variant does K and V of this dtype and these dims, stored in this format."""
        # A vector of codes is read from each part of a record whose codes share bytes.
        parts = 1 if kv_format is None else kv_format.keys.codes_per_byte
        multiple = parts * max(8, self.lanes)
        return dtype in DTYPES and all(8 <= dim <= 256 and dim % multiple == 0 for dim in (key_dim, value_dim))

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

        Scores are products times `scale`, then `softcap * tanh(scores / softcap)` where there is a softcap. `sinks
        [heads]` are one more score for each query, whose value is 0. Returns `[queries, heads, value_dim]`, contiguous.
        `NativeError` for what the library does not do, `MemoryError` where it gets no memory.
        """
        signature = (*_look_of(query, keys, values), scale, softcap, self._index, records)
        call = parts.calls.get(signature)
        if call is None:
            call = parts.calls[signature] = self.parts_call(query, keys, values, parts, scale, softcap, records)
        queries, heads, _ = query.shape
        value_dim = values.shape[2] if records is None else records.value_dim
        out = torch.empty((queries, heads, value_dim), dtype=query.dtype, device="cpu")
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

        The rows lie equally far apart, a whole number of tokens. `scale`, `softcap`, `sinks [heads]` and
        errors are those of `attend`. Returns `[rows, 1, heads, value_dim]`, contiguous.
        """
        signature = (*_look_of(query, key, value), scale, softcap)
        call = self._row_calls.get(signature)
        if call is None:
            if len(self._row_calls) >= _MAX_CALLS:
                self._row_calls.clear()
            call = self._row_calls[signature] = self.rows_call(query, key, value, scale, softcap)
        rows, heads, _, _ = query.shape
        out = torch.empty((rows, 1, heads, value.shape[3]), dtype=query.dtype, device="cpu")
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
        it did, too. `MemoryError` where the library gets none.
        """
        sinks_at = 0
        if sinks is not None:
            sinks = sinks.float().contiguous()
            heads = out.shape[-2]
            if sinks.shape != (heads,) or sinks.device != CPU:
                raise NativeError(f"sinks must be [{heads}] on the CPU, got {tuple(sinks.shape)} on {sinks.device}")
            sinks_at = sinks.data_ptr()
        self.run_whole(call + place_at(key_at, value_at, sinks_at), query, out)

    def run_whole(self, call: bytes, query: torch.Tensor, out: torch.Tensor) -> None:
        """The same with a call that says where K and V are."""
        error = self._attend(call, query.data_ptr(), out.data_ptr())
        if error:
            raise error_of(error)

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
        """`AttentionCall` without where K and V are; `extent` is slots, tokens of a row and the step between rows."""
        queries, heads, key_dim = query.shape
        kv_heads, _, value_size = values.shape
        query_stride, head_stride, last = query.stride()
        key_stride, value_stride = keys.stride(), values.stride()
        if last != 1 or key_stride[1:] != (keys.shape[2], 1) or value_stride[1:] != (value_size, 1):
            raise NativeError("query, keys or values are not contiguous in their last dims, or differ in dim")
        dtype = query.dtype
        sizes = dims = (keys.shape[2], value_size)
        stored, storage = dtype, DTYPES.get(dtype)
        if records is not None:
            sizes, dims = (records.key_bytes, records.value_bytes), (records.key_dim, records.value_dim)
            stored, storage = torch.uint8, records.kv_format.storage
        if keys.dtype != stored or values.dtype != stored or dtype not in DTYPES or heads % kv_heads:
            raise NativeError(f"cannot attend {heads} heads in {dtype} to {kv_heads} KV heads in {keys.dtype}")
        if dims[0] != key_dim or sizes != (keys.shape[2], value_size):
            raise NativeError(f"query has dim {key_dim}, keys have {dims[0]}, or records are of other dims")
        if not (query.device == keys.device == values.device == CPU):
            raise NativeError("query, keys or values are not on the CPU")
        return _LOOK.pack(
            self._index, DTYPES[dtype], storage, *parts,
            queries, kv_heads, heads // kv_heads, *dims,
            query_stride, head_stride, key_stride[0], value_stride[0], *extent, scale, softcap or 0.0,
        )  # fmt: skip


def place_at(key_at: int, value_at: int, sinks_at: int = 0) -> bytes:
    """What makes a call whole: addresses, and as many threads as torch uses now."""
    return _PLACE.pack(key_at, value_at, sinks_at, torch.get_num_threads())


def _look_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[Any, ...]:
    """All of the tensors that a laid out call depends on."""
    return (
        query.shape, query.stride(), query.dtype, query.device,
        key.shape, key.stride(), key.dtype, key.device,
        value.shape, value.stride(), value.dtype, value.device,
    )  # fmt: skip


class Availability(NamedTuple):
    """The variants that this CPU runs and nobody has switched off, in order of preference, and what to tell people.

    Attributes:
        multiplies: whether they are to take products of matrices (prompts), too, although torch's own attention can.
        linear: which is to multiply few rows by the weights of linear layers; `None`: torch.
    """

    kernels: tuple[NativeKernel, ...]
    reason: str
    multiplies: bool = False
    linear: NativeLinear | None = None

    def store_for(
        self, keys: torch.Tensor, values: torch.Tensor, records: KVRecords | None = None
    ) -> NativeStore | None:
        """The native store for one layer's memory, `None` where torch is to copy."""
        suits = keys.device == values.device == CPU and keys.shape[:2] == values.shape[:2]
        return NativeStore(keys, values, records) if self.kernels and suits else None


@functools.cache
def native_kernels() -> Availability:
    """What of the library can be used; looked at once a process."""
    return _look(os.environ.get(SWITCH))


@functools.cache
def kernel_for(
    dtype: torch.dtype, key_dim: int, value_dim: int, kv_format: KVFormat | None = None
) -> NativeKernel | None:
    """The variant for K and V on the CPU, `None` where torch's own attention is to be used."""
    suits = (kernel for kernel in native_kernels().kernels if kernel.takes(dtype, key_dim, value_dim, kv_format))
    return next(suits, None)


def variants() -> dict[str, NativeKernel]:
    """All variants that this CPU can run, by name; empty without the library."""
    try:
        library = load()
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
        return Availability((), f"native kernel off: {SWITCH}=off")
    if not LIBRARY.exists():
        return Availability((), "native kernel not built: no C++ compiler when the package was installed")
    found = variants()
    if not found:
        return Availability((), f"native kernel not usable: {LIBRARY.name} cannot be loaded here")
    if switch:
        if switch not in found:
            return Availability((), f"native kernel off: {SWITCH}={switch} is none of {', '.join(found)}")
        return Availability((found[switch],), f"native kernel, {switch} ({SWITCH})", True, found[switch].linear)
    kernels = tuple(found[name] for name in _MEASURED if name in found)
    if not kernels:
        return Availability((), f"native kernel off: not measured on this CPU ({', '.join(found)})")
    if not beats_mkl():
        return Availability(kernels, f"native kernel, {kernels[0].name}; prompts by torch")
    linear = kernels[0].linear if kernels[0].name in _MEASURED_LINEAR else None
    return Availability(kernels, f"native kernel, {kernels[0].name}", True, linear)
