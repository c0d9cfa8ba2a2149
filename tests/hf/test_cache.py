"""`PagedCache` as a cache: method for method what `DynamicCache` is."""

import copy
import gc
import inspect

import numpy as np
import prompts
import pytest
import torch
from cache_pairs import CONFIGS, append, assert_caches_equal, both_caches, dynamic_twin
from compare import BLOCK_SIZE, copy_of
from families import FAMILIES, stock_model
from tolerances import KV, assert_close
from transformers import Cache, DynamicCache

from hf_paged import PagedCache, patch_model


def test_append_uses_the_shape_of_the_configs():
    for name in CONFIGS:
        config = stock_model(name).config
        assert (config.num_key_value_heads, config.head_dim) == (2, 16), name


def test_it_has_every_public_member_of_dynamic_cache():
    dynamic, actual = both_caches("gemma3")
    missing = [name for name in dir(dynamic) if not name.startswith("_") and hasattr(dynamic, name)]
    missing = [name for name in missing if not hasattr(actual, name)]
    assert missing == []
    for wanted, got in zip(dynamic.layers, actual.layers, strict=True):
        allowed = {"dtype", "device", "lazy_initialization"}  # how a dense layer happens to keep its tensors
        missing = [name for name in dir(wanted) if not name.startswith("_") and not hasattr(got, name)]
        assert set(missing) <= allowed, missing


@pytest.mark.parametrize("name", CONFIGS)
def test_methods_take_the_arguments_of_dynamic_cache(name):
    dynamic, actual = both_caches(name)
    for method, function in inspect.getmembers(dynamic, inspect.ismethod):
        if method.startswith("_") or method == "crop":  # whose only argument has had two names
            continue
        wanted = list(inspect.signature(function).parameters)
        got = inspect.signature(getattr(actual, method)).parameters
        takes_anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in got.values())
        assert takes_anything or list(got)[: len(wanted)] == wanted, f"{method}: {list(got)}, DynamicCache {wanted}"


@pytest.mark.parametrize("name", CONFIGS)
def test_empty(name):
    dynamic, actual = both_caches(name, tokens=0)
    assert_caches_equal(dynamic, actual)
    assert isinstance(actual, Cache)
    assert actual.is_initialized == dynamic.is_initialized
    assert actual.is_compileable == dynamic.is_compileable
    assert (actual.get_seq_length(), actual.get_seq_length(1)) == (0, 0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pieces", [[1], [8], [16], [7, 1, 1], [13, 5, 1, 20], [1] * 12])
def test_append(name, pieces):
    caches = both_caches(name, tokens=0)
    for seed, count in enumerate(pieces):
        append(caches, 2, count, seed)
        assert_caches_equal(*caches, f"after {pieces[: seed + 1]}")
    assert caches[1].is_initialized == caches[0].is_initialized is True


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("order", [[1, 0, 2], [0, 0, 0], [2, 2, 1], [0, 1, 2]])
def test_reorder(name, order):
    caches = both_caches(name, batch_size=3)
    for cache in caches:
        cache.reorder_cache(torch.tensor(order))
    assert_caches_equal(*caches, "after the reorder")
    append(caches, 3, 4, seed=1)
    assert_caches_equal(*caches, "rows that share blocks must part when they grow")


@pytest.mark.parametrize("name", CONFIGS)
def test_repeat_interleave(name):
    caches = both_caches(name)
    for cache in caches:
        cache.batch_repeat_interleave(3)
    assert_caches_equal(*caches)
    append(caches, 6, 2, seed=1)
    assert_caches_equal(*caches, "after growing")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 1, 1, 2], [-1]])
def test_select(name, rows):
    caches = both_caches(name, batch_size=3)
    for cache in caches:
        cache.batch_select_indices(torch.tensor(rows))
    assert_caches_equal(*caches)
    append(caches, len(rows), 3, seed=1)
    assert_caches_equal(*caches, "after growing")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [[0], (2, -1), [True, False, True], np.array([2, 0])], ids=str)
def test_select_as_tensors_take_it(name, rows):
    caches = both_caches(name, batch_size=3)
    for cache in caches:
        cache.batch_select_indices(rows)
    assert_caches_equal(*caches)


@pytest.mark.parametrize("name", CONFIGS)
def test_select_with_a_mask(name):
    caches = both_caches(name, batch_size=3)
    for cache in caches:
        cache.batch_select_indices(torch.tensor([True, False, True]))
    assert_caches_equal(*caches)


def positive_crop_is_supported() -> bool:
    """Up to 5.13 a positive argument was the length to keep; later versions refuse it."""
    cache = DynamicCache(config=stock_model("llama").config)
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16), layer)
    try:
        cache.crop(3)
    except ValueError:
        return False
    return cache.get_seq_length() == 3


