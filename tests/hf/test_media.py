"""Prompts with images are found again by later calls with the same images, and by no others."""

import copy
import functools
from collections import Counter

import more_models
import pytest
import torch
from mishaps import Boom
from more_models import VISION_LANGUAGE, image_prompt, plain_tokens
from pair import Pair, evict
from transformers.generation import GenerationMixin
from versions import IS_PINNED

from hf_paged import compat
from hf_paged.forward import TOKEN_TYPES, ModelCall
from hf_paged.media import EncodedLater, copied, media_of
from hf_paged.token_names import media_tokens

NEW = 10
LOOKUP = {"prompt_lookup_num_tokens": 3, "eos_token_id": 2}
NAMES = [name for name in VISION_LANGUAGE if name != "mllama"]  # which stays on stock
pytestmark = pytest.mark.skipif(
    not (IS_PINNED or compat.MEDIA_INPUTS),
    reason="this version does not name the inputs that are dropped behind a prompt",
)


def followed_by(inputs: dict, ids: torch.Tensor, last: list[int]) -> dict:
    """`inputs` with `ids [1, tokens]` in place of theirs, and some tokens of text behind these."""
    ids = torch.cat([ids, torch.tensor([last])], dim=1)
    longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in set(TOKEN_TYPES) & inputs.keys():
        longer[name] = torch.cat([inputs[name], inputs[name].new_zeros(1, ids.shape[1] - inputs[name].shape[1])], dim=1)
    return longer


def both(name: str, first: dict, second: dict) -> dict:
    """Two prompts with an image each as one with two."""
    joined = {key: torch.cat([first[key], second[key]], dim=1) for key in first if first[key].shape[:1] == (1,)}
    for key in {"pixel_values", "image_grid_thw"} & first.keys():
        joined[key] = torch.cat([first[key], second[key]], dim=1 if name == "idefics3" else 0)
    return joined


def prompt(name: str, image: int = 0, seed: int = 1) -> dict:
    return image_prompt(name, [(20, 12, seed)], images=[image])


def tried(name: str, **settings) -> tuple[Pair, dict]:
    """A pair whose model was found to compute prompts with images in two pieces as in one; its pool has the prompt."""
    pair, inputs = Pair.of(more_models.build(name), **settings), prompt(name)
    pair.ask(inputs, max_new_tokens=NEW)
    pair.ask(followed_by(inputs, inputs["input_ids"], [5, 6]), max_new_tokens=NEW)
    assert pair.reused == 0, "computed both ways"
    return pair, inputs


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
    assert pair.reused == 0
    pair.ask(prompt(name, seed=2), max_new_tokens=NEW)
    assert pair.reused == 0, "other text before it"
    pair.ask({key: value for key, value in prompt(name).items() if key in ("input_ids", "attention_mask")} | {
        "input_ids": torch.tensor([plain_tokens(30, seed=1)]), "attention_mask": torch.ones(1, 30, dtype=torch.long)
    })  # fmt: skip
    assert pair.reused == 0, "the same text without it"


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_whose_end_was_evicted(name):
    """What is left ends before the image, or inside of it: then all goes through the model, the image with it."""
    pair, inputs = tried(name)
    assert evict(pair) > 0
    pair.ask(inputs, max_new_tokens=NEW)
    end = int((inputs["input_ids"][0] == more_models.IMAGE).nonzero().max()) + 1
    found = []
    for left in (4, 3, 2, 1):
        evict(pair, pair.pool.cached - left * len(pair.pool.pools))
        pair.ask(inputs, max_new_tokens=NEW)
        found.append(pair.reused)
    assert found[-1] == 0
    assert any(found) or name == "gemma3"  # of whose window less is left
    assert not any(0 < reused < end for reused in found)
    pair.pool.check_integrity()


