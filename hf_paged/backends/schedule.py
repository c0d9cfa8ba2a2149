"""Which views a CPU reads for a plan: made once per plan and window, used in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hf_paged.core.chain import Run
from hf_paged.core.plan import Piece, StepPlan
from hf_paged.store import run_slots

# A run of fewer tokens is not worth an attention call of its own: such runs are gathered into one.
MIN_VIEW_TOKENS = 128
# Queries per masked part of a sliding window; each reads up to `window` tokens before its own.
WINDOW_QUERIES = 256


class Batch(NamedTuple):
    """Queries `[start, stop)`, one a row, each over `tokens` slots of its own, `step` slots apart from row to row."""

    start: int
    stop: int
    slot: int
    step: int
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Queries `[start, stop)` over the same tokens: one run, or gathered slots `[tokens]`.

    `mask` is `[queries, tokens]`, True where a query sees a token.
    """

    start: int
    stop: int
    run: Run | None
    slots: torch.Tensor | None = None
    causal: bool = False
    mask: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """`batches` and `own` hold every query once, in order; `shared` parts are merged into them."""

    batches: list[Batch]
    own: list[Part]
    shared: list[Part]


def schedule_for(plan: StepPlan, window: int | None) -> Schedule:
    """The schedule of a plan, kept in `plan.prepared`."""
    window = plan.still_hiding(window)
    key = ("schedule", window)
    if key not in plan.prepared:
        plan.prepared[key] = _full(plan) if window is None else _windowed(plan, window)
    return plan.prepared[key]


def _full(plan: StepPlan) -> Schedule:
    shared = [part for piece in plan.shared for part in _parts(piece)]
    if all(piece.stop - piece.start == 1 for piece in plan.own):
        return Schedule(_batches(plan.own), [], shared)
    own = [Part(piece.start, piece.stop, piece.runs[0], causal=piece.stop - piece.start > 1) for piece in plan.own]
    return Schedule([], own, shared)


def _parts(piece: Piece) -> list[Part]:
    """Long runs one by one, short ones gathered."""
    if len(piece.runs) == 1:
        return [Part(piece.start, piece.stop, piece.runs[0])]
    parts = [Part(piece.start, piece.stop, run) for run in piece.runs if run.tokens >= MIN_VIEW_TOKENS]
    short = [run for run in piece.runs if run.tokens < MIN_VIEW_TOKENS]
    if len(short) == 1:
        parts.append(Part(piece.start, piece.stop, short[0]))
    elif short:
        parts.append(Part(piece.start, piece.stop, None, run_slots(short, torch.device("cpu"))))
    return parts


def _batches(own: Sequence[Piece]) -> list[Batch]:
    """Neighbouring queries whose runs are of equal length at equal distance become one batch."""
    batches: list[Batch] = []
    for piece in own:
        run = piece.runs[0]
        if batches and batches[-1].tokens == run.tokens:
            last = batches[-1]
            rows = last.stop - last.start
            step = run.slot - last.slot if rows == 1 else last.step
            if step > 0 and run.slot == last.slot + rows * step:
                batches[-1] = last._replace(stop=piece.stop, step=step)
                continue
        batches.append(Batch(piece.start, piece.stop, run.slot, 0, run.tokens))
    return batches


def _windowed(plan: StepPlan, window: int) -> Schedule:
    if all(segment.length == 1 for segment in plan.segments):
        own, shared = [], []
        for segment in plan.segments:
            *earlier, last = segment.chain.runs(max(0, segment.kv_len - window), segment.kv_len)
            own.append(Piece(segment.start, segment.start + 1, (last,), False))
            if earlier:
                shared += _parts(Piece(segment.start, segment.start + 1, tuple(earlier), False))
        return Schedule(_batches(own), [], shared)
    own_parts: list[Part] = []
    for segment in plan.segments:
        past = segment.kv_len - segment.length
        for first in range(past, segment.kv_len, WINDOW_QUERIES):
            stop = min(first + WINDOW_QUERIES, segment.kv_len)
            begin = max(0, first - window + 1)
            query_at = torch.arange(first, stop, device="cpu").unsqueeze(1)
            key_at = torch.arange(begin, stop, device="cpu")
            runs = list(segment.chain.runs(begin, stop))
            own_parts.append(
                Part(
                    segment.start + first - past,
                    segment.start + stop - past,
                    runs[0] if len(runs) == 1 else None,
                    None if len(runs) == 1 else run_slots(runs, torch.device("cpu")),
                    mask=(key_at <= query_at) & (key_at > query_at - window),
                )
            )
    return Schedule([], own_parts, [])
