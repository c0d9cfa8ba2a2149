"""Tiers: blocks that are given up for their memory go to the host and to disk, and come back where that is quicker.

    pool ──evicted──▶ host memory (of a model on a GPU) ──least recently used──▶ files ──▶ gone
      ▲                      │                                                     │
      └──── prefix index ◀───┴──────────── a later prompt begins with it ◀─────────┘

A record is one block of one group: K and V of its layers, one after the other. What comes back stays where it was, too,
and is not written again when it is evicted anew. Whatever goes wrong costs the time to compute blocks anew, and is
counted; it never changes an answer.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from hf_paged.core.blocks import NULL_BLOCK, BlockPool, OutOfBlocks
from hf_paged.core.fetch import FetchPolicy, Hop, find_hops, find_options, first_needed
from hf_paged.core.manager import BlockManager
from hf_paged.core.plan import Pin
from hf_paged.core.prefix import are_plain
from hf_paged.core.tier import TierStack
from hf_paged.disk import DiskLevel
from hf_paged.host import HostLevel, Loan
from hf_paged.layout import RecordLayout
from hf_paged.levels import Content, Level, Load, Source, first_line
from hf_paged.mover import BlockMover
from hf_paged.stats import Counters
from hf_paged.store import LayerStore
from hf_paged.streams import Lap, SideStream, start_lap

# Of device memory, at the most, for each of two stages that blocks pass through on their way; and of the pool's budget.
STAGE_BYTES = 64 * 2**20
STAGE_SHARE = 1 / 32
# Passes whose end nobody has seen yet.
MAX_LAPS = 64


class Tiers:
    """What a pool has given up, on the tiers below. Bookkeeping is done under the manager's lock, waiting without it.

    Args:
        manager: whose evicted blocks are kept.
        stores: of the manager's layers; those that are there when the first block is evicted take part.
        levels: the tiers, nearest first.
        side: of the pool's device.
        counters: told of bytes, choices and faults.
        takes_evicted: whether blocks that are given up come here; else nothing does.

    Attributes:
        policy: chooses between fetching and computing.
        is_closed: whether nothing is kept or found any more.
    """

    def __init__(
        self,
        manager: BlockManager,
        stores: Sequence[LayerStore | None],
        levels: Sequence[Level],
        side: SideStream | None,
        counters: Counters,
        takes_evicted: bool = True,
    ):
        self.policy = FetchPolicy()
        self.levels = levels
        self._manager, self._stores, self._side, self._counters = manager, stores, side, counters
        self._layouts: list[RecordLayout] = []
        self._mover: BlockMover | None = None
        self._laps: deque[tuple[int, Lap]] = deque(maxlen=MAX_LAPS)
        self._process = os.getpid()
        self.is_closed = False
        if takes_evicted:
            manager.budget.before_eviction = _weakly(weakref.WeakMethod(self.demote))

    @property
    def staging_bytes(self) -> int:
        """Memory of the pool's device that blocks pass through on their way."""
        return 0 if self._mover is None else self._mover.staging_bytes

    def gauges(self) -> dict[str, float]:
        """Fields of `PagedStats` that are true now."""
        self._note_laps()
        gauges: dict[str, float] = {"compute_tokens_per_second": self.policy.tokens_computed.per_second}
        for level in self.levels:
            gauges[f"blocks_{level.name}"] = len(level)
            gauges[f"{level.name}_bytes_per_second"] = self.policy.bytes_per_second(level.number)
        return gauges

    def clear(self) -> None:
        """Forget everything and give its room back."""
        with self._manager.lock:
            if self._is_usable:
                for level in self.levels:
                    self._try(level.name, level.clear)

    def close(self) -> None:
        """Give back memory and files; nothing is kept or found from now on."""
        with self._manager.lock:
            if self.is_closed:
                return
            is_usable, self.is_closed = self._is_usable, True
            self._manager.budget.before_eviction = None
            if is_usable and self._mover is not None:
                self._mover.release()
                for pool in self._manager.pools:
                    pool.before_reuse = None
        for level in self.levels:
            level.close()
        if is_usable and self._side is not None:
            self._side.give_back()

    @property
    def _is_usable(self) -> bool:
        """A forked process has the records, but neither the thread that writes them nor the GPU."""
        return not self.is_closed and os.getpid() == self._process

    def _try(self, name: str, what: Callable[[], object]) -> None:
        try:
            what()
        except Exception as error:  # whatever it is: one does without
            self._fall_back(name, error)

    def _fall_back(self, name: str, error: Exception) -> None:
        self._counters.fall_back(f"{name} tier: {first_line(error)}")

    # -- what passes take ----------------------------------------------------------------------------------------

    def start_pass(self) -> Lap:
        """A pass over prompt tokens begins, of which `end_pass` tells the end."""
        return start_lap(self._side)

    def end_pass(self, lap: Lap, num_tokens: int) -> None:
        """So many tokens were computed since; on a GPU they may yet be."""
        lap.stop()
        self._laps.append((num_tokens, lap))
        self._note_laps()

    def _note_laps(self) -> None:
        with self._manager.lock:
            while self._laps and (seconds := self._laps[0][1].seconds()) is not None:
                self.policy.note_computed(self._laps.popleft()[0], seconds)

    # -- down ----------------------------------------------------------------------------------------------------

    def demote(self, victims: list[tuple[BlockPool, int]]) -> None:
        """Keep the content of blocks that are about to be evicted, oldest first. Called under the manager's lock."""
        if self._is_usable:
            self._try(self.levels[0].name, partial(self._demote, victims))

    def _demote(self, victims: list[tuple[BlockPool, int]]) -> None:
        levels = self._open_levels()
        if not levels:
            return
        for group, pool in enumerate(self._manager.pools):
            contents = [
                Content(entry.key, entry.parent, entry.tokens, block)
                for owner, block in victims
                if owner is pool
                for entry in self._manager.index.by_block[group].get(block, ())
            ]
            self._keep(levels, group, contents, self._mover.read)

    def _open_levels(self) -> Sequence[Level]:
        """The tiers that work, made when first needed: the layers' shapes are known then."""
        manager = self._manager
        if self._mover is None:
            self._layouts = [
                RecordLayout([s for s in self._stores if s is not None and s.group == group], manager.block_size)
                for group in range(len(manager.pools))
            ]
            stage_bytes = min(STAGE_BYTES, int(manager.budget.limit_bytes * STAGE_SHARE))
            self._mover = BlockMover(self._layouts, self._side, stage_bytes, is_asked=True)
            for group, pool in enumerate(manager.pools):
                pool.before_reuse = partial(self._mover.before_reuse, group)
        for level in self.levels:
            if level.index is None:
                self._try(level.name, partial(level.open, self._layouts, self._mover, manager.index.full_bytes))
        return [level for level in self.levels if level.index is not None]

    def _keep(self, levels: Sequence[Level], group: int, contents: Sequence[Content], source: Source) -> None:
        """Put what is new on the first of these tiers; what has no place there, or loses it, goes to the next one."""
        level, *below = levels
        keys = [each.key for each in contents]
        new = [each for each in contents if level.index.get(group, each.key) is None]
        num_surplus = max(0, len(new) - level.index.capacity(group))
        surplus, kept = new[:num_surplus], new[num_surplus:]
        # A block that was there all along may be what has to make room; it is used now.
        level.index.touch(group, keys)
        gone = level.make_room(group, len(kept))
        if below and gone:
            self._try(below[0].name, partial(self._keep, below, group, gone, level.read))
        if below and surplus:
            self._try(below[0].name, partial(self._keep, below, group, surplus, source))
        self._try(level.name, partial(level.put, group, kept, source))
        level.index.touch(group, keys)

    def lend(self, group: int) -> Loan | None:
        """Host memory for blocks of a group that running sequences hold; `None` where there is none to be had.

        Called under the manager's lock; what it held goes to the tier below.
        """
        if not self._is_usable:
            return None
        try:
            levels = self._open_levels()
        except ValueError as error:  # the layers of another group lie on several devices
            self._fall_back(self.levels[0].name, error)
            return None
        if not levels or not isinstance(levels[0], HostLevel):
            return None
        host, *below = levels
        loan = host.lend(group)
        if loan is not None and below and loan.gone:
            self._try(below[0].name, partial(self._keep, below, loan.group, loan.gone, host.read))
        return loan

    # -- up ------------------------------------------------------------------------------------------------------

    def fetch(self, root: bytes | None, tokens: Sequence[int], limit: int) -> list[Pin]:
        """Bring blocks that the first `limit` of these tokens may begin with into the prefix index, if that is quicker.

        Returns what is pinned; the caller unpins it once it has matched the tokens.
        """
        if root is None or not any(map(len, self.levels)) or not self._is_usable or not are_plain(tokens):
            return []
        pins: list[Pin] = []
        try:
            self._try(self.levels[0].name, partial(self._fetch, root, tokens, limit, pins))
        except BaseException:
            self._manager.unpin(pins)
            raise
        return pins

    def _fetch(self, root: bytes, tokens: Sequence[int], limit: int, pins: list[Pin]) -> None:
        for _ in range(len(self.levels) + 1):  # a trial may be needed of each
            if not self._fetch_some(root, tokens, limit, pins):
                return

    def _fetch_some(self, root: bytes, tokens: Sequence[int], limit: int, pins: list[Pin]) -> bool:
        """Fetch what the policy chooses; whether it is to be asked again, because now it knows more."""
        manager = self._manager
        self._note_laps()
        with manager.lock:
            indices = TierStack([level.index for level in self.levels if level.index is not None])
            hops = find_hops(manager.index, indices, root, tokens, limit)
            in_memory = manager.index.match(root, tokens, limit).num_tokens
            sizes = [layout.record_bytes for layout in self._layouts]
            options = find_options(hops, manager.windows, sizes, in_memory, limit, len(self.levels))
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
        num_bytes = self._load(loads, hops)
        with manager.lock:
            for hop in hops:
                manager.index_blocks(hop.parent, hop.packed, hop.blocks, hop.key)
            manager.index.prune(hops[-1].key)
        return choice.is_trial and num_bytes > 0

    def _reserve(self, hops: list[Hop], limit: int, num_tokens: int, pins: list[Pin]) -> list[list[Load]]:
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
            for level in self.levels:
                if level.index is not None:
                    level.index.touch(group, [hops[i].key for i in reversed(lacking)])
        held = [(group, block) for hop in hops for group, block in enumerate(hop.blocks) if block]
        manager.hold(held)
        pins += held
        room = -(-(num_tokens - hops[-1].stop) // manager.block_size) + 1
        taken = manager.take_runs([len(lacking) for lacking in missing], after, max(0, room))
        pins += [(group, block) for group, blocks in enumerate(taken) for block in blocks]
        return [
            [Load(i, block, hops[i].records[group]) for i, block in zip(lacking, blocks, strict=True)]
            for group, (lacking, blocks) in enumerate(zip(missing, taken, strict=True))
        ]

    def _load(self, loads: Sequence[Sequence[Load]], hops: list[Hop]) -> int:
        """Fill the blocks of each group and put those that are whole into their hops; returns the bytes of these."""
        num_bytes = 0
        for level in self.levels:
            wanted = [[load for load in each if load.record.level == level.number] for each in loads]
            try:
                num_bytes += self._load_from(level, wanted, hops) if any(wanted) else 0
            except BaseException as error:
                self._mover.settle()  # others get the blocks now
                if not isinstance(error, Exception):
                    raise
                self._fall_back(level.name, error)
        return num_bytes

    def _load_from(self, level: Level, wanted: Sequence[Sequence[Load]], hops: list[Hop]) -> int:
        begin, num_bytes = time.perf_counter(), 0
        begun = [(group, each, *level.load(group, each)) for group, each in enumerate(wanted) if each]
        for group, each, whole, there in begun:
            there.result()
            for load, is_whole in zip(each, whole, strict=True):
                if is_whole:
                    hops[load.hop].blocks[group] = load.block
                    num_bytes += self._layouts[group].record_bytes
        self._counters.add(fetched_bytes=num_bytes)
        if num_bytes:
            self.policy.note_fetched(num_bytes, time.perf_counter() - begin, level.number)
        return num_bytes


def make_levels(
    host_bytes: int | None,
    disk_bytes: int | None,
    folder: Path | None,
    lock: AbstractContextManager[Any],
    side: SideStream | None,
    counters: Counters,
) -> list[Level]:
    """The tiers that have a budget, nearest first; `folder` is where that of the disk makes its own."""
    levels: list[Level] = []
    if host_bytes:
        levels.append(HostLevel(len(levels), host_bytes, lock, side, counters))
    if disk_bytes:
        levels.append(DiskLevel(len(levels), disk_bytes, folder, lock, counters))
    return levels


def _weakly(method: weakref.WeakMethod[Any]) -> Callable[[Any], None]:
    """Calls a method whose object may be gone."""

    def call(argument: Any) -> None:
        bound = method()
        if bound is not None:
            bound(argument)

    return call
