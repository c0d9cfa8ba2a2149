"""Pipelines and stop strings with a tokenizer of words, around tiny models patched before or after."""

import prompts
import pytest
import torch
from compare import BLOCK_SIZE, copy_of
from families import FAMILIES, VOCAB, stock_model
from patched_copies import GREEDY, LLAMA, is_patched, patched
from prompts import tokens

from hf_paged import patch_model, unpatch_model


def tiny_tokenizer():
    """A word-level tokenizer of the words w3, w4, ... built in code."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = [f"w{index}" for index in range(3, VOCAB - 2)]
    names = ["<pad>", "<s>", "</s>", *words, "abcdef", "<unk>"]  # stop strings need abcdef
    tokenizer = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


TEXTS = [" ".join(f"w{token}" for token in prompts.tokens(length)) for length in (5, 18, 18, 9)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_pipeline(batch_size):
    from transformers import pipeline

    def run(pipe):
        return pipe(TEXTS, do_sample=False, max_new_tokens=6, batch_size=batch_size)

    expected = run(pipeline("text-generation", model=copy_of(LLAMA), tokenizer=tiny_tokenizer()))
    pipe = pipeline("text-generation", model=copy_of(LLAMA), tokenizer=tiny_tokenizer())
    assert patch_model(pipe, block_size=BLOCK_SIZE) is pipe
    assert run(pipe) == expected
    assert pipe.model.paged.stats().blocks_in_use == 0
    assert pipe.model.paged.stats().prompt_tokens == sum(len(tiny_tokenizer()(text)["input_ids"]) for text in TEXTS)
    unpatch_model(pipe)
    assert not is_patched(pipe.model)
    assert run(pipe) == expected


def test_pipeline_made_from_a_patched_model():
    from transformers import pipeline

    pipe = pipeline("text-generation", model=patched(), tokenizer=tiny_tokenizer())
    stock = pipeline("text-generation", model=copy_of(LLAMA), tokenizer=tiny_tokenizer())
    assert pipe(TEXTS, do_sample=False, max_new_tokens=6) == stock(TEXTS, do_sample=False, max_new_tokens=6)


def test_stop_strings_need_the_tokenizer():
    word = f"w{int(stock_model('llama').generate(**prompts.single(), **GREEDY)[0, 24])}"
    outputs = [
        model.generate(
            **prompts.single(), do_sample=False, max_new_tokens=8, stop_strings=[word], tokenizer=tiny_tokenizer()
        )
        for model in (copy_of(LLAMA), patched())
    ]
    assert torch.equal(*outputs)
    assert outputs[0].shape[1] < 21 + 8


def test_a_pipeline_reuses_the_beginning_of_its_texts():
    pytest.importorskip("tokenizers")
    from transformers import pipeline

    stock, pipe = (
        pipeline("text-generation", model=copy_of(FAMILIES["llama"]), tokenizer=tiny_tokenizer()) for _ in range(2)
    )
    patch_model(pipe, block_size=BLOCK_SIZE)
    system = " ".join(f"w{token}" for token in tokens(30) if token < VOCAB - 2)
    for at, ending in enumerate(("w7", "w7 w8 w9", "w7", "w20 w21")):
        pipe.model.paged.reset_stats()
        asked = {"do_sample": False, "max_new_tokens": 6}
        assert pipe(f"{system} {ending}", **asked) == stock(f"{system} {ending}", **asked)
        assert pipe.model.paged.stats().reused_tokens >= (len(system.split()) if at else 0)
    assert pipe.model.paged.stats().blocks_in_use == 0
