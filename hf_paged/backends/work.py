"""Plans as the Triton kernels read them: laid out once per plan, window and shape of heads, used in every layer."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch

from hf_paged.core.chain import Run
from hf_paged.core.plan import Segment, StepPlan, joined
from hf_paged_kernels.tuning import Tile, processors
from hf_paged_kernels.work import Layout, PageTables, Work, cut, send

# Segments of so many rows (queries times heads) fill tiles of their own. Shorter ones go by the plan's pieces instead:
# queries that share a past then share tiles.
_SEGMENT_ROWS = 64


class Asked(NamedTuple):
    """What an attention call asks of its plan: its window, its heads, the tiles to choose from."""

    window: int | None
    heads: int
    kv_heads: int
    tiles: tuple[Tile, ...]


def work_for(plan: StepPlan, asked: Asked, device: torch.device) -> Work:
    """What the plan's queries read, kept in `plan.prepared`; so is what was asked, by whichever layer of the group."""
    plan.prepared.setdefault("asked", set()).add(asked)
    key = work_key(plan, asked, device)
    if key not in plan.prepared:
        plan.prepared[key] = send(layout_for(plan, asked, device), device)
    return plan.prepared[key]


def slots_key(device: torch.device) -> tuple[object, ...]:
    """Where `plan.prepared` holds the slots of the new tokens."""
    return ("slots", device)


def slot_numbers(plan: StepPlan, num_tokens: int) -> array:
    """The slot of each of `num_tokens` new tokens, -1 where it has none."""
    slots = array("i", [-1]) * num_tokens
    for source, tokens, slot, step in plan.writes:
        slots[source : source + tokens] = array("i", range(slot, slot + tokens * step, step))
    return slots


def work_key(plan: StepPlan, asked: Asked, device: torch.device) -> tuple[object, ...]:
    """Where `plan.prepared` holds a work; windows that hide nothing make no difference."""
    return ("work", *asked._replace(window=plan.still_hiding(asked.window)), device)


def layout_for(plan: StepPlan, asked: Asked, device: torch.device) -> Layout:
    """The same, still on the host."""
    window, group = plan.still_hiding(asked.window), asked.heads // asked.kv_heads
    rows = range(plan.num_queries) if plan.order is None else plan.order
    tables = _page_tables(plan, window, group)
    return cut(tables, rows, asked.tiles, group, asked.kv_heads, processors(device), window)


def _page_tables(plan: StepPlan, window: int | None, group: int) -> PageTables:
    tables = PageTables()
    segments = joined(plan.segments)
    if window is not None or plan.num_queries * group >= len(segments) * _SEGMENT_ROWS:
        _add_segments(tables, segments, window)
    else:
        _add_pieces(tables, plan)
    return tables


def _add_segments(tables: PageTables, segments: Sequence[Segment], window: int | None) -> None:
    """Ragged queries, each with all of its past."""
    for segment in segments:
        past = segment.kv_len - segment.length
        begin = segment.chain.first_token if window is None else max(0, past - window + 1)
        runs = list(segment.chain.runs(begin, segment.kv_len))
        tables.add(segment.start, segment.start + segment.length, runs, past - begin)


def _add_pieces(tables: PageTables, plan: StepPlan) -> None:
    """What queries share, read once; what a query has for itself, as one table."""
    alone: dict[int, list[Run]] = {}
    for piece in (*plan.shared, *plan.own):
        if piece.stop - piece.start == 1:
            alone.setdefault(piece.start, []).extend(piece.runs)
        else:
            tables.add(piece.start, piece.stop, piece.runs, 0 if piece.causal else None)
    for query, runs in alone.items():
        tables.add(query, query + 1, runs)
