"""Random operations on the pool against a plain model, integrity checked after every one."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from hf_paged.core.blocks import BlockPool, OutOfBlocks


class PoolMachine(RuleBasedStateMachine):
    """A block is free, owned, shared or cached; the model is a bag of references and an ordered list of cached ids."""

    NUM_BLOCKS = 13
    held = Bundle("held")

    def __init__(self):
        super().__init__()
        self.evicted: list[int] = []
        self.pool = BlockPool(self.NUM_BLOCKS, on_evict=self.evicted.append)
        self.references: Counter[int] = Counter()
        self.cached: list[int] = []
        self.claims: list[range] = []

    @rule(target=held, count=st.integers(1, 6), room=st.integers(0, 4), data=st.data())
    def take(self, count, room, data):
        owned = sorted(self.references)
        after = data.draw(st.sampled_from(owned)) if owned else None
        available = self.NUM_BLOCKS - 1 - len(self.references)
        if count > available:
            with pytest.raises(OutOfBlocks) as caught:
                self.pool.take(count, after, room)
            assert (caught.value.wanted, caught.value.available) == (count, available)
            return multiple()
        must_evict = max(0, len(self.references) + len(self.cached) + count - (self.NUM_BLOCKS - 1))
        oldest, self.evicted[:] = self.cached[:must_evict], []
        blocks, claim = self.pool.take(count, after, room)
        assert self.evicted == oldest, "the least recently used blocks go first, and no more than needed"
        del self.cached[:must_evict]
        assert len(set(blocks)) == count
        assert 0 not in blocks
        assert not set(blocks) & (set(self.references) | set(self.cached))
        if after is not None and after + 1 < self.NUM_BLOCKS and after + 1 in blocks:
            assert blocks[0] == after + 1
        self.references.update(blocks)
        self.claims.append(claim)
        return tuple(blocks)

    @rule(target=held, blocks=held)
    def share(self, blocks):
        if any(block not in self.references and block not in self.cached for block in blocks):
            return multiple()
        self.pool.share(blocks)
        self.references.update(blocks)
        self.cached = [block for block in self.cached if block not in blocks]
        return blocks

    @rule(blocks=consumes(held), keep=st.booleans())
    def drop(self, blocks, keep):
        if any(block not in self.references for block in blocks):
            return
        self.pool.drop(blocks, keep=lambda block: keep)
        for block in blocks:
            self.references[block] -= 1
            if not self.references[block]:
                del self.references[block]
                if keep:
                    self.cached.append(block)

    @rule(count=st.integers(1, 4))
    def evict(self, count):
        self.evicted.clear()
        assert self.pool.evict(count) == min(count, len(self.cached))
        assert self.evicted == self.cached[:count]
        del self.cached[:count]

    @rule()
    def unclaim(self):
        while self.claims:
            self.pool.unclaim(self.claims.pop())

    @rule(page_blocks=st.sampled_from([1, 2, 4, 5]))
    def give_back(self, page_blocks):
        """Every page of free blocks that are touched goes back, and no other."""
        self.pool.page_blocks = page_blocks
        used = {*self.references, *self.cached}
        pages = [range(at, at + page_blocks) for at in range(0, self.NUM_BLOCKS, page_blocks)]
        due = {block for page in pages if not used & set(page) for block in page}
        before, given_back = self.touched(), {block for run in self.pool.give_back() for block in run}
        assert given_back - {0} <= due | set(range(self.NUM_BLOCKS, self.NUM_BLOCKS + page_blocks)), (
            "a page that is used was given back"
        )
        assert not self.touched() & due, "an idle page was kept"
        assert self.touched() == before - due

    def touched(self):
        return {block for block in range(self.NUM_BLOCKS) if self.pool._touched[block]}

    @invariant()
    def agrees(self):
        self.pool.check_integrity(dict(self.references))
        assert (self.pool.in_use, self.pool.cached) == (len(self.references), len(self.cached))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class OnDemandMachine(PoolMachine):
    """The device has memory for `DEVICE` blocks, some of which others hold at times."""

    NUM_BLOCKS, STEP_BLOCKS, DEVICE = 31, 4, 22

    def __init__(self):
        super().__init__()
        self.memory: set[int] = set()
        self.others = 0
        self.take_blind(3)

    def take_blind(self, count):
        """What was handed out before anybody knew what memory is like."""
        blocks, _ = self.pool.take(count)
        self.pool.ask_for_memory(self.STEP_BLOCKS, self._back)
        self.memory.update(*self.pool.extents.runs)
        self.pool.drop(blocks)

    def _back(self, run):
        assert run
        assert not self.memory & set(run)
        fits = len(self.memory) + len(run) + self.others <= self.DEVICE
        if fits:
            self.memory.update(run)
        return fits

    @rule(others=st.integers(0, 15))
    def others_take(self, others):
        self.others = max(0, min(others, self.DEVICE - len(self.memory)))

    @rule(target=PoolMachine.held, count=st.integers(1, 9), room=st.integers(0, 4), data=st.data())
    def take(self, count, room, data):
        before, idle = set(self.memory), self._idle()
        taken, refused = self._take(count, room, data)
        if refused:
            assert len(self._idle()) < count
            assert not self.cached, "cached blocks go first"
            assert len(self.memory) + self.others + self.STEP_BLOCKS > self.DEVICE
        elif count <= len(idle):
            assert self.memory == before, "nothing was needed"
        assert set(taken) <= self.memory
        return multiple(tuple(taken)) if taken else multiple()

    def _take(self, count, room, data):
        """The blocks, and whether it was the device that refused them."""
        owned = sorted(self.references)
        after = data.draw(st.sampled_from(owned)) if owned else None
        self.evicted.clear()
        blocks, refused = [], False
        try:
            blocks, claim = self.pool.take(count, after, room)
            self.claims.append(claim)
        except OutOfBlocks as error:
            refused = error.refused
            assert refused == (count <= self.NUM_BLOCKS - 1 - len(self.references))
        self.cached = [block for block in self.cached if block not in self.evicted]
        assert len(set(blocks)) == len(blocks)
        assert not set(blocks) & {0, *self.references, *self.cached}
        self.references.update(blocks)
        return blocks, refused

    @rule()
    def give_back(self):
        """Every extent but the first goes back as soon as none of its blocks is used."""
        used = {*self.references, *self.cached}
        due = {run for run in self.pool.extents.runs[1:] if not used & set(run)}
        assert set(self.pool.give_back()) == due
        self.memory.difference_update(*due)

    def _idle(self):
        return self.memory - {0, *self.references, *self.cached}

    @invariant()
    def has_memory(self):
        assert {*self.references, *self.cached} <= self.memory
        assert self.pool.touched == len(self.memory) - 1
        assert {block for run in self.pool.extents.runs for block in run} == self.memory


TestOnDemand = OnDemandMachine.TestCase
TestOnDemand.settings = TestPool.settings
