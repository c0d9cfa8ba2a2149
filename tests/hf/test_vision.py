"""Vision-language models: images in the prompt, text without any, and what must never be shared between the two."""

import functools

import more_models
import prompts
import pytest
import torch
import transformers
from compare import BLOCK_SIZE
from more_models import VISION_LANGUAGE, image_prompt, plain_tokens
from pair import Pair
from versions import skip_if_older

from hf_paged import PagedCache
from hf_paged.compat import CACHE_NAME
from hf_paged.probe import _plain_tokens

NEW = 10
PACKED = [name for name in VISION_LANGUAGE if name != "mllama"]
TEXTS = [(5, 6, 1), (9, 2, 2), (5, 6, 1)]  # of unequal length; the last has the ids of the first


@pytest.mark.parametrize("name", PACKED)
def test_images_in_the_prompt(name):
    pair = Pair.of(more_models.build(name))
    inputs = image_prompt(name, TEXTS, images=[0, 1, 2])
    more_models.assert_varied(pair.ask(inputs, max_new_tokens=NEW), NEW)
    assert len(pair.paged.stats().fallbacks) == 1, "the prompt is padded, and the reason is counted"
    pair.ask(inputs, max_new_tokens=NEW, num_beams=3)
    pair.ask(inputs, max_new_tokens=NEW, do_sample=True, num_return_sequences=2)


@pytest.mark.parametrize("name", PACKED)
def test_equal_tokens_with_other_images_share_no_more_than_text(name):
    """The ids of two prompts are the same; only the pixels differ, in one call and from call to call."""
    pair = Pair.of(more_models.build(name))
    answers = [pair.ask(image_prompt(name, [(20, 7, 1)], images=[image]), max_new_tokens=NEW) for image in (0, 1, 0)]
    assert not torch.equal(answers[0], answers[1]), "the image makes no difference"
    assert torch.equal(answers[0], answers[2])
    inputs = image_prompt(name, [(20, 7, 1)] * 2, images=[0, 1])
    pair.ask(inputs, max_new_tokens=NEW)
    output = pair.model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
    first, other = (set(table.chains[0].blocks[20 // BLOCK_SIZE :]) for table in output.past_key_values.tables)
    assert not first & other


@pytest.mark.parametrize("name", PACKED)
def test_text_alone_is_packed_and_found_again(name):
    """Also after a call with an image, whose ids stand in the way of nothing."""
    pair = Pair.of(more_models.build(name))
    text = plain_tokens(20, seed=1)
    pair.ask(image_prompt(name, [(20, 7, 1)], images=[0]), max_new_tokens=NEW)
    inputs = prompts.batch([text + plain_tokens(3, 7), text + plain_tokens(6, 8)])
    pair.ask(inputs, max_new_tokens=NEW)
    assert pair.paged.stats().fallbacks == {}
    assert (pair.computed, pair.reused) == (20 + 3 + 6, 0)
    pair.ask(inputs, max_new_tokens=NEW)
    assert pair.reused > 0
    pair.ask(inputs, max_new_tokens=NEW, num_beams=2)
    pair.ask(image_prompt(name, [(20, 7, 1)], images=[0]), max_new_tokens=NEW)
    assert pair.reused == 0


def test_the_trial_run_uses_no_token_that_stands_for_an_image():
    """A model refuses the place of an image without one, and would then never be packed."""
    plain = _plain_tokens(more_models.build("qwen2_5_vl"))
    tokens = {plain(number) for number in range(300)}
    named = {more_models.IMAGE, more_models.VIDEO, more_models.IMAGE_START, more_models.IMAGE_END}
    assert len(tokens) > 100
    assert not tokens & named


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_token_types_that_say_text_change_nothing(name):
    """Processors add them to every prompt; zeros mean what leaving them out means."""
    pair = Pair.of(more_models.build(name))
    kind = "token_type_ids" if name == "gemma3" else "mm_token_type_ids"
    if not more_models.takes(VISION_LANGUAGE[name].class_name, kind):
        skip_if_older(f"no {kind} in this version")
    inputs = prompts.batch([plain_tokens(20), plain_tokens(12, 2)])
    pair.ask({**inputs, kind: torch.zeros_like(inputs["input_ids"])}, max_new_tokens=NEW)
    assert pair.paged.stats().fallbacks == {}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_samples_of_an_image_prompt_share_its_blocks(name):
    pair = Pair.of(more_models.build(name))
    inputs = image_prompt(name, [(30, 9, 1)], images=[0])
    output = pair.model.generate(
        **inputs, max_new_tokens=2, do_sample=True, num_return_sequences=4, return_dict_in_generate=True
    )
    rows = [table.chains[0].blocks for table in output.past_key_values.tables]
    whole = inputs["input_ids"].shape[1] // 8
    assert len({tuple(row[:whole]) for row in rows}) == 1
    del output
    pair.ask(inputs, max_new_tokens=NEW, do_sample=True, num_return_sequences=4)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_long_prompt_in_chunks(name):
    """Stock cuts the text and refuses to cut images, or does; either way the answers are the same."""
    pair = Pair.of(more_models.build(name))
    pair.ask(prompts.batch([plain_tokens(30), plain_tokens(21, 2)]), max_new_tokens=NEW, prefill_chunk_size=8)


def test_layers_that_read_images_stay_on_stock():
    """Mllama's cross-attention layers keep the K and V of image tokens, in layers of the same cache."""
    pair = Pair.of(more_models.build("mllama"))
    pair.ask(prompts.batch([plain_tokens(20), plain_tokens(12, 2)]), max_new_tokens=NEW)
    assert pair.paged.stats().fallbacks == {"stock generate: layer 1 keeps no K and V of text": 1}


def test_layers_that_read_images_stay_on_stock_where_the_model_refuses_to_be_tried(monkeypatch):
    """It is tried without an attention mask; what each layer keeps is then foreseen."""
    kind = type(more_models.build("mllama"))
    forward = kind.forward

    @functools.wraps(forward)
    def refusing(self, *args, **kwargs):
        if kwargs.get("attention_mask") is None:
            raise ValueError("attention_mask is required")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", refusing)
    pair = Pair.of(more_models.build("mllama"))
    pair.ask(prompts.batch([plain_tokens(20), plain_tokens(12, 2)]), max_new_tokens=NEW)
    assert pair.paged.stats().fallbacks == {"stock generate: layer 1 keeps no K and V of text": 1}


@torch.no_grad()
def test_a_paged_cache_refuses_the_tokens_of_images():
    model = more_models.build("mllama")
    ids = torch.tensor([[more_models.IMAGE, *plain_tokens(9)]])
    images = {
        "pixel_values": torch.randn(1, 1, 1, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 10, 1, 1, dtype=torch.long),
    }
    cache = PagedCache(model.config, block_size=8)
    with pytest.raises(ValueError, match=f"layer 1 of {CACHE_NAME} is given K and V of"):
        model(input_ids=ids, past_key_values=cache, **images)
    model(input_ids=ids, past_key_values=transformers.DynamicCache(config=model.config), **images)
