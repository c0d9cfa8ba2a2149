"""One picture of the results: how much faster, and how much less memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import MEGABYTE
from .runner import Outcome

STOCK, PATCHED, PEER, REAL = "#b0b7c3", "#2f6fdf", "#e0a030", "#1d3557"


def draw(path: Path, outcomes: Sequence[Outcome], caption: str) -> None:
    """Write a PNG with two panels, one row a scenario in both."""
    figure = Figure(figsize=(13, 1.6 + 0.62 * len(outcomes)), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True)
    draw_speed(speed, outcomes)
    draw_memory(memory, outcomes)
    speed.set_yticks(range(len(outcomes)), [label(outcome) for outcome in outcomes], fontsize=9)
    speed.invert_yaxis()
    for axes in (speed, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, frameon=False, fontsize=8)
    figure.suptitle(caption, fontsize=9, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_speed(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """Bars of stock / patched, a mark at each floor, a line where both are equal."""
    rows = range(len(outcomes))
    bars = axes.barh(rows, [o.ratio for o in outcomes], height=0.5, color=PATCHED, label="hf_paged")
    axes.bar_label(bars, fmt="%.2f×", padding=4, fontsize=8)
    mark(axes, [(i, o.scenario.floor) for i, o in enumerate(outcomes)], "black", "-", "floor")
    mark(axes, [(i, o.scenario.limit) for i, o in enumerate(outcomes)], "#999999", ":", "limit")
    peers = [(i, median(o.stock_seconds) / o.peer.seconds) for i, o in enumerate(outcomes) if o.peer.seconds]
    if peers:
        axes.plot([r for _, r in peers], [i for i, _ in peers], "D", color=PEER, ms=5, label="generate_batch")
    axes.axvline(1, color="#777777", lw=0.8)
    axes.set_title("Times faster than stock", fontsize=10)
    axes.margins(x=0.12)


def draw_memory(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """Bars of KV megabytes, and a mark at what the distinct real tokens take."""
    stock = [o.kv.stock_bytes / MEGABYTE for o in outcomes]
    patched = [o.kv.patched_bytes / MEGABYTE for o in outcomes]
    above = axes.barh([i - 0.18 for i in range(len(outcomes))], stock, height=0.34, color=STOCK, label="stock")
    below = axes.barh([i + 0.18 for i in range(len(outcomes))], patched, height=0.34, color=PATCHED, label="hf_paged")
    for bars in (above, below):
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    mark(axes, [(i, o.kv.real_bytes / MEGABYTE) for i, o in enumerate(outcomes)], REAL, "-", "distinct real tokens")
    axes.set_title("KV megabytes while decoding", fontsize=10)
    axes.margins(x=0.12)


def mark(axes: Axes, places: Sequence[tuple[int, float | None]], colour: str, style: str, name: str) -> None:
    """Draw a short upright line in each row that has a value."""
    known = [(i, value) for i, value in places if value is not None]
    if known:
        rows, values = zip(*known, strict=True)
        low, high = [i - 0.38 for i in rows], [i + 0.38 for i in rows]
        axes.vlines(values, low, high, colors=colour, linestyles=style, lw=1.6, label=name)


def label(outcome: Outcome) -> str:
    """Return a scenario's title and what was timed."""
    scenario = outcome.scenario
    what = "decode part" if scenario.timed == "decode" else "whole call"
    return f"{scenario.title}\n{what}, {scenario.dtype}"
