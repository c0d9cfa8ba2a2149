"""`torch.set_default_device` says where a user's tensors are made, not where ours are."""

from functools import partial

import prompts
import pytest
import torch
from disk import tiered
from host import as_gpu
from pair import Pair, evict
from prompts import batch
from spilled import CALLS, narrow

RAGGED, SHARED, SINGLE = prompts.ragged(), prompts.shared_prefix(), prompts.single()


@pytest.fixture(autouse=True)
def elsewhere():
    """On "meta" every tensor that is made without a device shows, as on a GPU those would that belong to the CPU."""
    yield
    torch.set_default_device(None)


def ask(pair: Pair, inputs, **kwargs) -> None:
    torch.set_default_device("meta")
    pair.ask(inputs, **kwargs)
    torch.set_default_device(None)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_answers_are_those_of_stock(name, backend):
    pair = Pair(name, attention_backend=backend)
    for inputs in (RAGGED, SHARED, SINGLE, RAGGED):
        ask(pair, inputs, eos_token_id=None, max_new_tokens=20)
        assert pair.paged.stats().fallbacks == {}
    assert pair.reused > 0


def test_quantized_kv():
    pair = Pair(kv_cache_dtype="int8", verify=False)
    expected = pair.model.generate(**SHARED, do_sample=False, max_new_tokens=20)
    pair.paged.clear()
    torch.set_default_device("meta")
    assert torch.equal(pair.model.generate(**SHARED, do_sample=False, max_new_tokens=20), expected)


def test_lower_tiers_and_files(tmp_path):
    pair = tiered()
    ask(pair, SINGLE)
    torch.set_default_device("meta")
    written = pair.paged.save(tmp_path)
    evict(pair)
    ask(pair, SINGLE)
    assert pair.paged.stats().fetched_bytes > 0
    torch.set_default_device("meta")
    pair.paged.clear()
    assert pair.paged.load(tmp_path) == written > 0
    ask(pair, SINGLE)
    assert pair.reused > 0


@pytest.mark.parametrize("name", ["llama", "falcon_rotary"])
def test_calls_that_need_more_than_the_device(name, monkeypatch):
    """In fast passes and in stock-shaped ones; with copies that are made at once, as nothing else is tested here."""
    as_gpu(monkeypatch, lambda: None)
    pair = narrow(partial(Pair, name), 3, 9)
    inputs = batch(CALLS["batch"][0])
    torch.set_default_device("meta")
    pair.skip_where_older_stock_refuses(inputs)  # falcon in transformers 5.8
    ask(pair, inputs, max_new_tokens=20)
    assert pair.paged.stats().fetched_bytes > 0
