"""A `Work` in a buffer of fixed size, for CUDA graphs: what changes from step to step is numbers in that buffer.

A captured launch keeps its grid, its addresses and its scalars. So each section of the buffer has room for more than a
step needs, and the room that is left over says "nothing":

    items of a tile    [ item ][ item ][ 0 0 0 ... ]     no queries and no tokens: the program ends at once
    pages              [ 7 8 9 30 ................ ]     read only as far as items go
    rows               [ 2 0 1 ][ 3 ]                    rows of the call beyond the queries that there are
    part_starts        [ 0 2 5 7 ][ 7 ]                  no parts: the merge writes zeros
    parts              [ 0 3 ... ][ ....... ]

Rows that no query belongs to come out as zeros: from the merge or, where results are final, from items of no tokens.
"""

from __future__ import annotations

from array import array
from itertools import accumulate
from typing import NamedTuple

import torch

from .tuning import Tile, next_power_of_two
from .work import ITEM_NUMBERS, Item, Launch, Layout, Work, item_numbers

# Of a tile, where results are parts: a program that has nothing to do costs little, a capture a forward pass or two.
_MIN_ITEMS = 8
# Pages cost four bytes each and are sent in every step: 64 rows of 1,024 tokens.
_MIN_PAGES = 4096


class Room(NamedTuple):
    """How large the sections are. Layouts of equal rooms may take turns in one buffer.

    Attributes:
        queries: rows of the call, those included that no query belongs to.
        tiles: shapes, and items of each.
        pages, parts: numbers of these.
        is_final: whether results need no merge.
        window: as in `Work`.
    """

    queries: int
    tiles: tuple[tuple[Tile, int], ...]
    pages: int
    parts: int
    is_final: bool
    window: int | None

    @classmethod
    def of(cls, layout: Layout, queries: int) -> Room:
        """Room for `layout`, whose queries are the first ones of `queries` rows, and for some that come after it."""
        is_final = not layout.num_parts
        least = queries if is_final else max(queries, _MIN_ITEMS)
        counts = {tile: next_power_of_two(max(least, len(items))) for tile, items in layout.by_tile.items()}
        pages = max(_MIN_PAGES, next_power_of_two(len(layout.pages)))
        parts = next_power_of_two(max(least, len(layout.parts)))
        return cls(queries, tuple(sorted(counts.items())), pages, parts, is_final, layout.window)

    @property
    def _sizes(self) -> list[int]:
        """Numbers of each section; all begin at multiples of 16 bytes."""
        sizes = [count * ITEM_NUMBERS for _, count in self.tiles]
        sizes += [self.pages, self.queries, self.queries + 1, self.parts]
        return [-(-size // 4) * 4 for size in sizes]

    @property
    def num_numbers(self) -> int:
        """Size of the buffer."""
        return sum(self._sizes)

    def numbers(self, layout: Layout) -> array:
        """What a buffer holds for `layout`."""
        count = len(layout.rows)
        items = {tile: layout.by_tile[tile] for tile, _ in self.tiles}
        if self.is_final:
            first, _ = self.tiles[0]
            items[first] = items[first] + [Item(row, 1, 0, 0, 0, 0, 0) for row in range(count, self.queries)]
        starts = layout.part_starts
        sections = [item_numbers(items[tile]) for tile, _ in self.tiles]
        sections += [
            layout.pages,
            array("i", [*layout.rows, *range(count, self.queries)]),
            starts + array("i", [starts[-1]]) * (self.queries - count),
            layout.parts,
        ]
        buffer = array("i")
        for section, size in zip(sections, self._sizes, strict=True):
            assert len(section) <= size, "more than there is room for"
            buffer.extend(section)
            buffer.extend(array("i", [0]) * (size - len(section)))
        return buffer

    def work(self, buffer: torch.Tensor) -> Work:
        """The work whose numbers are what `buffer [num_numbers]` holds, int32 on the device, when kernels run."""
        ends = list(accumulate(self._sizes))
        views = [buffer[end - size : end] for end, size in zip(ends, self._sizes, strict=True)]
        launches = [
            Launch(tile, section[: count * ITEM_NUMBERS].view(count, ITEM_NUMBERS))
            for (tile, count), section in zip(self.tiles, views, strict=False)
        ]
        pages, rows, part_starts, parts = views[len(launches) :]
        num_parts = 0 if self.is_final else self.parts
        return Work(
            launches, pages, rows[: self.queries], num_parts, part_starts[: self.queries + 1], parts, self.window
        )