def test_crop_of_zero():
    """The number that is neither positive nor negative: all or nothing, as the installed transformers has it."""
    caches = both_caches("llama")
    for cache in caches:
        cache.crop(0)
    assert caches[1].get_seq_length() == caches[0].get_seq_length()


@pytest.mark.parametrize("remove", [1, 5, 8, 12])
def test_crop_by_a_number_of_tokens(remove):
    caches = both_caches("llama")
    for cache in caches:
        cache.crop(-remove)
    assert caches[1].get_seq_length() == 13 - remove
    assert_caches_equal(*caches)
    append(caches, 2, 6, seed=1)
    assert_caches_equal(*caches, "after growing again")


@pytest.mark.parametrize("keep", [1, 8, 12, 13, 40])
def test_crop_to_a_length(keep):
    """The old convention is accepted everywhere; where stock accepts it too, the results are equal."""
    dynamic, actual = both_caches("llama")
    actual.crop(keep)
    assert actual.get_seq_length() == min(keep, 13)
    if positive_crop_is_supported():
        dynamic.crop(keep)
    elif keep < 13:
        dynamic.crop(keep - 13)
    assert_caches_equal(dynamic, actual)


@pytest.mark.parametrize("name", CONFIGS)
def test_crop_below_the_window(name):
    caches = both_caches(name, tokens=6)
    for cache in caches:
        cache.crop(-2)
    assert_caches_equal(*caches)
    append(caches, 2, 9, seed=1)
    assert_caches_equal(*caches, "after growing past the window")


needs_past_recording = pytest.mark.skipif(
    not hasattr(Cache, "activate_past_recording"), reason="this transformers has no past recording"
)


@needs_past_recording
@pytest.mark.parametrize("name", CONFIGS)
def test_crop_beyond_the_window_while_the_past_is_recorded(name):
    caches = both_caches(name, tokens=0, record_past=True)
    assert (
        caches[1].is_recording_past(0) == caches[0].is_recording_past(0)
        if hasattr(Cache, "is_recording_past")
        else True
    )
    append(caches, 2, 13)
    for seed, (count, remove) in enumerate([(5, 4), (3, 3), (6, 0), (1, 1), (4, 2)], start=1):
        append(caches, 2, count, seed)
        for cache in caches:
            cache.crop(-remove)
        assert_caches_equal(*caches, f"after +{count} −{remove}")


@pytest.mark.parametrize("name", CONFIGS)
def test_is_croppable(name):
    dynamic, actual = both_caches(name)
    if not hasattr(dynamic, "is_croppable"):
        pytest.skip("this transformers has no is_croppable")
    assert actual.is_croppable == dynamic.is_croppable
    assert [layer.is_croppable for layer in actual.layers] == [layer.is_croppable for layer in dynamic.layers]


@pytest.mark.parametrize("name", CONFIGS)
def test_maximum_length(name):
    dynamic, actual = both_caches(name)
    method = "get_max_length" if hasattr(dynamic, "get_max_length") else "get_max_cache_shape"
    for layer in range(len(dynamic)):
        assert getattr(actual, method)(layer) == getattr(dynamic, method)(layer)
    assert getattr(actual, method)() == getattr(dynamic, method)()


@pytest.mark.parametrize("name", CONFIGS)
def test_reset_and_reuse_with_another_batch_size(name):
    caches = both_caches(name)
    actual = caches[1]
    actual.reset()
    assert actual.get_seq_length() == 0
    fresh = dynamic_twin(name, actual)
    append((fresh, actual), 3, 11, seed=4)
    assert_caches_equal(fresh, actual)


