"""Answers stay exact, whoever gives memory back meanwhile: another thread, the garbage collector, the pool itself."""

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from disk import tiered
from pair import Pair, distinct_pieces, evict, piece
from prompts import batch, tokens
from windows import MIXED, PURE, window_pair


@pytest.mark.parametrize("meanwhile", ["clear", "release", "generate", "release, with a disk"])
def test_another_thread_is_not_disturbed(meanwhile):
    meanwhile, *disk = meanwhile.split(", ")
    pair = tiered(blocks=70) if disk else Pair("llama")
    inputs = batch([piece(40, 1), piece(33, 2), piece(21, 3)])
    expected = pair.stock.generate(**inputs, do_sample=False, max_new_tokens=24)
    stop, errors = threading.Event(), []

    def disturb():
        try:
            for seed in range(10_000):
                if stop.is_set():
                    return
                pair.model.generate(**batch([piece(20 + seed % 30, 10 + seed % 5)]), do_sample=False, max_new_tokens=2)
                if disk:
                    evict(pair)
                if meanwhile != "generate":
                    getattr(pair.paged, meanwhile)()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()
    try:
        for _ in range(8):
            answer = pair.model.generate(**inputs, do_sample=False, max_new_tokens=24)
            assert torch.equal(answer, expected)
    finally:
        stop.set()
        thread.join(timeout=60)
    assert not errors
    assert not pair.paged.stats().fallbacks
    assert bool(disk) == (pair.paged.stats().offloaded_bytes > 0)
    pair.check()


@contextmanager
def abandoned_cache(pair: Pair) -> Iterator[weakref.ref]:
    """It is part of a cycle, so that it is found later, in whatever thread and whatever that is doing."""
    gc.disable()
    try:
        inputs = batch([tokens(50, seed=1)])
        output = pair.model.generate(**inputs, do_sample=False, max_new_tokens=2, return_dict_in_generate=True)
        output.past_key_values.itself = output.past_key_values
        cache = weakref.ref(output.past_key_values)
        del output
        assert cache() is not None
        yield cache
    finally:
        gc.enable()


def test_garbage_in_a_thread_that_the_manager_waits_for():
    """As the disk tier's thread is, while blocks are given up."""
    pair = Pair("llama")
    with abandoned_cache(pair) as cache:
        with pair.pool.lock:
            thread = threading.Thread(target=gc.collect, daemon=True)
            thread.start()
            thread.join(timeout=20)
            assert not thread.is_alive()
        assert cache() is None
    assert pair.pool.in_use > 0
    pair.ask([piece(9, 1)])
    assert pair.pool.in_use == 0


def test_garbage_in_the_midst_of_an_operation_changes_nothing_under_it():
    pair = Pair("llama")
    with abandoned_cache(pair) as cache:
        with pair.pool.lock:
            in_use = pair.pool.in_use
            gc.collect()
            assert cache() is None
            assert pair.pool.in_use == in_use
        pair.paged.clear()
    assert pair.pool.in_use == 0


@pytest.mark.parametrize("name", ["llama", PURE, MIXED])
def test_memory_that_was_given_back_is_nobodys(name):
    """Poisoned: whoever read what went back would answer NaN; the null block stays zero."""
    pair = Pair(name) if name == "llama" else window_pair(name, 8)
    for turn, row in enumerate(distinct_pieces(4, 60)):
        pair.ask([row, row[:30] + tokens(9, seed=turn)], max_new_tokens=12)
        if turn % 2:
            pair.paged.clear()
            assert pair.paged.stats().bytes_reserved == 0
            for layer in pair.paged._pool.stores:
                for memory in (layer.keys, layer.values):
                    assert memory[:, :8].eq(0).all()
                    assert memory[:, 8:].isnan().all()
    pair.ask([piece(60, 1)], num_beams=3)
