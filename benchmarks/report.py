"""Outcomes as tables for people and as JSON for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from .environment import save
from .memory import MARGIN
from .runner import Outcome

MEGABYTE = 1e6
WIDTH = 150


def speed_table(outcomes: Sequence[Outcome]) -> Table:
    """Return the ratios beside their floors."""
    table = Table(title="Speed: stock / patched", title_justify="left")
    for name in ("scenario", "dtype", "timed"):
        table.add_column(name, no_wrap=True)
    for name in ("stock s", "patched s", "ratio", "floor", "limit", "generate_batch s"):
        table.add_column(name, justify="right")
    table.add_column("tokens equal", no_wrap=True)
    for outcome in outcomes:
        scenario = outcome.scenario
        table.add_row(
            scenario.title,
            scenario.dtype,
            scenario.timed,
            f"{median(outcome.stock_seconds):.2f}",
            f"{median(outcome.patched_seconds):.2f}",
            coloured(f"{outcome.ratio:.2f}", outcome.reached),
            number(scenario.floor),
            number(scenario.limit),
            number(outcome.peer.seconds),
            equality(outcome),
        )
    return table


def memory_table(outcomes: Sequence[Outcome]) -> Table:
    """Return KV megabytes at the peak of decoding, beside what the distinct real tokens take."""
    table = Table(title="KV memory while decoding", title_justify="left")
    table.add_column("scenario", no_wrap=True)
    for name in ("stock MB", "patched MB", "real tokens MB", f"factor (≤ {MARGIN})", "prompt tokens", "computed"):
        table.add_column(name, justify="right")
    for outcome in outcomes:
        kv = outcome.kv
        table.add_row(
            outcome.scenario.title,
            *(f"{size / MEGABYTE:.1f}" for size in (kv.stock_bytes, kv.patched_bytes, kv.real_bytes)),
            coloured(f"{kv.worst_factor:.3f}", outcome.lean),
            f"{outcome.prompt_tokens:,}",
            f"{outcome.computed_tokens:,}",
        )
    return table


def notes(outcomes: Sequence[Outcome]) -> list[str]:
    """Return what needs a reader's eye: tokens that differ, floors not reached, memory over its margin."""
    lines = []
    for outcome in outcomes:
        name, scenario = outcome.scenario.name, outcome.scenario
        if not outcome.exact:
            lines.append(f"{name}: TOKENS DIFFER from stock ({outcome.equal_share:.1%} equal)")
        if outcome.reached is False:
            lines.append(f"{name}: ratio {outcome.ratio:.2f} is below its floor {scenario.floor}")
        if outcome.lean is False:
            lines.append(f"{name}: KV memory reached {outcome.kv.worst_factor:.3f} × the real tokens")
    return lines


def write_json(path: Path, outcomes: Sequence[Outcome], environment: dict[str, object], **settings: object) -> None:
    """Write everything that was measured, and where."""
    content = {
        "environment": environment,
        "settings": settings,
        "outcomes": [as_json(outcome) for outcome in outcomes],
    }
    save(path, content)


def as_json(outcome: Outcome) -> dict[str, object]:
    """Return one outcome as plain values."""
    return {
        "scenario": asdict(outcome.scenario),
        "ratio": outcome.ratio,
        "reached": outcome.reached,
        "stock_seconds": outcome.stock_seconds,
        "patched_seconds": outcome.patched_seconds,
        "tokens_equal_share": outcome.equal_share,
        "prompt_tokens": outcome.prompt_tokens,
        "computed_tokens": outcome.computed_tokens,
        "kv": asdict(outcome.kv) | {"within_margin": outcome.lean},
        "generate_batch": asdict(outcome.peer),
    }


def equality(outcome: Outcome) -> str:
    """Return yes, or how much is equal; red only where equality was promised."""
    if outcome.equal_share == 1.0:
        return "yes"
    share = f"{outcome.equal_share:.1%}"
    return share if outcome.exact else f"[bold red]NO, {share}[/]"


def coloured(text: str, good: bool | None) -> str:
    """Return the text in green or red, or plain where there is nothing to judge."""
    return text if good is None else f"[{'green' if good else 'bold red'}]{text}[/]"


def console() -> Console:
    """Return a console that is wide enough for the tables where nobody says how wide it is (a file, a CI log)."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=WIDTH)


def number(value: float | None) -> str:
    """Return a figure, or a dash where there is none."""
    return "—" if value is None else f"{value:.2f}"
