"""Random operations on the pool and the manager against plain models, integrity checked after every one."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from hf_paged.core.blocks import BlockPool, OutOfBlocks
from hf_paged.core.manager import BlockManager
from hf_paged.core.prefix import TOKEN_LIMIT

SETTINGS = settings(max_examples=150, stateful_step_count=40, deadline=None)


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


ROOTS = [b"model a", b"model b"]


class ManagerMachine(RuleBasedStateMachine):
    """Tables against lists of tokens; what a slot of the memory holds depends on the tokens before it, as KV does.

    Token ids are few, so that sequences meet in the prefix index; numbers that are no ids stand for what ids do not
    describe. Layers form the groups that `WINDOWS` says; a budget of `BUDGET` is for all of them, of which a block of
    each takes as much as `COSTS` says.
    """

    WINDOWS: tuple = (None,)
    COSTS: tuple = (1,)
    BUDGET = 17
    PAGE_BLOCKS = 1

    tables = Bundle("tables")

    def __init__(self):
        super().__init__()
        self.manager = BlockManager(17, 4, self.WINDOWS, self.COSTS, self.BUDGET)
        self.manager.budget.on_give_back = self._lose
        for pool in self.manager.pools:
            pool.page_blocks = self.PAGE_BLOCKS
        self.memory: list[dict[int, tuple]] = [{} for _ in self.WINDOWS]
        self.content: dict[int, list[int]] = {}
        self.origin: dict[int, bytes] = {}
        self.live: dict[int, object] = {}
        self.unknown = TOKEN_LIMIT

    def _lose(self, group, runs):
        """Memory that is given back loses its content."""
        for run in runs:
            for slot in range(4 * run.start, 4 * run.stop):
                self.memory[group].pop(slot, None)

    @rule()
    def give_back(self):
        self.manager.budget.give_back()
        if self.PAGE_BLOCKS == 1:
            assert self.manager.budget.idle_bytes == 0

    @rule()
    def settle(self):
        self.manager.settle()
        if self.PAGE_BLOCKS == 1:
            living = sum(table.num_tokens > 0 for table in self.live.values())
            assert all(pool.idle <= living for pool in self.manager.pools)

    @rule(target=tables, root=st.sampled_from([None, *ROOTS]), count=st.integers(0, 14), data=st.data())
    def new(self, root, count, data):
        table = self._add(self.manager.new_table(root), [], root)
        self._append([table], count, 0, True, data)
        return table

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14), root=st.sampled_from(ROOTS), data=st.data())
    def come_and_go(self, tokens, root, data):
        """A whole call: begin with what is there, compute the rest, leave everything for others."""
        table = self._match(root, tokens, 1)
        rest = tokens[table.num_tokens :]
        self._append_tokens([table], [rest], 0, [rest])
        self.manager.index_table(table, True)
        self.agrees()
        self._free(table)

    @rule(
        target=tables,
        root=st.sampled_from(ROOTS),
        tokens=st.lists(st.integers(0, 1), max_size=14),
        held_back=st.integers(0, 2),
    )
    def match(self, root, tokens, held_back):
        return self._match(root, tokens, held_back)

    def _match(self, root, tokens, held_back):
        table = self.manager.new_table(root)
        hit = self.manager.match(table, tokens, len(tokens) - held_back)
        assert hit == table.num_tokens <= max(0, len(tokens) - held_back)
        return self._add(table, tokens[:hit], root)

    @rule(table=tables, with_tail=st.booleans())
    def index(self, table, with_tail):
        if id(table) in self.live:
            self.manager.index_table(table, with_tail)

    @rule(tables=st.lists(tables, min_size=1, max_size=4, unique_by=id))
    def trim(self, tables):
        tables = [table for table in tables if id(table) in self.live]
        self.manager.trim(tables)
        for table in tables:
            for chain, window in zip(table.chains, self.WINDOWS, strict=True):
                if window is not None:
                    assert len(chain.held) <= 2 + window // 4 + (table.seam_blocks > 0)

    @rule(table=tables, count=st.integers(1, 9), data=st.data())
    def go_back_and_on(self, table, count, data):
        """As assisted decoding does, with everything indexed on the way."""
        if id(table) in self.live:
            self.manager.index_table(table, True)
            self._crop(table, data)
            self._append([table], count, 0, True, data)
            self._find(table)

    @rule(table=tables)
    def found_again(self, table):
        self._find(table)

    def _find(self, table):
        """Whatever was just indexed is found as far as it goes."""
        if id(table) in self.live and table.root is not None:
            self.manager.index_table(table, True)
            found = self.manager.index.match(table.root, table.tokens, table.num_tokens)
            assert found.num_tokens == table.num_tokens
            assert {len(blocks) for blocks in found.blocks} == {table.num_blocks}

    @rule()
    def forget(self):
        self.manager.forget_prefixes()
        assert self.manager.cached == 0

    @rule(target=tables, source=tables, data=st.data())
    def fork(self, source, data):
        if id(source) not in self.live:
            return multiple()
        keep = self._length_to_keep(source, data)
        return self._add(self.manager.fork(source, keep), self.content[id(source)][:keep], self.origin[id(source)])

    @rule(
        sources=st.lists(tables, min_size=1, max_size=4, unique_by=id),
        count=st.integers(0, 9),
        room=st.integers(0, 9),
        known=st.booleans(),
        may_part=st.booleans(),
        data=st.data(),
    )
    def append(self, sources, count, room, known, may_part, data):
        self._append(sources, count, room, known, data, may_part)

    def _append(self, sources, count, room, known, data, may_part=False):
        sources = [table for table in sources if id(table) in self.live]
        tokens = [data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)) for _ in sources]
        if not known:
            self.unknown += 1
            tokens = [[self.unknown] * count for _ in sources]
        self._append_tokens(sources, tokens, room, tokens if known or count % 2 else None, may_part)

    def _append_tokens(self, sources, tokens, room, told, may_part=False):
        before = [self._state(table) for table in sources]
        try:
            copies, pins = self.manager.append(sources, [len(new) for new in tokens], room, told, may_part)
        except OutOfBlocks:
            assert before == [self._state(table) for table in sources], "refused, yet changed"
            return
        for table, new in zip(sources, tokens, strict=True):
            content = self.content[id(table)]
            for token in new:
                content.append(token)
                for chain, memory in zip(table.chains, self.memory, strict=True):
                    memory[chain.slot(len(content) - 1)] = (self.origin[id(table)], *content)
        for memory, each in zip(self.memory, copies, strict=True):
            for copy in each:
                for i in range(copy.tokens):
                    memory[copy.target + i] = memory[copy.source + i]
            assert len(each) <= len(sources), "at most one block a table is copied"
        self._agrees_with_budget()
        self.manager.unpin(pins)

    def _agrees_with_budget(self):
        """Memory was taken beyond the budget only where there was nothing left to give up for it."""
        if self.manager.budget.touched_bytes > self.BUDGET:
            assert self.manager.cached == 0
            for pool in self.manager.pools:
                for at in range(0, pool.num_blocks, self.PAGE_BLOCKS):
                    page = range(at, min(at + self.PAGE_BLOCKS, pool.num_blocks))
                    assert any(pool._used[block] for block in page[at == 0 :]) or not any(
                        pool._touched[block] for block in page
                    ), "a page of idle blocks was kept"

    @rule(table=tables, data=st.data())
    def crop(self, table, data):
        if id(table) in self.live:
            self._crop(table, data)

    def _crop(self, table, data):
        keep = self._length_to_keep(table, data)
        self.manager.crop(table, keep)
        del self.content[id(table)][keep:]

    @rule(target=tables, first=consumes(tables), second=consumes(tables), data=st.data())
    def reorder(self, first, second, data):
        old = self._distinct(first, second)
        if not old:
            return multiple()
        chosen = [data.draw(st.sampled_from(old)) for _ in old]
        new = [
            self._add(self.manager.fork(table), list(self.content[id(table)]), self.origin[id(table)])
            for table in chosen
        ]
        for table in old:
            self._free(table)
        return multiple(*new)

    @rule(table=consumes(tables))
    def free(self, table):
        if id(table) in self.live:
            self._free(table)

    def _length_to_keep(self, table, data):
        """Any from which the sequence can go on: its windows are still there."""
        lengths = [n for n in range(table.num_tokens + 1) if self.manager.reaches(table, n)]
        return data.draw(st.sampled_from(lengths))

    @staticmethod
    def _state(table):
        return [list(chain.blocks) for chain in table.chains], table.num_tokens, table.root

    def _distinct(self, *tables):
        return [table for key, table in {id(table): table for table in tables}.items() if key in self.live]

    def _add(self, table, content, origin):
        self.live[id(table)], self.content[id(table)], self.origin[id(table)] = table, content, origin
        return table

    def _free(self, table):
        self.manager.free(table)
        self.manager.free(table)  # twice is harmless
        del self.live[id(table)], self.content[id(table)], self.origin[id(table)]

    @invariant()
    def agrees(self):
        self.manager.check_integrity()
        for key, table in self.live.items():
            content = self.content[key]
            past = [(self.origin[key], *content[: i + 1]) for i in range(len(content))]
            for chain, memory in zip(table.chains, self.memory, strict=True):
                held = [memory[chain.slot(i)] for i in range(chain.first_token, table.num_tokens)]
                assert held == past[chain.first_token :]

    def teardown(self):
        for table in list(self.live.values()):
            self._free(table)
        assert self.manager.in_use == 0


class MixedMachine(ManagerMachine):
    """Layers that keep all tokens beside two sliding windows."""

    WINDOWS, COSTS, BUDGET = (None, 3, 6), (2, 5, 1), 90


class PagedMixedMachine(MixedMachine):
    """Blocks that share pages: those of one group cannot always make room for those of another."""

    PAGE_BLOCKS = 4


class WindowMachine(ManagerMachine):
    """A model whose layers all have the same window."""

    WINDOWS = (5,)


TestPool = PoolMachine.TestCase
TestPool.settings = SETTINGS
TestManager = ManagerMachine.TestCase
TestManager.settings = SETTINGS
TestMixedGroups = MixedMachine.TestCase
TestMixedGroups.settings = SETTINGS
TestPagedMixedGroups = PagedMixedMachine.TestCase
TestPagedMixedGroups.settings = SETTINGS
TestWindowGroup = WindowMachine.TestCase
TestWindowGroup.settings = SETTINGS
