"""Many threads on one patched model: each gets stock's answer, finds what the others have computed, and fails alone."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import modes
import prompts
import pytest
import torch
from families import stock_model
from mishaps import BadCriterion, Boom, assert_usable, expected
from mode_parts import Run
from pair import Pair
from patched_copies import GREEDY, LLAMA, is_patched, patched
from prompts import batch, tokens
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hf_paged import PagedMemoryError, compat, paged, patch_model, unpatch_model

THREADS = 6
PATIENCE_S = 60


class Waits(BaseStreamer):
    """Stops the call after its prompt until it is told to go on."""

    def __init__(self):
        self.reached, self.go_on, self.puts = threading.Event(), threading.Event(), 0

    def put(self, value):
        self.puts += 1
        if self.puts == 2:  # the first are the prompt's tokens, the second the first new one
            self.reached.set()
            assert self.go_on.wait(PATIENCE_S)

    def end(self):
        pass


class Raises(BaseStreamer):
    """A client that is gone after three tokens."""

    def __init__(self):
        self.puts = 0

    def put(self, value):
        self.puts += 1
        if self.puts == 4:
            raise ConnectionError("gone")

    def end(self):
        pass


def greedy(model, inputs, **more):
    return model.generate(**inputs, do_sample=False, max_new_tokens=8, **more)


def test_every_answer_is_the_sequential_one_whoever_fails_beside_it():
    pair = Pair("llama", max_memory={"cpu": 24 * 1024 * 64})
    start = tokens(48, seed=1)
    shared = [batch([start + tokens(5 + i, seed=10 + i), start]) for i in range(8)]
    kinds = [{}, {"num_beams": 2}, {"repetition_penalty": 1.3}]
    single = [batch([start + tokens(5 + i, seed=10 + i)]) for i in range(8)]
    calls = [(shared[i], kinds[i % 2]) for i in range(8)] + [(single[i], kinds[2]) for i in range(3)]
    right = [greedy(pair.stock, inputs, **more) for inputs, more in calls]
    huge = batch([tokens(20_000, seed=3)])
    outcomes = []

    def succeed(which):
        inputs, more = calls[which]
        assert torch.equal(greedy(pair.model, inputs, **more), right[which])
        outcomes.append("answer")

    def hang_up(which):
        with pytest.raises(ConnectionError):
            greedy(pair.model, single[which % 8], streamer=Raises())
        outcomes.append("error")

    def ask_nonsense(which):
        with pytest.raises(ValueError, match="top_k"):
            pair.model.generate(**single[which % 8], do_sample=True, top_k=-1)
        outcomes.append("error")

    def ask_too_much(which):
        with pytest.raises(PagedMemoryError):
            greedy(pair.model, huge)
        outcomes.append("error")

    work = [(succeed, which) for which in range(len(calls))] * 3
    work += [(fail, which) for fail in (hang_up, ask_nonsense, ask_too_much) for which in range(4)]
    random.Random(0).shuffle(work)
    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(job, which) for job, which in work]:
            future.result(PATIENCE_S)
    assert sorted(outcomes) == ["answer"] * 33 + ["error"] * 12
    assert pair.paged.stats().reused_tokens > 0
    pair.check()


def test_a_prompt_is_found_by_others_while_its_call_still_runs():
    pair = Pair("llama")
    prompt, streamer = batch([tokens(64, seed=1)]), Waits()
    expected = greedy(pair.stock, prompt)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(greedy, pair.model, prompt, streamer=streamer)
        try:
            assert streamer.reached.wait(PATIENCE_S)
            before = pair.paged.stats()
            assert before.blocks_in_use > 0
            assert torch.equal(greedy(pair.model, prompt), expected)
            after = pair.paged.stats()
            assert after.computed_tokens - before.computed_tokens <= pair.paged.config.block_size
            assert after.reused_tokens >= 64 - pair.paged.config.block_size
        finally:
            streamer.go_on.set()
        assert torch.equal(first.result(PATIENCE_S), expected)
    pair.check()


def test_weights_that_change_while_a_call_runs_hide_its_prompt():
    pair = Pair("llama")
    prompt, streamer = batch([tokens(64, seed=1)]), Waits()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(greedy, pair.model, prompt, streamer=streamer)
        try:
            assert streamer.reached.wait(PATIENCE_S)
            for model in (pair.stock, pair.model):
                with torch.no_grad():
                    model.get_input_embeddings().weight.mul_(-1.5)
            expected = greedy(pair.stock, prompt)
            assert torch.equal(greedy(pair.model, prompt), expected)
            assert pair.paged.stats().reused_tokens == 0
        finally:
            streamer.go_on.set()
        first.result(PATIENCE_S)
    assert torch.equal(greedy(pair.model, prompt), expected)
    pair.check()


def test_what_computes_in_another_dtype_beside_a_call_is_left_to_stock(tmp_path):
    """K and V of the two cannot be in one pool, and there is one at a time, for which `max_memory` is."""
    pair = Pair("llama")
    prompt, other, streamer = batch([tokens(30, seed=1)]), batch([tokens(30, seed=2)]), Waits()
    expected = greedy(pair.stock, prompt)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(greedy, pair.model, prompt, streamer=streamer)
        try:
            assert streamer.reached.wait(PATIENCE_S)
            before = pair.paged._pool
            with torch.autocast("cpu", torch.bfloat16):
                actual = greedy(pair.model, other)
                assert pair.paged._pool is before
                assert torch.equal(actual, greedy(pair.stock, other))
                with pytest.raises(ValueError, match="autocast"):
                    pair.paged.save(tmp_path)
            ((reason, count),) = pair.paged.stats().fallbacks.items()
            assert ("autocast" in reason, count) == (True, 1)
        finally:
            streamer.go_on.set()
        assert torch.equal(first.result(PATIENCE_S), expected)
    pair.ask(prompt)
    assert pair.reused == 29, "its prefix outlives what was asked meanwhile"
    with torch.autocast("cpu", torch.bfloat16):
        greedy(pair.model, other)
    assert pair.check().fallbacks == {}, "nobody else runs, so that the pool changes hands"


def test_a_call_goes_on_while_another_thread_patches_with_other_settings(monkeypatch):
    pair = Pair("llama")
    prompt, streamer = batch([tokens(30, seed=1)]), Waits()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(greedy, pair.model, prompt, streamer=streamer)
        name_attention = compat.set_attention_name

        def name_and_let_the_call_end(config, name):
            name_attention(config, name)
            streamer.go_on.set()
            first.exception(PATIENCE_S)

        try:
            assert streamer.reached.wait(PATIENCE_S)
            monkeypatch.setattr(compat, "set_attention_name", name_and_let_the_call_end)
            patch_model(pair.model, block_size=16)
        finally:
            streamer.go_on.set()
        assert torch.equal(first.result(PATIENCE_S), greedy(pair.stock, prompt))
    assert pair.paged.config.block_size == 16
    pair.ask([tokens(30, seed=1)])


def test_with_blocks_of_threads_may_overlap():
    pair = Pair("llama")
    unpatch_model(pair.model)
    prompt, streamer = batch([tokens(30, seed=1)]), Waits()

    def ask():
        with paged(pair.model, block_size=16):
            return greedy(pair.model, prompt, streamer=streamer)

    with ThreadPoolExecutor(1) as pool:
        with paged(pair.model, block_size=16):
            first = pool.submit(ask)
            assert streamer.reached.wait(PATIENCE_S)
        try:
            assert is_patched(pair.model), "the other block is not left yet"
        finally:
            streamer.go_on.set()
        assert torch.equal(first.result(PATIENCE_S), greedy(pair.stock, prompt))
    assert not is_patched(pair.model)


def in_threads(functions):
    results, errors = [None] * len(functions), []
    start = threading.Barrier(len(functions))

    def work(index):
        try:
            start.wait(timeout=60)
            results[index] = functions[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]
    return results


def test_four_threads_on_one_model():
    model, stock = patched(), stock_model("llama")
    names = ["shared_prefix", "greedy_ragged", "beam", "greedy_single"]  # nothing drawn at random: the seed is global
    calls = [modes.MODES[name] for name in names]
    right = [mode.call(Run(stock, LLAMA, mode.inputs())).tokens for mode in calls]

    def repeat(mode):
        return lambda: [mode.call(Run(model, LLAMA, mode.inputs())).tokens for _ in range(5)]

    for name, wanted, rounds in zip(names, right, in_threads([repeat(mode) for mode in calls]), strict=True):
        for got in rounds:
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), name
    stats = model.paged.stats()
    assert stats.blocks_in_use == 0
    assert stats.prompt_tokens == stats.computed_tokens + stats.reused_tokens + stats.shared_tokens
    once = sum(mode.copies * prompts.num_real_tokens(mode.inputs()) for mode in calls)
    assert stats.prompt_tokens == 5 * once


def test_a_thread_that_fails_does_not_disturb_the_others():
    model = patched()

    def fail():
        for at in range(4):
            bad = StoppingCriteriaList([BadCriterion(Boom, at)])
            with pytest.raises(Boom):
                model.generate(**prompts.shared_prefix(), stopping_criteria=bad, **GREEDY)

    def succeed():
        return [model.generate(**prompts.shared_prefix(), **GREEDY) for _ in range(4)]

    for result in in_threads([fail, succeed, succeed])[1:]:
        assert all(torch.equal(tokens, expected(prompts.shared_prefix)) for tokens in result)
    assert_usable(model)


def test_scoring_in_one_thread_while_another_generates():
    model, stock = patched(), stock_model("llama")
    ids = prompts.single()["input_ids"]
    with torch.no_grad():
        logits = stock(ids).logits
    tokens = expected(prompts.shared_prefix)

    def score():
        with torch.no_grad():
            return all(torch.equal(model(ids).logits, logits) for _ in range(20))

    def generate():
        return all(torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), tokens) for _ in range(5))

    assert in_threads([score, generate, score]) == [True, True, True]
