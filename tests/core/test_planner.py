"""Random packed passes, decode steps and reorders against a plain model of what each row must contain and see."""

import random

import pytest

from hf_paged.core.blocks import OutOfBlocks
from hf_paged.core.foresight import foresee
from hf_paged.core.manager import BlockManager
from hf_paged.core.plan import StepPlan
from hf_paged.core.planner import plan_decode, plan_packed
from hf_paged.core.table import BlockTable


class Walk:
    """Some rows, the tokens each must hold, and a memory of one token per slot that plans are run against.

    Each group of layers, of the `windows` given, has a memory and plans of its own.
    """

    def __init__(self, rng: random.Random, num_blocks: int, windows: tuple[int | None, ...]):
        self.rng, self.windows = rng, windows
        self.manager = BlockManager(num_blocks, rng.choice([1, 2, 4]), windows)
        self.tables = [self.manager.new_table() for _ in range(rng.randint(1, 5))]
        self.content: list[list[int]] = [[] for _ in self.tables]
        self.memories: list[dict[int, int]] = [{} for _ in windows]
        self.foreseen, self.came_so = None, 0

    def run(self, plan: StepPlan, memory: dict[int, int], inputs: list[int]) -> dict[int, list[int]]:
        """Write and copy as the plan says; returns the slots that each query sees."""
        for write in plan.writes:
            for i in range(write.tokens):
                memory[write.slot + i * write.step] = inputs[write.source + i]
        for copy in plan.copies:
            for i in range(copy.tokens):
                memory[copy.target + i] = memory[copy.source + i]
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
        assert len(flat) == plan.num_tokens == sum(chunk[0].num_queries for chunk in plan.chunks)
        done = 0
        for chunk in plan.chunks:
            inputs = flat[done : done + chunk[0].num_queries]
            for part, memory, window in zip(chunk, self.memories, self.windows, strict=True):
                self.check_segments(part, memory, window, self.run(part, memory, inputs))
            done += len(inputs)
        self.manager.check_integrity()
        self.manager.unpin(plan.pins)
        for row, new in enumerate(tokens):
            assert [flat[plan.packed_index(row, i)] for i in range(len(new))] == new
            self.content[row] += new

    def check_segments(self, plan, memory, window, seen) -> None:
        """Segments reach every token that a query sees; without a window pieces hold just these."""
        for segment in plan.segments:
            for i in range(segment.length):
                visible = segment.kv_len - segment.length + i + 1
                first = 0 if window is None else max(0, visible - window)
                expected = sorted(memory[segment.chain.slot(t)] for t in range(first, visible))
                runs = segment.chain.runs(first, visible)
                assert sorted(memory[run.slot + j] for run in runs for j in range(run.tokens)) == expected
                if window is None:
                    assert sorted(memory[slot] for slot in seen[segment.start + i]) == expected

    def decode(self) -> None:
        if not all(self.content):
            return
        room = self.rng.choice([0, 4])
        plans, pins = plan_decode(self.manager, self.tables, room_tokens=room, foreseen=self.foreseen)
        self.came_so += self.foreseen is not None and plans is self.foreseen.plans
        inputs = [self.rng.randint(0, 9) for _ in self.tables]
        seen = [self.run(plan, memory, inputs) for plan, memory in zip(plans, self.memories, strict=True)]
        self.manager.unpin(pins)
        for row, token in enumerate(inputs):
            self.content[row].append(token)
        for group, (plan, window) in enumerate(zip(plans, self.windows, strict=True)):
            for query, row in enumerate(plan.order or range(len(self.tables))):
                visible = self.content[row] if window is None else self.content[row][-window:]
                assert sorted(self.memories[group][slot] for slot in seen[group][query]) == sorted(visible)
        self.foreseen = foresee(self.manager, self.tables)  # of whatever may be done before the next one
        self.manager.check_integrity()

    def trim(self) -> None:
        self.manager.trim(self.tables)

    def reorder(self) -> None:
        rows = [self.rng.randrange(len(self.tables)) for _ in self.tables]
        self.replace([self.manager.fork(self.tables[row]) for row in rows], [list(self.content[row]) for row in rows])

    def crop(self) -> None:
        for row, table in enumerate(self.tables):
            keep = self.rng.choice([n for n in range(table.num_tokens + 1) if self.manager.reaches(table, n)])
            self.manager.crop(table, keep)
            del self.content[row][keep:]

    def replace(self, tables: list[BlockTable], content: list[list[int]]) -> None:
        for table in self.tables:
            self.manager.free(table)
        self.tables, self.content = tables, content

    def check(self) -> None:
        self.manager.check_integrity()
        for table, content in zip(self.tables, self.content, strict=True):
            for chain, memory in zip(table.chains, self.memories, strict=True):
                held = range(chain.first_token, table.num_tokens)
                assert [memory[chain.slot(i)] for i in held] == content[chain.first_token :]


GROUPS = {"all tokens": (None,), "a window": (5,), "mixed": (None, 3, 8)}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("seed", range(80))
def test_every_query_sees_its_own_past_and_nothing_else(seed, groups):
    walk = Walk(random.Random(seed), 400, GROUPS[groups])
    for _ in range(8):
        walk.rng.choice([walk.packed, walk.decode, walk.decode, walk.reorder, walk.crop, walk.trim])()
        walk.check()


def test_steps_come_as_foreseen():
    """Where rows only grow: all of them but those that take a block which is not kept for them."""
    walk = Walk(random.Random(1), 400, (None,))
    walk.packed()
    for _ in range(20):
        walk.decode()
    assert 10 < walk.came_so < 20


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("seed", range(60))
def test_a_pass_that_does_not_fit_changes_nothing(seed, groups):
    walk = Walk(random.Random(seed), 12, GROUPS[groups])
    for _ in range(8):
        operation = walk.rng.choice([walk.packed, walk.packed, walk.decode, walk.reorder])
        before = [([list(chain.blocks) for chain in table.chains], table.num_tokens) for table in walk.tables]
        try:
            operation()
        except OutOfBlocks:
            assert before == [([chain.blocks for chain in table.chains], table.num_tokens) for table in walk.tables]
        walk.check()
    for table in walk.tables:
        walk.manager.free(table)
    walk.manager.check_integrity()
    assert walk.manager.in_use == 0
