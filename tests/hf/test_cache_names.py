"""Names of the cache: `past_key_values` up to transformers 5.23; then `cache`, with a warning for the old one."""

import logging
import warnings

import pytest
import torch
import transformers
from families import FAMILIES, stock_model
from pair import NEW, Pair
from prompts import batch, tokens
from transformers import DynamicCache, EncoderDecoderCache, LlamaForCausalLM

from hf_paged import PagedCache, patch_model
from hf_paged.compat import CACHE_NAME, CACHE_NAMES

NAMES = CACHE_NAMES[CACHE_NAMES.index(CACHE_NAME) :]  # that this transformers takes
KINDS = {"stock's": lambda model: DynamicCache(config=model.config), "ours": lambda model: PagedCache(model.config)}
ROWS = [tokens(20, seed=1), tokens(11, seed=2)]


def of_names(caught):
    """Warnings that are about the name of the cache."""
    return [each for each in caught if CACHE_NAME in str(each.message) and "deprecated" in str(each.message)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_generate_takes_a_cache_by_every_name(name, kind):
    pair = Pair()
    expected = pair.stock.generate(**batch(ROWS), max_new_tokens=NEW, do_sample=False)
    actual = pair.model.generate(**batch(ROWS), max_new_tokens=NEW, do_sample=False, **{name: KINDS[kind](pair.model)})
    assert torch.equal(actual, expected)
    ours_computed = pair.paged.stats().computed_tokens
    assert (ours_computed > 0) == (kind == "ours"), "a cache of stock's is left alone"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("patched", [True, False], ids=["patched", "unpatched"])
def test_a_call_takes_a_cache_by_every_name(name, patched):
    pair = Pair()
    model = pair.model if patched else pair.stock
    cache, reference = PagedCache(pair.model.config), DynamicCache(config=pair.stock.config)
    ids = torch.tensor([tokens(12, seed=3)])
    with torch.no_grad():
        for part in (ids[:, :8], ids[:, 8:11], ids[:, 11:]):
            output = model(part, **{name: cache})
            expected = pair.stock(part, **{CACHE_NAME: reference})
            torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
            assert all(getattr(output, each) is cache for each in NAMES)
    assert cache.get_seq_length() == 12
    assert (cache.owner is not None) == patched, "only a patched model takes note of it"
    assert pair.paged.stats().fallbacks == {}


@pytest.mark.parametrize("name", NAMES)
def test_a_call_warns_of_the_name_as_often_as_stock_does(name):
    pair = Pair()
    ids = torch.tensor([tokens(12, seed=3)])
    counts = []
    for model in (pair.stock, pair.model):
        cache = KINDS["ours"](model)
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            model(ids, **{name: cache})
        counts.append(len(of_names(caught)))
    assert counts[0] == counts[1] == (name != CACHE_NAME)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_returned_goes_on_by_every_name(name):
    pair = Pair()
    given = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    longer = {}
    for model in (pair.stock, pair.model):
        first = model.generate(**batch([ROWS[0]]), **given)
        more = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
        longer[model] = model.generate(more, **{name: getattr(first, name)}, **given).sequences
    assert torch.equal(longer[pair.model], longer[pair.stock])


CALLS = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 2, "eos_token_id": 2},  # older versions look for the latter
    "dense": {"output_attentions": True, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("architecture", ["llama", "t5", "qwen2"])
@pytest.mark.parametrize("call", CALLS)
def test_no_call_of_ours_uses_a_name_that_stock_warns_of(architecture, call, caplog):
    model = FAMILIES[architecture].build()
    model.set_attn_implementation("eager")
    patch_model(model, verify=True, kv_cache_dtype="int8" if architecture == "llama" else "auto")
    rows = ROWS[:1] if call == "lookup" else ROWS
    transformers.logging.enable_propagation()
    try:
        with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
            warnings.simplefilter("always")
            model.generate(**batch(rows), max_new_tokens=NEW, **{"do_sample": False, **CALLS[call]})
    finally:
        transformers.logging.disable_propagation()
    assert of_names(caught) == []
    assert [record for record in caplog.records if "deprecated" in record.message and "cache" in record.message] == []


def test_a_pair_of_caches_goes_by_every_name():
    pair = Pair("t5")
    ids, start = torch.tensor([tokens(9, seed=4)]), torch.tensor([[0]])
    for name in NAMES:
        both = EncoderDecoderCache(DynamicCache(config=pair.model.config), DynamicCache(config=pair.model.config))
        with torch.no_grad():
            expected = pair.stock(ids, decoder_input_ids=start).logits
            actual = pair.model(ids, decoder_input_ids=start, **{name: both}).logits
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        assert both.self_attention_cache.get_seq_length() == 1


# Code from the hub, that was written before the cache was renamed


class _OldName(LlamaForCausalLM):
    """Its `forward` knows the older name alone, and gives anything else no thought."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        kwargs.pop("cache", None)
        return super().forward(input_ids, attention_mask, position_ids, **{CACHE_NAME: past_key_values}, **kwargs)


class _Renames(_OldName):
    """One that was helped to find the cache of today's `generate`."""

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, cache=None, **kwargs):
        given = {"attention_mask": attention_mask, CACHE_NAME: cache, **kwargs}
        inputs = super().prepare_inputs_for_generation(input_ids, **given)
        return {**inputs, "past_key_values": inputs.pop(CACHE_NAME, None)}


class _BothNames(LlamaForCausalLM):
    """For any version of transformers."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, past_key_values=None, **kwargs):
        kwargs[CACHE_NAME] = past_key_values if cache is None else cache
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


def hub_pair(kind):
    stock = kind(stock_model("llama").config).eval()
    stock.load_state_dict(stock_model("llama").state_dict())
    stock.generation_config = stock_model("llama").generation_config
    return Pair.of(stock)


@pytest.mark.parametrize("kind", [_OldName, _Renames, _BothNames])
def test_code_that_knows_an_older_name_is_told_that(kind):
    pair = hub_pair(kind)
    ids = torch.tensor([tokens(12, seed=3)])
    for make in (*KINDS.values(), lambda model: None):
        seen = []
        for model in (pair.stock, pair.model):
            cache = make(model)
            with warnings.catch_warnings(record=True) as caught, torch.no_grad():
                warnings.simplefilter("always")
                seen.append(torch.cat([model(part, past_key_values=cache).logits for part in ids.split(8, 1)], dim=1))
            assert cache is None or cache.get_seq_length() == 12
            assert of_names(caught) == []
        torch.testing.assert_close(seen[1], seen[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [_OldName, _Renames, _BothNames])
def test_generate_of_code_that_knows_an_older_name(kind):
    pair = hub_pair(kind)
    for arguments in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        pair.ask(ROWS, **arguments)
    for make in KINDS.values():
        for name in NAMES:
            pair.ask(ROWS, **{name: make})
