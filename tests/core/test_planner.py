"""Random packed passes, decode steps and reorders against a plain model of what each row must contain and see."""

import random

import pytest

from hf_paged.core.blocks import OutOfBlocks
from hf_paged.core.manager import BlockManager
from hf_paged.core.plan import StepPlan
from hf_paged.core.planner import plan_decode, plan_packed
from hf_paged.core.table import BlockTable


class Walk:
    """Some rows, the tokens each must hold, and a memory of one token per slot that plans are run against."""

    def __init__(self, rng: random.Random, num_blocks: int):
        self.rng = rng
        self.manager = BlockManager(num_blocks, rng.choice([1, 2, 4]))
        self.tables = [self.manager.new_table() for _ in range(rng.randint(1, 5))]
        self.content: list[list[int]] = [[] for _ in self.tables]
        self.memory: dict[int, int] = {}

    def run(self, plan: StepPlan, inputs: list[int]) -> dict[int, list[int]]:
        """Write and copy as the plan says; returns the slots that each query sees."""
        for write in plan.writes:
            for i in range(write.tokens):
                self.memory[write.slot + i * write.step] = inputs[write.source + i]
        for copy in plan.copies:
            for i in range(copy.tokens):
                self.memory[copy.target + i] = self.memory[copy.source + i]
        seen: dict[int, list[int]] = {query: [] for query in range(plan.num_queries)}
        for piece in plan.own + plan.shared:
            slots = [run.slot + i for run in piece.runs for i in range(run.tokens)]
            for query in range(piece.start, piece.stop):
                seen[query] += slots[: query - piece.start + 1] if piece.causal else slots
        return seen

    def packed(self) -> None:
        rng = self.rng
        tokens = [[rng.randint(0, 1) for _ in range(rng.randint(1, 9))] for _ in self.tables]
        plan = plan_packed(self.manager, self.tables, tokens, rng.choice([3, 5, 100]), rng.choice([0, 4]))
        flat = [token for row, start, stop in plan.sources for token in tokens[row][start:stop]]
        assert len(flat) == plan.num_tokens == sum(chunk.num_queries for chunk in plan.chunks)
        done = 0
        for chunk in plan.chunks:
            seen = self.run(chunk, flat[done : done + chunk.num_queries])
            for segment in chunk.segments:
                for i in range(segment.length):
                    visible = segment.kv_len - segment.length + i + 1
                    expected = sorted(self.memory[segment.table.slot(t)] for t in range(visible))
                    assert sorted(self.memory[slot] for slot in seen[segment.start + i]) == expected
            done += chunk.num_queries
        self.manager.check_integrity()
        self.manager.unpin(plan.pins)
        for row, new in enumerate(tokens):
            assert [flat[plan.packed_index(row, i)] for i in range(len(new))] == new
            self.content[row] += new

    def decode(self) -> None:
        if not all(self.content):
            return
        plan = plan_decode(self.manager, self.tables, room_tokens=self.rng.choice([0, 4]))
        inputs = [self.rng.randint(0, 9) for _ in self.tables]
        seen = self.run(plan, inputs)
        self.manager.unpin(plan.pins)
        for row, token in enumerate(inputs):
            self.content[row].append(token)
        for query, row in enumerate(plan.order or range(len(self.tables))):
            assert sorted(self.memory[slot] for slot in seen[query]) == sorted(self.content[row])

    def reorder(self) -> None:
        rows = [self.rng.randrange(len(self.tables)) for _ in self.tables]
        self.replace([self.manager.fork(self.tables[row]) for row in rows], [list(self.content[row]) for row in rows])

    def crop(self) -> None:
        for row, table in enumerate(self.tables):
            keep = self.rng.randint(0, table.num_tokens)
            self.manager.crop(table, keep)
            del self.content[row][keep:]

    def replace(self, tables: list[BlockTable], content: list[list[int]]) -> None:
        for table in self.tables:
            self.manager.free(table)
        self.tables, self.content = tables, content

    def check(self) -> None:
        self.manager.check_integrity()
        for table, content in zip(self.tables, self.content, strict=True):
            assert [self.memory[table.slot(i)] for i in range(table.num_tokens)] == content


@pytest.mark.parametrize("seed", range(150))
def test_every_query_sees_its_own_past_and_nothing_else(seed):
    walk = Walk(random.Random(seed), num_blocks=400)
    for _ in range(8):
        walk.rng.choice([walk.packed, walk.decode, walk.decode, walk.reorder, walk.crop])()
        walk.check()


@pytest.mark.parametrize("seed", range(100))
def test_a_pass_that_does_not_fit_changes_nothing(seed):
    walk = Walk(random.Random(seed), num_blocks=12)
    for _ in range(8):
        operation = walk.rng.choice([walk.packed, walk.packed, walk.decode, walk.reorder])
        before = [(list(table.blocks), table.num_tokens) for table in walk.tables]
        try:
            operation()
        except OutOfBlocks:
            assert before == [(table.blocks, table.num_tokens) for table in walk.tables]
        walk.check()
    for table in walk.tables:
        walk.manager.free(table)
    walk.manager.check_integrity()
    assert walk.manager.pool.in_use == 0
