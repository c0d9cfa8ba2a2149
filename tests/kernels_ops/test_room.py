"""Works in buffers of fixed size: layouts that take turns in one give what each gives by itself."""

import random

import pytest
import torch

import hf_paged_kernels.work as work_module
from hf_paged_kernels.room import Room
from hf_paged_kernels.tuning import PAGE_TOKENS, Tile
from hf_paged_kernels.work import PageTables, cut

TILES = (Tile(4, 16, 4, 2), Tile(8, 16, 4, 2))
QUERIES = 8  # rows of the call


def layout_of(rng, count, window=None, parts=16, shared=True):
    """One token for each of `count` rows over random blocks, some of which all rows share."""
    tables = PageTables()
    if shared and window is None and count > 1:
        tables.add(0, count, [(rng.randrange(1, 30) * PAGE_TOKENS, 32)])
    for row in range(count):
        tokens = rng.randint(1, 90)
        runs = [(rng.randrange(1, 30) * PAGE_TOKENS, min(16, tokens - at)) for at in range(0, tokens, 16)]
        tables.add(row, row + 1, runs, None if window is None else tokens - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work_module, "part_tokens", lambda *_: parts)
        return cut(tables, rng.sample(range(count), count), TILES, 2, 1, 1, window)


def shown(work):
    """For each row of the call its parts: the slots and bounds of each, as the kernels would find them."""
    pages, rows = work.pages.tolist(), work.rows.tolist()
    by_part, finals = {}, {row: [] for row in rows}
    for launch in work.launches:
        for start, queries, table, lo, hi, first, part, _ in launch.items.tolist():
            seen = [pages[table + i // PAGE_TOKENS] * PAGE_TOKENS + i % PAGE_TOKENS for i in range(lo, hi)]
            for query in range(queries):
                finals[rows[start + query]].append((launch.tile, seen, first - lo + query))
                by_part[part + query] = finals[rows[start + query]][-1]
    if not work.num_parts:
        return finals
    starts, parts = work.part_starts.tolist(), work.parts.tolist()
    assert max(by_part) < work.num_parts
    return {row: [by_part[part] for part in parts[starts[i] : starts[i + 1]]] for i, row in enumerate(rows)}


@pytest.mark.parametrize("seed", range(12))
def test_layouts_take_turns_in_one_buffer(seed):
    rng = random.Random(seed)
    window = rng.choice([None, None, 9])
    parts = rng.choice([16, 10**6])
    layouts = [layout_of(rng, rng.randint(1, QUERIES), window, parts, shared=seed % 2 == 0) for _ in range(6)]
    buffers: dict[Room, torch.Tensor] = {}
    for layout in layouts:
        room = Room.of(layout, QUERIES)
        buffer = buffers.setdefault(room, torch.full((room.num_numbers,), 2**30, dtype=torch.int32))
        work = room.work(buffer)  # before the numbers are there, as a captured pass has it
        numbers = room.numbers(layout)
        assert len(numbers) == room.num_numbers
        buffer.copy_(torch.frombuffer(numbers, dtype=torch.int32))
        assert sorted(work.rows.tolist()) == list(range(QUERIES))
        found, alone = shown(work), shown(work_module.send(layout, torch.device("cpu")))
        count = len(layout.rows)
        assert {row: found[row] for row in range(count)} == alone
        for row in range(count, QUERIES):
            assert all(not slots for _, slots, _ in found[row]), "a row that stands for none reads something"
            assert len(found[row]) == (1 if room.is_final else 0), "its result must be written by somebody"
        assert all(section.data_ptr() % 16 == buffer.data_ptr() % 16 for section in (work.pages, work.rows, work.parts))


def test_rooms_have_reserve_for_sequences_that_grow():
    """A captured pass lasts for as long as it took to get there: rooms double."""
    rooms = set()
    for tokens in range(1, 4000):
        tables = PageTables()
        tables.add(0, 1, [(PAGE_TOKENS, tokens)])
        rooms.add(Room.of(cut(tables, [0], TILES, 2, 1, 4), 1))
    assert len(rooms) <= 6


def test_more_than_there_is_room_for_is_refused():
    few, many = PageTables(), PageTables()
    few.add(0, 1, [(PAGE_TOKENS, 5)])
    many.add(0, 1, [(PAGE_TOKENS, 5 * PAGE_TOKENS)] * 10)
    room = Room.of(cut(few, [0], TILES, 2, 1, 1), 1)
    with pytest.raises(AssertionError, match="more than there is room for"):
        room.numbers(cut(many, [0], TILES, 2, 1, 1))
