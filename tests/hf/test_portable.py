"""A cache goes to files and other processes as stock's own."""

import copy
import io
import pickle

import prompts
import pytest
import torch
from compare import BLOCK_SIZE, assert_blocks_given_back, copy_of
from families import FAMILIES
from pair import Pair
from tolerances import assert_close
from transformers import DynamicCache, EncoderDecoderCache

from hf_paged import PagedCache, patch_model

# One window, two kinds of layers, states beside K and V, states alone, two caches.
NAMES = ["llama", "mistral_sliding", "gemma3", "lfm2", "qwen3_next", "bart", "t5"]


def through_pickle(value):
    data = pickle.dumps(value)
    assert b"hf_paged" not in data, "to be read where hf_paged is not installed"
    return pickle.loads(data)


def through_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    assert len(file.getvalue()) < 200_000, "the pool's memory went along"
    file.seek(0)
    return torch.load(file, weights_only=False)


def returned(model, inputs):
    torch.manual_seed(7)
    return model.generate(**inputs, do_sample=False, max_new_tokens=10, return_dict_in_generate=True)


def tensors_of(layer) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("way", [through_pickle, through_torch], ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_what_comes_back_is_what_stock_would_have_kept(name, way):
    pair = Pair(name)
    stock, ours = (way(returned(model, prompts.diverse())) for model in (pair.stock, pair.model))
    assert torch.equal(ours.sequences, stock.sequences)
    expected, actual = stock.past_key_values, ours.past_key_values
    assert type(actual) is type(expected)
    if isinstance(actual, EncoderDecoderCache):
        assert actual.is_updated == expected.is_updated
    assert actual.get_seq_length() == expected.get_seq_length()
    halves = ["self_attention_cache", "cross_attention_cache"] if isinstance(actual, EncoderDecoderCache) else [None]
    for half in halves:
        mine, theirs = (getattr(cache, half) if half else cache for cache in (actual, expected))
        for index, (got, wanted) in enumerate(zip(mine.layers, theirs.layers, strict=True)):
            assert type(got) is type(wanted)
            if hasattr(wanted, "get_seq_length"):
                assert got.get_seq_length() == wanted.get_seq_length()
            assert tensors_of(got).keys() == tensors_of(wanted).keys()
            for key, value in tensors_of(wanted).items():
                assert_close(getattr(got, key), value, f"{name}, layer {index}, {key}")
    del stock, ours, actual
    assert_blocks_given_back(pair.model)


@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "gemma3"])
def test_a_patched_model_goes_on_from_what_comes_back(name):
    pair = Pair(name)
    answers = []
    for model in (pair.stock, pair.model):
        output = through_pickle(returned(model, prompts.ragged()))
        ids = torch.cat([output.sequences, output.sequences[:, -4:]], dim=1)
        mask = torch.cat([prompts.ragged()["attention_mask"], torch.ones(len(ids), 14, dtype=torch.long)], dim=1)
        given = {"attention_mask": mask, "past_key_values": output.past_key_values}
        answers.append(model.generate(ids, **given, do_sample=False, max_new_tokens=10))
    assert torch.equal(*answers)


def test_quantized_and_empty_caches_and_those_of_unpatched_models():
    model = patch_model(copy_of(FAMILIES["llama"]), block_size=BLOCK_SIZE, kv_cache_dtype="int8", verify=False)
    cache = returned(model, prompts.single()).past_key_values
    assert torch.equal(through_pickle(cache).layers[1].keys, cache.layers[1].keys)
    empty = through_pickle(PagedCache(model.config))
    assert type(empty) is DynamicCache
    assert empty.get_seq_length() == 0


def test_a_shallow_copy_outlives_the_cache():
    pair = Pair()
    cache = returned(pair.model, prompts.single()).past_key_values
    keys = cache.layers[0].keys
    twin = copy.copy(cache)
    del cache
    assert_blocks_given_back(pair.model)
    assert torch.equal(twin.layers[0].keys, keys)