def test_tokens_around_an_image_that_come_with_it():
    """What ovis2 puts in the place of the one behind it is another thing where there is no image."""
    pair, inputs = tried("ovis2")[0], prompt("ovis2", image=1)
    ids = inputs["input_ids"]
    ids = ids[:, : int((ids[0] == more_models.IMAGE).nonzero().max()) + 1]
    for last in ([5, 6, 7], [more_models.IMAGE_END, 5, 6], [5, more_models.IMAGE_END, 7]):
        pair.ask(followed_by(inputs, ids, last), max_new_tokens=NEW)
        assert pair.reused == 0
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
def test_a_second_image(name):
    """With it everything is computed; the next turn begins with all of that."""
    pair, inputs = tried(name)
    two = both(name, inputs, prompt(name, image=1, seed=3))
    answer = pair.ask(two, max_new_tokens=NEW)
    assert pair.reused == 0
    pair.ask(followed_by(two, answer, [5, 6, 7]), max_new_tokens=NEW)
    assert_counted(pair, 4, answer.shape[1] - 1)
    pair.ask(both(name, inputs, prompt(name, image=2, seed=3)), max_new_tokens=NEW)
    assert pair.reused == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kwargs", [{"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}], ids=str)
def test_samples_and_beams(name, kwargs):
    pair, inputs = tried(name)
    columns = inputs["input_ids"].shape[1]
    pair.ask(inputs, max_new_tokens=NEW, **kwargs)
    assert pair.reused >= 3 * (columns - 8), "what one row has left is there for three"
    assert pair.computed <= 8
    other = prompt(name, image=1)
    pair.ask(other, max_new_tokens=NEW, **kwargs)
    assert_counted(pair, columns, 0)
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


@pytest.mark.parametrize("name", NAMES)
def test_several_prompts_with_images_are_computed_row_by_row(name):
    pair, inputs = tried(name)
    several = image_prompt(name, [(20, 12, 1), (9, 2, 2), (20, 12, 1)], images=[0, 1, 0])
    for kwargs in ({}, {"do_sample": True, "num_return_sequences": 2}):
        pair.ask(several, max_new_tokens=NEW, **kwargs)
        assert pair.reused == 0
    same = image_prompt(name, [(20, 12, 1)] * 2, images=[0, 1])  # equal tokens, and who knows whose image is whose
    pair.ask(same, max_new_tokens=NEW)
    assert_counted(pair, 2 * inputs["input_ids"].shape[1], 0)


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


# Features of images, which stock computes before the prompt from transformers 5.24 on

ENCODED_FIRST = hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation")
encoded_first = pytest.mark.skipif(
    not (IS_PINNED or ENCODED_FIRST), reason="images are encoded inside of the model in this version"
)


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


@encoded_first
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


@encoded_first
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


@encoded_first
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

    later = EncodedLater({"image": (encode, {"number": 3}), "video": (encode, {"number": 4})})
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


# What media are, by the arguments of a call

CONFIG = more_models.build("llava").config
IDS = torch.tensor([[5, 6, more_models.IMAGE, more_models.IMAGE, 7, 8]])


def media(ids=IDS, positions=None, alone=None, **arguments):
    kwargs = {"input_ids": ids, "position_ids": positions, **arguments}
    return media_of(CONFIG, ModelCall(None, kwargs, ids, None, True), list(arguments), alone)


PIXELS = torch.arange(12.0).reshape(1, 3, 2, 2)


@pytest.mark.parametrize(
    "other",
    [
        {"pixel_values": PIXELS + torch.eye(2)},
        {"pixel_values": PIXELS.double()},
        {"pixel_values": PIXELS.reshape(1, 3, 4, 1)},
        {"pixel_values": [PIXELS]},
        {"pixel_values": PIXELS, "image_sizes": [[2, 2]]},
        {"image_sizes": PIXELS},
        {"pixel_values": PIXELS, "positions": torch.tensor([[0, 1, 2, 2, 4, 5]])},
        {"pixel_values": PIXELS, "ids": torch.tensor([[5, 9, more_models.IMAGE, more_models.IMAGE, 7, 8]])},
    ],
    ids=lambda given: "-".join(given),
)
def test_other_media_have_another_digest(other):
    one, two = media(pixel_values=PIXELS), media(**other)
    assert one.digest == media(pixel_values=PIXELS.clone()).digest
    assert (one.stop, two.stop) == (4, 4)
    assert one.digest != two.digest


