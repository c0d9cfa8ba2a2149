"""Cached prefixes in host memory, below a CPU that is taken for a GPU: found again, and always stock's answer."""

import gc
import random
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from disk import NAMES, Always, Never, ask_from_threads, ask_through_failures, check, failing_now_and_then, rotate
from host import LateMark, LateSide, as_gpu, hosted, side, tiers
from pair import Pair, distinct_pieces, evict, piece
from prompts import batch, tokens
from resident import MIB
from soak import WAYS, Soak, hosted_pairs
from test_quantized import RoundingCache
from test_sharing import BLOCK_BYTES
from windows import window_pair

from hf_paged import host, pool, unpatch_model
from hf_paged.host import HostLevel, lendable_blocks
from hf_paged.layout import RecordLayout
from hf_paged.mover import BlockMover
from hf_paged.stats import Counters


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    as_gpu(monkeypatch)


def small_slabs(monkeypatch, blocks):
    monkeypatch.setattr(host, "SLAB_BYTES", blocks * BLOCK_BYTES)
    monkeypatch.setattr(host, "MIN_SLAB_RECORDS", 1)


BELOW = {"host": {}, "host and disk": {"host": 12 * BLOCK_BYTES, "disk": "10MiB"}}

# Answers


@pytest.mark.parametrize(("name", "below"), [("llama", "host"), *((name, "host and disk") for name in NAMES)])
def test_prompts_in_rotation_answer_as_stock(name, below):
    pair = hosted(name, 16, **BELOW[below])
    assert min(rotate(pair, distinct_pieces(4, 61))) >= 56, "all full blocks of the prompt come back"
    stats = pair.paged.stats()
    assert stats.blocks_host > 0
    assert (stats.blocks_disk > 0) == ("disk" in below)
    assert stats.fallbacks == {}


def test_copies_that_are_made_at_once(monkeypatch):
    as_gpu(monkeypatch, lambda: None)
    assert min(rotate(hosted(), distinct_pieces(3, 61))) == 56
    assert min(rotate(hosted(blocks=16, **BELOW["host and disk"]), distinct_pieces(5, 61))) == 56


def test_blocks_that_are_yet_to_be_read_are_not_written_to(monkeypatch):
    """Who gets them waits; without poison, which would wait before."""
    monkeypatch.setattr(pool, "POISON", False)
    pair = hosted()
    assert min(rotate(pair, distinct_pieces(3, 61))) == 56
    assert all(manager_pool.on_free is None for manager_pool in pair.pool.pools)


def test_a_disk_right_below_the_device():
    pair = hosted(host=0, disk="10MiB")
    assert min(rotate(pair, distinct_pieces(3, 61))) == 56
    assert pair.paged.stats().blocks_host == 0 < pair.paged.stats().blocks_disk


def test_beams_samples_and_batches_answer_as_stock():
    pair, rows = hosted(blocks=24, **BELOW["host and disk"]), distinct_pieces(4, 40)
    for how in (
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": 1},
    ):
        fetched = 0
        for row in rows * 2:
            pair.ask([row], **how)
            check(pair)
            fetched += pair.paged.stats().fetched_bytes
        assert fetched > 0
    system = piece(40, 9)
    ragged = [system + tokens(9, seed=seed) for seed in range(2)] + [piece(17, 12)]
    for _ in range(2):
        pair.ask(ragged)
        check(pair)
        assert pair.reused == 0 or pair.reused == 2 * 48 + 16
        evict(pair)
    assert pair.reused > 0


