"""Prompts in stock's shapes: equal rows are computed once, and nothing again that an earlier call has computed."""

import functools
from dataclasses import replace

import prompts
import pytest
import torch
from compare import every_family
from mishaps import BadCriterion, Boom
from pair import Pair
from patched_copies import GREEDY
from prompts import batch, tokens
from transformers import BloomForCausalLM, StoppingCriteriaList
from transformers.models.bloom.modeling_bloom import BloomModel

from hf_paged import capabilities, resume
from hf_paged.compat import CACHE_NAME
from hf_paged.errors import PagedMemoryError

PADDED = ["bloom", "falcon_alibi", "falcon_rotary", "deepseek_v2", "deepseek_v3"]
FAST = every_family(lambda family: family.packed)
NOT_SHARED = "prompts not shared: "
LOOKUP = {"prompt_lookup_num_tokens": 3, "eos_token_id": 2}
SYSTEM = tokens(30, seed=1)


@pytest.fixture(autouse=True)
def in_stock_shapes(monkeypatch):
    """Whatever could be packed, as deepseek can in older versions."""
    probe = capabilities.probe
    monkeypatch.setattr(capabilities, "probe", lambda *args: replace(probe(*args), obstacle="made up"))


def turn(pair: Pair, prompt: list[int], number: int) -> list[int]:
    """Asks, and returns the prompt of the next turn: the answer and something more to say."""
    return pair.ask([prompt], max_new_tokens=10)[0].tolist() + tokens(7, seed=number + 5)


def tried(name: str) -> Pair:
    """A pair whose model has been found to compute prompts in two pieces as in one; its pool has `SYSTEM`."""
    pair = Pair(name)
    for last in range(2):
        pair.ask([SYSTEM + tokens(5, seed=60 + last)])
    assert (pair.computed, pair.reused) == (35, 0), "the second is computed both ways"
    return pair


