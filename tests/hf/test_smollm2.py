"""End to end on a real model: SmolLM2-135M-Instruct, text in, the same text out."""

import pytest
import torch
from real import checkpoint

from benchmarks import smollm2 as smollm2_loader
from hf_paged import paged

pytestmark = pytest.mark.real

TEXT = (
    "The lighthouse keeper kept a diary. Every evening he wrote down the weather, the ships that had passed, and one "
    "thing that had surprised him. On the last page, dated the third of November, there was only a drawing of"
)
QUESTIONS = ["What did he draw?", "Who found the diary, and what did they do with it afterwards?", "Why?"]


@pytest.fixture(scope="module")
def smollm2():
    """The tokenizer, the stock model, and a second model object on the same weights to patch."""
    checkpoint()
    stock = smollm2_loader.load_model()
    return smollm2_loader.load_tokenizer(), stock, smollm2_loader.twin(stock)


MODES = {
    "greedy": {"do_sample": False},
    "beam": {"num_beams": 3, "do_sample": False},
    "samples": {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8},
}


@pytest.mark.parametrize("name", MODES)
def test_same_text_for_one_prompt(smollm2, name):
    tokenizer, stock, twin = smollm2
    inputs = tokenizer(TEXT, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    expected = stock.generate(**inputs, max_new_tokens=8, **MODES[name])
    with paged(twin) as model:
        torch.manual_seed(0)
        actual = model.generate(**inputs, max_new_tokens=8, **MODES[name])
        stats = model.paged.stats()
    assert tokenizer.batch_decode(actual) == tokenizer.batch_decode(expected)
    assert torch.equal(actual, expected)
    assert stats.computed_tokens == length
    assert stats.fallbacks == {}
    assert stats.blocks_in_use == 0


@pytest.mark.parametrize("name", ["greedy", "beam"])
def test_same_text_for_questions_under_one_system_prompt(smollm2, name):
    tokenizer, stock, twin = smollm2
    inputs = tokenizer([f"{TEXT}\n{question}" for question in QUESTIONS], padding=True, return_tensors="pt")
    expected = stock.generate(**inputs, max_new_tokens=6, **MODES[name])
    with paged(twin) as model:
        actual = model.generate(**inputs, max_new_tokens=6, **MODES[name])
        stats = model.paged.stats()
    assert torch.equal(actual, expected), tokenizer.batch_decode(actual)
    assert stats.computed_tokens < 0.6 * stats.prompt_tokens, "most of the prompts is one system prompt"
    assert stats.blocks_in_use == 0
