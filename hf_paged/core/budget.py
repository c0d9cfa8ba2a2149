"""The budget: what several groups' pools may hold together, whose cached blocks go first, when memory goes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import merge
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Protocol

from hf_paged.core.whole import changing_nothing

if TYPE_CHECKING:
    from hf_paged.core.blocks import BlockPool

# Memory grows by so much before it is asked again how much is free (60 us a time, on Linux).
GROWTH_STEP_BYTES = 2**26
# Free blocks that running sequences keep are such a part of those in use, at most. With none of them a step of 4 beams
# on 100 tokens takes 1.6 % longer (SmolLM2, one thread of a Zen 4); on 1,000 tokens nothing shows.
SPARE_SHARE = 1 / 64


class Guest(Protocol):
    """Cached memory that is not made of blocks, in parts of one size.

    Attributes:
        block_bytes: of a part.
        cached: how many there are.
    """

    block_bytes: int

    @property
    def cached(self) -> int: ...

    def oldest_first(self) -> Iterable[tuple[Any, int]]:
        """The parts, and the `stamp` of when each was last used."""

    def give_up(self, part: Any) -> None:
        """Forget a part, for its memory."""


class Budget:
    """`limit_bytes` for the blocks of all pools that join.

    What counts are blocks that are in use or cached, the null blocks, and what guests have cached. Memory beyond the
    limit is not touched as long as there is something to do about it: idle memory goes back first, then what is cached.
    Idle blocks that share a page with blocks in use cannot go back, and no call fails for them: they may come on top of
    the limit. A pool on its own may count in blocks instead of bytes: each of them costs 1 then.

    Args:
        limit_bytes: the limit, or where to begin.
        find_limit: says what it is now, given the bytes that are touched; `None`: it stays as it is.

    Attributes:
        is_frugal: whether pools hand out free blocks that are touched before those that would take more memory.
        on_give_back: lets the system have the memory of free blocks, given the number of a pool and runs of its blocks.
            `None`: their memory stays until they are used again.
        before_eviction: told which cached blocks of which pools are about to be given up for their memory, oldest
            first, while they still hold what they are kept for.
    """

    def __init__(self, limit_bytes: int, find_limit: Callable[[int], int] | None = None):
        self.limit_bytes = limit_bytes
        self.is_frugal = False
        self._find_limit = find_limit
        self._ceiling_bytes = limit_bytes if find_limit is None else 0
        self._pools: list[BlockPool] = []
        self._guests: list[Guest] = []
        self._clock = count()
        self.on_give_back: Callable[[int, list[range]], None] | None = None
        self.before_eviction: Callable[[list[tuple[BlockPool, int]]], None] | None = None

    def join(self, pool: BlockPool) -> None:
        """`pool` draws on this budget from now on."""
        self._pools.append(pool)

    def admit(self, guest: Guest) -> None:
        """`guest` draws on this budget from now on: what it caches goes when it is the oldest."""
        self._guests.append(guest)

    def has_room(self, num_bytes: int) -> bool:
        """Whether a guest may cache so many bytes more, for which what was not used for longer has made room.

        Memory of blocks that have made room goes back. Where too little of it does, because they share pages with
        others, guests make room among themselves, and then as much again of what is cached: all of it might go before a
        page is free. Where none ever goes back, guests come on top of it.
        """
        self.look_up(num_bytes)
        if num_bytes > self.free_bytes:
            return False
        self.make_room(num_bytes)
        has_tried = self.on_give_back is None
        while (excess := self.touched_bytes + num_bytes - self.limit_bytes) > 0 and not has_tried:
            if not (self.give_back() or self._evict_guests(excess)):
                self.evict_bytes(num_bytes)
                has_tried = not self.give_back()
        return excess <= 0 or self.on_give_back is None

    def stamp(self) -> int:
        """A number that rises from call to call: when a block was last used."""
        return next(self._clock)

    @property
    def free_bytes(self) -> int:
        """What running sequences have left, were every cached block given up."""
        return self.limit_bytes - sum((pool.in_use + 1) * pool.block_bytes for pool in self._pools)

    @property
    def uncached_bytes(self) -> int:
        """What is left without giving up cached blocks."""
        return self.free_bytes - sum(each.cached * each.block_bytes for each in (*self._pools, *self._guests))

    @property
    def guest_bytes(self) -> int:
        """What guests have cached."""
        return sum(guest.cached * guest.block_bytes for guest in self._guests)

    @property
    def untouched_bytes(self) -> int:
        """What is left beside memory that was taken already."""
        return self.limit_bytes - self.guest_bytes - sum((pool.touched + 1) * pool.block_bytes for pool in self._pools)

    @property
    def touched_bytes(self) -> int:
        """Memory that was taken and not given back."""
        return self.guest_bytes + sum(pool.touched * pool.block_bytes for pool in self._pools)

    @property
    def idle_bytes(self) -> int:
        """Of this, that of free blocks."""
        return sum(pool.idle * pool.block_bytes for pool in self._pools)

    def look_up(self, num_bytes: int) -> None:
        """Find the limit anew where `num_bytes` more take memory beyond the last step, or something to be given up."""
        if self._find_limit is None:
            return
        grown = self.touched_bytes + num_bytes
        if grown <= self._ceiling_bytes and num_bytes <= self.uncached_bytes:
            return
        in_use = self.limit_bytes - self.free_bytes
        self.limit_bytes = max(in_use, self._find_limit(self.touched_bytes))
        self._ceiling_bytes = min(self.limit_bytes, grown + GROWTH_STEP_BYTES)
        self.make_room(0)

    def resize(self, limit_bytes: int) -> None:
        """The limit is another one from now on, or found anew; what is in use stays in any case."""
        if self._find_limit is not None:
            self.expire()
        elif limit_bytes != self.limit_bytes:
            self.limit_bytes = self._ceiling_bytes = max(self.limit_bytes - self.free_bytes, limit_bytes)
            self.make_room(0)

    def expire(self) -> None:
        """Time passes: whatever is to be taken from now on, memory may be short by then."""
        if self._find_limit is not None:
            self._ceiling_bytes = min(self._ceiling_bytes, self.touched_bytes)

    def fit(self, counts: Sequence[int]) -> None:
        """Make sure that so many more blocks of each pool can be had without touching more than the limit.

        One pool's free blocks are of no use to another, so their memory goes back first; then cached blocks go.
        """
        growth = sum(count * pool.block_bytes for count, pool in zip(counts, self._pools, strict=True))
        if self.on_give_back is None or self.touched_bytes + growth <= self._ceiling_bytes:
            return
        while (excess := self._excess_bytes(counts)) > 0 and (self.give_back() or self.evict_bytes(excess)):
            pass
        self.is_frugal = True

    def _excess_bytes(self, counts: Sequence[int]) -> int:
        """What is touched above the limit once each pool has handed out so many blocks more, idle ones first."""
        pools = zip(counts, self._pools, strict=True)
        growth = sum(max(0, count - pool.idle) * pool.block_bytes for count, pool in pools)
        return self.touched_bytes + growth - self.limit_bytes

    def give_back(self) -> bool:
        """Let the system have the memory of free blocks; returns whether there was any."""
        if self.on_give_back is None or not self.idle_bytes:
            return False
        given_back = False
        for number, pool in enumerate(self._pools):
            runs = pool.give_back()
            if runs:
                self.on_give_back(number, runs)
                given_back = True
        if given_back:
            self.is_frugal = False
            self.expire()
        return given_back

    def settle(self, num_sequences: int) -> None:
        """Blocks have become free: their memory goes back, beside a little for the sequences that are left.

        These are about to need a block more, and beams give up and take some at every step.
        """
        if not num_sequences:
            self.expire()
        if any(pool.settled_idle + _spare(pool, num_sequences) < pool.idle for pool in self._pools):
            self.give_back()

    def make_room(self, num_bytes: int) -> None:
        """Give up what was cached and not used for the longest, until `num_bytes` more fit or nothing is left."""
        self.evict_bytes(num_bytes - self.uncached_bytes)

    def evict_bytes(self, num_bytes: int) -> bool:
        """Give up what was cached and not used for the longest, `num_bytes` of it; returns whether there was any."""
        victims = self._victims(num_bytes, self._oldest_first(self._guests))
        self.give_up([(owner, part) for owner, part in victims if owner in self._pools])
        self._send_away(victims)
        return bool(victims)

    def _evict_guests(self, num_bytes: int) -> bool:
        """As `evict_bytes`, of what guests have cached alone."""
        victims = self._victims(num_bytes, _merged(self._guests))
        self._send_away(victims)
        return bool(victims)

    def _send_away(self, victims: list[tuple[Any, Any]]) -> None:
        for owner, part in victims:
            if owner in self._guests:
                owner.give_up(part)

    @staticmethod
    def _victims(num_bytes: int, oldest_first: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        """The first of these, `num_bytes` of them."""
        victims = []
        for owner, part in oldest_first:
            if num_bytes <= 0:
                break
            victims.append((owner, part))
            num_bytes -= owner.block_bytes
        return victims

    def evict(self, num_blocks: int) -> int:
        """Give up the least recently used cached blocks of all pools; returns how many there were."""
        victims = list(islice(self._oldest_first(), num_blocks))
        self.give_up(victims)
        return len(victims)

    def give_up(self, victims: list[tuple[BlockPool, int]]) -> None:
        """Give up the content of these cached blocks, for their memory."""
        if victims and self.before_eviction is not None:
            changing_nothing(self.before_eviction, victims)
        for pool, block in victims:
            pool.give_up(block)

    def _oldest_first(self, guests: Sequence[Guest] = ()) -> Iterator[tuple[Any, Any]]:
        """What is cached in the pools, and by these guests, with whose it is."""
        return _merged((*self._pools, *guests))


def _merged(owners: Sequence[BlockPool | Guest]) -> Iterator[tuple[Any, Any]]:
    """What these have cached, oldest first, with whose it is."""
    for _, owner, part in merge(*map(_stamped, owners), key=lambda each: each[0]):
        yield owner, part


def _spare(pool: BlockPool, num_sequences: int) -> int:
    """Free blocks to keep beside those in use: no more than a sequence needs next, and never much."""
    return min(num_sequences, max(1, int(pool.in_use * SPARE_SHARE)))


def _stamped(owner: BlockPool | Guest) -> Iterable[tuple[int, Any, Any]]:
    return ((stamp, owner, part) for part, stamp in owner.oldest_first())
