"""What a patched model shows: the members of `model.paged`, its printed table, and the caches that calls return."""

import prompts
import torch
from families import FAMILIES, stock_model
from patched_copies import GREEDY, assert_generates_as_stock, expected_tokens, patched

from hf_paged import PagedCache, PagedConfig, PagedStats, unpatch_model


def test_runtime_members():
    model = patched()
    assert isinstance(model.paged.config, PagedConfig)
    assert model.paged.stats() == PagedStats(bytes_reserved=model.paged.stats().bytes_reserved)
    inputs = prompts.shared_prefix()
    output = model.generate(**inputs, **GREEDY)
    stats = model.paged.stats()
    assert stats.generated_tokens == len(output) * GREEDY["max_new_tokens"]
    assert stats.bytes_reserved > 0
    model.paged.reset_stats()
    after = model.paged.stats()
    assert (after.prompt_tokens, after.computed_tokens, after.generated_tokens) == (0, 0, 0)
    assert (after.blocks_cached, after.bytes_reserved) == (stats.blocks_cached, stats.bytes_reserved), (
        "gauges stay true"
    )


def test_clear_and_release():
    model = patched()
    assert_generates_as_stock(model)
    model.paged.clear()
    assert model.paged.stats().blocks_cached == 0
    model.paged.reset_stats()
    assert_generates_as_stock(model)
    assert model.paged.stats().reused_tokens == 0, "cleared prefixes are not used"
    model.paged.release()
    assert model.paged.stats().bytes_reserved == 0
    assert_generates_as_stock(model)


def test_release_keeps_a_cache_that_the_user_holds():
    model = patched()
    output = model.generate(**prompts.single(), do_sample=False, max_new_tokens=6, return_dict_in_generate=True)
    model.paged.clear()
    model.paged.release()
    whole = {"input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
    continued = model.generate(**whole, past_key_values=output.past_key_values, **GREEDY)
    assert torch.equal(continued, stock_model("llama").generate(**whole, **GREEDY))


def test_a_returned_cache_outlives_the_patch():
    """After unpatching, a cache that the user still holds either works or says what is wrong; it never lies."""
    model = patched()
    output = model.generate(**prompts.single(), do_sample=False, max_new_tokens=6, return_dict_in_generate=True)
    whole = {"input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
    expected = stock_model("llama").generate(**whole, **GREEDY)
    unpatch_model(model)
    error = None
    try:
        continued = model.generate(**whole, past_key_values=output.past_key_values, **GREEDY)
    except (ValueError, RuntimeError) as caught:
        error = str(caught)
    if error is None:
        assert torch.equal(continued, expected)
    else:
        assert "cache" in error


def test_printed_table_is_for_people():
    model = patched(FAMILIES["bloom"])
    model.generate(**prompts.ragged(), **GREEDY)
    table = str(model.paged)
    assert len(table.splitlines()) > 5
    stats = model.paged.stats()
    assert stats.fallbacks
    assert all(reason in table for reason in stats.fallbacks), table
    assert str(stats.prompt_tokens) in table


def test_cache_salt_is_accepted_and_changes_no_token():
    model = patched()
    for salt in ("tenant-a", "tenant-b", None):
        output = model.generate(**prompts.shared_prefix(), **GREEDY, cache_salt=salt)
        assert torch.equal(output, expected_tokens())


def test_a_returned_cache_is_a_cache():
    from transformers import Cache

    output = patched().generate(**prompts.single(), **GREEDY, return_dict_in_generate=True)
    assert isinstance(output.past_key_values, PagedCache)
    assert isinstance(output.past_key_values, Cache)
    assert output.past_key_values.get_seq_length() == 21 + GREEDY["max_new_tokens"] - 1
