"""Models that are unpatched, or patched anew, while other threads generate on them: these calls go on to their ends."""

import contextlib
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import prompts
import pytest
import torch
from compare import BLOCK_SIZE
from mishaps import AtFourthStep, Boom
from pair import Pair
from patched_copies import is_patched
from prompts import batch, tokens
from snapshot import differences, snapshot
from test_threads import PATIENCE_S, Waits, greedy
from torch import nn
from transformers.generation import GenerationMixin

from hf_paged import PagedCache, paged, patch_model, unpatch_model

PROMPT = batch([tokens(30, seed=1)])


class Gate(nn.Module):
    """Stops the pass number `at`, in the midst of it."""

    def __init__(self, inner, at):
        super().__init__()
        self.inner, self.left = inner, at
        self.reached, self.go_on = threading.Event(), threading.Event()

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            self.reached.set()
            assert self.go_on.wait(PATIENCE_S)
        return self.inner(x)


@contextlib.contextmanager
def stopped(pair, at, ask=greedy, prompt=PROMPT):
    """While the body runs, a call of the patched model is in the midst of its pass number `at`; then it must be right.

    Its attention layers are those before and behind.
    """
    right = ask(pair.stock, prompt)
    ask(pair.model, prompt)  # what is tried out at first is no pass of the call
    pair.paged.clear()
    mlp = pair.model.model.layers[0].mlp
    mlp.act_fn = gate = Gate(mlp.act_fn, 0)
    ask(pair.model, prompt)
    pair.paged.clear()
    gate.left = at
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(ask, pair.model, prompt)
        try:
            assert gate.reached.wait(PATIENCE_S)
            yield call
        finally:
            gate.go_on.set()
        assert torch.equal(call.result(PATIENCE_S), right)
    mlp.act_fn = gate.inner


def beams(model, prompt):
    return greedy(model, prompt, num_beams=2)


def samples(model, prompt):
    torch.manual_seed(5)
    return model.generate(**prompt, do_sample=True, num_return_sequences=3, max_new_tokens=8)


@pytest.mark.parametrize("ask", [greedy, beams, samples])
@pytest.mark.parametrize("at", [1, 4], ids=["in the prompt", "in a step"])
def test_a_running_call_goes_on_when_the_model_is_unpatched(at, ask):
    pair = Pair("llama")
    ask(unpatch_model(pair.model), PROMPT)  # whatever stock itself creates on first use is not our doing
    before = snapshot(pair.model)
    runtime = weakref.ref(patch_model(pair.model, block_size=BLOCK_SIZE).paged)
    with stopped(pair, at, ask):
        unpatch_model(pair.model)
        assert not is_patched(pair.model)
        unpatch_model(pair.model)
    gc.collect()
    assert type(pair.model) is type(pair.stock)
    assert differences(before, snapshot(pair.model)) == []
    assert runtime() is None
    assert torch.equal(ask(pair.model, PROMPT), ask(pair.stock, PROMPT))


def test_what_is_asked_meanwhile_is_asked_of_stock():
    pair = Pair("llama")
    with stopped(pair, 4):
        unpatch_model(pair.model)
        for more in ({}, {"num_beams": 2}, {"return_dict_in_generate": True}):
            expected, actual = (greedy(model, prompts.shared_prefix(), **more) for model in (pair.stock, pair.model))
            if more.get("return_dict_in_generate"):
                assert not isinstance(actual.past_key_values, PagedCache)
                expected, actual = expected.sequences, actual.sequences
            assert torch.equal(actual, expected)
        with pytest.raises(AttributeError, match="paged"):
            pair.model.paged.stats()
    assert torch.equal(greedy(pair.model, PROMPT), greedy(pair.stock, PROMPT))


@pytest.mark.parametrize("settings", [{"block_size": BLOCK_SIZE}, {"block_size": 16}, {"kv_cache_dtype": "int8"}])
def test_patched_again_before_the_call_has_ended(settings):
    pair = Pair("llama")
    with stopped(pair, 4):
        unpatch_model(pair.model)
        patch_model(pair.model, **settings)
        assert pair.paged.stats().prompt_tokens == 0
    assert is_patched(pair.model)
    if "kv_cache_dtype" not in settings:
        pair.ask(PROMPT)
    pair.check()
    unpatch_model(pair.model)
    assert type(pair.model) is type(pair.stock)


