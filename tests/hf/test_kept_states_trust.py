"""Kept states that must not be trusted, and those that must not be in the way of others."""

from itertools import pairwise

import pytest
import torch
from adapters import two_loras
from prompts import batch, tokens
from test_kept_states import NOT_SHARED, OTHER, SYSTEM, hybrid, kept, tried, turn
from transformers import StoppingCriteria, StoppingCriteriaList
from versions import skip_if_older


class AtStep(StoppingCriteria):
    """Does something to the model in the midst of a call, and ends nothing."""

    def __init__(self, step, change):
        self.left, self.change = step, change

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        if self.left == 0:
            self.change()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_states_in_the_midst_of_guesses_are_not_kept():
    """They are longer than others as long as some may be taken back, and nobody would keep others beside them."""
    pair = hybrid("lfm2")
    prompt = SYSTEM + SYSTEM[3:20]
    pair.skip_where_older_stock_refuses([prompt], prompt_lookup_num_tokens=3)
    known = len(pair.ask([prompt], max_new_tokens=20, prompt_lookup_num_tokens=3)[0]) - 1
    layers = pair.paged._pool.kept_states
    (first,) = layers._kept.values()
    assert first.num_tokens <= known, "behind the answer"
    for last in range(3):
        pair.ask([OTHER + tokens(5 + last, seed=last)], max_new_tokens=20)
    assert (pair.computed, pair.reused) == (7, 51)


def test_turns_with_guesses():
    pair, prompt = tried("lfm2"), SYSTEM + SYSTEM[3:20]
    pair.skip_where_older_stock_refuses([prompt], prompt_lookup_num_tokens=3)
    reused = []
    for number in range(4):
        answer = pair.ask([prompt], max_new_tokens=10, prompt_lookup_num_tokens=3)[0].tolist()
        reused.append(pair.reused)
        prompt = answer + answer[5:9] + tokens(3, seed=number)
    assert reused[0] == 43
    assert all(more > less for less, more in pairwise(reused))


def test_a_model_whose_answers_leave_other_states_than_prompts():
    """Zamba2 clamps time steps in prompts and not where tokens come alone; what comes of it is less than 1e-3."""
    pair, prompt = hybrid("zamba2"), OTHER
    for number in range(4):
        prompt = turn(pair, prompt, number, said=20)
        assert pair.reused == 0
    reasons = [each for each in pair.paged.stats().fallbacks if each.startswith(NOT_SHARED)]
    assert len(reasons) == 1
    if not reasons[0].startswith(f"{NOT_SHARED}states behind"):
        skip_if_older(f"prompts in pieces go wrong before that: {reasons}")


def test_an_adapter_that_is_switched_before_a_row_ends():
    """What it has made of the row's last tokens is not kept as that of the adapter that the call began with."""
    tried("falcon_h1")
    pair = hybrid("falcon_h1", wrap=two_loras)
    models, rows = (pair.stock, pair.model), [OTHER, tokens(51, seed=4)]

    def switched(step, **kwargs):
        def criteria(model):
            return StoppingCriteriaList([AtStep(step, lambda: model.set_adapter("second"))])

        answers = pair.ask(rows, max_new_tokens=10, stopping_criteria=criteria, **kwargs)
        for model in models:
            model.set_adapter("first")
        return answers[0, 51:].tolist()

    # The adapter is switched before the last token that the row is given; the next one ends it.
    end = next(step for step in range(3, 9) if (said := switched(step))[step] not in said[:step])
    pair.paged.clear()
    switched(end, eos_token_id=said[end])
    assert pair.ask(rows, max_new_tokens=10)[0, 51 : 51 + end].tolist() == said[:end]
    for last in range(2):
        pair.ask([OTHER + said[:end] + tokens(4, seed=last)])
    assert pair.reused == 51


def test_a_pool_that_nobody_asks_any_more_keeps_no_states():
    """Returned caches keep its blocks alive."""
    pair = tried("lfm2")
    outputs = pair.model.generate(**batch([SYSTEM]), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    before = pair.paged._pool
    assert kept(pair) > 0
    pair.both(lambda model: model.to(torch.bfloat16))
    pair.model.generate(**batch([SYSTEM]), max_new_tokens=2)
    assert pair.paged._pool is not before
    assert before.kept_states.cached == 0
    del outputs


def test_an_interrupt_while_room_is_made_for_a_state(monkeypatch):
    """Nobody trusts the books of that pool any more."""
    pair = tried("lfm2")
    before = pair.paged._pool

    def interrupted(num_bytes):
        raise KeyboardInterrupt

    monkeypatch.setattr(before.manager.budget, "has_room", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pair.model.generate(**batch([OTHER]), max_new_tokens=4)
    assert before.manager.is_torn
    pair.ask([OTHER])
    assert pair.paged._pool is not before


def test_blocks_are_not_written_to_a_disk_where_nobody_looks_for_them(tmp_path):
    """States are not there."""
    pair = tried("lfm2")
    state_bytes, block_bytes = pair.paged._pool.kept_states.block_bytes, pair.pool.pools[0].block_bytes
    memory = {"cpu": 24 * block_bytes + 3 * state_bytes, "disk": 2**24}
    pair = tried("lfm2", max_memory=memory, offload_folder=tmp_path)
    for number in range(8):
        pair.ask([tokens(45, seed=number % 4)])
    stats = pair.paged.stats()
    assert stats.evicted_blocks > 0
    assert (stats.blocks_disk, stats.offloaded_bytes) == (0, 0)
    assert "no prefixes on lower tiers: layers that keep a state" in stats.fallbacks
