"""Plans as the Triton kernels read them: laid out once per plan, window and shape of heads, used in every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_paged.core.chain import BlockChain, Run
from hf_paged.core.plan import Segment, StepPlan
from hf_paged_kernels.tuning import Tile, processors
from hf_paged_kernels.work import PageTables, Work, lay_out

# Segments of so many rows (queries times heads) fill tiles of their own. Shorter ones go by the plan's pieces instead:
# queries that share a past then share tiles.
_SEGMENT_ROWS = 64


def work_for(
    plan: StepPlan, window: int | None, heads: int, kv_heads: int, tiles: Sequence[Tile], device: torch.device
) -> Work:
    """What the plan's queries read, kept in `plan.prepared`.

    Args:
        plan: the step.
        window: sliding window of the attention call.
        heads, kv_heads: of the call.
        tiles: shapes to choose from.
        device: of the call.
    """
    window = plan.still_hiding(window)
    key = ("work", window, heads, kv_heads, tiles, device)
    if key not in plan.prepared:
        group = heads // kv_heads
        rows = range(plan.num_queries) if plan.order is None else plan.order
        tables = _page_tables(plan, window, group)
        plan.prepared[key] = lay_out(tables, rows, tiles, group, kv_heads, processors(device), device, window)
    return plan.prepared[key]


def _page_tables(plan: StepPlan, window: int | None, group: int) -> PageTables:
    tables = PageTables()
    segments = _joined(plan.segments)
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


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """Segments that go on where the one before ends, in the same chain, as one."""
    joined: list[Segment] = []
    for segment in segments:
        chain: BlockChain = segment.chain
        if joined and _goes_on(joined[-1], segment):
            last = joined[-1]
            joined[-1] = Segment(chain, last.start, last.length + segment.length, segment.kv_len)
        else:
            joined.append(segment)
    return joined


def _goes_on(last: Segment, segment: Segment) -> bool:
    return (
        last.chain is segment.chain
        and last.start + last.length == segment.start
        and last.kv_len + segment.length == segment.kv_len
    )
