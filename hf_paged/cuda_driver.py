"""Memory on demand on NVIDIA GPUs: the virtual memory management of the CUDA driver.

https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VA.html. torch has no Python interface to it, so the driver's
library, which torch has loaded, is called through ctypes.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from contextlib import ExitStack
from typing import Any

import torch

from hf_paged.errors import RefusedMemoryError
from hf_paged.virtual import AddressSpace, Driver

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_OUT_OF_MEMORY = 2
_PINNED, _ON_DEVICE, _READ_WRITE, _MINIMUM = 1, 1, 3, 0  # of the enumerations of cuda.h


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Flags(ctypes.Structure):
    _fields_ = (
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", _Flags),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


_size, _pointer, _handle, _none = ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64(0)


class CudaDriver:
    """The driver of one GPU.

    Attributes:
        backed_bytes: memory that is there.
        most_bytes: how much it was at most.

    Raises `OSError` or `AttributeError` where the library has no such calls, and `RuntimeError` where one fails.
    """

    def __init__(self, device: torch.device):
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.backed_bytes = self.most_bytes = 0
        self._cuda = ctypes.CDLL(_LIBRARY)
        location = _Location(_ON_DEVICE, self._device.index)
        self._properties = _Properties(_PINNED, 0, location)
        self._access = _Access(location, _READ_WRITE)
        self.wait()  # this thread has the device's context from now on
        page = _size()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(page), ctypes.byref(self._properties), _MINIMUM)
        self.page_bytes = page.value

    def reserve(self, num_bytes: int) -> int:
        """Address space without memory. Raises `RefusedMemoryError`."""
        address = _pointer()
        self._call("cuMemAddressReserve", ctypes.byref(address), _size(num_bytes), _size(0), _none, _none)
        return address.value

    def back(self, address: int, num_bytes: int) -> int:
        """Memory for a part of it; torch gives back what it keeps for later where there is none otherwise.

        Raises `RefusedMemoryError`.
        """
        handle, place, size = _handle(), _pointer(address), _size(num_bytes)
        arguments = (ctypes.byref(handle), size, ctypes.byref(self._properties), _none)
        with torch.cuda.device(self._device), ExitStack() as undo:
            try:
                self._call("cuMemCreate", *arguments)
            except RefusedMemoryError:
                torch.cuda.empty_cache()
                self._call("cuMemCreate", *arguments)
            undo.callback(self._call, "cuMemRelease", handle)
            self._call("cuMemMap", place, size, _size(0), handle, _none)
            undo.callback(self._call, "cuMemUnmap", place, size)
            self._call("cuMemSetAccess", place, size, ctypes.byref(self._access), _size(1))
            undo.pop_all()
        self.backed_bytes += num_bytes
        self.most_bytes = max(self.most_bytes, self.backed_bytes)
        return handle.value

    def unback(self, address: int, num_bytes: int, handle: int) -> None:
        """Give that memory back."""
        with torch.cuda.device(self._device):
            self._call("cuMemUnmap", _pointer(address), _size(num_bytes))
            self._call("cuMemRelease", _handle(handle))
        self.backed_bytes -= num_bytes

    def free(self, address: int, num_bytes: int) -> None:
        """Give back address space in which no memory is left."""
        self._call("cuMemAddressFree", _pointer(address), _size(num_bytes))

    def tensor(self, space: AddressSpace) -> torch.Tensor:
        """The space as bytes `[num_bytes]`; its first page must have memory, by which torch finds out the device."""
        return torch.as_tensor(_CudaArray(space), device=self._device)

    def wait(self) -> bool:
        """Wait for the device; in vain while a graph is captured, which that would spoil."""
        with torch.cuda.device(self._device):
            if torch.cuda.is_current_stream_capturing():
                return False
            torch.cuda.synchronize()
        return True

    def _call(self, name: str, *arguments: Any) -> None:
        error = getattr(self._cuda, name)(*arguments)
        if error == _OUT_OF_MEMORY:
            raise RefusedMemoryError(f"cuda:{self._device.index} has no memory left for KV; lower max_memory")
        if error:
            raise RuntimeError(f"{name} of the CUDA driver has failed with error {error}")


class _CudaArray:
    """An address space, told to torch: https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html."""

    def __init__(self, space: AddressSpace):
        self.space = space
        self.__cuda_array_interface__ = {
            "shape": (space.num_bytes,),
            "typestr": "|u1",
            "data": (space.address, False),
            "version": 3,
        }


@functools.cache
def driver_for(device: torch.device) -> Driver | None:
    """The driver that gives a device memory on demand, tried once; `None` where there is no such thing."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    try:
        driver = CudaDriver(device)
        return driver if works(driver) else None
    except (AttributeError, OSError, RuntimeError, TypeError, ValueError):  # of the library, of torch
        return None


def works(driver: Driver) -> bool:
    """Whether memory comes, keeps what is written to it while its neighbours come and go, and is given back."""
    page = driver.page_bytes
    space = AddressSpace(driver, 4 * page)
    space.back("first", 0, page)
    memory, seen = driver.tensor(space), driver.tensor(space)
    memory[:page] = 1
    space.back("second", page, 3 * page)
    memory[page : 3 * page] = 2
    space.back("third", 3 * page - 1, 4 * page)
    memory[3 * page :] = 3
    found = [seen[number * page : (number + 1) * page].unique().tolist() for number in range(4)]
    space.give_back("second")
    stays = seen[3 * page - 1].item(), space.backed_bytes
    space.give_back("third")
    gone = space.backed_bytes
    space.back("second", 2 * page, 4 * page)
    memory[2 * page :] = 4
    anew = seen[2 * page :].unique().tolist(), seen[:page].unique().tolist()
    return (found, stays, gone, anew) == ([[1], [2], [2], [3]], (2, 4 * page), page, ([4], [1]))
