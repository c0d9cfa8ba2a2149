"""`max_memory` of models and caches whose layers lie elsewhere than one would think, or on several devices."""

from dataclasses import replace
from types import SimpleNamespace

import prompts
import pytest
import torch
from compare import copy_of
from patched_copies import GREEDY, LLAMA, patched

from hf_paged import PagedCache, PagedConfig, PagedMemoryError, limits, patch_model, pool
from hf_paged.pool import KVPool

CPU, OTHER = torch.device("cpu"), torch.device("meta")  # which is called 0
TOKEN_BYTES = 2 * 2 * 16 * 4  # of K and V in one layer: heads, dim, float32
BLOCK_BYTES = 8 * TOKEN_BYTES


def spread(max_memory, devices=(CPU, OTHER), known=True, windows=(None, None)) -> KVPool:
    """A pool with a layer on each of the devices, which it is told of, or sees later."""
    settings = PagedConfig(block_size=8, max_memory=max_memory)
    return KVPool(settings, windows, [TOKEN_BYTES] * len(devices), devices[0], layer_devices=devices if known else None)


def see(made: KVPool, devices=(CPU, OTHER)) -> None:
    for index, device in enumerate(devices):
        key = torch.zeros(1, 2, 1, 16, device=device)
        made.layer(index, key, key)


@pytest.fixture
def on_demand(monkeypatch):
    """Memory of the other device is taken as it is needed, too."""
    monkeypatch.setattr(pool, "comes_on_demand", lambda device: True)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("here", "there"), [(40, 10), (10, 40), (20, 20)])
def test_each_device_keeps_to_its_limit(here, there, known, on_demand):
    """A block of two layers has half of its bytes on either."""
    made = spread({"cpu": here * BLOCK_BYTES, 0: there * BLOCK_BYTES}, known=known)
    see(made)
    # As long as nothing is known, there are ids for a first device that has it all.
    fits = min(here, there) if known else min(here // 2, there)
    assert made.manager.available == fits - 1  # beside the null block


def test_layers_of_a_window_count_where_they_lie(on_demand):
    """Those of one group all lie on the other device: were all blocks theirs, its limit would be kept to."""
    made = spread({"cpu": 40 * BLOCK_BYTES, 0: 10 * BLOCK_BYTES}, windows=(None, 16))
    see(made)
    assert [group.available for group in made.manager.pools] == [8, 8]


def test_a_limit_of_a_later_device_alone_counts(on_demand):
    made = spread({0: 10 * BLOCK_BYTES})
    see(made)
    assert made.manager.available == 9


def test_without_a_limit_of_its_own_a_device_sets_none(on_demand):
    made = spread({"cpu": 10 * BLOCK_BYTES})
    see(made)
    assert made.manager.available == 9


def test_what_does_not_fit_names_the_device_that_is_full(on_demand):
    made = spread({"cpu": 40 * BLOCK_BYTES, 0: 10 * BLOCK_BYTES})
    see(made)
    with pytest.raises(PagedMemoryError, match=r"Raise max_memory\[0\], shorten"):
        made.append_dense([made.manager.new_table()], [200], 0)


def test_where_ids_are_too_few_the_device_that_they_were_made_for_is_named(on_demand):
    """A limit that was looked at before anybody knew that other layers lie elsewhere."""
    made = spread({"cpu": 20 * BLOCK_BYTES, 0: 15 * BLOCK_BYTES}, known=False)
    see(made)
    with pytest.raises(PagedMemoryError, match=r"Raise max_memory\['cpu'\], shorten"):
        made.append_dense([made.manager.new_table()], [8 * 12], 0)


def test_where_a_models_layers_lie_is_known_from_its_trial():
    """So that each device keeps to its limit from the first prompt on."""
    model = patched(max_memory={"cpu": "64KiB", 0: "16KiB"})
    model.generate(**prompts.single(), **GREEDY)
    assert model.paged._pool.manager.budget.limit_bytes == 2**16, "nothing lies on the other device"
    model.paged.release()
    ((circumstances, found),) = model.paged._capabilities._found.items()
    assert found.layer_devices == (CPU, CPU)
    model.paged._capabilities._found[circumstances] = replace(found, layer_devices=(CPU, OTHER))
    assert model.paged._current_pool(model).manager.budget.limit_bytes == 2 * 2**14


# Limits of devices where nothing is


@pytest.mark.parametrize("memory", [{0: "2GiB"}, {1: "1GiB", 0: "1GiB"}, {0: "2GiB", "disk": "1GiB"}], ids=str)
def test_a_limit_of_another_device_alone_is_refused(memory):
    model = copy_of(LLAMA)
    with pytest.raises(ValueError, match=r"max_memory\[\d\] limits nothing: .* on cpu; set max_memory\['cpu'\]"):
        patch_model(model, max_memory=memory)
    assert not hasattr(model, "paged")


def test_a_limit_of_another_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(limits, "budget_key", lambda device: 0)
    with pytest.raises(ValueError, match=r"max_memory\[1\] limits nothing: .*set max_memory\[0\]"):
        patch_model(copy_of(LLAMA), max_memory={1: "2GiB", "cpu": "1GiB"})


def test_one_dict_for_all_devices_is_fine_where_some_entry_is_a_limit():
    """As accelerate's, whatever it has put where, and the same on all ranks."""
    model = patched(max_memory={0: "2GiB", 1: "2GiB", "cpu": "64KiB"})
    model.generate(**prompts.single(), **GREEDY)
    assert model.paged.stats().fallbacks == {}
    ids = torch.tensor([prompts.tokens(200)])
    with pytest.raises(PagedMemoryError, match=r"max_memory\['cpu'\]"):
        model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)