@pytest.mark.parametrize("name", PADDED)
def test_turns_of_a_chat(name):
    pair = Pair(name)
    prompt = turn(pair, SYSTEM, 0)
    prompt = turn(pair, prompt, 1)
    for number in (2, 3):
        known = len(prompt) - 7 - 1  # the last token of the answer was never computed
        prompt = turn(pair, prompt, number)
        assert (pair.computed, pair.reused) == (8, known)
    pair.pool.check_integrity()
    assert pair.pool.in_use == 0


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("kwargs", [{"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}], ids=str)
def test_equal_rows_are_computed_once(name, kwargs):
    pair = Pair(name)
    rows = [tokens(20, seed=3), tokens(17, seed=4)]
    pair.ask(rows, **kwargs)
    assert pair.computed == 3 * 37, "the first time all are"
    rows = [tokens(21, seed=5), tokens(18, seed=6)]
    pair.ask(rows, **kwargs)
    assert (pair.computed, pair.reused) == (39, 0)
    pair.ask([rows[1], rows[0], rows[1]])
    assert pair.computed + pair.reused < 21 + 2 * 18
    pair.pool.check_integrity()


@pytest.mark.parametrize("name", PADDED)
def test_equal_rows_without_prefixes(name):
    pair = Pair(name, prefix_caching=False)
    for computed in (3 * 20, 20):
        pair.ask([tokens(20, seed=3)], num_beams=3)
        assert pair.computed == computed
    assert pair.paged.stats().blocks_cached == 0


@pytest.mark.parametrize("name", PADDED)
def test_rows_of_unequal_length_begin_with_what_there_is(name):
    pair = tried(name)
    pair.ask([SYSTEM + tokens(9, seed=70), SYSTEM + tokens(2, seed=71), SYSTEM[:8] + tokens(20, seed=72)])
    assert pair.computed == 3 * 20, "as many columns of each row, of which the last one has eight tokens there"
    assert pair.reused == 39 + 32 + 28 - pair.computed
    pair.ask([SYSTEM + tokens(9, seed=70), tokens(3, seed=73)])
    assert pair.reused == 36, "the other row has padding only there"
    pair.pool.check_integrity()


def test_positions_that_are_columns_are_not_taken_from_behind_padding(monkeypatch):
    """K and V of a token are others behind padding, and its answer is right only with its own."""
    forward = BloomModel.forward

    @functools.wraps(forward)
    def counting(self, input_ids=None, inputs_embeds=None, **kwargs):
        cache = kwargs.get("cache") or kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        columns = torch.arange(past, past + input_ids.shape[1])
        embedded = self.word_embeddings(input_ids)
        embedded = embedded + (columns % 5).view(1, -1, 1) * torch.arange(embedded.shape[-1]).sin()
        return forward(self, input_ids=None, inputs_embeds=embedded, **kwargs)

    monkeypatch.setattr(BloomModel, "forward", counting)
    pair = tried("bloom")
    long, short = SYSTEM + tokens(8, seed=80), SYSTEM + tokens(4, seed=81)
    pair.ask([long, short])
    assert pair.reused == 0
    pair.ask([short])
    assert pair.reused == 30, "what was computed behind padding is not found"
    pair.ask([long])
    assert pair.reused == 30


def test_a_prompt_that_sees_what_follows_is_not_cut(monkeypatch):
    """As in a prefix language model; repeated as it is, a prompt in two pieces would be right."""
    forward = BloomModel.forward

    @functools.wraps(forward)
    def seeing(self, input_ids=None, inputs_embeds=None, **kwargs):
        embedded = self.word_embeddings(input_ids)
        return forward(self, input_ids=None, inputs_embeds=embedded + embedded.mean(dim=1, keepdim=True), **kwargs)

    monkeypatch.setattr(BloomModel, "forward", seeing)
    pair = Pair("bloom")
    prompt = SYSTEM + tokens(5, seed=60)
    for each in (prompt, prompt, SYSTEM + tokens(5, seed=61), prompt):
        pair.ask([each])
        assert pair.reused == 0
    (reason,) = (each for each in pair.paged.stats().fallbacks if each.startswith(NOT_SHARED))
    assert "in two pieces" in reason
    pair.ask([prompt], num_beams=2)
    assert pair.computed == 2 * 35


def test_a_model_that_notes_something_of_its_prompt_is_given_all_of_it(monkeypatch):
    forward = BloomForCausalLM.forward

    @functools.wraps(forward)
    def noting(self, input_ids=None, **kwargs):
        if input_ids.shape[1] > 1:
            self.noted = input_ids.sum()
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(BloomForCausalLM, "forward", noting)
    pair = Pair("bloom")
    for last, beams in enumerate((1, 1, 1, 2, 2, 2)):
        pair.ask([SYSTEM + tokens(5 + last, seed=60 + last)], num_beams=beams)
        assert pair.reused == 0
        assert torch.equal(pair.model.noted, pair.stock.noted)
    assert NOT_SHARED + "modules that keep a state of their own" in pair.paged.stats().fallbacks


@pytest.mark.parametrize("name", ["bloom", "deepseek_v3"])
def test_what_is_returned_of_the_prompt_is_all_there(name):
    """Hidden states of all tokens are asked for: then all are computed."""
    pair = tried(name)
    given = {**batch([SYSTEM + tokens(5, seed=60)]), **GREEDY, "return_dict_in_generate": True}
    for kwargs in ({"output_hidden_states": True}, {"output_attentions": True, "num_beams": 2}):
        stock, ours = (model.generate(**given, **kwargs) for model in (pair.stock, pair.model))
        for field in ("hidden_states", "attentions", "decoder_hidden_states"):
            assert (getattr(stock, field, None) is None) == (getattr(ours, field, None) is None)
            if getattr(stock, field, None) is not None:
                shapes = [[[each.shape for each in step] for step in getattr(one, field)] for one in (stock, ours)]
                assert shapes[0] == shapes[1]
        del ours


def test_hooks_see_every_row():
    pair, seen = tried("bloom"), []
    handle = pair.model.transformer.h[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    pair.ask([SYSTEM], num_beams=3)
    assert seen[0][:2] == (3, 30)
    handle.remove()
    pair.ask([SYSTEM], num_beams=3)
    assert (pair.computed, pair.reused) == (1, 3 * 29)


@pytest.mark.parametrize("salt", [None, "tenant"])
def test_salts_and_weights(salt):
    tried("deepseek_v3").check_salts_and_weights([SYSTEM + tokens(5, seed=60)] * 2, salt, known=34)


@pytest.mark.parametrize("kwargs", [LOOKUP, {"prefill_chunk_size": 7}], ids=str)
def test_other_ways_through_a_prompt(kwargs):
    pair = tried("falcon_alibi")
    prompt = SYSTEM + SYSTEM[3:20]
    for _ in range(2):
        pair.ask([prompt], max_new_tokens=10, **kwargs)
    pair.ask([prompt, prompt[4:]], max_new_tokens=10, **({} if kwargs is LOOKUP else kwargs))
    assert pair.pool.in_use == 0


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}], ids=str)
def test_a_call_that_fails_behind_a_hit_leaves_nothing(monkeypatch, kwargs):
    pair = tried("deepseek_v3")
    bad = StoppingCriteriaList([BadCriterion(Boom, at=1)])
    with pytest.raises(Boom):
        pair.model.generate(**batch([[*SYSTEM, 9, 8]]), **GREEDY, stopping_criteria=bad, **kwargs)
    run_padded = resume.run_padded

    def failing(*args):
        run_padded(*args)
        raise Boom

    with monkeypatch.context() as patch:
        patch.setattr(resume, "run_padded", failing)
        with pytest.raises(Boom):
            pair.model.generate(**batch([[*SYSTEM, 9, 8]]), **GREEDY, **kwargs)
    assert pair.pool.in_use == 0
    pair.ask([[*SYSTEM, 9, 8]], **kwargs)
    assert pair.reused > 0
    pair.pool.check_integrity()


def test_without_memory_for_a_trial_the_call_goes_on():
    """There is room for the prompt, and not for another beside it: it stays untried until there is."""
    pair = Pair("bloom", max_memory={"cpu": 14 * 2 * 2 * 64 * 4 * 8})
    for last in range(3):
        pair.ask([SYSTEM + tokens(30, seed=last)])
        assert pair.reused == 0
    pair.ask([SYSTEM])
    pair.ask([[*SYSTEM, 5]])
    assert pair.reused > 0


def test_refused_memory_in_a_trial_says_nothing_of_the_model(monkeypatch):
    pair, allows = Pair("bloom"), [True, False]
    pair.ask([SYSTEM])
    run_padded = resume.run_padded

    def refusing(*args):
        if not allows.pop(0):
            raise PagedMemoryError("no")
        return run_padded(*args)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "run_padded", refusing)
        pair.ask([[*SYSTEM, 5]], max_new_tokens=1)
    assert not allows
    pair.ask([[*SYSTEM, 5]])
    assert pair.reused == 0
    pair.ask([[*SYSTEM, 6]])
    assert pair.reused == 30


