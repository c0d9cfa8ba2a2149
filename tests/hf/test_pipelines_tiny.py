"""Pipelines and stop strings with a tokenizer of words, around tiny models patched before or after."""

import prompts
import pytest
import torch
from compare import BLOCK_SIZE, copy_of
from families import FAMILIES, stock_model
from patched_copies import GREEDY, LLAMA, is_patched, patched
from prompts import tokens
from transformers import pipeline
from words import text, tokenizer

from hf_paged import patch_model, unpatch_model

TEXTS = [text(tokens(length)) for length in (5, 18, 18, 9)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_pipeline(batch_size):
    def run(pipe):
        return pipe(TEXTS, do_sample=False, max_new_tokens=6, batch_size=batch_size)

    expected = run(pipeline("text-generation", model=copy_of(LLAMA), tokenizer=tokenizer()))
    pipe = pipeline("text-generation", model=copy_of(LLAMA), tokenizer=tokenizer())
    assert patch_model(pipe, block_size=BLOCK_SIZE) is pipe
    assert run(pipe) == expected
    assert pipe.model.paged.stats().blocks_in_use == 0
    assert pipe.model.paged.stats().prompt_tokens == sum(len(tokenizer()(asked)["input_ids"]) for asked in TEXTS)
    unpatch_model(pipe)
    assert not is_patched(pipe.model)
    assert run(pipe) == expected


def test_pipeline_made_from_a_patched_model():
    pipe = pipeline("text-generation", model=patched(), tokenizer=tokenizer())
    stock = pipeline("text-generation", model=copy_of(LLAMA), tokenizer=tokenizer())
    assert pipe(TEXTS, do_sample=False, max_new_tokens=6) == stock(TEXTS, do_sample=False, max_new_tokens=6)


def test_stop_strings_need_the_tokenizer():
    word = f"w{int(stock_model('llama').generate(**prompts.single(), **GREEDY)[0, 24])}"
    outputs = [
        model.generate(
            **prompts.single(), do_sample=False, max_new_tokens=8, stop_strings=[word], tokenizer=tokenizer()
        )
        for model in (copy_of(LLAMA), patched())
    ]
    assert torch.equal(*outputs)
    assert outputs[0].shape[1] < 21 + 8


def test_a_pipeline_reuses_the_beginning_of_its_texts():
    stock, pipe = (
        pipeline("text-generation", model=copy_of(FAMILIES["llama"]), tokenizer=tokenizer()) for _ in range(2)
    )
    patch_model(pipe, block_size=BLOCK_SIZE)
    system = text(tokens(30))
    for at, ending in enumerate(("w7", "w7 w8 w9", "w7", "w20 w21")):
        pipe.model.paged.reset_stats()
        asked = {"do_sample": False, "max_new_tokens": 6}
        assert pipe(f"{system} {ending}", **asked) == stock(f"{system} {ending}", **asked)
        assert pipe.model.paged.stats().reused_tokens >= (len(system.split()) if at else 0)
    assert pipe.model.paged.stats().blocks_in_use == 0