@pytest.mark.parametrize("name", ["gemma3", "mistral_sliding"])
def test_windows_bring_back_what_they_see(name):
    def windowed(*args, **kwargs):
        return window_pair(*args, window=20, **kwargs)

    pair, row = hosted(name, 40, make=windowed), piece(61, 1)
    told = pair.ask([row])[0].tolist()
    for other, reused in ((row, 56), ([*told, 5], 66), (row[:33], 32)):
        evict(pair)
        pair.ask([other])
        check(pair)
        assert pair.reused == reused


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_blocks_come_back(kind):
    class Rounded(Pair):
        """A pair whose stock side keeps rounded KV."""

        def ask(self, rows, **kwargs):
            def cache(model):
                return RoundingCache(model.config, kind) if model is self.stock else None

            return super().ask(rows, past_key_values=cache, **kwargs)

    pair = hosted(blocks=4, make=Rounded, kv_cache_dtype=kind, verify=False)
    for _ in range(2):
        for row in distinct_pieces(8, 30):
            pair.ask([row])
    assert pair.reused > 0
    assert pair.paged.stats().fetched_bytes > 0


@torch.inference_mode()
def _ask_under_inference_mode(pair):
    rotate(pair, distinct_pieces(3, 61))


def test_inference_mode_and_none_in_turns():
    pair = hosted()
    pair.ask([piece(9, 1)])  # what the pool is made in is its own affair
    _ask_under_inference_mode(pair)
    rotate(pair, distinct_pieces(6, 61)[3:], 1)
    assert pair.paged.stats().offloaded_bytes > 0, "into memory that was allocated before"
    assert min(rotate(pair, distinct_pieces(3, 61))) == 56


# What is kept, and where


@pytest.mark.parametrize("slots", [1, 5, 9])
def test_the_budget_holds_and_the_oldest_goes_first(slots, monkeypatch):
    small_slabs(monkeypatch, 2)
    pair = hosted(blocks=10, host=slots * BLOCK_BYTES)
    rotate(pair, distinct_pieces(4, 61))
    assert pair.paged.stats().blocks_host == slots
    assert sum(storage.nbytes() for storage in side(pair).pinned_now) == slots * BLOCK_BYTES


def test_what_the_host_has_no_room_for_goes_on_to_the_disk():
    pair, rows = hosted(blocks=10, host=8 * BLOCK_BYTES, disk="10MiB"), distinct_pieces(3, 61)
    rotate(pair, rows, 1)
    evict(pair)
    check(pair)
    stats = pair.paged.stats()
    assert (stats.blocks_host, stats.blocks_disk) == (8, 3 * 9 - 8), "nine blocks a prompt"
    pair.paged.reset_stats()
    pair.ask([rows[0]])
    check(pair)
    assert pair.reused == 56
    assert pair.paged.stats().fetched_bytes == 7 * BLOCK_BYTES
    assert min(rotate(pair, rows, 2)) == 56


def test_a_batch_of_victims_that_the_host_cannot_hold_is_parted():
    pair = hosted(blocks=40, host=4 * BLOCK_BYTES, disk="10MiB")
    row = piece(61, 1)
    pair.ask([row])
    evict(pair)
    check(pair)
    stats = pair.paged.stats()
    assert (stats.blocks_host, stats.blocks_disk) == (4, 5)
    pair.ask([row])
    assert pair.reused == 56, "half from the host, half from the disk"
    assert pair.paged.stats().fetch_choices == 1


def test_places_that_are_lost_to_what_is_evicted_meanwhile():
    """Blocks that come back need room; what leaves for it may take the places of the last of them."""
    pair, (first, second) = hosted(blocks=11, host=9 * BLOCK_BYTES), distinct_pieces(2, 61)
    pair.ask([first])
    evict(pair)
    pair.ask([second])
    pair.ask([first])
    check(pair)
    assert 0 < pair.reused < 56


def test_records_that_lose_their_places_before_their_copies_begin(monkeypatch):
    """Copies begin without the lock; what has gone meanwhile may have been overwritten, and is computed anew."""
    pair, row = hosted(blocks=40), piece(61, 1)
    pair.ask([row])
    evict(pair)
    host_index, write = tiers(pair).levels[0].index, BlockMover.write

    def too_late(self, *args):
        host_index.clear()
        return write(self, *args)

    monkeypatch.setattr(BlockMover, "write", too_late)
    pair.ask([row])
    check(pair)
    assert pair.reused == 0


