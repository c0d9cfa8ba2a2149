"""``python -m benchmarks.linear``: linear layers of a few rows, by what torch takes for float32 and by its oneDNN."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.table import Table

from hf_paged.linear import MAX_ROWS, MIN_WEIGHTS, multiply

from . import environment, report

RESULTS = Path(__file__).parent / "results"
SHAPES = ((576, 192), (576, 576), (576, 1536), (1536, 576), (576, 49152), (4096, 1024), (4096, 4096), (4096, 14336))
"""Features in and out: SmolLM2-135M's and some of Llama-3-8B's."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
WORKING_SET = 250e6
"""Bytes of weights that a round goes through, in as many layers as that takes: no cache holds them."""
ROUNDS = 5

Product = Callable[[torch.Tensor, torch.Tensor, None], object]


@dataclass(frozen=True)
class Result:
    """Microseconds of one layer, medians of rounds that take turns."""

    features: tuple[int, int]
    rows: int
    torch: float
    onednn: float

    @property
    def is_taken(self) -> bool:
        """Whether a patched model would take oneDNN here."""
        return self.features[0] * self.features[1] >= MIN_WEIGHTS and self.rows <= MAX_ROWS


def measure(features: tuple[int, int]) -> list[Result]:
    """Every number of rows for one shape of weights."""
    count = max(2, min(60, int(WORKING_SET / 4 / features[0] / features[1])))
    weights = [torch.randn(features[::-1]) for _ in range(count)]
    return [_compare(features, weights, torch.randn(rows, 1, features[0])) for rows in ROWS]


def _compare(features: tuple[int, int], weights: list[torch.Tensor], inputs: torch.Tensor) -> Result:
    products: tuple[Product, Product] = (torch.nn.functional.linear, multiply)
    times: tuple[list[float], list[float]] = ([], [])
    for product in products:
        product(inputs, weights[0], None)
    for _ in range(ROUNDS):
        for product, taken in zip(products, times, strict=True):
            begin = time.perf_counter()
            for each in weights:
                product(inputs, each, None)
            taken.append((time.perf_counter() - begin) / len(weights) * 1e6)
    return Result(features, len(inputs), *map(median, times))


def table(results: list[Result]) -> Table:
    """Return the ratios for people."""
    made = Table(title="Times as fast by oneDNN, where a patched model takes it (else dim)", title_justify="left")
    made.add_column("in x out")
    for rows in ROWS:
        made.add_column(f"{rows} rows", justify="right")
    for features in SHAPES:
        of_shape = [each for each in results if each.features == features]
        ratios = (("" if each.is_taken else "[dim]") + f"{each.torch / each.onednn:.2f}" for each in of_shape)
        made.add_row("{} x {}".format(*features), *ratios)
    return made


def main() -> int:
    """Measure and write a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args()
    environment.prepare(options.threads)
    described = environment.describe()
    with torch.inference_mode():
        results = [result for features in SHAPES for result in measure(features)]
    report.console().print(table(results))
    path = options.out / "linear.json"
    report.save(path, {"environment": described, "layers": [asdict(each) for each in results]})
    report.console().print(f"Written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
