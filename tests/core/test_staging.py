"""Blocks on their way from the host, layer by layer: what waits for what, and where they lie on the host."""

import pytest
import torch

from hf_paged.staging import Place, Slab, Staging, in_order, stretches

LAYER_BYTES = (4, 6, 4)


class Side:
    """Notes what it is given, and makes each copy at once."""

    def __init__(self):
        self.log, self._given = [], 0

    def run(self, copy):
        copy()
        self._given += 1
        self.log.append("copy")

    def after_current(self):
        self.log.append("after what was read")

    def share(self, memory):
        self.log.append("share")

    def mark(self):
        return Mark(self, self._given)


class Mark:
    def __init__(self, side, place):
        self._side, self._place = side, place

    def hold_current(self):
        self._side.log.append(f"wait for {self._place}")


class Layout:
    """Records of so many bytes, read as they are."""

    device = torch.device("cpu")

    def __init__(self, record_bytes):
        self.record_bytes = record_bytes

    def tokens(self, records):
        return records, records


def slab(rows: int, given_back=None) -> Slab:
    """A slab whose bytes count up in each layer."""
    made = Slab(
        torch.zeros(rows * sum(LAYER_BYTES) + 3, dtype=torch.uint8), LAYER_BYTES, lambda: given_back.append(True)
    )
    for layer, memory in enumerate(made.layers):
        memory.copy_(100 * layer + torch.arange(rows).unsqueeze(1).expand_as(memory))
    return made


def read(staging: Staging, layer: int) -> list[list[int]]:
    """The first byte of each row of each part."""
    return [[int(row[0]) for row in keys] for keys, _ in staging.read(layer)]


@pytest.mark.parametrize("part_blocks", [1, 2, 3, 9])
def test_layers_come_in_parts_in_order_and_out_of_it(part_blocks):
    memory = slab(9)
    rows = [1, 2, 3, 5, 8]
    staging = Staging([*map(Layout, LAYER_BYTES)], [Place(memory, row) for row in rows], None, part_blocks)
    for layer in (0, 1, 2, 0, 0, 2, 1, 2):
        expected = [100 * layer + row for row in rows]
        assert read(staging, layer) == [expected[i : i + part_blocks] for i in range(0, 5, part_blocks)]


def test_an_area_is_filled_anew_behind_who_has_read_it():
    side, memory = Side(), slab(4)
    staging = Staging([*map(Layout, LAYER_BYTES)], [Place(memory, row) for row in (0, 2)], side, 9)
    ahead = ["after what was read", "copy", "copy"]  # two rows that are no neighbours
    assert side.log == ["share", "share", *ahead, *ahead], "two layers are on their way before the first is asked for"
    for layer, expected in enumerate((["wait for 2", "read", *ahead], ["wait for 4", "read"], ["wait for 6", "read"])):
        side.log.clear()
        for _ in staging.read(layer):
            side.log.append("read")
        assert side.log == expected


def test_rows_are_taken_in_order_and_the_last_gives_the_memory_back():
    given_back = []
    first, second = slab(3, given_back), slab(4)
    places = [Place(second, row) for row in second.take(3)] + [Place(first, row) for row in first.take(9)]
    assert (first.has_room, second.has_room) == (False, True)
    places = [places[i] for i in in_order(places[::-1])]
    views = [each.of(1) for each in stretches(sorted(places, key=lambda place: (place.slab is second, place.row)))]
    assert [view[:, 0].tolist() for view in views] == [[100, 101, 102], [100, 101, 102]]
    for place in (Place(first, 1), Place(first, 0)):
        place.free()
    assert first.take(1) == [0]
    assert not given_back
    for row in (2, 0):
        Place(first, row).free()
    assert given_back == [True]
    assert not first.has_room, "it is not ours any more"
