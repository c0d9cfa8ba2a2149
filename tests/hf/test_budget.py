"""A budget that does not suffice: the error says what to raise, and the blocks come back."""

import gc

import prompts
import pytest
import torch
from families import stock_model
from mishaps import expected
from patched_copies import GREEDY, assert_generates_as_stock, patched, returned_cache

from hf_paged import PagedMemoryError, pool

BUDGET = {"cpu": "64KiB"}  # 16 blocks of 8 tokens: two layers × K and V × 2 heads × 16 × 4 bytes = 512 bytes a token


def test_prompt_that_does_not_fit():
    model = patched(max_memory=BUDGET)
    ids = torch.tensor([prompts.tokens(200)])
    with pytest.raises(PagedMemoryError) as raised:
        model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert isinstance(raised.value, RuntimeError)
    message = str(raised.value)
    assert "max_memory" in message, "names the setting to raise"
    assert any(character.isdigit() for character in message), "says how many tokens"
    assert model.paged.stats().blocks_in_use == 0
    assert torch.equal(model.generate(**prompts.single(), **GREEDY), expected(prompts.single))
    assert model.paged.stats().blocks_in_use == 0


def test_decode_that_outgrows_the_budget():
    model = patched(max_memory=BUDGET)
    with pytest.raises(PagedMemoryError):
        model.generate(**prompts.single(), do_sample=False, max_new_tokens=180)
    assert model.paged.stats().blocks_in_use == 0
    assert torch.equal(model.generate(**prompts.ragged(), **GREEDY), expected(prompts.ragged))


def test_beams_that_outgrow_the_budget():
    model = patched(max_memory=BUDGET)
    with pytest.raises(PagedMemoryError):
        model.generate(**prompts.ragged(), num_beams=4, do_sample=False, max_new_tokens=60)
    assert model.paged.stats().blocks_in_use == 0
    assert torch.equal(model.generate(**prompts.single(), **GREEDY), expected(prompts.single))


def test_budget_is_kept():
    model = patched(max_memory=BUDGET)
    for seed in range(6):  # 36 tokens each: cached blocks of earlier calls must be evicted for later ones
        ids = torch.tensor([prompts.tokens(28, seed)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(model.generate(**inputs, **GREEDY), stock_model("llama").generate(**inputs, **GREEDY))
        assert model.paged.stats().bytes_reserved <= 64 * 1024


def test_held_caches_count_against_the_budget_and_come_back():
    model = patched(max_memory=BUDGET)
    held = []

    def hold(count):
        for seed in range(count):
            held.append(returned_cache(model, {"input_ids": torch.tensor([prompts.tokens(28, seed)])}))

    with pytest.raises(PagedMemoryError):
        hold(10)
    assert held, "the first ones fit"
    held.clear()
    gc.collect()
    assert model.paged.stats().blocks_in_use == 0
    assert torch.equal(model.generate(**prompts.single(), **GREEDY), expected(prompts.single))


def test_zero_budget():
    with pytest.raises((ValueError, PagedMemoryError), match="max_memory"):
        patched(max_memory={"cpu": 0}).generate(**prompts.single(), **GREEDY)


LONG = {"input_ids": torch.tensor([prompts.tokens(200)])}


def test_where_ids_run_out_larger_blocks_are_the_remedy(monkeypatch):
    """No budget is reached, so that to raise it is of no use."""
    monkeypatch.setattr(pool, "MAX_BLOCKS", 16)
    model = patched(block_size=8)
    with pytest.raises(
        PagedMemoryError, match=r"a pool has 16 blocks at most.* Raise block_size \(up to 256\), shor"
    ) as raised:
        model.generate(**LONG, **GREEDY)
    assert "max_memory" not in str(raised.value)
    assert_generates_as_stock(model)
    larger = patched(block_size=16)
    assert torch.equal(larger.generate(**LONG, **GREEDY), stock_model("llama").generate(**LONG, **GREEDY))


def test_where_both_run_out_the_budget_is_named(monkeypatch):
    monkeypatch.setattr(pool, "MAX_BLOCKS", 16)
    with pytest.raises(PagedMemoryError, match=r"Raise max_memory\['cpu'\], shorten"):
        patched(max_memory={"cpu": 12 * 8 * 512}).generate(**LONG, **GREEDY)


def test_where_all_memory_is_taken_at_once_it_follows_the_budget_that_is_set(monkeypatch):
    monkeypatch.setattr(pool, "comes_on_demand", lambda device: False)
    monkeypatch.setattr(pool, "MAX_TOKENS_UNASKED", 128)
    with pytest.raises(PagedMemoryError, match=r"16 blocks at most unless .* Set max_memory\['cpu'\], shorten"):
        patched().generate(**LONG, **GREEDY)
    told = patched(max_memory={"cpu": "1MiB"})
    assert torch.equal(told.generate(**LONG, **GREEDY), stock_model("llama").generate(**LONG, **GREEDY))


def test_a_pool_has_room_for_many_long_rows_of_a_large_machine(no_poison):
    assert pool.most_tokens(block_size=16) >= 128 * 32_768
    assert pool.most_tokens(block_size=256) >= 1024 * 65_536
