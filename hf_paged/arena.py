"""Memory whose pages the system hands out at the first write, and takes back where nobody needs their content."""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Sequence

import torch

from hf_paged.errors import RefusedMemoryError

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


def whole_pages_of_slots(num_slots: int, likes: Sequence[torch.Tensor]) -> int:
    """At least `num_slots`: as many as fill whole pages of K and of V alike, `likes [batch, heads, tokens, dim]`.

    An odd number of pages a head (of the one that needs more slots to fill them) keeps heads from falling into the same
    cache sets; without pages an odd number of slots does.
    """
    slots = 1
    for like in likes:
        slot_bytes = like.shape[3] * like.element_size()
        if slot_bytes and like.device.type == "cpu" and can_give_back():
            slots = math.lcm(slots, PAGE_BYTES // math.gcd(PAGE_BYTES, slot_bytes))
    return (-(-num_slots // slots) | 1) * slots


class Arena:
    """`[heads, slots, dim]` zeros like `like [batch, heads, tokens, dim]`.

    On the CPU, where the system can take pages back, each head begins with a page: `num_slots` is to be a number that
    `whole_pages_of_slots` has returned. Elsewhere it is a tensor as any other.

    Attributes:
        tensor: the memory; contiguous.
    """

    def __init__(self, num_slots: int, like: torch.Tensor):
        heads, dim = like.shape[1], like.shape[3]
        self._slot_bytes = dim * like.element_size()
        self._mapping: mmap.mmap | None = None
        if like.device.type == "cpu" and heads * dim and can_give_back():
            self._mapping = self._reserve(heads * num_slots * self._slot_bytes)
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

    def give_back(self, start: int, stop: int) -> None:
        """Slots `start` to `stop` lose their content and their memory; both at the beginning of a page, or the end."""
        if self._mapping is None:
            return
        heads, num_slots, _ = self.tensor.shape
        num_bytes = (min(stop, num_slots) - start) * self._slot_bytes
        for head in range(heads):
            self._mapping.madvise(mmap.MADV_DONTNEED, (head * num_slots + start) * self._slot_bytes, num_bytes)
