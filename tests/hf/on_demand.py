"""A stand-in for a GPU's driver: memory on demand on the CPU. Whoever touches what has none dies of it (SIGSEGV)."""

import ctypes
import mmap
from itertools import count

import torch

from hf_paged.errors import RefusedMemoryError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_NOTHING = 0


class HostDriver:
    """Pages of `page_bytes` in address space that nobody may touch before they are backed; their content is NaN.

    Attributes:
        backed: address -> (bytes, handle) of what has memory.
        limit_bytes: more is refused.
        can_wait: whether `wait` succeeds.
        is_idle: whether it did, since memory was asked for.
    """

    def __init__(self, page_bytes: int = 16 * mmap.PAGESIZE, limit_bytes: int | None = None):
        self.page_bytes, self.limit_bytes = page_bytes, limit_bytes
        # Garbage collection gives memory back at any moment: what goes through all of it takes a copy.
        self.backed, self.reserved = (
            {},
            {},
        )  # a garbage collection gives memory back at any moment: copies are gone through
        self.can_wait = self.is_idle = True
        self._handles = count(1)

    @property
    def backed_bytes(self) -> int:
        return sum(num_bytes for num_bytes, _ in self.backed.copy().values())

    def reserve(self, num_bytes):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = _libc.mmap(None, num_bytes, _NOTHING, flags, -1, 0)
        assert address not in (None, ctypes.c_void_p(-1).value), "no address space"
        self.reserved[address] = num_bytes
        return address

    def back(self, address, num_bytes):
        assert address % mmap.PAGESIZE == 0 == num_bytes % self.page_bytes
        assert not any(at < address + num_bytes and address < at + size for at, (size, _) in self.backed.copy().items())
        if self.limit_bytes is not None and self.backed_bytes + num_bytes > self.limit_bytes:
            raise RefusedMemoryError(f"no {num_bytes} bytes beside {self.backed_bytes}")
        self._protect(address, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
        ctypes.memset(address, 0xFF, num_bytes)  # NaN in every dtype of floats
        self.is_idle, handle = False, next(self._handles)
        self.backed[address] = (num_bytes, handle)
        return handle

    def unback(self, address, num_bytes, handle):
        assert self.is_idle, "the device may still read it"
        assert self.backed.pop(address) == (num_bytes, handle)
        assert _libc.madvise(address, num_bytes, mmap.MADV_DONTNEED) == 0
        self._protect(address, num_bytes, _NOTHING)

    def free(self, address, num_bytes):
        assert self.reserved.pop(address) == num_bytes
        assert not any(address <= at < address + num_bytes for at in self.backed.copy()), "memory is left in it"
        assert _libc.munmap(address, num_bytes) == 0

    def tensor(self, space):
        buffer = (ctypes.c_ubyte * space.num_bytes).from_address(space.address)
        buffer.space = space  # which lives as long as the tensor does
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def wait(self):
        self.is_idle |= self.can_wait
        return self.can_wait

    @staticmethod
    def _protect(address, num_bytes, mode):
        assert _libc.mprotect(address, num_bytes, mode) == 0, ctypes.get_errno()
