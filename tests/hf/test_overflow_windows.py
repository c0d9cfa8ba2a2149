"""Calls that need more than the device holds, in models with layers of a window: full layers' blocks go to the host."""

import gc
from functools import partial

import pytest
import torch
from disk import Always
from host import as_gpu, hosted
from pair import Pair, evict, piece
from prompts import batch
from spilled import CALLS, Notes, check, continued, device_bytes, generated, narrow, num_rows, on_host, watch
from windows import PURE, WINDOWED, near, window_pair

from hf_paged import PagedMemoryError, overflow
from hf_paged.core.overflow import movable

# Those whose windows attention is told of: llama4's chunks are not, and are among the stock-shaped passes.
MIXED = [name for name in WINDOWED if name not in (PURE, "llama4")]
WINDOW = 20


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    as_gpu(monkeypatch)


def windowed(name, **overrides) -> Pair:
    return window_pair(name, WINDOW, **overrides)


def full_block_bytes(pair: Pair) -> int:
    return pair.paged._pool.manager.pools[0].block_bytes


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MIXED)
def test_a_call_of_three_times_what_full_layers_have_answers_as_stock(name, call, monkeypatch):
    rows, how, full_blocks = CALLS[call]
    read = watch(monkeypatch)
    pair = narrow(partial(windowed, name), num_rows(call), full_blocks)
    pair.ask(rows, **how)
    check(pair)
    assert max(read, default=0) > 0
    pair.ask(rows, **how)
    check(pair)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("how", ["assisted", "prompt lookup"])
def test_guesses_that_are_taken_back(name, how, monkeypatch):
    """Until they are, window layers keep what falls out."""
    read = watch(monkeypatch)
    pair = narrow(partial(windowed, name), 2, 6)
    guess = {"assistant_model": near} if how == "assisted" else {"prompt_lookup_num_tokens": 4, "eos_token_id": 1}
    pair.skip_where_older_stock_refuses([piece(40, 1) * 2], max_new_tokens=24, **guess)  # transformers 5.17
    pair.ask([piece(40, 1) * 2], max_new_tokens=24, **guess)
    check(pair)
    assert max(read) > 3


@pytest.mark.parametrize("name", MIXED)
def test_a_cache_that_comes_back_goes_on(name):
    pair = narrow(partial(windowed, name), 1, 5)
    first = [generated(model, piece(101, 1)) for model in (pair.stock, pair.model)]
    assert on_host(pair) > 5
    then = [continued(*each) for each in zip(first, (pair.stock, pair.model), strict=True)]
    assert torch.equal(then[0].sequences, then[1].sequences)
    del first, then
    check(pair)


@pytest.mark.parametrize("name", MIXED)
def test_no_more_leaves_than_makes_room_in_all_layers(name, monkeypatch):
    """A block in all layers is wanted, and the memory of a part of it is free."""
    function, left = overflow.Overflow.make_room, []

    def watched(self, tables, error):
        before = len(self)
        made = function(self, tables, error)
        wanted_bytes = error.wanted * sum(pool.block_bytes for pool in pair.pool.pools)
        if made:
            left.append((len(self) - before, pair.pool.budget.free_bytes - wanted_bytes))
        else:
            assert not movable(self._manager, tables, self.group), "a prompt that goes on in shorter stretches"
        return made

    monkeypatch.setattr(overflow.Overflow, "make_room", watched)
    pair = narrow(partial(windowed, name), 2, 6)
    pair.ask([piece(20, 1), piece(33, 2)], max_new_tokens=60)
    assert len(left) > 3
    for moved, surplus_bytes in left:
        assert moved == 1 or 0 <= surplus_bytes < full_block_bytes(pair)
    check(pair)


@pytest.mark.parametrize("name", MIXED)
def test_blocks_come_back_when_there_is_room_for_twice_as_many_of_them(name):
    """Room in layers with a window is room, too."""
    pair = narrow(partial(windowed, name), 3, 16)
    rows = [piece(61, 1), piece(61, 2), piece(61, 3)]
    free = pair.ask(rows, max_new_tokens=30)[:, 61:]
    notes = Notes(lambda: (on_host(pair), pair.pool.pools[0].available))
    pair.ask(
        rows,
        max_new_tokens=30,
        eos_token_id=[int(free[row, 4]) for row in (0, 1)],
        stopping_criteria=lambda model: [notes] if model is pair.model else [],
    )
    assert notes.said[0][0] > 0 == notes.said[-1][0]
    for (left, available), (then, _) in zip(notes.said, notes.said[1:], strict=False):
        assert not 0 < left <= available / 2 or then < left
    check(pair)


@pytest.mark.parametrize("disk", [None, "1MiB"])
def test_all_of_the_host_is_there_for_full_layers(disk):
    """Two layers of three have windows; what was kept of earlier calls makes way, there as well."""
    size = device_bytes(windowed("gemma3"), 1, 3)
    below = {"cpu": 24 * 3 * 1024} | ({} if disk is None else {"disk": disk})
    pair = windowed("gemma3", max_memory={0: size, **below})
    pair.paged._current_pool(pair.model).tiers.policy = Always()
    pair.ask([piece(50, 5)])
    evict(pair)
    assert pair.paged.stats().blocks_host > 3
    said = Notes(lambda: on_host(pair) * full_block_bytes(pair))
    pair.ask(
        [piece(200, 1)],
        max_new_tokens=20,
        stopping_criteria=lambda model: [said] if model is pair.model else [],
    )
    assert max(said.said) > below["cpu"] / 2, "more than a third"
    check(pair)
    assert (pair.paged.stats().blocks_disk > 0) == (disk is not None)
    pair.ask([piece(50, 5)])
    assert pair.reused == (48 if disk else 0)
    check(pair)


@pytest.mark.parametrize("count", [1, 3])
def test_layers_with_windows_alone_need_no_host(count):
    """However long the rows are, they hold a window each; a device that has no room for these is too small."""
    rows = [piece(150, at) for at in range(count)]
    pair = hosted(PURE, 5 * count, make=windowed, policy=None)
    pair.ask(rows, max_new_tokens=40)
    assert pair.paged._pool.overflow is None
    small = hosted(PURE, 2 * count, make=windowed, policy=None)
    with pytest.raises(PagedMemoryError, match=r"Raise max_memory\[0\], shorten"):
        small.model.generate(**batch(rows), max_new_tokens=40)
    gc.collect()
    small.pool.check_integrity()
    assert small.pool.in_use == 0
