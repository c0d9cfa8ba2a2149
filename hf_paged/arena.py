"""Memory that is there where it is needed, and goes back where nobody needs its content.

The CPU's system hands pages out at the first write. GPUs get theirs when they are asked for, before anybody writes.
Elsewhere all of it is taken at once.
"""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from hf_paged.cuda_driver import driver_for
from hf_paged.errors import RefusedMemoryError
from hf_paged.virtual import AddressSpace

PAGE_BYTES = mmap.PAGESIZE


@functools.cache
def can_give_back() -> bool:
    """Whether pages can be given back here: tried on two pages, which must read as zeros afterwards."""
    try:
        mapping = _map(2 * PAGE_BYTES)
        mapping.write(b"\1" * len(mapping))
        mapping.madvise(mmap.MADV_DONTNEED)
        return not any(mapping[:])
    except (AttributeError, OSError):  # no such call on this system
        return False


def _map(num_bytes: int) -> mmap.mmap:
    """An anonymous mapping of our own: all zeros, and no memory until something is written."""
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # A huge page a head would take 2 MiB for the first token, and could only be given back whole.
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return mapping


# Of a driver, that slots are to fill without a rest.
MOST_PAGES = 8


def _page_bytes(device: torch.device) -> int | None:
    """What memory comes and goes in; `None` where it does neither."""
    if (driver := driver_for(device)) is not None:
        return driver.page_bytes
    return PAGE_BYTES if device.type == "cpu" and can_give_back() else None


def whole_pages_of_slots(num_slots: int, likes: Sequence[torch.Tensor]) -> int:
    """At least `num_slots`: as many as fill whole pages of K and of V alike, `likes [batch, heads, tokens, dim]`.

    Where a driver's pages are large, and slots of an odd size, heads share pages. An odd number of pages a head (of the
    one that needs more slots to fill them) keeps heads from falling into the same cache sets; without pages an odd
    number of slots does.
    """
    slots = 1
    for like in likes:
        slot_bytes = like.shape[3] * like.element_size()
        page_bytes = _page_bytes(like.device)
        if slot_bytes and page_bytes is not None:
            whole_pages = page_bytes // math.gcd(page_bytes, slot_bytes)
            if like.device.type == "cpu" or whole_pages * slot_bytes <= MOST_PAGES * page_bytes:
                slots = math.lcm(slots, whole_pages)
    return (-(-num_slots // slots) | 1) * slots


def comes_on_demand(device: torch.device) -> bool:
    """Whether memory on a device is taken as it is needed, so that address space costs nothing."""
    return device.type == "cpu" or driver_for(device) is not None


# What fits into fewer pages a head is taken at once.
MIN_PAGES = 4


class Arena:
    """`[heads, slots, dim]` like `like [batch, heads, tokens, dim]`.

    On the CPU, where the system can take pages back, each head begins with a page: `num_slots` is to be a number that
    `whole_pages_of_slots` has returned. Where a driver gives memory on demand, slots have none until `back`, unless all
    of it is but a few pages. Elsewhere it is a tensor as any other. All but memory on demand is zero at first.

    Attributes:
        tensor: the memory; contiguous.
    """

    def __init__(self, num_slots: int, like: torch.Tensor):
        heads, dim = like.shape[1], like.shape[3]
        self._slot_bytes = dim * like.element_size()
        self._mapping: mmap.mmap | None = None
        self._space: AddressSpace | None = None
        num_bytes = heads * num_slots * self._slot_bytes
        driver = driver_for(like.device)
        if driver is not None and num_bytes > heads * MIN_PAGES * driver.page_bytes:
            self._space = AddressSpace(driver, num_bytes)
            self._space.back("begin", 0, 1)
            memory = driver.tensor(self._space)[:num_bytes]
            self.tensor = memory.view(like.dtype).view(heads, num_slots, dim)
            self._step_slots = -(-driver.page_bytes // self._slot_bytes)
        elif driver is None and like.device.type == "cpu" and num_bytes and can_give_back():
            self._mapping = self._reserve(num_bytes)
            self.tensor = torch.frombuffer(self._mapping, dtype=like.dtype).view(heads, num_slots, dim)
        else:
            self.tensor = torch.zeros((heads, num_slots, dim), dtype=like.dtype, device=like.device)

    @staticmethod
    def _reserve(num_bytes: int) -> mmap.mmap:
        try:
            return _map(num_bytes)
        except OSError as error:
            raise RefusedMemoryError(
                f"the system refuses {num_bytes} bytes of address space for K or V of one layer ({error}); "
                "lower max_memory"
            ) from error

    def whole_page_blocks(self, block_size: int) -> int:
        """The smallest number of adjacent blocks that fill whole pages."""
        if self._mapping is None:
            return 1
        return PAGE_BYTES // math.gcd(PAGE_BYTES, block_size * self._slot_bytes)

    @property
    def step_slots(self) -> int | None:
        """Adjacent slots whose memory fills a page a head; `None` where slots need not be asked for."""
        return None if self._space is None else self._step_slots

    def back(self, start: int, stop: int) -> None:
        """Have memory for slots `start` to `stop`, which may hold anything then. Raises `RefusedMemoryError`."""
        if self._space is None:
            return
        with ExitStack() as undo:
            for head, first, last in self._per_head(start, stop):
                self._space.back((head, start), first, last)
                undo.callback(self._space.give_back, (head, start))
            undo.pop_all()

    def give_back(self, start: int, stop: int) -> None:
        """Slots `start` to `stop` lose their content and their memory.

        Where the system hands out pages, both at the beginning of a page, or the end; elsewhere as they were backed.
        """
        if self._space is not None:
            self._space.give_back(*((head, start) for head, _, _ in self._per_head(start, stop)))
        elif self._mapping is not None:
            for _, first, last in self._per_head(start, stop):
                self._mapping.madvise(mmap.MADV_DONTNEED, first, last - first)

    def _per_head(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Number, first byte and the one behind the last of slots `start` to `stop` of every head."""
        heads, num_slots, _ = self.tensor.shape
        stop, size = min(stop, num_slots), self._slot_bytes
        return [(head, (head * num_slots + start) * size, (head * num_slots + stop) * size) for head in range(heads)]
