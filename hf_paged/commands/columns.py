"""Columns of text, as the commands print them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns, the first to the left, the others to the right."""
    table = list(rows)
    widths = [max(len(row[at]) for row in table if at < len(row)) for at in range(max(map(len, table)))]
    return [
        "  " + "  ".join(f"{cell:<{width}}" if at == 0 else f"{cell:>{width}}" for at, (cell, width) in cells)
        for row in table
        if (cells := list(enumerate(zip(row, widths, strict=False))))
    ]
