"""Features of images, which stock computes before the prompt from transformers 5.24 on: only where they are needed."""

import copy
import functools
from collections import Counter

import more_models
import prompts
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from media_prompts import NAMES, NEW, followed_by, prompt, tried
from mishaps import Boom
from more_models import plain_tokens
from pair import Pair
from transformers.generation import GenerationMixin
from versions import skip_if_older

from hf_paged.compat import CACHE_NAME
from hf_paged.encoded_later import EncodedLater, copied


@pytest.fixture
def encoded_first():
    if not hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation"):
        skip_if_older("images are encoded inside of the model in this version")


@pytest.fixture
def encoded(monkeypatch):
    """Counts how often images are encoded, by model."""
    counts = Counter()

    def count(model):
        kind = type(model.base_model)
        encode = kind.get_image_features

        @functools.wraps(encode)
        def counting(self, *args, **kwargs):
            counts[id(self)] += 1
            return encode(self, *args, **kwargs)

        monkeypatch.setattr(kind, "get_image_features", counting)
        return lambda: counts[id(model.base_model)]

    return count


@pytest.mark.usefixtures("encoded_first")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}], ids=str)
def test_images_that_were_seen_are_not_encoded_again(name, kwargs, encoded):
    pair, inputs = Pair.of(more_models.build(name)), prompt(name)
    ours, stocks = encoded(pair.model), encoded(pair.stock)
    answer = pair.ask(inputs, max_new_tokens=NEW)
    pair.ask(followed_by(inputs, answer, [5, 6]), max_new_tokens=NEW)
    before = ours()
    for number in range(2):
        pair.ask(followed_by(inputs, answer, plain_tokens(7, seed=number)), max_new_tokens=NEW, **kwargs)
        assert pair.reused > 0
    assert ours() == before
    assert stocks() > before
    pair.ask(prompt(name, image=1), max_new_tokens=NEW, **kwargs)
    assert ours() > before


@pytest.mark.usefixtures("encoded_first")
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_images_that_cannot_be_encoded(name, monkeypatch):
    """The error is the encoder's, and nothing stays in use."""
    pair, inputs = tried(name)
    kind = type(pair.model.base_model)

    def failing(self, pixel_values, image_grid_thw=None, **kwargs):
        raise Boom

    other = prompt(name, image=1)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "get_image_features", failing)
        for kwargs in ({}, {"num_beams": 2}):
            with pytest.raises(Boom):
                pair.model.generate(**other, max_new_tokens=2, **kwargs)
    assert pair.pool.in_use == 0
    pair.ask(other, max_new_tokens=NEW)
    pair.ask(inputs, max_new_tokens=NEW)
    assert pair.reused > 0


@pytest.mark.usefixtures("encoded_first")
@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "gemma3"])
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}], ids=str)
def test_features_that_the_caller_has_computed(name, kwargs):
    pair, inputs = tried(name)
    pixels = inputs.pop("pixel_values")
    given = {**inputs, "mm_encoder_outputs": lambda model: {"image": model.get_image_features(pixels)}}
    for _ in range(2):
        answer = pair.ask(inputs, max_new_tokens=NEW, mm_encoder_outputs=given["mm_encoder_outputs"], **kwargs)
    assert pair.reused > 0
    assert torch.equal(answer, pair.ask({**inputs, "pixel_values": pixels}, max_new_tokens=NEW, **kwargs))
    with pytest.raises(ValueError, match="both"):
        pair.model.generate(
            **inputs, pixel_values=pixels, mm_encoder_outputs={"image": pair.model.get_image_features(pixels)}
        )


def test_encoders_run_when_they_are_asked_and_once():
    calls = []

    def encode(number):
        calls.append(number)
        return {"features": torch.full((2,), number)}

    later = EncodedLater.of({"image": (encode, {"number": 3}), "video": (encode, {"number": 4})})
    twin, repeated = copied(later), later.repeated(lambda given: {kind: [each] * 2 for kind, each in given.items()})
    assert (len(later), list(later), "image" in later, bool(later)) == (2, ["image", "video"], True, True)
    assert later.get("audio") is None
    assert calls == []
    assert later.get("video") is later["video"]
    assert calls == [4]
    assert [each["features"][0] for each in repeated["video"]] == [4, 4]
    assert repeated["video"][0] is not later["video"], "which may be changed"
    assert calls == [4]
    assert len(twin.values()) == len(dict(twin.items())) == 2
    assert calls == [4, 3, 4]
    assert copied(later)["video"] is not None
    assert calls == [4, 3, 4], "what is computed is taken along"


@pytest.mark.parametrize("make", [dict, lambda given: {**given}, lambda given: type(given)(given.items()), copy.copy])
def test_a_mapping_that_is_made_of_what_comes_later_has_it(make):
    """Whoever copies it without asking for its items, as `dict` does with its own kind, would have got nothing."""
    later = EncodedLater.of({"image": (lambda number: number + 1, {"number": 3})})
    assert make(later)["image"] == 4


@pytest.mark.usefixtures("encoded_first")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}], ids=str)
def test_a_model_that_accelerate_has_dispatched(name, kwargs):
    """Its hooks make mappings of arguments anew, on the device that computes."""
    pair = Pair.of(copy.deepcopy(more_models.build(name)))
    pair.both(lambda model: add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True)))
    for last in ([5, 6], [7, 8], [9]):
        pair.ask(followed_by(prompt(name), prompt(name)["input_ids"], last), max_new_tokens=NEW, **kwargs)
    assert pair.reused > 0


@pytest.mark.usefixtures("encoded_first")
@pytest.mark.parametrize("kwargs", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("is_text", [True, False])
def test_a_returned_cache_holds_no_images(kwargs, is_text):
    pair, inputs = Pair.of(more_models.build("llava")), prompt("llava")
    if is_text:
        inputs = prompts.single()
    given = {"max_new_tokens": 2, "return_dict_in_generate": True, **kwargs}
    assert pair.model.generate(**inputs, **given)[CACHE_NAME].alone is None
