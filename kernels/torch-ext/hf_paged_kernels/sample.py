"""A sample of what tensors hold, taken by the native library: compared with at every later look."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from struct import Struct

import torch

from .native_library import NativeError, library

# Elements per piece of work for a thread. A matrix gives about one per row, so that most tensors are one piece.
_MAX_COUNT = 4096
_SIZES = (1, 2, 4, 8)
_TYPES = (torch.Tensor, torch.nn.Parameter)
_CPU = torch.device("cpu")
_storage = torch.Tensor.untyped_storage  # as a function: in a `map` it takes less than in a comprehension
# As `SampleCall` and `Read` in sample.h.
_CALL, _READ_FIELDS = Struct("=QqQq"), 5


class NativeSample:
    """What every `steps[i]`th of the first elements of `tensors[i]`, `counts[i]` of them, holds when this is made.

    Holds no tensor; is given them anew at each look, in the same order.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], counts: Sequence[int], steps: Sequence[int]):
        loaded = library()
        if loaded is None:
            raise NativeError("the native library is not built, or switched off")
        self._library = loaded
        storages = list(map(_storage, tensors))
        self._memory = _memory(storages)
        reads, size = array("q"), 0
        for tensor, storage, count, step in zip(tensors, storages, counts, steps, strict=True):
            if not can_sample(tensor):
                raise NativeError(f"cannot sample a {type(tensor).__name__} in {tensor.dtype} on {tensor.device}")
            width, offset = tensor.element_size(), tensor.storage_offset()
            if count < 1 or step < 1 or (count - 1) * step >= tensor.numel():
                raise NativeError(f"{count} elements, {step} apart, are not in a tensor of {tensor.numel()}")
            size += -size % width
            for first in range(0, count, _MAX_COUNT):
                length, start = min(count - first, _MAX_COUNT), offset + first * step
                reads.extend((storage.data_ptr() + start * width, length, step * width, width, size))
                size += length * width
        self._reads, self._kept = reads, ctypes.create_string_buffer(size + 1)  # which the call points into
        self._call = _CALL.pack(reads.buffer_info()[0], len(reads) // _READ_FIELDS, ctypes.addressof(self._kept), size)
        self._begin(tensors, storages, is_recording=True)()

    def differs(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether any byte is not as it was, or has come to lie elsewhere."""
        return self.begin(tensors)()

    def begin(self, tensors: Sequence[torch.Tensor]) -> NativeLook:
        """Has other threads read and compare while the caller does something else; threads as torch has."""
        return self._begin(tensors, list(map(_storage, tensors)), is_recording=False)

    def _begin(
        self, tensors: Sequence[torch.Tensor], storages: list[torch.UntypedStorage], is_recording: bool
    ) -> NativeLook:
        if _memory(storages) != self._memory or any(map(torch.Tensor.is_neg, tensors)):
            return NativeLook(self._library, None, ())
        look = ctypes.c_void_p()
        if self._library.hf_paged_sample_begin(self._call, torch.get_num_threads(), is_recording, look):
            raise NativeError("the library finds a size or place out of range, or has no memory")
        return NativeLook(self._library, look, (storages, self))


class NativeLook:
    """One look of a `NativeSample`: keeps the memory that it reads until it has been read."""

    def __init__(self, library: ctypes.CDLL, look: ctypes.c_void_p | None, read: tuple[object, ...]):
        self._library, self._look, self._read = library, look, read
        self._differs = look is None

    def __call__(self) -> bool:
        """Whether any byte is not as it was, or has come to lie elsewhere; waits for what is not read yet."""
        look, self._look = self._look, None
        if look is not None:
            self._differs = self._library.hf_paged_sample_end(look) != 0
            self._read = ()
        return self._differs

    def __del__(self) -> None:
        self()


def can_sample(tensor: torch.Tensor) -> bool:
    """Whether `NativeSample` does this tensor; those whose bytes are not all there is to it are left to torch."""
    if library() is None or type(tensor) not in _TYPES or tensor.device != _CPU or tensor.layout is not torch.strided:
        return False
    width, storage = tensor.element_size(), tensor.untyped_storage()
    start, stop = tensor.storage_offset() * width, (tensor.storage_offset() + tensor.numel()) * width
    return (
        width in _SIZES
        and tensor.is_contiguous()
        and not (tensor.is_complex() or tensor.is_neg())
        and tensor.numel() > 0
        and stop <= storage.nbytes()
        and tensor.data_ptr() == storage.data_ptr() + start
    )


def _memory(storages: Sequence[torch.UntypedStorage]) -> tuple[list[int], list[int]]:
    """Where it begins, and how many bytes."""
    return list(map(torch.UntypedStorage.data_ptr, storages)), list(map(torch.UntypedStorage.nbytes, storages))
