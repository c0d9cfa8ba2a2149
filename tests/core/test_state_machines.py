"""Random operations on the manager against a plain model, integrity checked after every one."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from hf_paged.core.blocks import OutOfBlocks
from hf_paged.core.manager import BlockManager
from hf_paged.core.overflow import HOST_BLOCKS, movable, on_host, relocate
from hf_paged.core.prefix import TOKEN_LIMIT

SETTINGS = settings(max_examples=150, stateful_step_count=40, deadline=None)


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


class OnDemandManagerMachine(MixedMachine):
    """Memory is asked for, and comes. None is taken beyond the budget as long as some can go."""

    STEPS = (3, 2, 5)

    def __init__(self):
        super().__init__()
        for pool, step in zip(self.manager.pools, self.STEPS, strict=True):
            pool.ask_for_memory(step, lambda run: True)

    @rule()
    def give_back(self):
        self.manager.budget.give_back()
        self._keeps_no_idle_extent()

    @rule()
    def settle(self):
        self.manager.settle()
        if not self.live:
            self._keeps_no_idle_extent()

    def _keeps_no_idle_extent(self):
        for pool in self.manager.pools:
            for run in pool.extents.runs[1:]:
                assert pool._used.find(1, run.start, run.stop) >= 0, "memory that is idle was kept"

    def _agrees_with_budget(self):
        if self.manager.budget.touched_bytes > self.BUDGET:
            assert self.manager.cached == 0
            self._keeps_no_idle_extent()


class OverflowMachine(MixedMachine):
    """Some blocks of the first group move to the host and back; whoever is about to write has them back before."""

    HOST_PLACES = 9

    class Place:
        def __init__(self, free_places):
            self.free_places = free_places
            free_places.pop()

        def free(self):
            self.free_places.append(self)

    def __init__(self):
        super().__init__()
        self.free_places = list(range(self.HOST_PLACES))

    @rule(tables=st.lists(ManagerMachine.tables, min_size=1, max_size=4, unique_by=id), count=st.integers(1, 4))
    def overflow(self, tables, count):
        manager, tables = self.manager, [table for table in tables if id(table) in self.live]
        blocks = movable(manager, tables, 0)
        for block in blocks:
            holders = {key for key, table in self.live.items() if block in table.chains[0].blocks}
            assert holders <= set(map(id, tables)), "others hold it, too"
            for table in tables:
                if block in table.chains[0].blocks:
                    assert table.chains[0].blocks.index(block) < table.num_tokens // 4, "it is not full"
        moves = {}
        for block in blocks[: min(count, len(self.free_places))]:
            moves[block] = manager.pools[0].overflow.add(self.Place(self.free_places))
            self._move(block, moves[block])
        before = manager.in_use
        relocate(manager, tables, 0, moves)
        assert manager.in_use == before - len(moves)

    @rule(tables=st.lists(ManagerMachine.tables, min_size=1, max_size=4, unique_by=id))
    def bring_back(self, tables):
        tables = [table for table in tables if id(table) in self.live]
        self._bring_back(tables, on_host(tables, 0))

    def _bring_back(self, tables, blocks):
        manager = self.manager
        try:
            taken = manager.take_runs([len(blocks), 0, 0], [0, 0, 0], 0)[0]
        except OutOfBlocks:
            return False
        for block, new in zip(blocks, taken, strict=True):
            self._move(block, new)
        relocate(manager, tables, 0, dict(zip(blocks, taken, strict=True)))
        manager.unpin([(0, block) for block in taken])
        return True

    def _move(self, source, target):
        memory = self.memory[0]
        for i in range(4):
            memory[4 * target + i] = memory.get(4 * source + i)

    def _append_tokens(self, sources, tokens, *args, **kwargs):
        tails = {table.chains[0].blocks[-1] for table in sources if table.tail_tokens}
        if self._bring_back(sources, sorted(block for block in tails if block >= HOST_BLOCKS)):
            super()._append_tokens(sources, tokens, *args, **kwargs)

    def _find(self, table):
        if id(table) in self.live and not table.chains[0].reaches_host:
            super()._find(table)

    @invariant()
    def places_agree(self):
        held = on_host(self.live.values(), 0)
        assert len(held) == self.HOST_PLACES - len(self.free_places) == len(self.manager.pools[0].overflow)
        assert not set(held) & set(self.manager.index.by_block[0]), "it is found"

    def teardown(self):
        super().teardown()
        assert len(self.free_places) == self.HOST_PLACES


class WindowMachine(ManagerMachine):
    """A model whose layers all have the same window."""

    WINDOWS = (5,)


TestManager = ManagerMachine.TestCase
TestManager.settings = SETTINGS
TestMixedGroups = MixedMachine.TestCase
TestMixedGroups.settings = SETTINGS
TestPagedMixedGroups = PagedMixedMachine.TestCase
TestPagedMixedGroups.settings = SETTINGS
TestOnDemandGroups = OnDemandManagerMachine.TestCase
TestOnDemandGroups.settings = SETTINGS
TestOverflow = OverflowMachine.TestCase
TestOverflow.settings = settings(SETTINGS, max_examples=80)
TestWindowGroup = WindowMachine.TestCase
TestWindowGroup.settings = SETTINGS
