"""Mistakes get an error that says what would be right, and leave the model as it was."""

import prompts
import pytest
import torch
from compare import BLOCK_SIZE, copy_of
from families import VOCAB, stock_model
from mishaps import assert_usable
from patched_copies import GREEDY, LLAMA, is_patched, patched, returned_cache

from hf_paged import PagedCache, PagedConfig, paged, patch_model

# What can be patched


def bert():
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )


def headless_llama():
    return copy_of(LLAMA).model


@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.nn.Linear(2, 2),
        bert,
        headless_llama,
        lambda: "a model",
        lambda: None,
        lambda: stock_model("llama").config,
    ],
    ids=["linear", "bert", "llama without a head", "str", "None", "config"],
)
@pytest.mark.parametrize(
    "function", [patch_model, lambda model: paged(model).__enter__()], ids=["patch_model", "paged"]
)
def test_what_cannot_generate_is_a_type_error(function, build):
    thing = build()
    with pytest.raises(TypeError) as raised:
        function(thing)
    assert type(thing).__name__ in str(raised.value), "the message names what was passed"
    assert "generate" in str(raised.value), "the message says what is missing"


def test_a_refused_model_is_left_alone():
    model = bert()
    before = type(model), dict(vars(model))
    with pytest.raises(TypeError):
        patch_model(model)
    assert (type(model), dict(vars(model))) == before


# Settings
BAD_SETTINGS = [
    ("block_size", 10),
    ("block_size", 4),
    ("block_size", 512),
    ("block_size", 0),
    ("block_size", -16),
    ("block_size", 16.0),
    ("block_size", "16"),
    ("block_size", True),
    ("block_size", None),
    ("kv_cache_dtype", "float3"),
    ("kv_cache_dtype", None),
    ("kv_cache_dtype", torch.int8),
    ("attention_backend", "cuda!"),
    ("attention_backend", None),
    ("max_memory", "8GiB"),
    ("max_memory", {"cpu": "lots"}),
    ("max_memory", {"cpu": -1}),
    ("max_memory", {"cpu": None}),
    ("max_memory", {"tape": "1GiB"}),
    ("max_memory", {-1: "1GiB"}),
    ("max_memory", {"cpu": "-1GiB"}),
    ("prefix_caching", "yes"),
    ("cuda_graphs", 2),
    ("verify", "maybe"),
]


@pytest.mark.parametrize(("field", "value"), BAD_SETTINGS, ids=[f"{field}={value!r}" for field, value in BAD_SETTINGS])
def test_bad_setting_is_a_value_error_that_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        PagedConfig(**{field: value})
    model = copy_of(LLAMA)
    with pytest.raises(ValueError, match=field):
        patch_model(model, **{field: value})
    assert not hasattr(model, "paged"), "a refused patch leaves the model unpatched"
    assert type(model) is type(stock_model("llama"))


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
def test_every_allowed_block_size_is_allowed(size):
    assert PagedConfig(block_size=size).block_size == size


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_attention_for_another_device_than_the_models(name):
    class Elsewhere(type(stock_model("llama"))):
        device = torch.device("xpu:0")

    model = copy_of(LLAMA)
    model.__class__ = Elsewhere
    if name == "cpu":
        with pytest.raises(ValueError, match=r"attention_backend='cpu' is not available: .* on xpu:0; 'auto' takes"):
            patch_model(model, attention_backend=name)
        assert type(model) is Elsewhere
    else:
        assert is_patched(patch_model(model, attention_backend=name))


def test_unknown_setting():
    with pytest.raises(ValueError, match="blocksize"):
        patch_model(copy_of(LLAMA), blocksize=16)


def test_config_of_another_type():
    with pytest.raises((TypeError, ValueError), match="config"):
        patch_model(copy_of(LLAMA), {"block_size": 16})


def test_config_is_frozen_and_keyword_only():
    config = PagedConfig()
    with pytest.raises(AttributeError):
        config.block_size = 32
    with pytest.raises(TypeError):
        PagedConfig(32)


