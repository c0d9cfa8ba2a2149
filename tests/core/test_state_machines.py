"""Random operations on the pool and the manager against plain models, integrity checked after every one."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from hf_paged.core.blocks import BlockPool, OutOfBlocks
from hf_paged.core.manager import BlockManager

SETTINGS = settings(max_examples=25, stateful_step_count=30, deadline=None)


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

    @invariant()
    def agrees(self):
        self.pool.check_integrity(dict(self.references))
        assert (self.pool.in_use, self.pool.cached) == (len(self.references), len(self.cached))


class ManagerMachine(RuleBasedStateMachine):
    """Tables against lists of tokens; a memory of one token per slot shows what a table really holds."""

    tables = Bundle("tables")

    def __init__(self):
        super().__init__()
        self.manager = BlockManager(num_blocks=25, block_size=4)
        self.memory: dict[int, int] = {}
        self.content: dict[int, list[int]] = {}
        self.live: dict[int, object] = {}
        self.next_token = 0

    @rule(target=tables)
    def new(self):
        return self._add(self.manager.new_table(), [])

    @rule(target=tables, source=tables, data=st.data())
    def fork(self, source, data):
        if id(source) not in self.live:
            return multiple()
        keep = data.draw(st.integers(0, source.num_tokens))
        return self._add(self.manager.fork(source, keep), self.content[id(source)][:keep])

    @rule(
        sources=st.lists(tables, min_size=1, max_size=4, unique_by=id), count=st.integers(0, 9), room=st.integers(0, 9)
    )
    def append(self, sources, count, room):
        sources = [table for table in sources if id(table) in self.live]
        before = [(list(table.blocks), table.num_tokens) for table in sources]
        try:
            copies, pins = self.manager.append(sources, count, room)
        except OutOfBlocks:
            assert before == [(table.blocks, table.num_tokens) for table in sources], "a refusal changes nothing"
            return
        for table in sources:
            for position in range(table.num_tokens - count, table.num_tokens):
                self.next_token += 1
                self.memory[table.slot(position)] = self.next_token
                self.content[id(table)].append(self.next_token)
        for copy in copies:
            for i in range(copy.tokens):
                self.memory[copy.target + i] = self.memory[copy.source + i]
        self.manager.unpin(pins)
        assert len(copies) <= len(sources), "at most one block a table is copied"

    @rule(table=tables, data=st.data())
    def crop(self, table, data):
        if id(table) in self.live:
            keep = data.draw(st.integers(0, table.num_tokens))
            self.manager.crop(table, keep)
            del self.content[id(table)][keep:]

    @rule(target=tables, first=consumes(tables), second=consumes(tables), data=st.data())
    def reorder(self, first, second, data):
        old = self._distinct(first, second)
        if not old:
            return multiple()
        chosen = [data.draw(st.sampled_from(old)) for _ in old]
        new = [self._add(self.manager.fork(table), list(self.content[id(table)])) for table in chosen]
        for table in old:
            self._free(table)
        return multiple(*new)

    @rule(table=consumes(tables))
    def free(self, table):
        if id(table) in self.live:
            self._free(table)

    def _distinct(self, *tables):
        return [table for key, table in {id(table): table for table in tables}.items() if key in self.live]

    def _add(self, table, content):
        self.live[id(table)], self.content[id(table)] = table, content
        return table

    def _free(self, table):
        self.manager.free(table)
        self.manager.free(table)  # twice is harmless
        del self.live[id(table)], self.content[id(table)]

    @invariant()
    def agrees(self):
        self.manager.check_integrity()
        for key, table in self.live.items():
            assert [self.memory[table.slot(i)] for i in range(table.num_tokens)] == self.content[key]

    def teardown(self):
        for table in list(self.live.values()):
            self._free(table)
        assert self.manager.pool.in_use == 0


TestPool = PoolMachine.TestCase
TestPool.settings = SETTINGS
TestManager = ManagerMachine.TestCase
TestManager.settings = SETTINGS