@pytest.mark.parametrize("special", ["hole", "positions", "padding on the right"])
def test_what_ids_do_not_say_is_neither_kept_nor_taken(special):
    """A token hidden in the middle, positions of the caller's own, padding behind."""
    pair, plain = tried("deepseek_v3"), batch([SYSTEM + tokens(20, seed=75)])
    given = {**plain, "attention_mask": plain["attention_mask"].clone()}
    if special == "hole":
        given["attention_mask"][:, 40] = 0
    elif special == "positions":
        given["position_ids"] = torch.arange(50).unsqueeze(0) + (torch.arange(50) >= 40) * 3
    else:
        given = batch([SYSTEM + tokens(20, seed=75), SYSTEM], side="right")
    for _ in range(2):
        pair.ask(given)
        assert pair.reused == 0
    pair.ask(plain)
    assert pair.reused == 30


@pytest.mark.parametrize("name", ["deepseek_v3", "bloom"])  # bloom is told no positions, which differ, too
def test_rows_that_differ_in_their_mask_alone_are_not_equal(name):
    pair, given = tried(name), batch([tokens(20, seed=75)] * 3)
    given["attention_mask"][1, 9] = 0
    answer = pair.ask(given)
    assert not torch.equal(answer[0], answer[1])
    assert torch.equal(answer[0], answer[2])
    assert pair.computed == 20 + 19


def test_training_mode_computes_every_row():
    pair = tried("bloom")
    pair.both(lambda model: model.train())
    for _ in range(2):
        pair.ask(prompts.identical(), do_sample=True)
        assert pair.computed == 3 * 19


@pytest.mark.parametrize("name", ["deepseek_v3", "bloom"])
def test_tokens_behind_one_that_was_hidden_later_are_not_found(name):
    """A cache that is given back, and a mask that hides what it was not hidden from."""
    pair = tried(name)
    outputs = pair.hold([SYSTEM + tokens(5, seed=60)])
    longer = batch([outputs[0].sequences[0].tolist() + tokens(20, seed=76)])
    caches = [getattr(output, CACHE_NAME) for output in outputs]
    hidden = longer["attention_mask"].clone()
    hidden[:, 3:9] = 0
    answers = [
        model.generate(**{**longer, "attention_mask": hidden}, **GREEDY, **{CACHE_NAME: cache})
        for model, cache in zip((pair.stock, pair.model), caches, strict=True)
    ]
    assert torch.equal(*answers)
    del caches, outputs
    pair.ask(longer)
    assert 0 < pair.reused <= 35 + 6


@pytest.mark.parametrize("family", FAST)
def test_every_family_in_stock_shapes(family):
    """Windows that have given up blocks among them: then less is found, or nothing."""
    pair = Pair(family.name)
    prompt = turn(pair, SYSTEM, 0)
    for number in (1, 2, 3):
        prompt = turn(pair, prompt, number)
    assert pair.reused > 0
    pair.ask([SYSTEM + tokens(9, seed=70), SYSTEM[:12] + tokens(3, seed=71), tokens(25, seed=72)])
    for kwargs in ({"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}):
        pair.ask([SYSTEM + tokens(12, seed=73), prompt[:40]], **kwargs)
        assert pair.computed <= 42 + 40
    pair.ask([SYSTEM + SYSTEM[4:]], **LOOKUP)
    assert list(pair.paged.stats().fallbacks) == ["made up"]
    pair.pool.check_integrity()
    assert pair.pool.in_use == 0
