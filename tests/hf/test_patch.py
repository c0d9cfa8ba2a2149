"""Patching and its undo: what a patch leaves as it was, and what may be changed under it."""

import gc
import weakref

import prompts
import pytest
import torch
from compare import BLOCK_SIZE, copy_of, every_family
from families import PAD, stock_model
from patched_copies import GREEDY, LLAMA, assert_generates_as_stock, expected_tokens, is_patched, patched
from snapshot import differences, snapshot
from tolerances import assert_close

from hf_paged import PagedConfig, paged, patch_model, unpatch_model

# Patching


def test_patch_returns_the_same_object():
    model = copy_of(LLAMA)
    assert patch_model(model) is model
    assert is_patched(model)


def test_patched_model_is_still_its_class():
    model, stock = patched(), stock_model("llama")
    assert isinstance(model, type(stock))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model).__qualname__ == type(stock).__qualname__
    assert type(model).__module__ == type(stock).__module__
    assert repr(model) == repr(stock)
    assert model.config.to_dict() == stock.config.to_dict()


def test_nothing_is_patched_by_the_import_or_in_other_models():
    other = copy_of(LLAMA)
    before = snapshot(other)
    patched().generate(**prompts.single(), **GREEDY)
    assert differences(before, snapshot(other)) == []
    assert not is_patched(other)


def test_the_generation_config_and_inputs_are_not_changed():
    model, inputs = patched(), prompts.shared_prefix()
    before = model.generation_config.to_dict(), {name: value.clone() for name, value in inputs.items()}
    model.generate(**inputs, **GREEDY)
    assert model.generation_config.to_dict() == before[0]
    assert all(torch.equal(inputs[name], value) for name, value in before[1].items())


def test_patching_twice_changes_nothing():
    model = patched()
    kind, runtime = type(model), model.paged
    assert patch_model(model, block_size=BLOCK_SIZE) is model
    assert type(model) is kind
    assert model.paged.config == runtime.config
    assert_generates_as_stock(model)
    unpatch_model(model)
    assert not is_patched(model), "patched twice, unpatching once must be enough"


def test_patching_again_reconfigures():
    model = patched()
    assert_generates_as_stock(model)
    patch_model(model, block_size=32)
    assert model.paged.config.block_size == 32
    assert_generates_as_stock(model)
    patch_model(model, PagedConfig(block_size=64), prefix_caching=False)
    assert (model.paged.config.block_size, model.paged.config.prefix_caching) == (64, False)
    assert_generates_as_stock(model)
    assert model.paged.stats().blocks_in_use == 0


def test_config_object_and_overrides():
    config = PagedConfig(block_size=32)
    model = patch_model(copy_of(LLAMA), config, attention_backend="reference")
    assert (model.paged.config.block_size, model.paged.config.attention_backend) == (32, "reference")
    assert config == PagedConfig(block_size=32), "the user's object is not changed"


def test_pad_token_inside_the_prompt_is_a_token_like_any_other():
    """With an explicit mask, the id that is also the padding may stand in the middle of a text."""
    inputs = prompts.ragged()
    inputs["input_ids"][0, 4] = PAD
    expected = stock_model("llama").generate(**inputs, **GREEDY)
    assert torch.equal(patched().generate(**inputs, **GREEDY), expected)


# Changes after patching


def test_moving_and_casting_after_patching():
    model = patched().to(torch.float64)
    expected = copy_of(LLAMA).to(torch.float64).generate(**prompts.ragged(), **GREEDY)
    assert torch.equal(model.generate(**prompts.ragged(), **GREEDY), expected)
    assert_generates_as_stock(model.to(torch.float32))


def test_changed_weights_are_seen():
    """In-place edits between two calls on one prompt: the second must not use the first one's blocks."""
    model, stock = patched(), copy_of(LLAMA)
    assert_generates_as_stock(model)
    for one in (model, stock):
        with torch.no_grad():
            one.model.layers[1].self_attn.k_proj.weight.add_(0.3)
    expected = stock.generate(**prompts.shared_prefix(), **GREEDY)
    assert not torch.equal(expected, expected_tokens())
    assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), expected)


def test_set_attn_implementation_after_patching():
    model, stock = patched(), copy_of(LLAMA)
    for one in (model, stock):
        one.set_attn_implementation("eager")
    output = [
        one.generate(**prompts.single(), **GREEDY, output_attentions=True, return_dict_in_generate=True)
        for one in (model, stock)
    ]
    assert torch.equal(output[0].sequences, output[1].sequences)
    assert_close(output[0].attentions[0][0], output[1].attentions[0][0], "attentions")


# Undoing