def test_devices_that_hooks_compute_on_are_the_models():
    model = copy_of(LLAMA)
    model.model.layers[1]._hf_hook = SimpleNamespace(execution_device="meta")
    patch_model(model, max_memory={0: "2GiB"})
    assert limits.compute_devices(model) == [CPU, OTHER]


def test_a_model_that_has_moved_away_from_its_limit_says_so(monkeypatch):
    with monkeypatch.context() as as_gpu:
        as_gpu.setattr(limits, "budget_key", lambda device: 0)
        model = patched(max_memory={0: "64KiB"})
    with pytest.warns(UserWarning, match=r"takes what memory is free: max_memory\[0\] limits nothing"):
        model.generate(**prompts.single(), **GREEDY)
    (reason,) = model.paged.stats().fallbacks
    assert "max_memory[0] limits nothing" in reason


@pytest.mark.parametrize("memory", [{"cpu": "1GiB"}, {1: "1GiB"}], ids=str)
def test_a_limit_of_another_device_than_a_caches_own_is_refused(memory, monkeypatch):
    """Where there are no tiers, `"cpu"` is a device like any other."""
    monkeypatch.setattr(limits, "budget_key", lambda device: 0)
    model = copy_of(LLAMA)
    with pytest.raises(ValueError, match=r"limits nothing: .* set max_memory\[0\]"), torch.no_grad():
        model(prompts.single()["input_ids"], past_key_values=PagedCache(model.config, max_memory=memory))


@pytest.mark.parametrize("patch", [False, True])
def test_a_gpus_limit_on_the_cpu_is_refused_of_a_cache_too(patch):
    model = patched(max_memory={"cpu": "1MiB"}) if patch else copy_of(LLAMA)
    cache = PagedCache(model.config, block_size=8, max_memory={0: "1MiB"})
    with pytest.raises(ValueError, match=r"max_memory\[0\] limits nothing: .* set max_memory\['cpu'\]"):
        model.generate(**prompts.single(), past_key_values=cache, **GREEDY)
    assert model.generate(**prompts.single(), **GREEDY).shape[0] == 1


@pytest.mark.parametrize("patch", [False, True])
def test_the_limit_of_a_cache_of_ones_own(patch):
    model = patched() if patch else copy_of(LLAMA)
    ids = torch.tensor([prompts.tokens(200)])
    given = {"attention_mask": torch.ones_like(ids), **GREEDY}
    cache = PagedCache(model.config, block_size=8, max_memory={"cpu": "64KiB"})
    with pytest.raises(PagedMemoryError, match=r"max_memory\['cpu'\]"):
        model.generate(ids, past_key_values=cache, **given)
    roomy = PagedCache(model.config, block_size=8, max_memory={"cpu": "1MiB"})
    assert model.generate(ids, past_key_values=roomy, **given).shape == (1, 208)


def test_the_limit_of_a_cache_is_one_without_tiers(tmp_path):
    """Whatever the model has below its own pool."""
    model = patched(max_memory={"cpu": "1MiB", "disk": "1MiB"}, offload_folder=tmp_path)
    ids = torch.tensor([prompts.tokens(200)])
    cache = PagedCache(model.config, block_size=8, max_memory={"cpu": "64KiB"})
    with pytest.raises(PagedMemoryError, match=r"Raise max_memory\['cpu'\], shorten"):
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY)


def test_groups_of_layers_that_lie_differently_keep_to_each_limit():
    """Whichever of them blocks are taken for: all of its blocks may be the group's that has most there."""
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    made = limits.DeviceLimits(PagedConfig(max_memory={0: 1000, 1: 900}), first)
    made.place([(0, 10, first), (1, 10, first), (1, 30, second)])
    assert made.allowed_bytes == 1000
    assert made.tightest == 0
