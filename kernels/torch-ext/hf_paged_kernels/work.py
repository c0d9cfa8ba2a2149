"""What the attention kernels read, laid out for the device: items of work, page tables, and how parts are merged.

Numbers of one step are the same in every layer, so they are laid out once and sent in one copy. An *item* is a tile of
queries over a stretch of a page table:

    pages            [ 7 ][ 8 ][ 9 ][ 30 ]        page p holds the slots [p * PAGE_TOKENS, (p + 1) * PAGE_TOKENS)
    index            0    16   32   48   64
    an item             lo ^~~~~~~~~~~~~~^ hi     query i of it sees index n where lo <= n < hi, n <= first + i,
                                                  and, with a window, n > first + i - window

Results of items are final where every query has one item; else they are parts, and a merge by log-sum-exp follows.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

import torch

from .tuning import PAGE_TOKENS, Tile, part_tokens

# `first` of items whose queries see all of their tokens; with a query's number added it still fits 32 bits.
SEES_ALL = 2**30
# Numbers per item in the layout: those of `Item` and one to fill up.
ITEM_NUMBERS = 8


class Stretch(NamedTuple):
    """Queries `[start, stop)` over indices `[lo, hi)` of the pages that begin at entry `table`."""

    start: int
    stop: int
    table: int
    lo: int
    hi: int
    first: int


class Item(NamedTuple):
    """A tile of `count` queries from `start` on; its part of the results begins at row `part`."""

    start: int
    count: int
    table: int
    lo: int
    hi: int
    first: int
    part: int


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """Items of one tile shape, `[items, ITEM_NUMBERS]`."""

    tile: Tile
    items: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What a `Work` is made of, still on the host; names as there."""

    by_tile: dict[Tile, list[Item]]
    pages: array
    rows: Sequence[int]
    num_parts: int
    part_starts: array
    parts: array
    window: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """All that is read for some queries, as int32 tensors on the device.

    Attributes:
        launches: the items.
        pages: page tables, one after the other.
        rows: `rows[i]` is the row of query `i` in the tensors of the call.
        num_parts: rows of partial results; 0 where results are final.
        part_starts: `[queries + 1]`; the parts of query `i` are `parts[part_starts[i] : part_starts[i + 1]]`.
        parts: rows of partial results.
        window: a query sees itself and the `window - 1` tokens before it; `None`: all of its items.
    """

    launches: list[Launch]
    pages: torch.Tensor
    rows: torch.Tensor
    num_parts: int
    part_starts: torch.Tensor
    parts: torch.Tensor
    window: int | None

    @property
    def num_queries(self) -> int:
        """Queries that the items have between them."""
        return self.rows.shape[0]


# Of page numbers that were counted once, the most; 67 million tokens.
_MOST_COUNTED = 2**22
_counted = array("i")


def _numbers(start: int, stop: int) -> array:
    """`start, start + 1, ...`; cut out of numbers that were counted before, which is quicker than counting."""
    global _counted
    if stop > _MOST_COUNTED:
        return array("i", range(start, stop))
    counted = _counted
    if len(counted) < stop:
        _counted = counted = array("i", range(min(2 * stop, _MOST_COUNTED)))
    return counted[start:stop]