def test_bad_reconfiguration_keeps_the_old_one():
    model = patched()
    with pytest.raises(ValueError, match="block_size"):
        patch_model(model, block_size=10)
    assert model.paged.config.block_size == BLOCK_SIZE
    assert_usable(model)


# Caches that do not fit


@pytest.mark.parametrize("patch", [False, True], ids=["unpatched", "patched"])
def test_cache_of_another_model(patch):
    """Same class, other shape: the heads do not fit. (Stock's DynamicCache would take them and be wrong.)"""
    model = copy_of(LLAMA)
    if patch:
        patch_model(model, block_size=BLOCK_SIZE)
    other = LLAMA.build(num_hidden_layers=3, num_key_value_heads=4)
    cache = PagedCache(other.config, block_size=BLOCK_SIZE)
    with torch.no_grad():
        other(prompts.single()["input_ids"], past_key_values=cache)
    with pytest.raises(ValueError, match=r"past_key_values|cache|model"):
        model.generate(**prompts.single(), past_key_values=cache, **GREEDY)
    if patch:
        assert_usable(model)


def test_empty_cache_of_another_model():
    model = patched()
    cache = PagedCache(LLAMA.build(num_hidden_layers=3, num_key_value_heads=4).config, block_size=BLOCK_SIZE)
    with pytest.raises(ValueError, match=r"past_key_values|cache|model"):
        model.generate(**prompts.single(), past_key_values=cache, **GREEDY)
    assert_usable(model)


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 3}], ids=["same shape", "other shape"])
def test_returned_cache_given_to_another_patched_model(changes):
    """K and V of other weights would be silent nonsense, even where the shapes agree."""
    one, two = patched(), patch_model(LLAMA.build(seed=5, **changes), block_size=BLOCK_SIZE)
    output = returned_cache(one, prompts.single())
    whole = {"input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
    with pytest.raises(ValueError, match=r"past_key_values|cache|model"):
        two.generate(**whole, past_key_values=output.past_key_values, **GREEDY)
    del output
    assert_usable(one)


def test_cache_of_another_batch_size():
    model = patched()
    output = returned_cache(model, prompts.diverse())  # three rows
    whole = torch.cat([output.sequences, output.sequences[:1]])  # four
    with pytest.raises(ValueError, match=r"batch|rows"):
        model.generate(whole, attention_mask=torch.ones_like(whole), past_key_values=output.past_key_values, **GREEDY)
    del output
    assert_usable(model)


def test_cache_of_another_batch_size_on_an_unpatched_model():
    model = stock_model("llama")
    cache = PagedCache(model.config, block_size=BLOCK_SIZE)
    with torch.no_grad():
        model(prompts.diverse()["input_ids"], past_key_values=cache)
        with pytest.raises(ValueError, match=r"batch|rows"):
            model(torch.tensor([[5], [6]]), past_key_values=cache)


@pytest.mark.parametrize("remove", [22, 100])
def test_crop_beyond_the_length(remove):
    model = stock_model("llama")
    cache = PagedCache(model.config, block_size=BLOCK_SIZE)
    with torch.no_grad():
        model(prompts.single()["input_ids"], past_key_values=cache)
    with pytest.raises(ValueError, match=r"crop|21"):
        cache.crop(-remove)
    assert cache.get_seq_length() == 21, "a refused crop changes nothing"


def test_cache_arguments():
    config = stock_model("llama").config
    with pytest.raises(ValueError, match="block_size"):
        PagedCache(config, block_size=10)
    with pytest.raises((TypeError, ValueError), match="config"):
        PagedCache(None)


# Arguments of `generate`


def test_invalid_arguments_of_generate_leave_nothing_behind():
    model = patched()
    for arguments in (
        {"num_beams": 0},
        {"max_new_tokens": -3},
        {"no_such_argument": 1},
        {"num_return_sequences": 3},
    ):
        with pytest.raises((ValueError, RuntimeError, ArithmeticError)):
            model.generate(**prompts.single(), **{"do_sample": False, "max_new_tokens": 4, **arguments})
    assert_usable(model)
