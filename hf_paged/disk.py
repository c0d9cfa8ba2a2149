"""The disk tier: records in files, written by a thread of the tier's.

Whatever goes wrong with a file costs the time to compute its blocks anew, and is counted; it never changes an answer.
"""

from __future__ import annotations

import errno
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from hf_paged.core.records import RecordFolder
from hf_paged.core.tier import Pending, Record, TierIndex
from hf_paged.layout import RecordLayout, runs
from hf_paged.levels import Content, Level, Load, Source
from hf_paged.mover import DONE, BlockMover
from hf_paged.stats import Counters

# What is copied at a time, and what may wait for the disk before whoever evicts more has to wait, too.
CHUNK_BYTES = 8 * 2**20
MAX_STAGED_BYTES = 64 * 2**20


class DiskLevel(Level):
    """Blocks in files.

    Args:
        base: the folder to make a folder in; `None`: that of temporary files.
        lock: the manager's.
        counters: told of bytes and faults.
    """

    name = "disk"

    def __init__(self, number: int, budget_bytes: int, base: Path | None, lock: Any, counters: Counters):
        super().__init__(number, budget_bytes)
        self._base, self._lock, self._counters = base, lock, counters
        self._layouts: Sequence[RecordLayout] = []
        self._mover: BlockMover | None = None
        self._folder: RecordFolder | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._staged: deque[tuple[Future[None], int]] = deque()
        self._failed: deque[tuple[int, Record, OSError]] = deque()
        self._remove: Callable[[], object] = lambda: None

    def open(self, layouts: Sequence[RecordLayout], mover: BlockMover, full_bytes: int) -> None:
        num_slots = self.budget_bytes // sum(layout.record_bytes for layout in layouts)
        if not num_slots:
            raise ValueError("max_memory['disk'] is less than one block")
        folder = RecordFolder(self._base, [layout.record_bytes for layout in layouts])
        self._layouts, self._mover, self._folder = layouts, mover, folder
        self._writer = ThreadPoolExecutor(1, "hf_paged-disk")
        self._remove = weakref.finalize(self, _remove, self._writer, folder)
        self.index = TierIndex(len(layouts), num_slots, full_bytes, self.number)

    def clear(self) -> None:
        if self.index is not None:
            self.index.clear()
            for file in self._folder.files:  # behind what is still being written
                self._writer.submit(self._truncate, file.truncate)

    def _truncate(self, truncate: Callable[[], None]) -> None:
        try:
            truncate()
        except OSError as error:
            self._counters.fall_back(f"disk tier: {error}")

    def close(self) -> None:
        with self._lock:
            if self.index is not None:
                self.index.clear()
        self._remove()

    def flush(self) -> None:
        """Wait until everything that was put here is on disk."""
        while self._staged:
            self._staged.popleft()[0].result()

    # -- to disk -------------------------------------------------------------------------------------------------

    def make_room(self, group: int, count: int) -> list[Content]:
        while self._failed:
            where, record, error = self._failed.popleft()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.index.retire(where, record)
        self.index.make_room(group, count)
        return []

    def put(self, group: int, contents: Sequence[Content], source: Source) -> None:
        """Chains come end first; their records lie root first."""
        record_bytes = self._layouts[group].record_bytes
        records = [(self.index.add(group, *each[:3]), each.place) for each in reversed(contents)]
        placed = sorted([each for each in records if each[0] is not None], key=lambda each: each[1])
        for part in _parts(placed, record_bytes):
            staging = _staging(len(part), record_bytes)
            copied = source(group, [place for _, place in part], [staging])
            self._wait_for_room(staging.nbytes)
            self._write([record for record, _ in part], staging, copied, group)

    def _wait_for_room(self, num_bytes: int) -> None:
        while self._staged and sum(size for _, size in self._staged) + num_bytes > MAX_STAGED_BYTES:
            self._staged[0][0].result()
            self._staged.popleft()
        while self._staged and self._staged[0][0].done():
            self._staged.popleft()

    def _write(self, records: Sequence[Record], staging: torch.Tensor, copied: Pending, group: int) -> None:
        done = self._writer.submit(self._write_records, records, staging, copied, group)
        self._staged.append((done, staging.nbytes))
        for record in records:
            record.written = done

    def _write_records(self, records: Sequence[Record], staging: torch.Tensor, copied: Pending, group: int) -> None:
        """Runs in the tier's thread, which takes no lock: others may wait for it."""
        copied.result()
        file = self._folder.files[group]
        for record, content in zip(records, staging.numpy(), strict=True):
            try:
                record.checksum = file.write(record.slot, memoryview(content))
                self._counters.add(offloaded_bytes=len(content))
            except OSError as error:
                self._failed.append((group, record, error))
                self._counters.fall_back(f"disk tier: {error}")

    # -- from disk -----------------------------------------------------------------------------------------------

    def load(self, group: int, loads: Sequence[Load]) -> tuple[list[bool], Pending]:
        record_bytes, file = self._layouts[group].record_bytes, self._folder.files[group]
        for load in sorted(loads, key=lambda load: load.record.slot):
            file.prefetch(load.record.slot)
        whole, written = [False] * len(loads), DONE
        for part in _parts(sorted(range(len(loads)), key=lambda i: loads[i].block), record_bytes):
            staging = _staging(len(part), record_bytes)
            for i, content in zip(part, staging.numpy(), strict=True):
                whole[i] = self._read(group, loads[i].record, content)
            good = [at for at, i in enumerate(part) if whole[i]]
            pieces = [staging[good[at] : good[at] + count] for at, count in runs(good)]
            written.result()  # one part is read while the one before is on its way to the pool
            written = self._mover.write(group, [loads[part[at]].block for at in good], pieces)
        return whole, written

    def _read(self, group: int, record: Record, into: Any) -> bool:
        """Read one record; one that is not what it was is forgotten."""
        fault = "a record is damaged"
        if record.written is not None:  # an interrupt may have come before somebody noted that it is under way
            record.written.result()
        try:
            if record.checksum is None:
                return False
            if self._folder.files[group].read(record.slot, memoryview(into), record.checksum):
                return True
        except OSError as error:
            fault = str(error)
        with self._lock:
            if self.index.discard(group, record):  # and has not just lost its place to another one
                self._counters.fall_back(f"disk tier: {fault}")
        return False


def _staging(num_records: int, record_bytes: int) -> torch.Tensor:
    return torch.empty(num_records, record_bytes, dtype=torch.uint8, device="cpu")


def _parts(items: Sequence[Any], record_bytes: int) -> Iterator[Sequence[Any]]:
    """As many at a time as make a chunk."""
    size = max(1, CHUNK_BYTES // record_bytes)
    return (items[at : at + size] for at in range(0, len(items), size))


def _remove(writer: ThreadPoolExecutor, folder: RecordFolder) -> None:
    if folder.is_own:  # a forked process has no thread that could be told to end
        writer.shutdown(cancel_futures=True)
    folder.remove()
