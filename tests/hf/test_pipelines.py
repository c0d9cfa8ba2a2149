"""transformers' pipelines on patched models: the same output as stock's, and later turns compute what is new."""

import pytest
import torch
from real import save_tiny_chat_model
from transformers import TextIteratorStreamer, pipeline

from hf_paged import patch_model, unpatch_model

pytestmark = pytest.mark.real
SYSTEM = {"role": "system", "content": "You answer briefly, in one sentence, and never invent anything at all."}
GREEDY = {"do_sample": False, "max_new_tokens": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def pipes(folder):
    """A stock pipeline, and one that is patched."""
    stock, patched = (pipeline("text-generation", model=folder, dtype="float32") for _ in range(2))
    for pipe in (stock, patched):
        pipe.tokenizer.padding_side = "left"
    assert patch_model(patched, block_size=8) is patched
    yield stock, patched
    assert patched.model.paged.stats().blocks_in_use == 0
    assert not patched.model.paged.stats().fallbacks


def user(text):
    return {"role": "user", "content": text}


def common(first, second):
    """Number of equal tokens that two lists begin with."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def test_the_second_turn_of_a_chat_computes_what_is_new(pipes):
    stock, patched = pipes
    template = patched.tokenizer.apply_chat_template
    chat, held = [SYSTEM], []
    for question in ("What is a page of memory?", "And a block?", "Thanks."):
        chat = [*chat, user(question)]
        prompt = template(chat, add_generation_prompt=True)["input_ids"]
        patched.model.paged.reset_stats()
        answered = patched(chat, **GREEDY)[0]["generated_text"]
        assert answered == stock(chat, **GREEDY)[0]["generated_text"]
        stats = patched.model.paged.stats()
        # The template tokenizes the answer anew: what is reused ends where the tokens part from those that were made.
        assert stats.reused_tokens == common(held, prompt)
        assert stats.computed_tokens == len(prompt) - stats.reused_tokens
        assert not held or stats.computed_tokens < len(prompt) / 2
        made = stock.model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **GREEDY)
        chat, held = answered, made[0, :-1].tolist()  # the last token was never put into the model


def test_batches_samples_and_streams(pipes):
    stock, patched = pipes
    chats = [[SYSTEM, user(text)] for text in ("One?", "Two and a little more?", "Three?", "One?")]
    assert patched(chats, batch_size=4, **GREEDY) == stock(chats, batch_size=4, **GREEDY)
    assert patched.model.paged.stats().shared_tokens > 3 * 16
    sampled = []
    for pipe in pipes:
        torch.manual_seed(3)
        sampled.append(pipe(chats[0], num_return_sequences=3, do_sample=True, max_new_tokens=6))
    assert sampled[0] == sampled[1]
    assert len(sampled[0]) == 3
    pieces = []
    for pipe in pipes:
        streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True)
        pipe("Once upon a time", streamer=streamer, **GREEDY)
        pieces.append(list(streamer))
    assert pieces[0] == pieces[1]


def test_a_pipeline_made_from_a_patched_model(pipes):
    stock, patched = pipes
    made = pipeline("text-generation", model=patched.model, tokenizer=patched.tokenizer)
    assert made.model is patched.model
    assert made("The weather today", **GREEDY) == stock("The weather today", **GREEDY)
    assert made.model.paged.stats().generated_tokens == 9


def test_unpatching_a_pipeline(folder):
    pipe = pipeline("text-generation", model=folder)
    kind = type(pipe.model)
    assert unpatch_model(patch_model(pipe)) is pipe
    assert type(pipe.model) is kind
