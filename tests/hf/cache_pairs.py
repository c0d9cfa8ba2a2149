"""A `DynamicCache` and a `PagedCache` that have seen the same K and V, and must show the same."""

import torch
from compare import BLOCK_SIZE
from families import stock_model
from tolerances import KV, assert_close
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_paged import PagedCache

CONFIGS = ["llama", "mistral_sliding", "gemma3"]  # full layers only, sliding layers only, both


def both_caches(name: str, batch_size: int = 2, tokens: int = 13, record_past: bool = False) -> tuple[Cache, Cache]:
    """A DynamicCache and a PagedCache that have seen the same random K and V."""
    actual = PagedCache(stock_model(name).config, block_size=BLOCK_SIZE)
    caches = dynamic_twin(name, actual), actual
    if record_past:
        for cache in caches:
            cache.activate_past_recording()
    if tokens:
        append(caches, batch_size, tokens)
    return caches


def dynamic_twin(name: str, actual: Cache) -> Cache:
    """The DynamicCache that a PagedCache has to behave as, layer by layer as it calls itself.

    A layer that says it slides must do all that a DynamicSlidingWindowLayer does; one that keeps everything although
    the model looks through a window, all that a DynamicLayer does, as in a `DynamicCache()` without a config.
    """
    twin = DynamicCache(config=stock_model(name).config)
    assert len(actual.layers) == len(twin.layers)
    for index, slides in enumerate(actual.is_sliding):
        if not slides:
            twin.layers[index] = DynamicLayer()
    return twin


def append(caches: tuple[Cache, Cache], batch_size: int, tokens: int, seed: int = 0) -> None:
    """The same new K and V to both; what `update` returns must be equal, bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    for layer in range(len(caches[0].layers)):
        heads, dim = 2, 16
        keys, values = (torch.randn(batch_size, heads, tokens, dim, generator=generator) for _ in range(2))
        # transformers 5.17 returns more than its own masks cover while a window layer records its past.
        visible, _ = caches[0].get_mask_sizes(tokens, layer)
        results = [cache.update(keys, values, layer) for cache in caches]
        for name, expected, actual in zip(("keys", "values"), *results, strict=True):
            expected = expected[:, :, -visible:]
            assert_close(torch.clone(actual), expected, f"{name} returned by update of layer {layer}", KV)


def assert_caches_equal(dynamic: Cache, actual: Cache, what: str = "") -> None:
    """Everything visible: lengths, mask sizes, kinds of layers, and the dense K and V of every layer."""
    assert len(actual) == len(dynamic), what
    assert actual.get_seq_length() == dynamic.get_seq_length(), what
    assert actual.is_sliding == dynamic.is_sliding, what
    for index, (wanted, got) in enumerate(zip(dynamic.layers, actual.layers, strict=True)):
        name = f"{what}, layer {index}"
        assert got.get_seq_length() == wanted.get_seq_length(), name
        for queries in (1, 3, 20):
            assert actual.get_mask_sizes(queries, index) == dynamic.get_mask_sizes(queries, index), (
                f"{name}, {queries} queries"
            )
        if wanted.get_seq_length() == 0:
            continue
        assert_close(torch.clone(got.keys), wanted.keys, f"{name} keys", KV)
        assert_close(torch.clone(got.values), wanted.values, f"{name} values", KV)
