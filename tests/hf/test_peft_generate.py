"""PEFT's models for causal language modelling, which have a `generate` of their own, around a patch or in one."""

import prompts
import torch
from adapters import lora
from compare import BLOCK_SIZE, copy_of
from patched_copies import GREEDY, LLAMA, assert_generates_as_stock, expected_tokens, is_patched, patched

from hf_paged import patch_model, unpatch_model


def test_peft_model_patched_from_outside():
    stock, model = lora(copy_of(LLAMA)), lora(copy_of(LLAMA))
    expected = stock.generate(**prompts.shared_prefix(), **GREEDY)
    assert not torch.equal(expected, expected_tokens()), "the adapter must matter"
    assert patch_model(model, block_size=BLOCK_SIZE) is model
    assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), expected)
    stats = model.paged.stats()
    assert stats.prompt_tokens == prompts.num_real_tokens(prompts.shared_prefix())
    assert stats.fallbacks == {}
    assert stats.blocks_in_use == 0
    unpatch_model(model)
    assert not is_patched(model)
    assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), expected)


def test_model_patched_before_peft_wraps_it():
    expected = lora(copy_of(LLAMA)).generate(**prompts.shared_prefix(), **GREEDY)
    base = patched()
    assert_generates_as_stock(base)
    model = lora(base)
    assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), expected)
    assert model.paged.stats().blocks_in_use == 0


def test_peft_adapter_switched_off_and_on():
    """Each state of the adapter has its own cached prefixes."""
    model = patch_model(lora(copy_of(LLAMA)), block_size=BLOCK_SIZE)
    adapted = lora(copy_of(LLAMA)).generate(**prompts.shared_prefix(), **GREEDY)
    for _ in range(2):
        assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), adapted)
        with model.disable_adapter():
            assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), expected_tokens())


def test_peft_merge():
    stock, model = lora(copy_of(LLAMA)), patch_model(lora(copy_of(LLAMA)), block_size=BLOCK_SIZE)
    for _ in range(2):
        expected = stock.generate(**prompts.shared_prefix(), **GREEDY)
        assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), expected)
        stock.merge_adapter(), model.merge_adapter()
    merged = patch_model(lora(copy_of(LLAMA)), block_size=BLOCK_SIZE).merge_and_unload()
    assert torch.equal(merged.generate(**prompts.shared_prefix(), **GREEDY), expected)
