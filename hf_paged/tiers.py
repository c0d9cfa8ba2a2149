"""The disk tier: blocks that are given up for their memory go to files, and come back where that is quicker.

    evicted block ──copy──▶ staging memory ──a thread of the tier's──▶ record in a file ──▶ taken block ──▶ prefix index

A record is one block of one group: K and V of its layers, one after the other, so that it is one write and one read.
Whatever goes wrong with a file costs the time to compute its blocks anew, and is counted; it never changes an answer.
"""

from __future__ import annotations

import errno
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_paged.core.blocks import NULL_BLOCK, BlockPool, OutOfBlocks
from hf_paged.core.fetch import FetchPolicy, Hop, find_hops, find_options, first_needed
from hf_paged.core.manager import BlockManager, Pin
from hf_paged.core.prefix import Entry, are_plain
from hf_paged.core.records import RecordFolder
from hf_paged.core.tier import Record, TierIndex
from hf_paged.layout import RecordLayout
from hf_paged.stats import Counters
from hf_paged.store import LayerStore

# What is copied at a time, and what may wait for the disk before whoever evicts more has to wait, too.
CHUNK_BYTES = 8 * 2**20
MAX_STAGED_BYTES = 64 * 2**20


class DiskTier:
    """What a pool has given up, on disk. Bookkeeping is done under the manager's lock, reading without it.

    Args:
        manager: whose evicted blocks are kept.
        stores: of the manager's layers; those that are there when the first block is evicted take part.
        budget_bytes: the most that the files hold.
        base: the folder to make a folder in; `None`: that of temporary files.
        counters: told of bytes, choices and faults.

    Attributes:
        is_closed: whether nothing is kept or found any more.
    """

    def __init__(
        self,
        manager: BlockManager,
        stores: Sequence[LayerStore | None],
        budget_bytes: int,
        base: Path | None,
        counters: Counters,
    ):
        self.policy = FetchPolicy()
        self._manager, self._stores, self._counters = manager, stores, counters
        self._budget_bytes, self._base = budget_bytes, base
        self._layouts: list[RecordLayout] = []
        self._index: TierIndex | None = None
        self._folder: RecordFolder | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._staged: deque[tuple[Future[None], int]] = deque()
        self._failed: deque[tuple[int, Record, OSError]] = deque()
        self._process = os.getpid()
        self._remove: Callable[[], object] = lambda: None
        self.is_closed = False
        manager.budget.before_eviction = _weakly(weakref.WeakMethod(self.demote))

    @property
    def num_blocks(self) -> int:
        """Blocks on disk or on their way there."""
        return 0 if self._index is None else len(self._index)

    def gauges(self) -> dict[str, float]:
        """Fields of `PagedStats` that are true now."""
        return {
            "blocks_disk": self.num_blocks,
            "fetch_bytes_per_second": self.policy.bytes_fetched.per_second,
            "compute_tokens_per_second": self.policy.tokens_computed.per_second,
        }

    def clear(self) -> None:
        """Forget everything and give the disk's room back."""
        with self._manager.lock:
            if self._index is not None and self._is_usable:
                self._index.clear()
                for file in self._folder.files:  # behind what is still being written
                    self._try(partial(self._writer.submit, self._try, file.truncate))

    def close(self) -> None:
        """Remove the files; nothing is kept or found from now on."""
        with self._manager.lock:
            self.is_closed = True
            self._manager.budget.before_eviction = None
            if self._index is not None:
                self._index.clear()
        self._remove()

    def flush(self) -> None:
        """Wait until everything that was evicted is on disk."""
        while self._staged:
            self._staged.popleft()[0].result()

    @property
    def _is_usable(self) -> bool:
        """A forked process has the files, but not the thread that writes them."""
        return not self.is_closed and os.getpid() == self._process

    def _try(self, what: Callable[[], object]) -> None:
        try:
            what()
        except Exception as error:  # whatever it is: the tier does without
            self._counters.fall_back(f"disk tier: {str(error) or type(error).__name__}")

    # -- to disk -------------------------------------------------------------------------------------------------

    def demote(self, victims: list[tuple[BlockPool, int]]) -> None:
        """Keep the content of blocks that are about to be evicted, oldest first. Called under the manager's lock."""
        if self._is_usable:
            self._try(partial(self._demote, victims))

    def _demote(self, victims: list[tuple[BlockPool, int]]) -> None:
        self._open()
        self._retire_failed()
        for group, pool in enumerate(self._manager.pools):
            entries = [
                (entry, block)
                for owner, block in victims
                if owner is pool
                for entry in self._manager.index.by_block[group].get(block, ())
            ]
            new = [each for each in entries if self._index.get(group, each[0].key) is None]
            self._store(group, new[-self._num_slots :])
            self._index.touch(group, [entry.key for entry, _ in entries])

    def _open(self) -> None:
        """Make the files when first needed: the layers' shapes are known then. Raises where that cannot be done."""
        if self._index is not None:
            return
        layouts = [
            RecordLayout([s for s in self._stores if s is not None and s.group == group], self._manager.block_size)
            for group in range(len(self._manager.pools))
        ]
        self._num_slots = self._budget_bytes // sum(layout.record_bytes for layout in layouts)
        if not self._num_slots:
            raise ValueError("max_memory['disk'] is less than one block")
        folder = RecordFolder(self._base, [layout.record_bytes for layout in layouts])
        self._layouts, self._folder = layouts, folder
        self._writer = ThreadPoolExecutor(1, "hf_paged-disk")
        self._remove = weakref.finalize(self, _remove, self._writer, folder)
        self._index = TierIndex(len(layouts), self._num_slots, self._manager.index.full_bytes)

    def _retire_failed(self) -> None:
        while self._failed:
            group, record, error = self._failed.popleft()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._index.retire(group, record)

    def _store(self, group: int, new: Sequence[tuple[Entry, int]]) -> None:
        """Copy blocks and have them written. Chains come end first; their records lie root first."""
        layout = self._layouts[group]
        records = [(self._index.add(group, entry.parent, entry.tokens), block) for entry, block in reversed(new)]
        placed = sorted([each for each in records if each[0] is not None], key=lambda each: each[1])
        for part in _parts(placed, layout.record_bytes):
            staging = layout.read_blocks([block for _, block in part])
            self._wait_for_room(staging.nbytes)
            self._write([record for record, _ in part], staging, group)

    def _wait_for_room(self, num_bytes: int) -> None:
        while self._staged and sum(size for _, size in self._staged) + num_bytes > MAX_STAGED_BYTES:
            self._staged[0][0].result()
            self._staged.popleft()
        while self._staged and self._staged[0][0].done():
            self._staged.popleft()

    def _write(self, records: Sequence[Record], staging: torch.Tensor, group: int) -> None:
        done = self._writer.submit(self._write_records, records, staging, group)
        self._staged.append((done, staging.nbytes))
        for record in records:
            record.written = done

    def _write_records(self, records: Sequence[Record], staging: torch.Tensor, group: int) -> None:
        """Runs in the tier's thread, which takes no lock: others may wait for it."""
        file = self._folder.files[group]
        for record, content in zip(records, staging.numpy(), strict=True):
            try:
                record.checksum = file.write(record.slot, memoryview(content))
                self._counters.add(offloaded_bytes=len(content))
            except OSError as error:
                self._failed.append((group, record, error))
                self._counters.fall_back(f"disk tier: {error}")

    # -- from disk -----------------------------------------------------------------------------------------------

    def fetch(self, root: bytes | None, tokens: Sequence[int], limit: int) -> list[Pin]:
        """Bring blocks that the first `limit` of these tokens may begin with into the prefix index, if that is quicker.

        Returns what is pinned; the caller unpins it once it has matched the tokens.
        """
        if root is None or not self.num_blocks or not self._is_usable or not are_plain(tokens):
            return []
        pins: list[Pin] = []
        try:
            self._try(partial(self._fetch, root, tokens, limit, pins))
        except BaseException:
            self._manager.unpin(pins)
            raise
        return pins

    def _fetch(self, root: bytes, tokens: Sequence[int], limit: int, pins: list[Pin]) -> None:
        if self._fetch_some(root, tokens, limit, pins):  # that was a trial
            self._fetch_some(root, tokens, limit, pins)

    def _fetch_some(self, root: bytes, tokens: Sequence[int], limit: int, pins: list[Pin]) -> bool:
        """Fetch what the policy chooses; whether it is to be asked again, because now it knows more."""
        manager = self._manager
        with manager.lock:
            hops = find_hops(manager.index, self._index, root, tokens, limit)
            in_memory = manager.index.match(root, tokens, limit).num_tokens
            sizes = [layout.record_bytes for layout in self._layouts]
            options = find_options(hops, manager.windows, sizes, in_memory, limit)
            if not options:
                return False
            choice = self.policy.choose(options)
            if choice is None:
                self._counters.add(recompute_choices=1)
                return False
            del hops[choice.option.num_hops :]
            try:
                loads = self._reserve(hops, limit, len(tokens), pins)
            except OutOfBlocks:
                return False
        self._counters.add(fetch_choices=1)
        begin = time.perf_counter()
        num_bytes = sum(self._load(group, each, hops) for group, each in enumerate(loads))
        with manager.lock:
            for hop in hops:
                manager.index_blocks(hop.parent, hop.packed, hop.blocks)
            manager.index.prune(hops[-1].key)
        self._counters.add(fetched_bytes=num_bytes)
        if num_bytes:
            self.policy.note_fetched(num_bytes, time.perf_counter() - begin)
        return choice.is_trial and num_bytes > 0

    def _reserve(self, hops: list[Hop], limit: int, num_tokens: int, pins: list[Pin]) -> list[list[_Load]]:
        """Pin the blocks of `hops` that are needed and in memory, and take blocks for the others, one list a group.

        What is not needed leaves the hops: nothing keeps it where it is. Raises `OutOfBlocks`.
        """
        manager, missing, after = self._manager, [], []
        for group, window in enumerate(manager.windows):
            first = first_needed(hops, min(hops[-1].stop, limit), window)
            for hop in hops[:first]:
                hop.blocks[group] = NULL_BLOCK
            lacking = [i for i in range(first, len(hops)) if not hops[i].blocks[group]]
            missing.append(lacking)
            after.append(hops[lacking[0] - 1].blocks[group] if lacking and lacking[0] else NULL_BLOCK)
            # Before anything is evicted, which may take the places of the records used least recently.
            self._index.touch(group, [hops[i].key for i in reversed(lacking)])
        held = [(group, block) for hop in hops for group, block in enumerate(hop.blocks) if block]
        manager.hold(held)
        pins += held
        room = -(-(num_tokens - hops[-1].stop) // manager.block_size) + 1
        taken = manager.take_runs([len(lacking) for lacking in missing], after, max(0, room))
        pins += [(group, block) for group, blocks in enumerate(taken) for block in blocks]
        return [
            [_Load(i, block, hops[i].records[group]) for i, block in zip(lacking, blocks, strict=True)]
            for group, (lacking, blocks) in enumerate(zip(missing, taken, strict=True))
        ]

    def _load(self, group: int, loads: list[_Load], hops: list[Hop]) -> int:
        """Fill the blocks of one group and put those that are whole into their hops; returns the bytes of these."""
        layout, file, num_bytes = self._layouts[group], self._folder.files[group], 0
        for load in sorted(loads, key=lambda load: load.record.slot):
            file.prefetch(load.record.slot)
        for part in _parts(sorted(loads, key=lambda load: load.block), layout.record_bytes):
            staging = layout.empty(len(part))
            whole = [self._read(group, load, content) for load, content in zip(part, staging.numpy(), strict=True)]
            layout.write_blocks([load.block for load in part], staging, whole)
            for load, is_whole in zip(part, whole, strict=True):
                if is_whole:
                    hops[load.hop].blocks[group] = load.block
                    num_bytes += layout.record_bytes
        return num_bytes

    def _read(self, group: int, load: _Load, into: Any) -> bool:
        """Read one record; one that is not what it was is forgotten."""
        record, fault = load.record, "a record is damaged"
        if record.written is not None:  # an interrupt may have come before somebody noted that it is under way
            record.written.result()
        try:
            if record.checksum is None:
                return False
            if self._folder.files[group].read(record.slot, memoryview(into), record.checksum):
                return True
        except OSError as error:
            fault = str(error)
        with self._manager.lock:
            if self._index.discard(group, record):  # and has not just lost its place to another one
                self._counters.fall_back(f"disk tier: {fault}")
        return False


class _Load(NamedTuple):
    """A record that is to fill the block of hop number `hop`."""

    hop: int
    block: int
    record: Record


def _parts(items: Sequence[Any], record_bytes: int) -> Iterator[Sequence[Any]]:
    """As many at a time as make a chunk."""
    size = max(1, CHUNK_BYTES // record_bytes)
    return (items[at : at + size] for at in range(0, len(items), size))


def _weakly(method: weakref.WeakMethod[Any]) -> Callable[[Any], None]:
    """Calls a method whose object may be gone."""

    def call(argument: Any) -> None:
        bound = method()
        if bound is not None:
            bound(argument)

    return call


def _remove(writer: ThreadPoolExecutor, folder: RecordFolder) -> None:
    writer.shutdown(cancel_futures=True)
    folder.remove()