def test_what_follows_is_no_part_of_it():
    longer = torch.cat([IDS, torch.tensor([[9, 9, 9]])], dim=1)
    assert media(pixel_values=PIXELS).digest == media(longer, pixel_values=PIXELS).digest
    types = (IDS == more_models.IMAGE).long()
    with_types = [
        media(ids, pixel_values=PIXELS, token_type_ids=torch.nn.functional.pad(types, (0, ids.shape[1] - 6)))
        for ids in (IDS, longer)
    ]
    assert with_types[0].digest == with_types[1].digest


@pytest.mark.parametrize(
    ("changed", "arguments"),
    [
        ("an argument that is no input of media", {"weights": PIXELS}),
        ("nothing that can be compared", {"pixel_values": object()}),
        ("no token for it", {"ids": torch.tensor([[5, 6, 7]]), "pixel_values": PIXELS}),
        ("nothing behind it", {"ids": IDS[:, :4], "pixel_values": PIXELS}),
        ("two rows", {"ids": IDS.expand(2, -1), "pixel_values": PIXELS.expand(2, -1, -1, -1)}),
        ("positions with gaps behind it", {"positions": torch.tensor([[0, 1, 2, 3, 4, 6]]), "pixel_values": PIXELS}),
        (
            "fractions of positions behind it",
            {"positions": torch.tensor([[0, 1, 2, 2.5, 3.1, 4.1000001]], dtype=torch.double), "pixel_values": PIXELS},
        ),
        ("rounded ones", {"positions": torch.tensor([[0, 1, 2, 3, 1000, 1001]]).bfloat16(), "pixel_values": PIXELS}),
    ],
)
def test_what_is_not_understood_is_left_alone(changed, arguments):
    assert media(**arguments) is None


@pytest.mark.parametrize("dtype", [torch.long, torch.float])
def test_positions_may_be_as_far_ahead_in_another_type(dtype):
    extra = 0.5 if dtype.is_floating_point else 0
    positions = torch.tensor([[0, 1, 2, 2, 9, 10]], dtype=dtype) + extra
    assert media(positions=positions, pixel_values=PIXELS).shifts == [5 + extra]


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ({"image_token_id": 3, "eos_token_id": [1, 2]}, {3}),
        ({"visual_indicator_token_ids": (3, 4), "vision_start_token_id": 5, "image_end_token_id": 6}, {3, 4}),
        ({"audio_token_index": None, "speech_token_index": 4}, {4}),
        ({"attribute_map": {"video_token_id": "patch_id"}, "patch_id": 3}, {3}),
    ],
    ids=str,
)
def test_tokens_that_stand_for_media(named, found):
    config = type("Config", (), {"attribute_map": named.pop("attribute_map", {})})()
    vars(config).update(named)
    assert media_tokens(config) == found


def test_one_row_of_several():
    repeated = {"pixel_values": PIXELS.repeat(2, 1, 1, 1)}
    found = media(IDS.expand(2, -1), alone={"pixel_values": PIXELS}, **repeated)
    assert found.digest == media(pixel_values=PIXELS).digest
    assert found.given["pixel_values"] is PIXELS
    assert media(IDS.expand(2, -1), alone={}, **repeated) is None


def test_copies_of_mappings_are_apart():
    inner = {"image": {"features": PIXELS}}
    twin = copied(inner)
    twin["image"]["features"] = None
    assert inner["image"]["features"] is PIXELS
    assert copied(PIXELS) is PIXELS