@pytest.mark.parametrize("at", [1, 4], ids=["in the prompt", "in a step"])
def test_a_running_call_goes_on_with_other_settings_around_it(at):
    pair = Pair("llama")
    with stopped(pair, at):
        patch_model(pair.model, block_size=16, kv_cache_dtype="int8")
    patch_model(pair.model, block_size=BLOCK_SIZE)
    pair.ask(PROMPT)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_running_call_goes_on_when_a_model_with_the_same_config_is_unpatched(is_first):
    pair = Pair("llama")
    unpatch_model(pair.model)
    other = type(pair.model)(pair.model.config).eval()
    for model in (other, pair.model) if is_first else (pair.model, other):
        patch_model(model, block_size=BLOCK_SIZE)
    greedy(other, PROMPT)
    with stopped(pair, 4):
        unpatch_model(other)
    assert type(other) is type(pair.stock)
    pair.ask(PROMPT)
    unpatch_model(pair.model)
    assert type(pair.model.config._attn_implementation) is str


def test_a_call_that_has_begun_before_the_patch_stays_stocks(monkeypatch):
    """Nobody knows of it, so that the patch may end before the call does."""
    pair = Pair("llama")
    unpatch_model(pair.model)
    begin = GenerationMixin._prepare_special_tokens

    def begin_and_patch(model, *args, **kwargs):
        if model is pair.model:
            patch_model(model, block_size=BLOCK_SIZE)
        return begin(model, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_prepare_special_tokens", begin_and_patch)
    for more in ({}, {"num_beams": 2}):
        more["return_dict_in_generate"] = True
        answers = [greedy(model, PROMPT, **more) for model in (pair.stock, pair.model)]
        assert torch.equal(*(each.sequences for each in answers))
        assert is_patched(pair.model)
        assert not isinstance(answers[1].past_key_values, PagedCache)
        unpatch_model(pair.model)


def test_a_call_that_fails_ends_the_patch_as_well():
    pair = Pair("llama")
    streamer = Waits()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(greedy, pair.model, PROMPT, streamer=streamer)
        try:
            assert streamer.reached.wait(PATIENCE_S)
            unpatch_model(pair.model)

            def fail(value):
                raise Boom

            streamer.put = fail
        finally:
            streamer.go_on.set()
        with pytest.raises(Boom):
            call.result(PATIENCE_S)
    assert type(pair.model) is type(pair.stock)


def test_a_call_that_unpatches_its_own_model():
    pair = Pair("llama")
    right = greedy(pair.stock, PROMPT)
    assert torch.equal(greedy(pair.model, PROMPT, streamer=AtFourthStep(pair.model, unpatch_model)), right)
    assert type(pair.model) is type(pair.stock)
    assert torch.equal(greedy(pair.model, PROMPT), right)


def test_with_blocks_come_and_go_under_calls_of_other_threads():
    pair = Pair("llama")
    unpatch_model(pair.model)
    asked = [prompts.shared_prefix(), PROMPT, prompts.ragged()]
    calls = [(greedy, each) for each in asked] + [(beams, asked[0])]
    right = [ask(pair.stock, prompt) for ask, prompt in calls]
    done = threading.Event()

    def ask(which):
        rounds = 0
        while not done.is_set() or rounds < 3:
            function, prompt = calls[which]
            assert torch.equal(function(pair.model, prompt), right[which])
            rounds += 1
        return rounds

    with ThreadPoolExecutor(len(calls)) as pool:
        running = [pool.submit(ask, which) for which in range(len(calls))]
        try:
            for round_ in range(60):
                with paged(pair.model, block_size=(BLOCK_SIZE, 16)[round_ % 2]):
                    done.wait(0.02)
                done.wait(0.01)
        finally:
            done.set()
        for each in running:
            assert each.result(PATIENCE_S) >= 3
    assert type(pair.model) is type(pair.stock)
