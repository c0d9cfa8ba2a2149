"""What a person sees while runs are under way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

REFRESH_PER_SECOND = 2
"""Drawing costs processor time that the runs need; it falls on both sides alike."""


class RunProgress(AbstractContextManager):
    """A bar over all scenarios and a bar over the tokens of the current run (it pulses during the prefill)."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<44}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=REFRESH_PER_SECOND,
            transient=True,
        )
        self.whole = self.bars.add_task(title, total=total)
        self.current = self.bars.add_task("loading the model", total=None)

    def __enter__(self) -> RunProgress:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def run(self, name: str, tokens: int) -> Callable[[], None]:
        """Show that a run begins; call the result at each of its ``tokens``."""
        self.bars.reset(self.current, description=name, total=None)

        def on_token() -> None:
            self.bars.update(self.current, advance=1, total=tokens)

        return on_token

    def done(self) -> None:
        """Count one scenario as finished."""
        self.bars.advance(self.whole)
