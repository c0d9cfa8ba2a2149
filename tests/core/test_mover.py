"""Moving blocks between a pool and host memory: what waits for what, and how memory is cut."""

from itertools import pairwise

import pytest
import torch
from host import LateSide

from hf_paged.host import slab_sizes
from hf_paged.layout import RecordLayout
from hf_paged.mover import NUM_STAGES, BlockMover
from hf_paged.store import LayerStore

BLOCK_SIZE, NUM_BLOCKS = 4, 12


class Told(LateSide):
    """Writes down what it is told, and what the current stream waits for."""

    def __init__(self):
        super().__init__()
        self.told = []

    def run(self, copies):
        self.told.append("run")
        super().run(copies)

    def after_current(self):
        self.told.append("after current")


def stores(dtype=torch.float32):
    """Two layers, K and V of different dims, whose memory is full of numbers that differ."""
    made = []
    for heads, key_dim, value_dim in ((2, 5, 3), (1, 4, 8)):
        key, value = torch.zeros(1, heads, 1, key_dim), torch.zeros(1, heads, 1, value_dim)
        store = LayerStore(NUM_BLOCKS * BLOCK_SIZE, BLOCK_SIZE, key.to(dtype), value.to(dtype))
        for memory in (store.keys, store.values):
            memory.copy_(torch.randn(memory.shape).to(dtype))
        made.append(store)
    return made


def contents(layers, blocks):
    return [
        memory[:, block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE].clone()
        for block in blocks
        for layer in layers
        for memory in (layer.keys, layer.values)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_asked", [False, True])
@pytest.mark.parametrize("make_side", [LateSide, lambda: None])
@pytest.mark.parametrize("blocks", [[3], [2, 3, 4, 5, 6], [7, 2, 9, 4, 5]], ids=["one", "adjacent", "scattered"])
def test_what_goes_comes_back(blocks, make_side, is_asked, dtype):
    """Through stages of two records; the blocks are overwritten at once, other ones are not touched."""
    layers = stores(dtype)
    layout = RecordLayout(layers, BLOCK_SIZE)
    mover = BlockMover([layout], make_side(), 2 * layout.record_bytes, is_asked)
    expected, others = contents(layers, blocks), [block for block in range(NUM_BLOCKS) if block not in blocks]
    rows = torch.zeros(len(blocks), layout.record_bytes, dtype=torch.uint8)
    gone = mover.read(0, blocks, [rows[:1], rows[1:]])
    if is_asked:
        mover.before_reuse(0, blocks)
    for layer in layers:
        layer.poison(range(1, NUM_BLOCKS))
    beside = contents(layers, others)
    there = mover.write(0, blocks, [rows[:1], rows[1:]])
    there.result()
    assert gone.done()
    assert all(map(torch.equal, contents(layers, blocks), expected))
    for now, before in zip(contents(layers, others), beside, strict=True):
        assert torch.equal(now.nan_to_num(7), before.nan_to_num(7))
    assert mover.staging_bytes <= NUM_STAGES * 2 * layout.record_bytes


def test_the_side_stream_waits_for_what_was_computed():
    """Each copy out for the gathering before it, a copy in for whoever had the blocks before."""
    layers, side = stores(), Told()
    layout = RecordLayout(layers, BLOCK_SIZE)
    mover = BlockMover([layout], side, layout.record_bytes, is_asked=True)
    rows = torch.empty(3, layout.record_bytes, dtype=torch.uint8)
    mover.read(0, [1, 2, 3], [rows])
    assert side.told == ["after current", "run"] * NUM_STAGES + ["run"] * 2, "the third one is gathered there, too"
    side.told.clear()
    mover.write(0, [1, 2, 3], [rows])
    assert side.told == ["after current"] + ["run"] * 4, "one for the ids"


def test_only_who_gets_blocks_that_are_yet_to_be_read_waits():
    """What the stages hold is gathered at once; beyond, blocks are read later, and waited for by themselves."""
    layers, side = stores(), LateSide()
    layout = RecordLayout(layers, BLOCK_SIZE)
    mover = BlockMover([layout, layout], side, layout.record_bytes, is_asked=True)
    blocks = [2, 3, 4, 5]
    expected = contents(layers, blocks)
    rows = torch.zeros(4, layout.record_bytes, dtype=torch.uint8)
    gone = mover.read(0, blocks, [rows])
    mover.before_reuse(0, [1, 2, 3, 9])
    mover.before_reuse(1, blocks)
    assert side._done == 0, "nobody has waited"
    for layer in layers:
        layer.poison(range(2, 4))
    mover.before_reuse(0, range(4, 5))
    assert side._done == side._given - 1, "for the third one, not for the last one"
    for layer in layers:
        layer.poison(range(4, 5))
    gone.result()
    assert mover._reading
    mover.before_reuse(0, [])
    assert not mover._reading, "what was read is forgotten"
    mover.write(0, blocks, [rows]).result()
    assert all(map(torch.equal, contents(layers, blocks), expected))


def test_layers_on_several_devices_are_told():
    layers = stores()
    layers[1].keys = layers[1].keys.to("meta")
    with pytest.raises(ValueError, match="several devices: cpu, meta"):
        RecordLayout(layers, BLOCK_SIZE)


@pytest.mark.parametrize("budget", [0, 99, 100, 1000, 64 * 2**20 - 1, 200 * 2**20 + 12345, 2**30])
@pytest.mark.parametrize("record", [100, 4096, 3 * 2**19, 100 * 2**20])
def test_slabs_stay_within_the_budget_and_use_it(budget, record):
    sizes = list(slab_sizes(budget, record))
    assert all(size & (size - 1) == 0 and size >= record for size in sizes)
    assert all(a >= b for a, b in pairwise(sizes))
    assert sum(sizes) <= budget
    assert budget - sum(sizes) < 2 * record, "the rest is worth no slab"
    largest = max(sizes, default=0)
    assert sizes.count(largest) <= 1 or largest % record <= largest / 16, "what the many ones leave over is little"
