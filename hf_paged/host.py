"""The host tier of a model on a GPU: records in pinned memory.

Copies to and from it are all on one side stream. Those to it are begun under the manager's lock, and whoever reads a
slot asks afterwards whether it was still that of the record: then it is written anew after it was last read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import accumulate, compress, pairwise
from typing import Any, NamedTuple

import torch

from hf_paged.core.tier import Pending, Record, TierIndex
from hf_paged.layout import RecordLayout, runs
from hf_paged.levels import Content, Level, Load, Source, first_line
from hf_paged.mover import DONE, BlockMover
from hf_paged.stats import Counters
from hf_paged.streams import SideStream

# Memory is pinned in pieces of powers of two, as torch rounds it up to. Pinning takes time, so they are of about this
# size, unless so few records fit that too much is left over at their ends.
SLAB_BYTES = 64 * 2**20
MIN_SLAB_RECORDS = 16


class Loan(NamedTuple):
    """Host memory, to be given back.

    Attributes:
        memory: `[bytes]` uint8, of which copies on the side stream may be under way.
        give_back: called when it is not needed any more.
        group: whose records have lain in it.
        gone: those that have lost their place.
    """

    memory: torch.Tensor
    give_back: Callable[[], None]
    group: int
    gone: list[Content]


class HostLevel(Level):
    """Blocks in host memory, pinned where the system allows that.

    Args:
        lock: the manager's.
        side: pins memory; `None`: nothing is to be pinned.
        counters: told of bytes and faults.
    """

    name = "host"

    def __init__(
        self,
        number: int,
        budget_bytes: int,
        lock: AbstractContextManager[Any],
        side: SideStream | None,
        counters: Counters,
    ):
        super().__init__(number, budget_bytes)
        self._lock, self._side, self._counters = lock, side, counters
        self._memories: list[_SlabMemory] = []
        self._leaving: list[Pending] = []
        self._mover: BlockMover | None = None

    def open(self, layouts: Sequence[RecordLayout], mover: BlockMover, full_bytes: int) -> None:
        total = sum(layout.record_bytes for layout in layouts)
        budgets = [self.budget_bytes * layout.record_bytes // total for layout in layouts]
        memories = [_SlabMemory(*each) for each in zip(budgets, (each.record_bytes for each in layouts), strict=True)]
        num_slots = min(memory.num_slots for memory in memories)
        if not num_slots:
            raise ValueError("max_memory['cpu'] is less than one block")
        self._memories, self._mover = memories, mover
        self.index = TierIndex(len(layouts), num_slots, full_bytes, self.number)

    def make_room(self, group: int, count: int) -> list[Content]:
        gone = [record for record in self.index.make_room(group, count) if not record.is_lost]
        self._leaving = [record.written for record in gone]
        return [_content(record) for record in gone]

    def put(self, group: int, contents: Sequence[Content], source: Source) -> None:
        """Chains come end first; their records lie root first."""
        added = [(self.index.add(group, *each[:3]), each.place) for each in reversed(contents)]
        records = sorted([each for each in added if each[0] is not None], key=lambda each: each[0].slot)
        try:
            if self._memories[group].are_there([record.slot for record, _ in records]):
                placed = records
            else:
                placed = [each for each in records if self._has_memory(group, each[0])]
            if not placed:
                return
            slots = [record.slot for record, _ in placed]
            written = source(group, [place for _, place in placed], list(self._memories[group].pieces(slots)))
            for record, _ in placed:
                record.written, record.checksum = written, 0
        except BaseException:
            for record, _ in records:
                self.index.discard(group, record)
            raise
        self._counters.add(offloaded_bytes=len(placed) * self._memories[group].record_bytes)

    def _has_memory(self, group: int, record: Record) -> bool:
        """Whether there is memory behind the record's slot; one that cannot be had is not asked for again."""
        try:
            self._memories[group].ensure(record.slot, self._allocate)
            return True
        except (RuntimeError, MemoryError) as error:
            self._counters.fall_back(f"host tier: {first_line(error)}")
            self.index.retire(group, record)
            return False

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        with torch.inference_mode(False):
            if self._side is not None:
                try:
                    return self._side.pinned(num_bytes)
                except RuntimeError as error:
                    self._counters.fall_back(f"host tier: memory is not pinned: {first_line(error)}")
            return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def read(self, group: int, slots: Sequence[int], pieces: Sequence[torch.Tensor]) -> Pending:
        """A `Source` for the tier below, of slots that `make_room` has returned."""
        for written in self._leaving:
            written.result()
        at = 0
        for piece in pieces:
            torch.cat(list(self._memories[group].pieces(slots[at : at + len(piece)])), out=piece)
            at += len(piece)
        return DONE

    def load(self, group: int, loads: Sequence[Load]) -> tuple[list[bool], Pending]:
        """Copies are begun without the lock, too: others compute on meanwhile.

        What lost its place before its copy had begun may come too late, and is not whole: `holds` is asked again then.
        """
        with self._lock:
            # Taking the blocks may have cost the records their places.
            whole = [self.index.holds(group, load.record) for load in loads]
            there = sorted((load.record.slot, load.block) for load in compress(loads, whole))
            pieces = list(self._memories[group].pieces([slot for slot, _ in there]))
            num_gone = self.index.num_gone
        written = self._mover.write(group, [block for _, block in there], pieces)
        with self._lock:
            if self.index.num_gone != num_gone:
                whole = [was and self.index.holds(group, load.record) for was, load in zip(whole, loads, strict=True)]
        return whole, written

    def lend(self, group: int) -> Loan | None:
        """A slab for blocks of a group, no records: of the group's own, or else of another one's.

        A tier below may read what has lost its place until something else is done here. `None` where there is no slab
        left, or none is to be had from the system.
        """
        others = [other for other in range(len(self._memories)) if other != group]
        for owner in (group, *others):
            memory = self._memories[owner]
            slabs = [slots for slots in memory.slabs() if self.index.can_lend(owner, slots)]
            large = [each for each in slabs if len(each) * memory.record_bytes >= self._memories[group].record_bytes]
            if large:
                return self._lend(owner, min(large, key=partial(self.index.count_in, owner)))
        return None

    def _lend(self, group: int, slots: range) -> Loan | None:
        try:
            memory = self._memories[group].ensure(slots.start, self._allocate)
        except (RuntimeError, MemoryError) as error:
            self._counters.fall_back(f"host tier: {first_line(error)}")
            return None
        gone = [record for record in self.index.lend(group, slots) if not record.is_lost]
        self._leaving = [record.written for record in gone]
        return Loan(memory.flatten(), partial(self.index.take_back, group, slots), group, list(map(_content, gone)))

    def clear(self) -> None:
        self.close()
        if self._side is not None:
            self._side.mark().result()  # memory that copies still go to or come from cannot be given back
            self._side.give_back()

    def close(self) -> None:
        with self._lock:
            if self.index is not None:
                self.index.clear()
            for memory in self._memories:
                memory.clear()


