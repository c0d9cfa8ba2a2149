"""Several prompts with images in one call."""

import more_models
import pytest
import torch
from families import PAD
from media_prompts import (
    NAMES,
    NEW,
    both,
    followed_by,
    mix_images,
    prompt,
    skip_where_inputs_have_no_names,
    text_of,
    tried,
)
from more_models import image_prompt
from pair import Pair
from torch.nn.functional import pad
from versions import IS_PINNED

TEXTS = [(20, 12, 1), (9, 2, 2), (20, 12, 1)]
# Tokens of a row that are computed where it is all known; those of a partly filled block where answers are not kept.
LAST = 1 if IS_PINNED else 8


def rows(name: str, texts: list, images: list[int]) -> dict:
    skip_where_inputs_have_no_names()
    return image_prompt(name, texts, images)


def rows_tried(name: str, **settings) -> Pair:
    """A pair whose model was found to compute rows with an image each in two pieces as in one."""
    pair = tried(name, **settings)[0]
    pair.ask(rows(name, [(20, 12, 5), (20, 12, 6)], [5, 6]), max_new_tokens=NEW)
    assert pair.reused == 0, "computed both ways"
    return pair


@pytest.mark.parametrize("name", NAMES)
def test_equal_rows_are_computed_once(name):
    pair, columns = rows_tried(name), prompt(name)["input_ids"].shape[1]
    four = rows(name, [(20, 12, 1), (20, 12, 2)] * 2, [1, 2, 1, 3])
    pair.ask(four, max_new_tokens=NEW)
    assert pair.computed == 3 * columns
    assert pair.paged.stats().shared_tokens == columns
    pair.ask(four, max_new_tokens=NEW)
    assert pair.computed <= 3 * LAST
    pair.ask(four, max_new_tokens=NEW, do_sample=True, num_return_sequences=2)
    assert pair.computed <= 3 * LAST
    pair.pool.check_integrity()


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_were_prompts_of_their_own(name):
    pair = rows_tried(name)
    singles = [prompt(name, image=image, seed=image) for image in (1, 2)]
    for single in singles:
        pair.ask(single, max_new_tokens=NEW)
    two = rows(name, [(20, 12, 1), (20, 12, 2)], [1, 2])
    answer = pair.ask(two, max_new_tokens=NEW)
    assert pair.computed <= 2 * LAST
    for row, single in enumerate(singles):
        pair.ask(followed_by(single, answer[row : row + 1], [5, 6]), max_new_tokens=NEW)
        assert pair.computed <= 3 + NEW + 8
    pair.ask(rows(name, [(20, 12, 1), (20, 12, 2)], [2, 1]), max_new_tokens=NEW)
    assert pair.reused <= 2 * text_of(name), "the same text with the images of the other row"


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_unequal_length(name):
    """With padding before the shorter ones, in pieces, and each as a prompt of its own."""
    texts = [(20, 12, 1), (9, 2, 2), (20, 12, 1)]
    pair = tried(name)[0]
    pair.ask(prompt(name, image=8), max_new_tokens=NEW)
    pair.ask(rows(name, texts, [4, 5, 4]), max_new_tokens=NEW)
    assert pair.reused == 0, "computed both ways"
    several = rows(name, texts, [1, 2, 1])
    columns = int(several["attention_mask"].sum(dim=1)[:2].sum())
    pair.ask(several, max_new_tokens=NEW)
    assert pair.paged.stats().shared_tokens >= 16 or not IS_PINNED, "the third row is as the first"
    assert pair.computed <= columns
    pair.ask(several, max_new_tokens=NEW)
    assert pair.computed <= 2 * LAST
    pair.ask(rows(name, texts, [1, 3, 1]), max_new_tokens=NEW)
    assert pair.computed <= columns
    pair.ask(rows(name, texts[1:2], [2]), max_new_tokens=NEW)
    assert pair.computed <= LAST
    pair.pool.check_integrity()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_rows_that_see_each_other(name, monkeypatch):
    """Of such nothing is kept that would be wrong in other company."""
    pair = tried(name)[0]
    mix_images(monkeypatch, pair)
    texts = [(20, 12, 1), (20, 12, 2)]
    reasons = set()
    for images in ([1, 2], [1, 3], [1, 3], [1, 1], [3, 1]):
        pair.ask(rows(name, texts, images), max_new_tokens=NEW)
        assert (pair.reused, pair.paged.stats().shared_tokens) == (0, 0)
        reasons |= pair.paged.stats().fallbacks.keys()
        pair.ask(rows(name, texts[:1], images[:1]), max_new_tokens=NEW)
    assert any("prompts not shared" in reason for reason in reasons)


def test_media_of_which_nobody_knows_whose_they_are():
    """A row with two images, and one with one and a blank beside it."""
    pair, one = tried("idefics3")[0], prompt("idefics3", seed=2)
    two = both("idefics3", prompt("idefics3", image=1), prompt("idefics3", image=2, seed=3))
    columns = two["input_ids"].shape[1] - one["input_ids"].shape[1]
    several = {
        "input_ids": torch.cat([two["input_ids"], pad(one["input_ids"], (columns, 0), value=PAD)]),
        "attention_mask": torch.cat([two["attention_mask"], pad(one["attention_mask"], (columns, 0))]),
        "pixel_values": torch.cat([two["pixel_values"], pad(one["pixel_values"], (0, 0, 0, 0, 0, 0, 0, 1))]),
    }
    for kwargs in ({}, {"do_sample": True, "num_return_sequences": 2}):
        for _ in range(2):
            pair.ask(several, max_new_tokens=NEW, **kwargs)
            assert pair.reused == 0


# Not fuyu, for which `both` cannot join patches of several images, nor ovis2, whose chunks stock itself cannot compute.
CHUNKED = [name for name in NAMES if name not in ("fuyu", "ovis2")]


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_beams_and_samples_of_a_prompt_whose_chunks_hold_some_of_its_images(name, kwargs):
    """Each chunk comes with the features of its own images."""
    pair = Pair.of(more_models.build(name))
    for number in range(4):  # it is known then that such prompts may be computed once
        pair.ask(rows(name, [(8, 5, number)], [number]), **kwargs)
    two = both(name, rows(name, [(8, 5, 8)], [8]), rows(name, [(27, 5, 9)], [9]))
    kwargs = {"max_new_tokens": NEW, "prefill_chunk_size": 16, **kwargs}
    pair.skip_where_older_stock_refuses(two, **kwargs)
    pair.ask(two, **kwargs)
