"""`PagedConfig` as a value: sizes as accelerate reads them, and settings that stay what they were at first."""

import copy
import json
import pickle
from dataclasses import asdict, replace

import pytest
from accelerate.utils.modeling import convert_file_size_to_int
from compare import copy_of
from patched_copies import LLAMA

from hf_paged import PagedConfig, patch_model
from hf_paged.config import parse_bytes

MEMORY = {"cpu": "1GiB", "disk": 10**9}


@pytest.mark.parametrize(
    "size", ["8GB", "8gB", "8Gb", "8gb", "1.5Mb", "3kb", "7KB", "8GiB", "8Gib", "8gib", "2MIB", "64KiB", 12]
)
def test_sizes_are_what_accelerate_takes_them_for(size):
    assert parse_bytes(size) == convert_file_size_to_int(size)


def test_settings_do_not_change_with_the_dict_that_they_came_from():
    memory = dict(MEMORY)
    config = PagedConfig(max_memory=memory)
    memory["cpu"] = "no size"
    assert config.max_memory == MEMORY
    assert config.budget_bytes("cpu") == 2**30


def test_a_dict_that_was_changed_reconfigures():
    memory = {"cpu": "64MiB"}
    model = patch_model(copy_of(LLAMA), max_memory=memory)
    memory["cpu"] = "32MiB"
    patch_model(model, max_memory=memory)
    assert model.paged.config.budget_bytes("cpu") == 2**25
    memory["cpu"] = "no size"
    with pytest.raises(ValueError, match="max_memory"):
        patch_model(model, max_memory=memory)
    assert model.paged.config.budget_bytes("cpu") == 2**25


CHANGES = {
    "set": lambda memory: memory.__setitem__("cpu", 1),
    "add": lambda memory: memory.setdefault(0, 1),
    "delete": lambda memory: memory.__delitem__("cpu"),
    "pop": lambda memory: memory.pop("cpu"),
    "popitem": lambda memory: memory.popitem(),
    "clear": lambda memory: memory.clear(),
    "update": lambda memory: memory.update(cpu=1),
    "merge": lambda memory: memory.__ior__({"cpu": 1}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_max_memory_is_as_frozen_as_the_rest(change):
    config = PagedConfig(max_memory=MEMORY)
    with pytest.raises(TypeError, match="max_memory"):
        CHANGES[change](config.max_memory)
    assert config.max_memory == MEMORY


@pytest.mark.parametrize(
    "again",
    [
        replace,
        copy.copy,
        copy.deepcopy,
        lambda config: pickle.loads(pickle.dumps(config)),
        lambda config: PagedConfig(**asdict(config)),
        lambda config: PagedConfig(**json.loads(json.dumps(asdict(config)))),
    ],
    ids=["replace", "copy", "deepcopy", "pickle", "asdict", "json"],
)
def test_equal_settings_are_equal_and_hash_alike(again):
    config = PagedConfig(max_memory=MEMORY, block_size=32)
    twin = again(config)
    assert twin == config
    assert hash(twin) == hash(config)
    assert twin.max_memory == MEMORY
    assert {config: "found"}[twin] == "found"


def test_other_limits_are_other_settings():
    one, other = (PagedConfig(max_memory={"cpu": size}) for size in ("1GiB", "2GiB"))
    assert one != other
    assert len({one, other, PagedConfig()}) == 3
