"""Processes that are forked while other threads use a patched model: they answer as stock does, and nothing hangs."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import prompts
import torch
from forking import in_fork, needs_fork
from pair import Pair
from patched_copies import is_patched
from prompts import batch, tokens
from test_threads import PATIENCE_S, Waits, greedy

from hf_paged import unpatch_model
from hf_paged.core import forks

pytestmark = needs_fork
PROMPT, OTHER = batch([tokens(30, seed=1)]), batch([tokens(40, seed=2)])


def test_while_a_call_runs():
    pair = Pair("llama")
    right = [greedy(pair.stock, PROMPT), greedy(pair.stock, OTHER)]
    assert torch.equal(greedy(pair.model, OTHER), right[1])
    held = pair.hold([tokens(20, seed=3)])
    streamer = Waits()

    def ask():
        assert torch.equal(greedy(pair.model, PROMPT), right[0])
        assert torch.equal(greedy(pair.model, OTHER), right[1])
        stats = pair.paged.stats()
        assert stats.blocks_in_use == 0, "nobody will give back what the other thread's call holds"
        pair.go_on(held)
        unpatch_model(pair.model)
        assert not is_patched(pair.model)
        assert type(pair.model) is type(pair.stock), "no call of this process is waited for"

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(greedy, pair.model, PROMPT, streamer=streamer)
        try:
            assert streamer.reached.wait(PATIENCE_S)
            assert in_fork(ask) == 0
        finally:
            streamer.go_on.set()
        assert torch.equal(first.result(PATIENCE_S), right[0])
    pair.go_on(held)
    held.clear()
    pair.check()


def test_between_calls_prefixes_are_found_by_the_children():
    pair = Pair("llama")
    pair.ask(PROMPT)

    def ask():
        pair.ask(PROMPT)
        assert pair.reused == 29

    assert in_fork(ask) == 0
    pair.ask(PROMPT)
    assert pair.reused == 29


def test_with_every_lock_held_elsewhere(tmp_path):
    pair = Pair("llama", max_memory={"cpu": 24 * 1024 * 64, "disk": "1MiB"}, offload_folder=tmp_path)
    pair.ask(PROMPT)
    held, go_on = threading.Event(), threading.Event()

    def hold():
        locks = list(forks._locks)
        for lock in locks:
            lock.acquire()
        held.set()
        go_on.wait()
        for lock in locks:
            lock.release()

    def ask():
        pair.ask(PROMPT)
        pair.ask(OTHER)
        assert "hf_paged" in str(pair.paged)
        pair.paged.save(tmp_path / "saved")
        pair.paged.clear()
        pair.paged.release()
        unpatch_model(pair.model)

    other = threading.Thread(target=hold)
    other.start()
    try:
        assert held.wait(PATIENCE_S)
        assert in_fork(ask) == 0
    finally:
        go_on.set()
        other.join()
    pair.ask(PROMPT)


def test_workers_of_a_data_loader():
    pair = Pair("llama")
    rows = [prompts.tokens(20, seed) for seed in range(6)]

    class Answers(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return greedy(pair.model, batch([rows[index]]))[0]

    loader = torch.utils.data.DataLoader(
        Answers(), batch_size=None, num_workers=2, multiprocessing_context=multiprocessing.get_context("fork")
    )
    streamer = Waits()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(greedy, pair.model, PROMPT, streamer=streamer)
        try:
            assert streamer.reached.wait(PATIENCE_S)
            answers = list(loader)
        finally:
            streamer.go_on.set()
        first.result(PATIENCE_S)
    for row, answer in zip(rows, answers, strict=True):
        assert torch.equal(answer, greedy(pair.stock, batch([row]))[0])
