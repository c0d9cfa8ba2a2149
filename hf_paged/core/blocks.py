"""The block pool: which block is free, owned, shared or cached, and where the next one should lie.

Life of a block:

    state    references   indexed   leaves by
    -------  ----------   -------   ------------------------------------------
    free     0            no        take()                      -> owned
    owned    1            maybe     share() -> shared, drop()   -> cached / free
    shared   2 or more    maybe     drop()                      -> owned
    cached   0            yes       share() -> owned, evict()   -> free

Block 0 is the null block: never handed out, always zero, the target of padding.

Attention reads adjacent blocks as one strided view, so the pool prefers them: `take(after=b)` continues behind
`b`, and a *claim* keeps room behind a sequence that is expected to grow. A claim is a hint, not a reservation:
it costs no memory and is ignored as soon as nothing else is free.

A block is *touched* from when it is first handed out until its memory is given back, which only a free block's can be.
A free block that is touched is *idle*. Memory comes and goes in pages: `page_blocks` adjacent blocks fill whole ones.

Where memory has to be asked for (`ask_for_memory`) a block is touched as long as it has some. Those that have none are
marked as used, so that nobody finds them; `get_memory` brings some for more of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from hf_paged.core.budget import Budget
from hf_paged.core.extents import Extents
from hf_paged.core.overflow import HOST_BLOCKS, HostBlocks

NULL_BLOCK = 0
_FLIP = bytes([1, 0]) + bytes(254)  # for `translate`: the other blocks of a bitmap


class OutOfBlocks(Exception):
    """Raised when fewer blocks can be had than were asked for.

    Carries the number that could, the bytes wanted, and whether it was the device that refused them, not the budget.
    """

    changed_nothing = True

    def __init__(self, wanted: int, available: int, wanted_bytes: int, refused: bool = False):
        super().__init__(f"{wanted} blocks wanted, {available} available")
        self.wanted, self.available, self.wanted_bytes, self.refused = wanted, available, wanted_bytes, refused


class BlockPool:
    """Hands out block ids.

    Args:
        num_blocks: ids run from 1 to `num_blocks - 1`; id 0 is the null block.
        on_evict: called with a cached block's id when its content is given up.
        on_free: called with a block's id when it becomes free, for whatever reason.
        budget: shared with other pools; `None`: as much as there are ids.
        block_bytes: what one block costs of it.

    Attributes:
        touched: blocks whose memory was taken and not given back.
        before_reuse: called with blocks whose memory is about to be written to by somebody new.
        page_blocks: memory is given back in groups of so many adjacent blocks.
        overflow: blocks that tables hold outside of this pool.
        extents: which blocks have memory; `None` where none is asked for.
    """

    def __init__(
        self,
        num_blocks: int,
        on_evict: Callable[[int], None] | None = None,
        on_free: Callable[[int], None] | None = None,
        budget: Budget | None = None,
        block_bytes: int = 1,
    ):
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self._budget = Budget(num_blocks) if budget is None else budget
        self._budget.join(self)
        self._refs = [0] * num_blocks
        self._used = bytearray(num_blocks)
        self._claimed = bytearray(num_blocks)
        self._touched = bytearray(num_blocks)
        self.touched, self.page_blocks = 0, 1
        self._settled_idle = 0
        self._used[NULL_BLOCK] = self._claimed[NULL_BLOCK] = 1
        self._cached: OrderedDict[int, int] = OrderedDict()  # when each was last used, oldest first
        self._in_use = 0
        self._on_evict = on_evict
        self.on_free = on_free
        self.before_reuse: Callable[[Iterable[int]], None] | None = None
        self.overflow = HostBlocks()
        self.extents: Extents | None = None
        self.evicted = 0
        self.high_water = 1

    @property
    def in_use(self) -> int:
        """Blocks held by at least one table."""
        return self._in_use

    @property
    def cached(self) -> int:
        """Blocks held by no table whose content is kept."""
        return len(self._cached)

    @property
    def idle(self) -> int:
        """Free blocks whose memory is there."""
        return self.touched - self._in_use - self.cached

    @property
    def settled_idle(self) -> int:
        """Of these, such as could not be given back last time, because they share pages with others."""
        self._settled_idle = min(self._settled_idle, self.idle)
        return self._settled_idle

    @property
    def available(self) -> int:
        """Blocks that `take` could hand out, cached ones included."""
        return max(0, min(self.free_ids, self._budget.free_bytes // self.block_bytes))

    @property
    def free_ids(self) -> int:
        """Ids that no table holds: so many blocks there are, whatever the budget says."""
        return self.num_blocks - 1 - self._in_use

    def oldest_first(self) -> Iterable[tuple[int, int]]:
        """The cached blocks, and when each was last used."""
        return self._cached.items()

    def limit_ids(self, num_blocks: int) -> None:
        """Hand out no ids from `num_blocks` on, unless some were handed out already."""
        backed = 0 if self.extents is None else self.extents.stop
        self.num_blocks = max(self.high_water, backed, min(self.num_blocks, num_blocks))
        for bitmap in (self._refs, self._used, self._claimed, self._touched):
            del bitmap[self.num_blocks :]

    def is_cached(self, block: int) -> bool:
        """Whether no table holds `block` and its content is kept."""
        return block in self._cached

    def references(self, block: int) -> int:
        """Number of tables that hold `block`."""
        return self._refs[block] if block < HOST_BLOCKS else self.overflow.references(block)

    def take(self, count: int, after: int | None = None, room: int = 0) -> tuple[list[int], range]:
        """Take `count` blocks, adjacent if possible, behind block `after` if possible.

        Returns the ids and the claim, the ids from the first block on with `room` more behind them; give it
        back with `unclaim`. Evicts cached blocks where nothing is free. Raises `OutOfBlocks` and changes
        nothing where that is not enough.
        """
        if count > self.available:
            raise OutOfBlocks(count, self.available, count * self.block_bytes)
        self._budget.make_room(count * self.block_bytes)
        self.make_room(count)
        self.get_memory(count)
        claim = range(0)
        blocks = self._own(self._idle_blocks(after, count)) if self._budget.is_frugal else []
        after = blocks[-1] if blocks else after
        blocks += self._own(self._run_behind(after, count - len(blocks))) if after is not None else []
        rest = count - len(blocks)
        if rest:
            start = self._find_run(rest, room)
            if start is None:
                blocks += self._own(self._scattered(self._used, rest))
            else:
                blocks += self._own(range(start, start + rest))
                claim = range(start, min(start + rest + room, self.num_blocks))
                self._claimed[claim.start : claim.stop] = b"\1" * len(claim)
        self._in_use += count
        self.high_water = max(self.high_water, max(blocks, default=0) + 1)
        if self.before_reuse is not None:
            self.before_reuse(blocks)
        return blocks, claim

    def _own(self, blocks: Iterable[int]) -> list[int]:
        blocks = list(blocks)
        self.touched += len(blocks) - sum(map(self._touched.__getitem__, blocks))
        for block in blocks:
            self._touched[block] = 1
            self._used[block] = self._claimed[block] = 1
            self._refs[block] = 1
        return blocks

    def _run_behind(self, after: int, count: int) -> range:
        stop = min(after + 1 + count, self.num_blocks)
        used = self._used.find(1, after + 1, stop)
        return range(after + 1, stop if used < 0 else used)

    def _find_run(self, count: int, room: int) -> int | None:
        """Start of the first run of free blocks: with room and unclaimed, else unclaimed, else just free."""
        for bitmap, length in ((self._claimed, count + room), (self._claimed, count), (self._used, count)):
            start = bitmap.find(bytes(length))
            if start >= 0:
                return start
        return None

    @staticmethod
    def _scattered(bitmap: bytes | bytearray, count: int) -> list[int]:
        blocks, at = [], 0
        for _ in range(count):
            at = bitmap.find(0, at + 1)
            blocks.append(at)
        return blocks

    def _idle_blocks(self, after: int | None, count: int) -> Sequence[int]:
        """At most `count` idle blocks: behind block `after`, else adjacent, else any.

        None where all free blocks are idle, so that it makes no difference.
        """
        idle = self.idle
        if idle == self.num_blocks - 1 - self._in_use - self.cached:
            return ()
        count = min(count, idle)
        seen = self.high_water if self.extents is None else self.num_blocks
        others = int.from_bytes(self._touched[:seen].translate(_FLIP), "big")
        taken = (int.from_bytes(self._used[:seen], "big") | others).to_bytes(seen, "big")
        start = -1 if after is None else taken.find(bytes(count), after + 1, after + 1 + count)
        if start < 0:
            start = taken.find(bytes(count))
        return self._scattered(taken, count) if start < 0 else range(start, start + count)

    def unclaim(self, claim: range) -> None:
        """Give back the unused part of a claim."""
        self._claimed[claim.start : claim.stop] = self._used[claim.start : claim.stop]

    def share(self, blocks: Sequence[int]) -> None:
        """Add one reference to each block; a cached block is owned again."""
        for block in blocks:
            if block >= HOST_BLOCKS:
                self.overflow.share(block)
                continue
            if self._refs[block] == 0:
                del self._cached[block]
                self._in_use += 1
            self._refs[block] += 1

    def drop(self, blocks: Sequence[int], keep: Callable[[int], bool] = lambda block: False) -> None:
        """Remove one reference from each block, in order; those that `keep` accepts stay cached.

        Callers drop a sequence's tail first, so that chains are evicted from their ends.
        """
        for block in blocks:
            if block >= HOST_BLOCKS:
                self.overflow.drop(block)
                continue
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            self._in_use -= 1
            if keep(block):
                self._cached[block] = self._budget.stamp()
            else:
                self._free(block)

    def make_room(self, count: int) -> None:
        """Give up cached blocks until there are ids for `count` more."""
        self.evict(self._in_use + self.cached + count - (self.num_blocks - 1))

    def ask_for_memory(self, step_blocks: int, back: Callable[[range], bool]) -> None:
        """From now on blocks have memory where `back` has brought it: at once for all that were ever handed out.

        The caller sees to that of these, `extents.runs`, which are whole steps if the budget has room for that;
        `step_blocks` are asked for at a time, or a multiple.
        """
        room = self.high_water + max(0, self._budget.untouched_bytes // self.block_bytes)
        backed = max(self.high_water, min(-(-self.high_water // step_blocks) * step_blocks, room, self.num_blocks))
        self.extents = Extents(step_blocks, back, backed)
        self._set_touched(range(NULL_BLOCK + 1, backed), True)  # the null block is nobody's
        self._withhold(range(backed, self.num_blocks))

    def get_memory(self, count: int, room: int = 0) -> None:
        """Have memory for `count` free blocks, that of cached ones where no more is to be had; else `OutOfBlocks`.

        And for `room` more that nobody has claimed, if the budget allows it and the device has it.
        """
        if self.extents is None:
            return
        while (short := count - (self.extents.num_blocks - 1 - self._in_use - self.cached)) > 0:
            if not self._get_extent(self.extents, short) and not self.evict(short):
                raise OutOfBlocks(count, count - short, count * self.block_bytes, refused=True)
        while room and (short := count + room - self._claimed.count(0)) > 0:
            short = min(short, self._budget.untouched_bytes // self.block_bytes)
            if short <= 0 or not self._get_extent(self.extents, short):
                return

    def _get_extent(self, extents: Extents, wanted: int) -> bool:
        run = extents.get(wanted, self._budget.untouched_bytes // self.block_bytes, self.num_blocks)
        self._set_touched(run, True)
        self._used[run.start : run.stop] = self._claimed[run.start : run.stop] = bytes(len(run))
        return bool(run)

    def _withhold(self, blocks: range) -> None:
        """Blocks that nobody holds have no memory now."""
        self._set_touched(blocks, False)
        self._used[blocks.start : blocks.stop] = self._claimed[blocks.start : blocks.stop] = b"\1" * len(blocks)

    def _set_touched(self, blocks: range, touched: bool) -> None:
        self.touched += touched * len(blocks) - self._touched.count(1, blocks.start, blocks.stop)
        self._touched[blocks.start : blocks.stop] = bytes([touched]) * len(blocks)

    def evict(self, count: int) -> int:
        """Give up the content of the `count` least recently used cached blocks; returns how many there were."""
        victims = [(self, block) for block in islice(self._cached, max(0, count))]
        self._budget.give_up(victims)
        return len(victims)

    def give_up(self, block: int) -> None:
        """Give up the content of one cached block for its memory; called through the budget."""
        del self._cached[block]
        self._free(block)
        if self._on_evict is not None:
            self._on_evict(block)
        self.evicted += 1

    def touch(self, block: int) -> None:
        """A cached block counts as the most recently used; no effect on others."""
        if block in self._cached:
            self._cached.move_to_end(block)
            self._cached[block] = self._budget.stamp()

    def discard(self, block: int) -> None:
        """Give up the content of one cached block that nobody will ask for; no effect on others."""
        if block in self._cached:
            del self._cached[block]
            self._free(block)

    def discard_all(self) -> None:
        """Give up the content of every cached block, not for its memory but because nobody will ask for it."""
        for block in list(self._cached):
            self.discard(block)

    def give_back(self) -> list[range]:
        """Runs of free blocks that fill whole pages, every idle one that can be: they are not touched any more.

        A run may begin with the null block: memory that comes back is zero, as it must be.
        """
        if self.extents is not None:
            runs = self.extents.take_idle(self._used)
            for run in runs:
                self._withhold(run)
            self._settled_idle = self.idle
            return runs
        runs, size, at, seen = [], self.page_blocks, 0, self.high_water
        unused = self._used[:seen].translate(_FLIP)
        idle = (int.from_bytes(self._touched[:seen], "big") & int.from_bytes(unused, "big")).to_bytes(seen, "big")
        while (at := idle.find(1, at)) >= 0:
            start = at // size * size
            used = self._used.find(1, max(start, NULL_BLOCK + 1))
            stop = self.num_blocks if used < 0 else used // size * size
            if stop <= at:  # it shares a page with a block that is used
                at = start + size
                continue
            at = -(-(idle.rfind(1, start, stop) + 1) // size) * size
            self.touched -= idle.count(1, start, at)
            self._touched[start:at] = bytes(min(at, self.num_blocks) - start)
            runs.append(range(start, at))
        self._settled_idle = self.idle
        return runs

    def _free(self, block: int) -> None:
        self._used[block] = self._claimed[block] = 0
        if self.on_free is not None:
            self.on_free(block)

    def check_integrity(self, expected_references: dict[int, int]) -> None:
        """Prove that every block is in exactly one state and that references equal `expected_references`."""
        away = {block: count for block, count in expected_references.items() if block >= HOST_BLOCKS}
        self.overflow.check_integrity(away)
        for block in range(1, self.num_blocks):
            refs = expected_references.get(block, 0)
            assert self._refs[block] == refs, f"block {block}: {self._refs[block]} references, tables hold {refs}"
            cached = block in self._cached
            assert not (refs and cached), f"block {block} is owned and cached"
            has_memory = self.extents is None or any(block in run for run in self.extents.runs)
            assert has_memory or not (refs or cached), f"block {block} has no memory"
            assert bool(self._used[block]) == bool(refs or cached or not has_memory), f"block {block}: wrong bitmap"
            assert self._claimed[block] or not self._used[block], f"block {block} is used but not claimed"
            assert self._touched[block] or not (refs or cached), f"block {block} is held but not touched"
            assert self.extents is None or self._touched[block] == has_memory, f"block {block}: wrong memory"
        assert self._touched.count(1) == self.touched, "wrong count of touched blocks"
        assert len(self._touched) == len(self._used) == self.num_blocks, "a bitmap has changed its length"
        assert self._refs[NULL_BLOCK] == 0, "the null block was handed out"
        assert self._in_use == len(expected_references) - len(away), "wrong count of blocks in use"
        assert list(self._cached.values()) == sorted(self._cached.values()), "cached blocks out of order"
