"""Prompts with images are found again by later calls with the same images, and by no others."""

import copy

import more_models
import pytest
import torch
from media_prompts import NAMES, NEW, followed_by, prompt, text_of, tried
from more_models import plain_tokens
from pair import Pair, evict
from versions import IS_PINNED

LOOKUP = {"prompt_lookup_num_tokens": 3, "eos_token_id": 2}


def assert_counted(pair: Pair, computed: int, reused: int) -> None:
    """Where decode steps are in stock's shapes, as qwen2_5_vl's are in older versions, answers are not found again."""
    assert pair.computed + pair.reused == computed + reused
    if IS_PINNED or not reused:
        assert pair.reused == reused
    else:
        assert pair.reused >= reused - NEW - 8, "an answer and a block that its prompt has filled in part"


@pytest.mark.parametrize("name", NAMES)
def test_turns_of_a_chat_about_an_image(name):
    pair, inputs = tried(name)
    answer = pair.ask(inputs, max_new_tokens=NEW)
    assert_counted(pair, 1, inputs["input_ids"].shape[1] - 1)
    for number in range(3):
        known = answer.shape[1] - 1
        longer = followed_by(inputs, answer, plain_tokens(7, seed=number + 5))
        answer = pair.ask(longer, max_new_tokens=NEW)
        more_models.assert_varied(answer, NEW)
        assert_counted(pair, 8, known)
    pair.pool.check_integrity()
    assert pair.pool.in_use == 0


@pytest.mark.parametrize("name", NAMES)
def test_another_image_is_another_prompt(name):
    pair, inputs = tried(name)
    answers = [pair.ask(prompt(name, image=image), max_new_tokens=NEW) for image in (0, 1, 0)]
    assert_counted(pair, 1, inputs["input_ids"].shape[1] - 1)
    assert not torch.equal(answers[0], answers[1])
    pair.ask(prompt(name, image=2), max_new_tokens=NEW)
    assert pair.reused == text_of(name), "what comes before it"
    pair.ask(prompt(name, seed=2), max_new_tokens=NEW)
    assert pair.reused == 0, "other text before it"
    pair.ask({key: value for key, value in prompt(name).items() if key in ("input_ids", "attention_mask")} | {
        "input_ids": torch.tensor([plain_tokens(30, seed=1)]), "attention_mask": torch.ones(1, 30, dtype=torch.long)
    })  # fmt: skip
    assert pair.reused == 0, "the same text without it"


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_whose_end_was_evicted(name):
    """What is left ends before the image, or inside of it: then that goes through the model, and all behind it."""
    pair, inputs = tried(name)
    assert evict(pair) > 0
    pair.ask(inputs, max_new_tokens=NEW)
    end = int((inputs["input_ids"][0] == more_models.IMAGE).nonzero().max()) + 1
    found = []
    for left in (4, 3, 2, 1):
        evict(pair, pair.pool.cached - left * len(pair.pool.pools))
        pair.ask(inputs, max_new_tokens=NEW)
        found.append(pair.reused)
    assert any(found) or name == "gemma3"  # of whose window less is left
    assert not any(text_of(name) < reused < end for reused in found)
    assert found[-1] < end
    pair.pool.check_integrity()


def test_tokens_around_an_image_that_come_with_it():
    """What ovis2 puts in the place of the one behind it is another thing where there is no image."""
    pair, inputs = tried("ovis2")[0], prompt("ovis2", image=1)
    ids = inputs["input_ids"]
    ids = ids[:, : int((ids[0] == more_models.IMAGE).nonzero().max()) + 1]
    for last in ([5, 6, 7], [more_models.IMAGE_END, 5, 6], [5, more_models.IMAGE_END, 7]):
        pair.ask(followed_by(inputs, ids, last), max_new_tokens=NEW)
        assert pair.reused <= text_of("ovis2")
    pair.ask(followed_by(inputs, ids, [*last, 8]), max_new_tokens=NEW)
    assert_counted(pair, 1, ids.shape[1] + len(last))


@pytest.mark.parametrize("name", NAMES)
def test_an_image_and_a_token_that_the_mask_hides(name):
    pair, inputs = tried(name)
    mask = inputs["attention_mask"].clone()
    mask[:, 3] = 0
    for _ in range(2):
        pair.ask({**inputs, "attention_mask": mask}, max_new_tokens=NEW)
        assert pair.reused == 0
    pair.ask(inputs, max_new_tokens=NEW)
    assert_counted(pair, 1, inputs["input_ids"].shape[1] - 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kwargs", [{"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}], ids=str)
def test_samples_and_beams(name, kwargs):
    pair, inputs = tried(name)
    columns = inputs["input_ids"].shape[1]
    pair.ask(inputs, max_new_tokens=NEW, **kwargs)
    assert pair.reused >= 3 * (columns - 8), "what one row has left is there for three"
    assert pair.computed <= 8
    pair.ask(prompt(name, image=8), max_new_tokens=NEW)  # tries what comes before it
    other, text = prompt(name, image=1), text_of(name)
    pair.ask(other, max_new_tokens=NEW, **kwargs)
    assert_counted(pair, columns - text, 3 * text)
    answer = pair.ask(other, max_new_tokens=NEW)
    assert_counted(pair, 1, columns - 1)
    pair.ask(followed_by(other, answer[:1], [5, 6, 7]), max_new_tokens=NEW, **kwargs)
    assert pair.computed <= 4 + NEW + 8
    pair.pool.check_integrity()


@pytest.mark.parametrize("name", NAMES)
def test_samples_without_prefixes(name):
    pair, inputs = Pair.of(more_models.build(name), prefix_caching=False), prompt(name)
    columns = inputs["input_ids"].shape[1]
    for computed in (3 * columns, columns, columns):
        pair.ask(inputs, max_new_tokens=NEW, num_beams=3)
        assert_counted(pair, computed, 0)
    assert pair.paged.stats().blocks_cached == 0


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_the_first_image_of_all(name):
    """Modules that have never been called note something in their first pass."""
    pair, inputs = Pair.of(more_models.build.__wrapped__(name)), prompt(name)
    for _ in range(2):
        pair.ask(inputs, max_new_tokens=NEW, num_beams=3)
    assert pair.reused > 0


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "kwargs", [{"prompt_lookup_num_tokens": 3, "eos_token_id": 2}, {"cache_salt": "other"}], ids=str
)
def test_lookup_and_salts(name, kwargs):
    pair, inputs = tried(name)
    salt = kwargs.pop("cache_salt", None)
    answers = [pair.ask(inputs, max_new_tokens=NEW, salt=salt, **kwargs) for _ in range(2)]
    assert torch.equal(*answers)
    assert pair.reused > 0
    pair.ask(inputs, max_new_tokens=NEW, salt="third")
    assert pair.reused == 0


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_the_image_part(name):
    """A projection that has changed makes other features of the same pixels, and other weights another state."""
    pair, inputs = Pair.of(copy.deepcopy(more_models.build(name))), prompt(name)
    for last in ([5, 6], [7, 8], [9]):
        pair.ask(followed_by(inputs, inputs["input_ids"], last), max_new_tokens=NEW)
    assert pair.reused > 0

    def change(model):
        vision = next(value for key, value in model.named_parameters() if "vision" in key or "visual" in key)
        with torch.no_grad():
            vision.mul_(1.5)

    pair.both(change)
    pair.ask(inputs, max_new_tokens=NEW)
    assert pair.reused == 0
