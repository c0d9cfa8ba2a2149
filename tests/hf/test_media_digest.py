"""What media are, by the arguments of a call: their digest, where they end, and what is not understood."""

import more_models
import pytest
import torch
from media_prompts import skip_where_inputs_have_no_names

from hf_paged.encoded_later import copied
from hf_paged.forward import ModelCall
from hf_paged.media import Alone, media_of
from hf_paged.token_names import media_tokens

CONFIG = more_models.build("llava").config
IDS = torch.tensor([[5, 6, *[more_models.IMAGE] * 4, 7, 8]])
LONG = torch.cat([IDS[:, :1].expand(1, 6), IDS], dim=1)
POSITIONS = torch.tensor([[0, 1, 2, 2, 2, 2, 4, 5]])


def media(ids=IDS, positions=None, alone=None, **arguments):
    skip_where_inputs_have_no_names()
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
        {"pixel_values": PIXELS, "positions": POSITIONS},
        {"pixel_values": PIXELS, "ids": IDS.index_fill(1, torch.tensor([1]), 9)},
    ],
    ids=lambda given: "-".join(given),
)
def test_other_media_have_another_digest(other):
    one, two = media(pixel_values=PIXELS), media(**other)
    assert one.ids == media(pixel_values=PIXELS.clone()).ids
    assert (one.stop, two.stop) == (6, 6)
    assert one.ids != two.ids
    assert one.ids[0][-2:] == two.ids[0][-2:] == [7, 8]
    assert len({*one.ids[0][2:6], *two.ids[0][2:6]}) == 8 or "ids" in other


def test_other_positions_of_an_image():
    others = POSITIONS.clone()
    others[:, 4:6] += 1
    one, two = (media(positions=each, pixel_values=PIXELS).ids for each in (POSITIONS, others))
    assert one != two
    assert one == media(positions=POSITIONS.clone(), pixel_values=PIXELS).ids


def test_padding_is_no_image():
    """Although some models pad with the token that stands for one."""
    skip_where_inputs_have_no_names()
    ids = torch.nn.functional.pad(LONG, (4, 0), value=more_models.IMAGE)
    new = torch.arange(ids.shape[1]).ge(4).unsqueeze(0)
    kwargs = {"input_ids": ids, "pixel_values": PIXELS}
    found = media_of(CONFIG, ModelCall(None, kwargs, ids, new, True), ["pixel_values"], None)
    assert found.ids == media(LONG, pixel_values=PIXELS).ids
    assert "padding" in found.key


def test_what_follows_is_no_part_of_it():
    longer = torch.cat([IDS, torch.tensor([[9, 9, 9]])], dim=1)
    assert media(longer, pixel_values=PIXELS).ids[0] == [*media(pixel_values=PIXELS).ids[0], 9, 9, 9]
    types = (IDS == more_models.IMAGE).long()
    with_types = [
        media(ids, pixel_values=PIXELS, token_type_ids=torch.nn.functional.pad(types, (0, ids.shape[1] - 8)))
        for ids in (IDS, longer)
    ]
    assert with_types[0].ids[0] == with_types[1].ids[0][:8]
    assert with_types[0].names != media(pixel_values=PIXELS).names, "types may make other masks, which are tried apart"


@pytest.mark.parametrize(
    ("changed", "arguments"),
    [
        ("an argument that is no input of media", {"weights": PIXELS}),
        ("nothing that can be compared", {"pixel_values": object()}),
        ("no token for it", {"ids": torch.tensor([[5, 6, 7]]), "pixel_values": PIXELS}),
        ("nothing behind it", {"ids": IDS[:, :6], "pixel_values": PIXELS}),
        ("more rows than images", {"ids": IDS.expand(2, -1), "pixel_values": PIXELS}),
        ("three tokens for it", {"ids": IDS[:, [0, 1, 2, 3, 4, 6, 7]], "pixel_values": PIXELS}),
        (
            "other positions before it",
            {"ids": LONG, "positions": torch.arange(1, 15).unsqueeze(0), "pixel_values": PIXELS},
        ),
        ("positions with gaps behind it", {"positions": torch.tensor([[*range(7), 8]]), "pixel_values": PIXELS}),
        (
            "fractions of positions behind it",
            {
                "positions": torch.tensor([[0, 1, 2, 2, 2, 2.5, 3.1, 4.1000001]], dtype=torch.double),
                "pixel_values": PIXELS,
            },
        ),
        ("rounded ones", {"positions": torch.tensor([[*range(6), 1000, 1001]]).bfloat16(), "pixel_values": PIXELS}),
    ],
)
def test_what_is_not_understood_is_left_alone(changed, arguments):
    assert media(**arguments) is None


@pytest.mark.parametrize("dtype", [torch.long, torch.float])
def test_positions_may_be_as_far_ahead_in_another_type(dtype):
    extra = 0.5 if dtype.is_floating_point else 0
    positions = POSITIONS.to(dtype)
    positions[:, 2:] += extra
    assert media(positions=positions, pixel_values=PIXELS).shifts == [[extra - 2]]


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
    found = media(IDS.expand(2, -1), alone=Alone(1, IDS.shape[1], {"pixel_values": PIXELS}), **repeated)
    assert found.ids == media(pixel_values=PIXELS).ids
    assert found.given["pixel_values"] is PIXELS
    assert media(IDS.expand(2, -1), alone=Alone(1, IDS.shape[1], {}), **repeated) is None
    assert media(IDS.expand(3, -1), alone=Alone(2, IDS.shape[1], repeated), **repeated) is None


def test_rows_with_an_image_each():
    pixels = torch.cat([PIXELS, PIXELS + 1, PIXELS])
    found = media(IDS.expand(3, -1), pixel_values=pixels)
    assert found.ids == [*media(pixel_values=PIXELS).ids, *media(pixel_values=PIXELS + 1).ids, found.ids[0]]
    assert torch.equal(found.between(range(8), [0, 1])["pixel_values"], pixels[:2])
    assert torch.equal(found.between(range(8), [1, 2])["pixel_values"], pixels[1:])
    assert found.between(range(6, 8), [0, 1]) == {}
    assert len(found.keys) == 1, "nobody knows what text is without them where it is so short"
    assert len(media(LONG.expand(3, -1), pixel_values=pixels).keys) == 2


def test_copies_of_mappings_are_apart():
    inner = {"image": {"features": PIXELS}}
    twin = copied(inner)
    twin["image"]["features"] = None
    assert inner["image"]["features"] is PIXELS
    assert copied(PIXELS) is PIXELS