class PageTables:
    """Turns runs of adjacent slots into page tables and stretches."""

    def __init__(self) -> None:
        self.pages = array("i")
        self.stretches: list[Stretch] = []

    def add(self, start: int, stop: int, runs: Sequence[tuple[int, int]], first: int | None = None) -> None:
        """Queries `[start, stop)` see the tokens of `runs (slot, tokens)`.

        Query `start + i` sees the first `first + i + 1` of them only, where `first` is given. Runs go on in one
        stretch as long as pages are full; behind a page that is not, another begins.
        """
        passed = 0
        table = lo = hi = 0
        for slot, tokens in runs:
            if hi == lo or hi % PAGE_TOKENS or slot % PAGE_TOKENS:
                self._end(start, stop, table, lo, hi, first, passed)
                passed += hi - lo
                table, lo = len(self.pages), slot % PAGE_TOKENS
                hi = lo
            self.pages.extend(_numbers(slot // PAGE_TOKENS, (slot + tokens - 1) // PAGE_TOKENS + 1))
            hi += tokens
        self._end(start, stop, table, lo, hi, first, passed)

    def _end(self, start: int, stop: int, table: int, lo: int, hi: int, first: int | None, passed: int) -> None:
        if hi > lo:
            self.stretches.append(
                Stretch(start, stop, table, lo, hi, SEES_ALL if first is None else lo + first - passed)
            )


def cut(
    tables: PageTables,
    rows: Sequence[int],
    tiles: Sequence[Tile],
    group: int,
    kv_heads: int,
    num_processors: int,
    window: int | None = None,
) -> Layout:
    """Cut stretches into items.

    Args:
        tables: what is read; with a `window`, every stretch has a `first`.
        rows: row of each query in the tensors of the call.
        tiles: shapes to choose from, fewest rows first.
        group: query heads per KV head.
        kv_heads: KV heads of the call.
        num_processors: of the device.
        window: a query sees itself and the `window - 1` tokens before it.
    """
    by_tile: dict[Tile, list[Item]] = {}
    for stretch in tables.stretches:
        needed = (stretch.stop - stretch.start) * group
        tile = next((tile for tile in tiles if tile.rows >= needed), tiles[-1])
        by_tile.setdefault(tile, []).extend(_tiled(stretch, tile.rows // group, window))
    parts: list[list[int]] = [[] for _ in rows]
    num_parts = 0
    for tile, whole in by_tile.items():
        most = part_tokens([item.hi - item.lo for item in whole], tile.rows, kv_heads, num_processors)
        items: list[Item] = []
        for start, count, table, lo, hi, first, _ in whole:
            # In parts that begin with a page where the item does; the last one is up to half as long again.
            last = lo + (max(1, round((hi - lo) / most)) - 1) * most
            for at in range(lo, last + 1, most):
                stop = hi if at == last else at + most
                items.append(Item(start, count, table, at, stop, first, num_parts))
                for i in range(count):
                    parts[start + i].append(num_parts + i)
                num_parts += count
        by_tile[tile] = items
        items.sort(key=lambda item: item.lo - item.hi)  # the longest first, so that none is left over at the end
    is_final = all(len(of_query) == 1 for of_query in parts)
    starts = array("i", accumulate(map(len, parts), initial=0))
    flat_parts = array("i", chain.from_iterable(parts))
    return Layout(by_tile, tables.pages, rows, 0 if is_final else num_parts, starts, flat_parts, window)


def item_numbers(items: Sequence[Item]) -> array:
    """Items as the kernels read them."""
    return array("i", chain.from_iterable((*item, 0) for item in items))


def _tiled(stretch: Stretch, queries: int, window: int | None) -> list[Item]:
    """One item per `queries` queries, over what any of them sees."""
    items = []
    for start in range(stretch.start, stretch.stop, queries):
        count = min(queries, stretch.stop - start)
        lo, hi, first = stretch.lo, stretch.hi, stretch.first
        if first != SEES_ALL:
            first += start - stretch.start
            hi = min(hi, first + count)
            if window is not None:
                lo = max(lo, first - window + 1)
        if hi > lo:
            items.append(Item(start, count, stretch.table, lo, hi, first, 0))
    return items


def send(layout: Layout, device: torch.device) -> Work:
    """One copy to the device; every tensor begins at a multiple of 16 bytes."""
    sections = [item_numbers(items) for items in layout.by_tile.values()]
    sections += [layout.pages, array("i", layout.rows), layout.part_starts, layout.parts]
    buffer, places = array("i"), []
    for section in sections:
        places.append((len(buffer), len(buffer) + len(section)))
        buffer.extend(section)
        buffer.extend([0] * (-len(buffer) % 4))
    sent = torch.frombuffer(buffer, dtype=torch.int32).to(device)
    views = [sent[start:stop] for start, stop in places]
    launches = [Launch(tile, items.view(-1, ITEM_NUMBERS)) for tile, items in zip(layout.by_tile, views, strict=False)]
    pages, rows, part_starts, parts = views[len(launches) :]
    return Work(launches, pages, rows, layout.num_parts, part_starts, parts, layout.window)
