"""Models whose weights accelerate brings in layer by layer, from memory or disk, patch and generate like any other."""

import functools
import gc

import accelerate
import prompts
import pytest
import torch
from compare import BLOCK_SIZE, copy_of
from families import FAMILIES, stock_model
from snapshot import differences, snapshot

from hf_paged import patch_model, unpatch_model

GREEDY = {"do_sample": False, "max_new_tokens": 8}
CPU = torch.device("cpu")
ON_DISK = {"prefixes not reused: weights offloaded to disk, or in a layout without strides"}


def spread(model) -> dict[str, str]:
    """A device map: the embedding and the first layer in memory, everything else on disk."""
    names = [name for name, _ in model.named_modules() if name.count(".") == 1 and name != "model.layers"]
    names += [f"model.layers.{index}" for index in range(len(model.model.layers))] + ["lm_head"]
    return {name: "cpu" if name in ("model.embed_tokens", "model.layers.0") else "disk" for name in names}


def loaded(model, folder, **how):
    model.save_pretrained(folder / "model")
    return type(model).from_pretrained(folder / "model", offload_folder=folder / "weights", **how).eval()


def offloaded_with_hook(model, folder):
    return accelerate.cpu_offload_with_hook(model, execution_device="cpu")[0]


HOW = {
    "hooks only": lambda model, folder: accelerate.dispatch_model(
        model, {name: "cpu" for name, _ in model.named_children()}, force_hooks=True
    ),
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, execution_device=CPU) or model,
    "cpu_offload_with_hook": offloaded_with_hook,
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, execution_device=CPU) or model,
    "device_map with disk": lambda model, folder: accelerate.dispatch_model(
        model, spread(model), main_device="cpu", offload_dir=folder
    ),
    "from_pretrained device_map": lambda model, folder: loaded(model, folder, device_map=spread(model)),
    "from_pretrained max_memory": lambda model, folder: loaded(
        model, folder, device_map="auto", max_memory={"cpu": 250_000}
    ),
}
FROM_DISK = [how for how in HOW if "disk" in how or "from_pretrained" in how]


def structure(model) -> dict:
    """Of a snapshot, all but which object each weight is: accelerate makes new placeholders with every pass."""
    return {name: state for name, state in snapshot(model).items() if name not in ("parameters", "buffers")}


CALLS = [
    (prompts.shared_prefix, {}),
    (prompts.ragged, {"num_beams": 2}),
    (prompts.single, {"do_sample": True, "num_return_sequences": 3}),
]


def answers(model) -> list[torch.Tensor]:
    """What a model says to a batch, a beam search and a request for samples."""
    said = []
    for inputs, how in CALLS:
        torch.manual_seed(3)
        said.append(model.generate(**inputs(), **{**GREEDY, **how}))
    return said


@functools.cache
def stock_answers(name: str) -> list[torch.Tensor]:
    return answers(stock_model(name))


def assert_answers_as_stock(model, name: str) -> None:
    for (_, how), expected, actual in zip(CALLS, stock_answers(name), answers(model), strict=True):
        assert torch.equal(actual, expected), how


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("how", HOW)
def test_offloaded_models_generate_and_unpatch_like_others(how, name, tmp_path):
    model = HOW[how](copy_of(FAMILIES[name]), tmp_path)
    assert any(hasattr(module, "_hf_hook") for module in model.modules()), "accelerate has put its hooks in"
    assert (how in FROM_DISK) <= any(each.is_meta for each in model.parameters()), "some weights are not in memory"
    assert_answers_as_stock(model, name)  # whatever stock itself creates on first use is not our doing
    before = structure(model)
    patch_model(model, block_size=BLOCK_SIZE)
    assert_answers_as_stock(model, name)
    stats = model.paged.stats()
    assert stats.fallbacks.keys() == (ON_DISK if how in FROM_DISK else set())
    assert stats.shared_tokens > 0, "the prompt that rows share was computed once"
    assert stats.blocks_in_use == 0
    assert {layer.keys.device.type for layer in model.paged._pool.stores} == {"cpu"}
    unpatch_model(model)
    assert differences(before, structure(model)) == []
    assert_answers_as_stock(model, name)


@pytest.mark.parametrize("how", [how for how in HOW if "from_pretrained" not in how])
def test_patched_models_can_be_offloaded(how, tmp_path):
    model = HOW[how](patch_model(copy_of(FAMILIES["llama"]), block_size=BLOCK_SIZE), tmp_path)
    assert_answers_as_stock(model, "llama")
    assert model.paged.stats().fallbacks.keys() == (ON_DISK if how in FROM_DISK else set())
    unpatch_model(model)
    assert_answers_as_stock(model, "llama")


@pytest.mark.parametrize("how", [how for how in HOW if how not in FROM_DISK])
def test_prefixes_are_reused_where_weights_can_be_watched(how, tmp_path):
    model = patch_model(HOW[how](copy_of(FAMILIES["llama"]), tmp_path), block_size=BLOCK_SIZE)
    for _ in range(2):
        assert_answers_as_stock(model, "llama")
    stats = model.paged.stats()
    assert stats.reused_tokens > stats.computed_tokens


def test_weights_that_change_while_offloaded_are_noticed():
    model, changed = copy_of(FAMILIES["llama"]), copy_of(FAMILIES["llama"])
    accelerate.cpu_offload(model, execution_device=CPU)
    patch_model(model, block_size=BLOCK_SIZE)
    assert_answers_as_stock(model, "llama")
    projection = model.model.layers[0].self_attn.v_proj
    with torch.no_grad():
        projection._hf_hook.weights_map["weight"].mul_(-1.0)
        changed.model.layers[0].self_attn.v_proj.weight.mul_(-1.0)
    expected = changed.generate(**prompts.shared_prefix(), **GREEDY)
    assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), expected)
    assert not torch.equal(expected, stock_model("llama").generate(**prompts.shared_prefix(), **GREEDY))


def test_prefixes_of_offloaded_weights_are_those_of_the_same_weights_in_memory(tmp_path):
    model = patch_model(copy_of(FAMILIES["llama"]), block_size=BLOCK_SIZE)
    model.generate(**prompts.shared_prefix(), **GREEDY)
    written = model.paged.save(tmp_path)
    other = copy_of(FAMILIES["llama"])
    accelerate.cpu_offload(other, execution_device=CPU)
    patch_model(other, block_size=BLOCK_SIZE)
    assert other.paged.load(tmp_path) == written
    assert_answers_as_stock(other, "llama")
    assert other.paged.stats().reused_tokens > 0


def test_an_error_in_the_middle_leaves_weights_and_blocks_as_they_were():
    model = copy_of(FAMILIES["llama"])
    accelerate.cpu_offload(model, execution_device=CPU)
    patch_model(model, block_size=BLOCK_SIZE, prefix_caching=False)

    def stop(ids, scores, **kwargs):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.generate(**prompts.shared_prefix(), **GREEDY, stopping_criteria=[stop])
    gc.collect()
    assert model.paged.stats().blocks_in_use == 0
    assert_answers_as_stock(model, "llama")
