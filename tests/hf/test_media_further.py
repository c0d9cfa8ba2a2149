"""Prompts that begin like earlier ones, text and images, and go on with other images."""

import functools

import more_models
import pytest
import torch
from media_prompts import NAMES, NEW, both, followed_by, images_of, mix_images, prompt, text_of, then, tried
from more_models import image_prompt, plain_tokens
from pair import Pair, evict
from transformers.generation import GenerationMixin
from versions import IS_PINNED, skip_if_older

# Of whose arguments it is known which belong to which image.
PARTED = [name for name in NAMES if name != "fuyu"]
# Tokens that are computed where all is known; those of a partly filled block where answers are not kept.
LAST = 1 if IS_PINNED else 8


def tried_between(name: str, **settings) -> Pair:
    """A pair whose model was found to compute prompts in two pieces, of which both have an image, as in one."""
    pair, inputs = tried(name, **settings)
    answer = pair.ask(inputs, max_new_tokens=NEW)
    pair.ask(then(name, inputs, answer, 7), max_new_tokens=NEW)
    assert pair.reused == 0, "computed both ways"
    return pair


def text_tried(name: str, **settings) -> Pair:
    """A pair whose model was found to compute text before an image as without it."""
    pair = tried(name, **settings)[0]
    pair.ask(prompt(name, image=8), max_new_tokens=NEW)
    assert pair.reused == 0, "computed both ways"
    return pair


def assert_reused(pair: Pair, reused: int, answered: int = NEW) -> None:
    """Where decode steps are in stock's shapes, as qwen2_5_vl's are in older versions, answers are not found again."""
    least = reused if IS_PINNED or not reused else reused - answered - 8
    assert least <= pair.reused <= reused


@pytest.mark.parametrize("name", PARTED)
def test_a_chat_with_one_image_after_the_other(name):
    pair = tried_between(name)
    inputs = prompt(name, image=1, seed=9)
    answer = pair.ask(inputs, max_new_tokens=NEW)
    for image in (2, 3, 4):
        known = answer.shape[1] - 1
        inputs = then(name, inputs, answer, image)
        answer = pair.ask(inputs, max_new_tokens=NEW)
        more_models.assert_varied(answer, NEW)
        assert_reused(pair, known)
        known = answer.shape[1] - 1
        inputs = followed_by(inputs, answer, plain_tokens(7, seed=image))
        answer = pair.ask(inputs, max_new_tokens=NEW)
        assert_reused(pair, known)
    pair.ask(inputs, max_new_tokens=NEW)
    assert pair.computed <= LAST, "all of it, under one name"
    pair.pool.check_integrity()
    assert pair.pool.in_use == 0


@pytest.mark.parametrize("name", PARTED)
def test_the_same_image_behind_another_one(name):
    pair = tried_between(name)
    pair.ask(prompt(name, image=8), max_new_tokens=NEW)
    firsts, second = [prompt(name, image=image, seed=9) for image in (1, 2, 1)], prompt(name, image=3, seed=5)
    answers = [pair.ask(both(name, first, second), max_new_tokens=NEW) for first in firsts[:2]]
    assert pair.reused == text_of(name)
    assert not torch.equal(*answers)
    pair.ask(both(name, firsts[2], second), max_new_tokens=NEW)
    assert pair.computed <= LAST
    pair.ask(both(name, second, firsts[0]), max_new_tokens=NEW)
    assert pair.reused == 0


@pytest.mark.parametrize("name", PARTED)
def test_the_last_of_two_images_is_another_one(name):
    """Images that come together are known one by one."""
    pair = tried_between(name)
    first = prompt(name, image=1, seed=9)
    pair.ask(both(name, first, prompt(name, image=2, seed=4)), max_new_tokens=NEW)
    pair.ask(both(name, first, prompt(name, image=3, seed=4)), max_new_tokens=NEW)
    assert_reused(pair, first["input_ids"].shape[1] + text_of(name), 0)
    pair.ask(first, max_new_tokens=NEW)
    assert_reused(pair, first["input_ids"].shape[1] - 1, 0)


