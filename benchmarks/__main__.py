"""``python -m benchmarks``: measure stock transformers against hf_paged, print tables, write JSON and a PNG."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import environment, plot, profiling, report
from .progress import RunProgress
from .runner import run_all
from .scenarios import SCENARIOS, Scenario, named

QUICK_DIVISOR = 8
BUSY = 0.7
"""Load average above which another program is likely at work; two threads that wait for a third take far longer."""


def main() -> int:
    """Run what was asked. The exit status is 1 where float32 tokens differ from stock's."""
    options = environment.parse(parser())
    if options.profile:
        profiling.show(in_dtype(named(options.profile), options.dtype), options.side)
        return 0
    return measure(chosen(options), options)


def measure(scenarios: Sequence[Scenario], options: argparse.Namespace) -> int:
    """Measure, show and write."""
    console = report.console()
    described = environment.describe()
    if described["load_before"] > BUSY:
        console.print(
            f"Load is {described['load_before']:.1f} before the first run: times will be off.", style="yellow"
        )
    outcomes = []
    path = options.out / file_name(options)
    with RunProgress(console, "scenarios", len(scenarios)) as progress:
        for outcome in run_all(scenarios, runs=options.runs, with_peer=options.peer, progress=progress):
            outcomes.append(outcome)
            report.write_json(path.with_suffix(".json"), outcomes, described, **settings(options))  # so far
            progress.done()
            console.print(f"{outcome.scenario.name}: {outcome.ratio:.2f} times faster")
    console.print(report.speed_table(outcomes), report.memory_table(outcomes), environment.summary(described))
    for line in report.notes(outcomes):
        console.print(line, style="red")
    plot.draw(path.with_suffix(".png"), outcomes, environment.summary(described))
    console.print(f"Written: {path.with_suffix('.json')} and {path.with_suffix('.png')}")
    return 0 if all(outcome.exact for outcome in outcomes) else 1


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    names = [scenario.name for scenario in SCENARIOS]
    made = environment.parser("benchmarks", __doc__, what="folder for the JSON and the PNG")
    made.add_argument("--only", metavar="NAME", action="append", choices=names, help=f"one of {', '.join(names)}")
    made.add_argument("--quick", action="store_true", help="an eighth of the prompt lengths, one run, no floors")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), help="run every scenario in this dtype")
    made.add_argument("--runs", type=int, default=3, help="timed runs a side; the median counts (default 3)")
    made.add_argument("--no-peer", dest="peer", action="store_false", help="leave generate_batch out")
    made.add_argument("--profile", metavar="NAME", choices=names, help="profile the decode part of one scenario")
    made.add_argument("--side", choices=("patched", "stock"), default="patched", help="what --profile looks at")
    return made


def chosen(options: argparse.Namespace) -> list[Scenario]:
    """Return the scenarios asked for, in the order of the table."""
    scenarios = [in_dtype(s, options.dtype) for s in SCENARIOS if options.only is None or s.name in options.only]
    if options.quick:
        options.runs = 1
        scenarios = [scenario.shrunk(QUICK_DIVISOR) for scenario in scenarios]
    return sorted(scenarios, key=lambda scenario: scenario.dtype, reverse=True)


def in_dtype(scenario: Scenario, dtype: str | None) -> Scenario:
    """Return the scenario in the dtype asked for, or as it is."""
    return scenario if dtype is None else scenario.in_dtype(dtype)


def file_name(options: argparse.Namespace) -> str:
    """Return the name of the result files: complete runs get one of their own, others overwrite ``partial``."""
    complete = options.only is None and options.dtype is None and not options.quick
    return f"cpu-{options.threads}-threads" if complete else "partial"


def settings(options: argparse.Namespace) -> dict[str, object]:
    """Return the options that shaped a result."""
    return {name: getattr(options, name) for name in ("only", "quick", "dtype", "runs", "threads", "peer")}


if __name__ == "__main__":
    sys.exit(main())
