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