@pytest.mark.parametrize("name", NAMES)
def test_text_before_images(name):
    pair = text_tried(name)
    for image in (1, 2):
        pair.ask(prompt(name, image=image), max_new_tokens=NEW)
        assert pair.reused == text_of(name)
    text = torch.tensor([plain_tokens(31, seed=77)])
    pair.ask({"input_ids": text, "attention_mask": torch.ones_like(text)}, max_new_tokens=NEW)
    pair.ask(image_prompt(name, [(31, 12, 77)], images=[3]), max_new_tokens=NEW)
    assert pair.reused == 31
    assert pair.reused >= 31
    pair.ask(image_prompt(name, [(31, 12, 77)], images=[3]), max_new_tokens=NEW)
    assert pair.computed <= LAST, "kept with all that follows"


@pytest.mark.parametrize("name", PARTED)
def test_images_that_were_seen_are_not_encoded_again_with_further_ones(name, monkeypatch):
    if not hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation"):
        skip_if_older("images are encoded inside of the model in this version")
    pair, encoded = tried_between(name), []
    kind = type(pair.model.base_model)
    encode = kind.get_image_features

    @functools.wraps(encode)
    def counting(self, *args, **kwargs):
        encoded.append((self is pair.model.base_model, images_of(kwargs)))
        return encode(self, *args, **kwargs)

    inputs = prompt(name, image=1, seed=9)
    answer = pair.ask(inputs, max_new_tokens=NEW)
    monkeypatch.setattr(kind, "get_image_features", counting)
    inputs = then(name, inputs, answer, 2)
    pair.ask(then(name, inputs, inputs["input_ids"], 3), max_new_tokens=NEW)
    assert encoded == [(False, 3), (True, 2)]


@pytest.mark.parametrize("name", PARTED)
@pytest.mark.parametrize("kwargs", [{"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}], ids=str)
def test_samples_and_beams_of_a_further_image(name, kwargs):
    pair = tried_between(name)
    inputs = prompt(name, image=1, seed=9)
    answer = pair.ask(inputs, max_new_tokens=NEW, **kwargs)[:1]
    longer = then(name, inputs, answer, 2)
    pair.ask(longer, max_new_tokens=NEW, **kwargs)
    if not IS_PINNED and name in ("llava", "gemma3", "ovis2"):
        assert pair.reused == 0, "rows are given each other's images by stock"
        return
    known = inputs["input_ids"].shape[1] - LAST + 1
    assert pair.reused >= 3 * known
    assert pair.computed <= longer["input_ids"].shape[1] - known
    if name == "llava":  # types of tokens do not follow guesses
        pair.ask(longer, max_new_tokens=NEW, prompt_lookup_num_tokens=3, eos_token_id=2)
        assert pair.computed <= 8


@pytest.mark.parametrize("name", PARTED)
def test_what_is_left_ends_within_an_image(name):
    pair = tried_between(name)
    pair.ask(prompt(name, image=8), max_new_tokens=NEW)
    first = prompt(name, image=1, seed=9)
    inputs = both(name, first, prompt(name, image=2, seed=4))
    columns = (inputs["input_ids"][0] == more_models.IMAGE).nonzero().flatten().tolist()
    within = {*range(columns[0] + 1, columns[3] + 1), *range(columns[4] + 1, columns[7] + 1)}
    assert evict(pair) > 0
    pair.ask(inputs, max_new_tokens=NEW)
    found = []
    for left in range(8, 0, -1):
        evict(pair, pair.pool.cached - left * len(pair.pool.pools))
        pair.ask(inputs, max_new_tokens=NEW)
        found.append(pair.reused)
    assert not within & {*found}
    assert len({*found}) > 2 or name == "gemma3", "of whose window less is left"
    pair.pool.check_integrity()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_images_that_see_each_other(name, monkeypatch):
    """What a model makes of two images apart is tried, and what it made of them then is not taken for that."""
    pair = tried(name)[0]
    mix_images(monkeypatch, pair)
    inputs = prompt(name, image=1, seed=9)
    answer = pair.ask(inputs, max_new_tokens=NEW)
    for image in (2, 3):
        pair.ask(then(name, inputs, answer, image), max_new_tokens=NEW)
        assert pair.reused == 0
    assert any("prompts not shared" in reason for reason in pair.paged.stats().fallbacks)
    pair.ask(inputs, max_new_tokens=NEW)
    assert pair.reused > 0
