"""What `hf-paged plan` computes, against what caches of every family really hold and what budgets really carry."""

import copy

import pytest
import torch
import transformers
from compare import BLOCK_SIZE, copy_of, every_family
from families import FAMILIES, SIZES, stock_model
from pair import piece
from prompts import batch
from transformers import DynamicCache
from windows import PURE
from windows import stock_model as windowed_model

from hf_paged import PagedCache, PagedMemoryError, compat, patch_model
from hf_paged.core.capacity import Capacity, group_costs, stock_bytes
from hf_paged.footprint import footprint

DTYPES = [torch.float32, torch.bfloat16]
MOST = 2**14


def keeps_blocks(family) -> bool:
    return not family.tags & {"recurrent", "encoder_decoder"}


def capacity_of(model, block_size: int = BLOCK_SIZE) -> Capacity:
    layer_bytes = footprint(type(model), model.config, model.dtype).layer_bytes
    return Capacity(group_costs(layer_bytes, compat.cache_layout(model.config).windows), block_size, MOST)


def held_bytes(cache) -> int:
    """Of stock's cache: memory, not what the tensors show of it."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


# Bytes a token


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", every_family(keeps_blocks))
@torch.no_grad()
def test_bytes_of_a_token_are_those_of_real_caches(family, dtype):
    model = copy_of(family).to(dtype)
    predicted = footprint(type(model), model.config, dtype)
    assert predicted.estimated is None
    assert predicted.weight_bytes == sum(each.numel() * dtype.itemsize for each in model.parameters())
    stock, paged = DynamicCache(config=model.config), PagedCache(model.config, block_size=BLOCK_SIZE)
    for cache in (stock, paged):
        model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    # Layers that read what others keep have nothing of their own.
    shown = [layer.keys.nbytes + layer.values.nbytes for layer in stock.layers if layer.keys is not None]
    assert [3 * size for size in predicted.layer_bytes] == shown
    own = [layer for layer in paged.layers if layer.keys is not None]
    assert list(predicted.layer_bytes) == [layer.store.bytes_per_token for layer in own]


@pytest.mark.parametrize("family", every_family(keeps_blocks))
def test_pool_knows_the_bytes_before_the_first_token(family):
    """An estimate that is too high would waste a part of the budget for good."""
    model = patch_model(copy_of(family), block_size=BLOCK_SIZE)
    pool = model.paged._current_pool(model)
    before = [each.block_bytes for each in pool.manager.pools]
    model.generate(**batch([piece(9, 1)]), do_sample=False, max_new_tokens=2)
    assert [each.block_bytes for each in pool.manager.pools] == before


def test_random_numbers_of_the_process_are_left_alone():
    """This model draws some for its lambdas where it is made, also without memory."""
    config = transformers.DiffLlamaConfig(**SIZES)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert footprint(transformers.DiffLlamaForCausalLM, config, torch.float32).estimated is None
    assert torch.equal(torch.rand(2), expected)


# Bytes a sequence


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma3", "gpt_oss", "mistral_sliding"])
@pytest.mark.parametrize("lengths", [(3, 9), (30, 9), (5, 40)], ids=str)
def test_stock_holds_what_is_predicted(name, lengths):
    model, (prompt, new) = stock_model(name), lengths
    output = model.generate(
        **batch([piece(prompt, 1), piece(prompt, 2)]), do_sample=False, max_new_tokens=new, return_dict_in_generate=True
    )
    groups = capacity_of(model).groups
    assert held_bytes(output.past_key_values) == stock_bytes(groups, prompt + new - 1, rows=2)


def patched(model, budget_bytes: int, block_size: int = BLOCK_SIZE):
    return patch_model(model, block_size=block_size, max_memory={"cpu": budget_bytes})


def ask(model, rows: int, prompt: int, stored: int) -> None:
    """Generate so that each row's cache holds `stored` tokens at the end."""
    inputs = batch([piece(prompt, name) for name in range(rows)])
    # MPT asks for no cache by itself.
    model.generate(**inputs, do_sample=False, max_new_tokens=stored - prompt + 1, use_cache=True)


@pytest.mark.parametrize("prompt", [5, 70])
@pytest.mark.parametrize("family", every_family(lambda family: keeps_blocks(family) and family.name != PURE))
def test_the_longest_sequence_fits_and_no_longer_one(family, prompt):
    capacity = capacity_of(stock_model(family.name))
    budget = capacity.null_bytes + capacity.sequence_bytes(83)
    longest = capacity.longest(budget)
    assert longest == 88, "what 83 tokens take is filled to the last slot"
    ask(patched(copy_of(family), budget), 1, prompt, longest)
    with pytest.raises(PagedMemoryError):
        ask(patched(copy_of(family), budget), 1, prompt, longest + 1)


def test_window_layers_alone_carry_any_length():
    capacity = capacity_of(stock_model(PURE))
    enough = capacity.null_bytes + capacity.sequence_bytes(1000)
    assert capacity.longest(enough) is None
    ask(patched(copy_of(FAMILIES[PURE]), enough), 1, 5, 250)
    assert capacity.longest(enough - 1) == BLOCK_SIZE, "less than a window, but not nothing"


def test_a_budget_of_a_few_blocks_does_not_keep_models_off_the_fast_path():
    capacity = capacity_of(stock_model(PURE))
    model = patched(copy_of(FAMILIES[PURE]), capacity.null_bytes + capacity.sequence_bytes(1000))
    ask(model, 1, 5, 20)
    assert model.paged.stats().fallbacks == {}


@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize("window", [5, 8, 9, 20, 33])
@pytest.mark.parametrize("name", ["mistral_sliding", "gemma3"])
def test_windows_take_what_is_predicted(name, window, block_size):
    """To the byte, for a short prompt that is outgrown and for a long one; and no more than a window and two blocks."""
    build = windowed_model(name, window)
    capacity = capacity_of(build, block_size)
    (*_, group) = capacity.groups
    assert capacity.blocks(group, MOST) * block_size <= window + 2 * block_size
    budget = capacity.null_bytes + capacity.sequence_bytes(100)
    for prompt in (4, 90):
        ask(patched(copy.deepcopy(build), budget, block_size), 1, prompt, 100)
        with pytest.raises(PagedMemoryError):
            ask(patched(copy.deepcopy(build), budget - 1, block_size), 1, prompt, 100)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "falcon_rotary", "gemma3", "mistral_sliding"])
def test_as_many_sequences_fit_as_predicted(name):
    capacity = capacity_of(stock_model(name))
    budget = capacity.null_bytes + 4 * capacity.sequence_bytes(40) - 1
    count = capacity.sequences(budget, 40)
    assert count == 3
    ask(patched(copy_of(FAMILIES[name]), budget), count, 25, 40)
    with pytest.raises(PagedMemoryError):
        ask(patched(copy_of(FAMILIES[name]), budget), count + 1, 25, 40)