@pytest.mark.parametrize("family", every_family())
def test_undo_restores_everything_reachable(family):
    model = copy_of(family)
    model.generate(**prompts.single(), **GREEDY)  # whatever stock itself creates on first use is not our doing
    before = snapshot(model)
    patch_model(model, block_size=BLOCK_SIZE)
    model.generate(**prompts.ragged(), **GREEDY)
    if "encoder_decoder" not in family.tags:
        model.generate(**prompts.ragged(), num_beams=2, **GREEDY)
    unpatch_model(model)
    assert differences(before, snapshot(model)) == []
    assert_generates_as_stock(model, family)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_undo_restores_the_attention_implementation(attention):
    model = copy_of(LLAMA)
    model.set_attn_implementation(attention)
    patch_model(model)
    model.generate(**prompts.single(), **GREEDY)
    unpatch_model(model)
    assert model.config._attn_implementation == attention
    assert model.model.layers[0].self_attn.config._attn_implementation == attention


def test_undo_keeps_the_users_own_attributes_and_hooks():
    model = copy_of(LLAMA)
    calls = []
    model.my_note = "kept"
    handle = model.model.register_forward_hook(lambda *args: calls.append(1))
    patch_model(model, block_size=BLOCK_SIZE)
    assert_generates_as_stock(model)
    assert calls, "a user's hook runs under the patch"
    unpatch_model(model)
    assert model.my_note == "kept"
    calls.clear()
    model.generate(**prompts.single(), **GREEDY)
    assert len(calls) == GREEDY["max_new_tokens"]
    handle.remove()


def test_users_instance_forward_survives():
    """Libraries replace `forward` on the instance; it must be called, and be there afterwards."""
    model, calls = copy_of(LLAMA), []
    original = model.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = forward
    patch_model(model, block_size=BLOCK_SIZE)
    assert_generates_as_stock(model)
    assert calls
    unpatch_model(model)
    assert model.forward is forward


def test_a_generate_that_was_taken_along_outlives_the_patch():
    """Libraries wrap `generate` on the instance."""
    model = patched()
    taken = model.generate
    model.generate = lambda *args, **kwargs: taken(*args, **kwargs)
    assert_generates_as_stock(model)
    assert model.paged.stats().prompt_tokens
    unpatch_model(model)
    assert_generates_as_stock(model)


def test_unpatch_without_patch_is_a_no_op():
    model = copy_of(LLAMA)
    before = snapshot(model)
    unpatch_model(model)
    unpatch_model(model)
    assert differences(before, snapshot(model)) == []


def test_unpatch_frees_the_memory():
    model = patched()
    model.generate(**prompts.shared_prefix(), **GREEDY)
    runtime = weakref.ref(model.paged)
    unpatch_model(model)
    gc.collect()
    assert runtime() is None, "the runtime and its pool live on after unpatching"


def test_a_patched_model_can_be_collected():
    model = patched()
    model.generate(**prompts.shared_prefix(), **GREEDY)
    alive = [weakref.ref(model), weakref.ref(model.paged)]
    del model
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_with_block_scopes_the_patch():
    model = copy_of(LLAMA)
    before = snapshot(model)
    with paged(model, block_size=BLOCK_SIZE) as inner:
        assert inner is model
        assert model.paged.config.block_size == BLOCK_SIZE
        assert_generates_as_stock(model)
    assert not is_patched(model)
    assert differences(before, snapshot(model)) == []


def test_with_block_undoes_after_an_exception():
    model = copy_of(LLAMA)
    with pytest.raises(KeyError), paged(model):
        raise KeyError("from the body")
    assert not is_patched(model)


def test_with_block_inside_a_patch_gives_the_outer_patch_back():
    model = patched()
    with paged(model, block_size=32):
        assert model.paged.config.block_size == 32
        assert_generates_as_stock(model)
    assert is_patched(model), "the outer patch was the user's own"
    assert model.paged.config.block_size == BLOCK_SIZE
    assert_generates_as_stock(model)


def test_unpatching_inside_of_with_blocks_is_final():
    model = patched()
    before = snapshot(unpatch_model(model))
    patch_model(model, block_size=BLOCK_SIZE)
    with paged(model, block_size=32), paged(model, block_size=16):
        unpatch_model(model)
    assert not is_patched(model), "whoever unpatches a model wants it as it was"
    with paged(patch_model(model)):
        with paged(unpatch_model(model), block_size=16):
            assert_generates_as_stock(model)
        assert not is_patched(model)
    assert differences(before, snapshot(model)) == []


def test_patching_anew_inside_of_a_with_block_lasts_as_long_as_the_block():
    model = patched()
    with paged(model, block_size=32):
        patch_model(unpatch_model(model), block_size=64)
    assert model.paged.config.block_size == BLOCK_SIZE