@pytest.mark.parametrize("name", CONFIGS)
def test_iteration_over_layers(name):
    dynamic, actual = both_caches(name)
    wanted, got = list(dynamic), list(actual)
    assert len(wanted) == len(got)
    for layer, (expected, found) in enumerate(zip(wanted, got, strict=True)):
        assert len(expected) == len(found)
        assert_close(torch.clone(found[0]), expected[0], f"keys of layer {layer}", KV)
        assert_close(torch.clone(found[1]), expected[1], f"values of layer {layer}", KV)
        assert (found[2] is None) == (expected[2] is None)
        assert expected[2] is None or int(found[2]) == int(expected[2])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dynamic_cache_can_be_made_from_it(name):
    """The way DDP and older code convert caches: through iteration."""
    dynamic, actual = both_caches(name)
    rebuilt = DynamicCache([(torch.clone(layer[0]), torch.clone(layer[1])) for layer in actual])
    for wanted, got in zip(dynamic.layers, rebuilt.layers, strict=True):
        assert torch.equal(got.keys, wanted.keys)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "operation",
    [
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.batch_select_indices([1]),
        lambda layer: layer.crop(-3),
    ],
    ids=["reorder", "repeat", "select", "select by a list", "crop"],
)
def test_layer_methods_one_by_one(name, operation):
    """`for layer in cache.layers: layer.method(...)` is how `Cache` itself and other code apply an operation."""
    caches = both_caches(name, tokens=6)
    for cache in caches:
        for layer in cache.layers:
            operation(layer)
    assert_caches_equal(*caches, "after the loop over layers")
    rows = caches[0].layers[0].keys.shape[0]
    append(caches, rows, 5, seed=2)
    assert_caches_equal(*caches, "after growing")


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_update_one_by_one(name):
    caches = both_caches(name, tokens=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for layers in zip(caches[0].layers, caches[1].layers, strict=True):
            keys, values = (torch.randn(2, 2, 5, 16, generator=generator) for _ in range(2))
            (keys_a, values_a), (keys_b, values_b) = (layer.update(keys, values) for layer in layers)
            assert_close(torch.clone(keys_b), keys_a, "keys", KV)
            assert_close(torch.clone(values_b), values_a, "values", KV)
    assert_caches_equal(*caches)


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_reset_one_by_one(name):
    caches = both_caches(name)
    for layer in caches[1].layers:
        layer.reset()
    assert caches[1].get_seq_length() == 0
    fresh = dynamic_twin(name, caches[1])
    append((fresh, caches[1]), 2, 7, seed=3)
    assert_caches_equal(fresh, caches[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_deepcopies_go_on_independently(name):
    caches = both_caches(name)
    copies = copy.deepcopy(caches)
    assert_caches_equal(*copies, "right after the copy")
    append(caches, 2, 4, seed=1)
    append(copies, 2, 6, seed=2)
    assert_caches_equal(*caches, "the original")
    assert_caches_equal(*copies, "the copy")
    del caches
    gc.collect()
    append(copies, 2, 1, seed=3)
    assert_caches_equal(*copies, "the copy, after the original is gone")


def test_deepcopy_on_a_pool_frees_only_its_own():
    model = patch_model(copy_of(FAMILIES["llama"]), block_size=BLOCK_SIZE)
    output = model.generate(**prompts.single(), do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    held = model.paged.stats().blocks_in_use
    assert held > 0
    twin = copy.deepcopy(output.past_key_values)
    del output
    gc.collect()
    assert model.paged.stats().blocks_in_use > 0
    before = [torch.clone(layer.keys) for layer in twin.layers]
    model.generate(**prompts.ragged(), do_sample=False, max_new_tokens=12)
    assert all(torch.equal(torch.clone(layer.keys), keys) for layer, keys in zip(twin.layers, before, strict=True))
    del twin
    gc.collect()
    assert model.paged.stats().blocks_in_use == 0


def test_returned_tensors_are_not_overwritten_later():
    """What `update` returned is the user's: with DynamicCache it is a snapshot of that moment."""
    caches = both_caches("llama", tokens=0)
    keys, values = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    returned = torch.clone(caches[1].update(keys, values, 0)[0])
    assert torch.equal(returned, keys)
    keys.zero_()
    assert not torch.equal(torch.clone(caches[1].layers[0].keys), keys), "the cache keeps its own copy"


@pytest.mark.parametrize("shape", [(1, 1, 64), (5, 7, 16)], ids=str)
def test_other_shapes_come_from_the_tensors(shape):
    """Heads and dims of a config may mislead (as for latent attention): what is appended decides."""
    heads, tokens, dim = shape
    config = FAMILIES["llama"].build(num_attention_heads=4, num_key_value_heads=2).config
    dynamic, actual = DynamicCache(config=config), PagedCache(config, block_size=BLOCK_SIZE)
    keys, values = torch.randn(2, heads, tokens, dim), torch.randn(2, heads, tokens, dim // 2)
    for layer in range(2):
        for cache in (dynamic, actual):
            cache.update(keys, values, layer)
    assert_caches_equal(dynamic, actual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_come_back_bit_for_bit(dtype):
    config = stock_model("llama").config
    dynamic, actual = DynamicCache(config=config), PagedCache(config, block_size=BLOCK_SIZE)
    for layer in range(2):
        keys, values = torch.randn(2, 2, 11, 16).to(dtype), torch.randn(2, 2, 11, 16).to(dtype)
        for cache in (dynamic, actual):
            cache.update(keys, values, layer)
    for wanted, got in zip(dynamic.layers, actual.layers, strict=True):
        assert got.keys.dtype == dtype
        assert torch.equal(torch.clone(got.keys), wanted.keys)
        assert torch.equal(torch.clone(got.values), wanted.values)
