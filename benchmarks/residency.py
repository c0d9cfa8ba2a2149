"""``python -m benchmarks.residency``: the process's real memory over time, stock against patched, on a ragged batch.

Each side runs in a process of its own, after a short call that warms it up; what the process holds then is subtracted.
Tokens must be equal on all sides.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

import psutil
from matplotlib.figure import Figure
from rich.table import Table

from hf_paged import patch_model

from . import environment, plot, report, smollm2
from .measure import StepClock, Work, generate
from .scenarios import Scenario

QUICK_DIVISOR = 8
RAGGED = Scenario(
    name="ragged-8",
    title="8 prompts of 100 to 1,500, ending after 8 to 96",
    own=(100, 200, 400, 600, 800, 1000, 1200, 1500),
    new=96,
    ends=(96, 80, 64, 48, 32, 24, 16, 8),
)
WARM_UP = Scenario(name="warm-up", title="", own=(64, 32), new=8)
SIDES = {"stock": None, "hf_paged": {}, "hf_paged, prefix_caching=False": {"prefix_caching": False}}
COLOURS = dict(zip(SIDES, (plot.STOCK, plot.PATCHED, plot.REAL), strict=True))
SAMPLE_SECONDS, REST_SECONDS = 0.01, 1.0


@dataclass(frozen=True)
class Curve:
    """What one process held, in bytes above what it held before the call."""

    seconds: list[float]
    held: list[int]
    call_seconds: float
    sequences: list[list[int]] = field(repr=False)

    @property
    def during(self) -> list[int]:
        """The samples of the call itself."""
        return [held for at, held in zip(self.seconds, self.held, strict=True) if at <= self.call_seconds]

    @property
    def peak(self) -> int:
        """The most that was held."""
        return max(self.during)

    @property
    def average(self) -> float:
        """The mean over the time of the call."""
        return sum(self.during) / len(self.during)

    @property
    def left(self) -> int:
        """What was held when the call was over for a while."""
        return self.held[-1]


class Sampler:
    """Samples the process's resident memory in a thread of its own."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.held: list[int] = []
        self._process, self._stop = psutil.Process(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._base, self._begin = self._process.memory_info().rss, time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.held.append(self._process.memory_info().rss - self._base)
            self.seconds.append(time.perf_counter() - self._begin)


def run_side(side: str, scenario: Scenario) -> Curve:
    """Measure one side in this process."""
    model, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()
    model.generation_config.eos_token_id = None
    settings = SIDES[side]
    if settings is not None:
        patch_model(model, **settings)
    generate(model, Work.of(WARM_UP, tokenizer), StepClock())
    work = Work.of(scenario, tokenizer)
    with Sampler() as sampler:
        begin = time.perf_counter()
        sequences = generate(model, work, StepClock()).tolist()
        call_seconds = time.perf_counter() - begin
        time.sleep(REST_SECONDS)
    return Curve(sampler.seconds, sampler.held, call_seconds, sequences)


def run_apart(side: str, options: argparse.Namespace) -> Curve:
    """Measure one side in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve.json"
        command = [sys.executable, "-m", "benchmarks.residency", "--side", side, "--out", str(path)]
        command += ["--threads", str(options.threads), *(["--quick"] if options.quick else [])]
        subprocess.run(command, check=True)
        return Curve(**json.loads(path.read_text()))


def table(scenario: Scenario, curves: dict[str, Curve]) -> Table:
    """Return peak, average and what is left, in megabytes above the process before the call."""
    made = Table(title=f"Resident memory above the idle process: {scenario.title}", title_justify="left")
    made.add_column("side", no_wrap=True)
    for name in ("peak MB", "average MB", "after the call MB", "call s"):
        made.add_column(name, justify="right")
    for side, curve in curves.items():
        sizes = (curve.peak, curve.average, curve.left)
        made.add_row(side, *(f"{size / report.MEGABYTE:.0f}" for size in sizes), f"{curve.call_seconds:.1f}")
    return made


def draw(path: Path, scenario: Scenario, curves: dict[str, Curve], caption: str) -> None:
    """Write a PNG: megabytes over seconds, a dot where the call ends."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for side, curve in curves.items():
        held = [size / report.MEGABYTE for size in curve.held]
        name = f"{side}: peak {curve.peak / report.MEGABYTE:.0f}, average {curve.average / report.MEGABYTE:.0f} MB"
        axes.plot(curve.seconds, held, color=COLOURS[side], lw=1.4, label=name)
        axes.plot([curve.call_seconds], [curve.during[-1] / report.MEGABYTE], "o", color=COLOURS[side], ms=5)
    axes.set_title(f"Process memory over time: {scenario.title}", fontsize=10)
    axes.set_xlabel(f"seconds; a dot where the call ends\n{caption}", fontsize=8)
    axes.set_ylabel("MB above the process before the call", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run every side, or one; the exit status is 1 where tokens differ."""
    options = environment.parse(parser())
    scenario = RAGGED.shrunk(QUICK_DIVISOR) if options.quick else RAGGED
    if options.side is not None:
        options.out.write_text(json.dumps(asdict(run_side(options.side, scenario))))
        return 0
    described, console = environment.describe(), report.console()
    curves = {side: run_apart(side, options) for side in SIDES}
    equal = len({json.dumps(curve.sequences) for curve in curves.values()}) == 1
    console.print(table(scenario, curves), environment.summary(described))
    write(options.out, scenario, curves, described, equal)
    draw(options.out.with_suffix(".png"), scenario, curves, environment.summary(described))
    console.print(f"Written: {options.out} and {options.out.with_suffix('.png')}")
    if not equal:
        console.print("TOKENS DIFFER", style="red")
    return 0 if equal else 1


def write(path: Path, scenario: Scenario, curves: dict[str, Curve], described: dict[str, object], equal: bool) -> None:
    """Write the figures; the samples themselves are in the picture."""
    figures = {
        side: {
            "peak_bytes": curve.peak,
            "average_bytes": round(curve.average),
            "bytes_after_call": curve.left,
            "call_seconds": curve.call_seconds,
        }
        for side, curve in curves.items()
    }
    content = {"environment": described, "scenario": asdict(scenario), "tokens_equal": equal, "sides": figures}
    environment.save(path, content)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    out = environment.RESULTS / "memory-over-time.json"
    made = environment.parser("benchmarks.residency", __doc__, out=out, what="the JSON; a PNG beside it")
    made.add_argument("--quick", action="store_true", help="an eighth of the prompt lengths")
    made.add_argument("--side", choices=list(SIDES), help="measure one side in this process, for the others' sake")
    return made


if __name__ == "__main__":
    sys.exit(main())