def test_what_the_host_has_is_not_copied_again():
    pair, rows = hosted(blocks=12), distinct_pieces(4, 61)
    rotate(pair, rows, rounds=3)
    for row in rows:
        pair.ask([row])
        assert pair.paged.stats().evicted_blocks > 0
        assert pair.paged.stats().offloaded_bytes == 0
        check(pair)


def test_never_and_by_estimate():
    pair = hosted(policy=Never)
    assert max(rotate(pair, distinct_pieces(3, 61))) == 0
    assert pair.paged.stats().recompute_choices == 1
    pair = hosted(policy=None, disk="10MiB", host=12 * BLOCK_BYTES)
    rotate(pair, distinct_pieces(4, 61))
    evict(pair)
    pair.ask([piece(61, 3)])
    stats = pair.paged.stats()
    assert min(stats.host_bytes_per_second, stats.disk_bytes_per_second, stats.compute_tokens_per_second) > 0
    assert "speed of host / disk / computing" in str(pair.paged)


def test_salts_and_edits_are_kept_apart():
    pair, rows = hosted(), distinct_pieces(3, 61)
    rotate(pair, rows, salt="a")
    pair.ask([rows[0]], salt="b")
    assert pair.reused == 0
    pair.both(lambda model: model.lm_head.weight.data.mul_(1.1))
    for row in rows:
        pair.ask([row], salt="a")
        assert pair.reused == 0
    check(pair)


# Giving memory back


def _train(pair):
    pair.model.train()
    pair.model(**batch([piece(9, 1)]))
    pair.model.eval()


GIVE_BACK = {
    "clear": lambda pair: pair.paged.clear(),
    "release": lambda pair: pair.paged.release(),
    "training": _train,
    "unpatching": lambda pair: unpatch_model(pair.model),
}


@pytest.mark.parametrize("how", GIVE_BACK)
def test_memory_is_given_back(how):
    pair, rows = hosted(disk="10MiB"), distinct_pieces(3, 61)
    rotate(pair, rows)
    aside = side(pair)
    assert len(aside.pinned_now) > 0
    assert pair.paged.stats().bytes_reserved > tiers(pair).staging_bytes > 0
    GIVE_BACK[how](pair)
    gc.collect()
    assert len(aside.pinned_now) == 0
    assert aside.given_back > 0, "behind that"
    if how != "unpatching":
        pair.paged._current_pool(pair.model).tiers.policy = Always()  # the tiers may be others now
        assert pair.paged.stats().blocks_host == pair.paged.stats().blocks_disk == 0
        pair.ask([rows[0]])
        assert pair.reused == 0
        assert min(rotate(pair, rows)) == 56, "and goes on"


def test_memory_goes_with_the_model():
    pair = hosted()
    rotate(pair, distinct_pieces(3, 61))
    aside = side(pair)
    aside.reach(aside._given)  # a stream holds what it is yet to copy
    del pair
    gc.collect()
    assert len(aside.pinned_now) == 0


# Faults


def test_memory_that_cannot_be_pinned_is_used_as_it_is(monkeypatch):
    as_gpu(monkeypatch, lambda: LateSide(may_pin=False))
    pair = hosted()
    assert min(rotate(pair, distinct_pieces(3, 61), 2, ["memory is not pinned"])) == 56
    pair.paged.clear()
    pair.paged.reset_stats()
    pair.ask([piece(61, 1)])
    evict(pair)
    assert pair.paged.stats().fallbacks == {"host tier: memory is not pinned: the system does not pin": 1}


