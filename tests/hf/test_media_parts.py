"""Which columns stand for which images, by the shapes of arguments alone; and where these do not say it."""

import pytest
import torch

from hf_paged.encoded_later import EncodedLater
from hf_paged.media_parts import Part, Units, joined, parts_of, units_of


def pictures(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


GRID = torch.tensor([[1, 2, 4], [1, 4, 4]])
SIZES = torch.tensor([[8, 8], [8, 8], [8, 8]])


@pytest.mark.parametrize(
    ("given", "units"),
    [
        ({"pixel_values": pictures(3, 3, 4, 4)}, Units(0, [1, 1, 1])),
        ({"pixel_values": pictures(1, 3, 4, 4)}, Units(0, [1])),
        ({"pixel_values": pictures(1, 2, 3, 4, 4)}, Units(1, [1, 1])),
        ({"pixel_values": pictures(2, 1, 3, 4, 4)}, Units(0, [1, 1])),
        ({"pixel_values": pictures(3, 5, 3, 4, 4), "image_sizes": SIZES}, Units(0, [1, 1, 1])),
        ({"pixel_values": pictures(1, 5, 3, 4, 4), "image_sizes": SIZES[:1]}, Units(0, [1])),
        ({"pixel_values": pictures(1, 3, 3, 4, 4), "pixel_attention_mask": torch.ones(1, 3, 4, 4)}, None),
        (
            {"pixel_values": pictures(1, 3, 3, 4, 4), "pixel_attention_mask": torch.ones(1, 3, 4, 4).bool()},
            Units(1, [1, 1, 1]),
        ),
        ({"pixel_values": pictures(24, 5), "image_grid_thw": GRID}, Units(0, [8, 16])),
        ({"pixel_values": pictures(24, 5), "image_grid_thw": GRID, "return_dict": True}, Units(0, [8, 16])),
        ({"pixel_values": pictures(23, 5), "image_grid_thw": GRID}, None),
        ({"pixel_values": pictures(24, 5), "image_grid_thw": GRID, "other": torch.ones(3).long()}, None),
        ({"pixel_values": pictures(3, 3, 4, 4), "image_sizes": torch.tensor([[8, 8], [8, 4], [8, 8]])}, None),
        ({"pixel_values": pictures(3, 3, 4, 4), "image_sizes": SIZES[:2]}, None),
        ({"pixel_values": pictures(3, 3, 4, 4), "input_features": pictures(3, 5, 6)}, None),
        ({"pixel_values": [pictures(3, 4, 4)]}, None),
        ({"pixel_values": pictures(3, 3, 4, 4), "image_sizes": [(8, 8)] * 3}, None),
        ({"pixel_values": pictures(2, 3, 4, 4), "temperature": torch.tensor(1.0)}, None),
        ({"grid": GRID}, None),
        ({}, None),
    ],
    ids=lambda each: "-".join(each) if isinstance(each, dict) else None,
)
def test_units_of_arguments(given, units):
    assert units_of(given) == units
    later = EncodedLater.of({"image": (dict, given)})
    assert units_of({"mm_encoder_outputs": later}) == units
    if given:
        both = EncodedLater.of({"image": (dict, given), "video": (dict, given)})
        assert units_of({"mm_encoder_outputs": both}) is None
        assert units_of({"mm_encoder_outputs": {"image": given}}) is None


def columns(*stretches: tuple[int, int]) -> list[int]:
    return [column for start, stop in stretches for column in range(start, stop)]


def part(start: int, stop: int, *units: int) -> Part:
    return Part(range(start, stop), range(units[0], units[-1] + 1))


@pytest.mark.parametrize(
    ("rows", "sizes", "parts"),
    [
        ([[(2, 6), (8, 12)]], [1, 1], [[part(2, 6, 0), part(8, 12, 1)]]),
        ([[(2, 6), (8, 16), (17, 21)]], [1] * 4, [[part(2, 6, 0), part(8, 16, 1, 2), part(17, 21, 3)]]),
        ([[(2, 4), (5, 7), (8, 10), (11, 13)]], [1, 1], [[part(2, 7, 0), part(8, 13, 1)]]),
        ([[(2, 4), (6, 10)]], [8, 16], [[part(2, 4, 0), part(6, 10, 1)]]),
        ([[(2, 6)], [(1, 5), (6, 10)]], [1, 1, 1], [[part(2, 6, 0)], [part(1, 5, 1), part(6, 10, 2)]]),
        ([[(2, 6)], [], [(1, 5)]], [1, 1], [[part(2, 6, 0)], [], [part(1, 5, 1)]]),
        # Features and columns do not go together: all is one part, or nothing is known of several rows.
        ([[(2, 4), (6, 10)]], [1, 1], [[part(2, 10, 0, 1)]]),
        ([[(2, 4), (5, 9), (10, 22), (23, 29)]], [1] * 4, [[part(2, 29, 0, 3)]]),
        ([[(2, 4), (6, 10)]], [16, 8], [[part(2, 10, 0, 1)]]),
        ([[(2, 4), (6, 10)]], None, [[part(2, 10, 0)]]),
        ([[(2, 4)], [(6, 10)]], [1, 1], None),
        ([[(2, 6)], [(6, 10)]], [1], None),
        ([[(2, 6)], [(6, 10)]], None, None),
        ([[], []], [1], None),
    ],
)
def test_parts_of_rows(rows, sizes, parts):
    units = None if sizes is None else Units(0, sizes)
    assert parts_of([columns(*row) for row in rows], units) == parts


def test_shares_of_arguments():
    units, grid = Units(0, [8, 16]), GRID
    picture = pictures(24, 5)
    assert torch.equal(units.take(picture, [1]), picture[8:])
    assert torch.equal(units.take(grid, [1]), grid[1:])
    assert torch.equal(units.take(picture, [0]), picture[:8])
    assert units.take(True, [0]) is True
    tiles = pictures(1, 4, 3, 2, 2)
    assert torch.equal(Units(1, [1] * 4).take(tiles, [0, 2, 3]), tiles[:, [0, 2, 3]])
    later = EncodedLater.of({"image": (lambda **given: given, {"pixel_values": picture, "image_grid_thw": grid})})
    share = units.take(later, [1])["image"]
    assert torch.equal(share["pixel_values"], picture[8:])
    assert torch.equal(share["image_grid_thw"], grid[1:])
    assert torch.equal(later["image"]["pixel_values"], picture), "which is as it was"


def test_what_lies_between_images():
    parts = [part(2, 6, 0), part(8, 12, 1), part(14, 18, 2)]
    assert joined(parts, lambda columns: True) == parts
    assert joined(parts, lambda columns: columns == range(6, 8)) == [parts[0], part(8, 18, 1, 2)]
    assert joined(parts, lambda columns: False) == [part(2, 18, 0, 2)]