class _SlabMemory:
    """Slots of `record_bytes` bytes in slabs, which are allocated when first written to.

    Attributes:
        num_slots: as many as the budget has room for.
    """

    def __init__(self, budget_bytes: int, record_bytes: int):
        self.record_bytes = record_bytes
        self._sizes = list(slab_sizes(budget_bytes, record_bytes))
        self._stops = list(accumulate(size // record_bytes for size in self._sizes))  # the slots before its end
        self.num_slots = self._stops[-1] if self._stops else 0
        self._slabs: list[torch.Tensor | None] = [None] * len(self._sizes)

    def are_there(self, slots: Sequence[int]) -> bool:
        """Whether the slabs of all these slots, in order, are allocated."""
        first, last = (bisect_right(self._stops, slot) for slot in (slots[0], slots[-1])) if slots else (0, -1)
        return all(slab is not None for slab in self._slabs[first : last + 1])

    def slabs(self) -> Iterator[range]:
        """The slots of each slab."""
        return (range(*each) for each in pairwise([0, *self._stops]))

    def ensure(self, slot: int, allocate: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The slab of a slot, `[slots, record_bytes]`; allocated where it is not there."""
        slab = bisect_right(self._stops, slot)
        if self._slabs[slab] is None:
            rows = self._sizes[slab] // self.record_bytes
            memory = allocate(self._sizes[slab])
            self._slabs[slab] = memory[: rows * self.record_bytes].view(rows, self.record_bytes)
        return self._slabs[slab]

    def pieces(self, slots: Sequence[int]) -> Iterator[torch.Tensor]:
        """The rows of slots, in order, as few views `[rows, record_bytes]` as possible."""
        for at, count in runs(slots):
            first, last = slots[at], slots[at] + count
            while first < last:
                slab = bisect_right(self._stops, first)
                start = self._stops[slab - 1] if slab else 0
                stop = min(last, self._stops[slab])
                yield self._slabs[slab][first - start : stop - start]
                first = stop

    def clear(self) -> None:
        """Give the slabs up."""
        self._slabs = [None] * len(self._sizes)


def slab_sizes(budget_bytes: int, record_bytes: int) -> Iterator[int]:
    """Powers of two that add up to no more than the budget and hold a record or more each, largest first."""
    largest = max(SLAB_BYTES, 1 << (MIN_SLAB_RECORDS * record_bytes - 1).bit_length())
    while budget_bytes >= record_bytes:
        size = min(largest, 1 << (budget_bytes.bit_length() - 1))
        if size < record_bytes:
            return
        yield size
        budget_bytes -= size


def lendable_blocks(budget_bytes: int, record_bytes: Sequence[int], group: int) -> int:
    """Blocks of a group that fit what a host tier can lend, where a record of each group takes `record_bytes`."""
    shares = [budget_bytes * size // sum(record_bytes) for size in record_bytes]
    memories = [_SlabMemory(*each) for each in zip(shares, record_bytes, strict=True)]
    num_slots = min(memory.num_slots for memory in memories)
    slabs = [
        len(slots) * memory.record_bytes for memory in memories for slots in memory.slabs() if slots.stop <= num_slots
    ]
    return sum(size // record_bytes[group] for size in slabs)


def _content(record: Record) -> Content:
    return Content(record.key, record.parent, record.tokens, record.slot)