@pytest.mark.parametrize("below", ["nothing", "disk"])
@pytest.mark.parametrize("slabs", [0, 2])
def test_memory_that_is_refused_half_way(slabs, below, monkeypatch):
    """What there is is used; the rest goes to the disk, or is computed anew."""
    given = []

    def refuse(self, num_bytes):
        if len(given) >= slabs:
            raise MemoryError("no more")
        given.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    small_slabs(monkeypatch, 4)
    pair, rows = hosted(disk="10MiB" if below == "disk" else None), distinct_pieces(4, 61)
    with monkeypatch.context() as patched:
        patched.setattr(LateSide, "pinned", refuse)
        reused = rotate(pair, rows, 4, ["host tier: no more"])
        assert pair.paged.stats().blocks_host == 4 * slabs
        assert pair.paged.stats().fallbacks == {}, "by now it knows how much there is"
        assert below == "nothing" or min(reused) == 56
    pair.paged.clear()
    assert min(rotate(pair, rows)) == 56, "then it is asked again"


def test_a_budget_smaller_than_a_block_is_said():
    pair = hosted(host=100)
    rotate(pair, distinct_pieces(3, 61), fallbacks=["less than one block"])
    assert "host tier: max_memory['cpu'] is less than one block" in pair.paged.stats().fallbacks


PLACES = {
    "gathering": (RecordLayout, "read_blocks"),
    "copying": (LateSide, "run"),
    "scattering": (RecordLayout, "write_blocks"),
    "pinning": (LateSide, "pinned"),
    "waiting": (LateMark, "result"),
}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES)
def test_a_transfer_that_fails_or_is_interrupted(place, error, monkeypatch):
    """Errors cost the blocks, Ctrl-C ends the call; no block is leaked, none is written to behind its next owner."""
    owner, name = PLACES[place]
    function, calls = getattr(owner, name), []
    if owner is RecordLayout:
        as_gpu(monkeypatch, lambda: None)  # on a stream, too, it is the calling thread that meets these errors

    small_slabs(monkeypatch, 4)
    pair, rows = hosted(blocks=12, host=16 * BLOCK_BYTES, disk="10MiB"), distinct_pieces(4, 61)
    rotate(pair, rows[:2], 1)
    evict(pair)
    check(pair)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing_now_and_then(function, error, calls))
        if place == "pinning":
            pair.paged.clear()
        ask_through_failures(pair, (*rows, *rows[:2]), error)
    assert calls
    rotate(pair, rows, 1, ["a transfer"])
    evict(pair)
    assert min(rotate(pair, rows, 1)) == 56


# Threads, and a long time


def test_threads_share_the_host():
    ask_from_threads(hosted(blocks=60), distinct_pieces(8, 61), calls=10)


def test_a_soak_of_random_calls():
    soak = Soak(seed=2, pairs=hosted_pairs())
    soak.run(30)
    assert min(soak.counts[name] for name in (*WAYS, "tokens reused", "bytes fetched", "blocks evicted")) > 0
    assert soak.growth < 4 * MIB


@pytest.mark.parametrize("seed", range(30))
def test_what_can_be_lent_is_known_beforehand(seed):
    """Slabs of the group, and then those of others that hold a block of it."""
    draw = random.Random(seed)
    sizes = [draw.randint(1, 40) * 16 for _ in range(draw.randint(1, 3))]
    budget, group = draw.randint(sum(sizes), 40 * sum(sizes)), draw.randrange(len(sizes))
    level = HostLevel(0, budget, threading.RLock(), None, Counters())
    layouts = [SimpleNamespace(record_bytes=size) for size in sizes]
    level.open(layouts, None, 8)
    loans = list(iter(partial(level.lend, group), None))
    assert all(len(loan.memory) >= sizes[group] for loan in loans)
    assert len({loan.memory.data_ptr() for loan in loans}) == len(loans)
    assert sum(len(loan.memory) for loan in loans) <= budget
    assert sum(len(loan.memory) // sizes[group] for loan in loans) == lendable_blocks(budget, sizes, group)
    others = [loan.group != group for loan in loans]
    assert others == sorted(others)
    for loan in loans:
        loan.give_back()
    assert len(list(iter(partial(level.lend, group), None))) == len(loans)
