"""``make demo``: SmolLM2 answers three kinds of calls, stock and patched, side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from . import environment, plot, report, smollm2
from .measure import Work, run
from .progress import RunProgress
from .runner import Outcome, Sides, run_one
from .scenarios import DEMO, Scenario

WARM_UP = Scenario(name="warm-up", title="", own=(16,), new=2)


def main() -> int:
    """Run the demo. The exit status is 1 where tokens differ from stock's."""
    where = {"out": Path("demo.png"), "what": "where the picture goes"}
    options = environment.parse(environment.parser("benchmarks.demo", __doc__, **where))
    return demonstrate(report.console(), options.out)


def demonstrate(console: Console, picture: Path) -> int:
    """Measure each call once on either side, then show."""
    console.print("The same model.generate(...) calls, on stock transformers and after patch_model(model).")
    outcomes = []
    with RunProgress(console, "calls", len(DEMO)) as progress:
        tokenizer = smollm2.load_tokenizer()
        sides = Sides.of(smollm2.load_model())
        for model in (sides.stock, sides.patched):
            run(model, Work.of(WARM_UP, tokenizer))
        for scenario in DEMO:
            outcome = run_one(scenario, sides, tokenizer, runs=1, with_peer=False, progress=progress, warm_up=False)
            outcomes.append(outcome)
            progress.done()
            console.print(f"[bold]{scenario.title}[/]: …{answer(outcome, tokenizer)}", highlight=False)
    where = environment.summary(environment.describe())
    console.print(table(outcomes), where)
    plot.draw(picture, outcomes, where)
    console.print(f"A picture of this table: {picture.resolve()}")
    return 0 if all(outcome.exact for outcome in outcomes) else 1


def table(outcomes: Sequence[Outcome]) -> Table:
    """Return what a user gains, one call a row."""
    made = Table(title="stock transformers → hf_paged", title_justify="left")
    made.add_column("one call of generate", no_wrap=True)
    for name in ("seconds", "times faster", "prompt tokens computed", "KV megabytes"):
        made.add_column(name, justify="right")
    made.add_column("tokens equal")
    for outcome in outcomes:
        stock, patched = (size / report.MEGABYTE for size in (outcome.kv.stock_bytes, outcome.kv.patched_bytes))
        made.add_row(
            outcome.scenario.title,
            f"{outcome.stock_seconds[0]:.1f} → {outcome.patched_seconds[0]:.1f}",
            f"[bold green]{outcome.ratio:.1f}×[/]",
            f"{outcome.prompt_tokens:,} → {outcome.computed_tokens:,}",
            f"{stock:.0f} → {patched:.0f}",
            report.equality(outcome),
        )
    return made


def answer(outcome: Outcome, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the first row's new text on one line."""
    return " ".join(tokenizer.decode(outcome.sample[-outcome.scenario.new :], skip_special_tokens=True).split())


if __name__ == "__main__":
    sys.exit(main())
