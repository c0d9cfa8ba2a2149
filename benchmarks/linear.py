"""``python -m benchmarks.linear``: linear layers of a few rows, by what torch takes for float32 and by its oneDNN.

And decode steps of Llama-3.2-1B's shape with random weights, stock and patched, in which linear layers take most time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median

import torch
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StoppingCriteriaList

from hf_paged import paged
from hf_paged.linear import MAX_ROWS, MIN_WEIGHTS, multiply

from . import environment, report
from .measure import StepClock

SHAPES = ((576, 192), (576, 576), (576, 1536), (1536, 576), (576, 49152), (4096, 1024), (4096, 4096), (4096, 14336))
"""Features in and out: SmolLM2-135M's and some of Llama-3-8B's."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
WORKING_SET = 250e6
"""Bytes of weights that a round goes through, in as many layers as that takes: no cache holds them."""
ROUNDS = 5
BATCHES, PROMPT_TOKENS, STEPS = (1, 4, 8), 100, 12

Product = Callable[[torch.Tensor, torch.Tensor, None], object]


@dataclass(frozen=True)
class Layer:
    """Microseconds of one layer, medians of rounds that take turns."""

    features: tuple[int, int]
    rows: int
    torch: float
    onednn: float

    @property
    def is_taken(self) -> bool:
        """Whether a patched model would take oneDNN here."""
        return self.features[0] * self.features[1] >= MIN_WEIGHTS and self.rows <= MAX_ROWS


@dataclass(frozen=True)
class Step:
    """Milliseconds of a decode step, medians of two calls' steps; the calls take turns."""

    rows: int
    stock: float
    patched: float
    equal: bool
    """Whether the tokens are."""


def layers(features: tuple[int, int]) -> list[Layer]:
    """Every number of rows for one shape of weights."""
    count = max(2, min(60, int(WORKING_SET / 4 / features[0] / features[1])))
    weights = [torch.randn(features[::-1]) for _ in range(count)]
    return [_compare(features, weights, torch.randn(rows, 1, features[0])) for rows in ROWS]


def _compare(features: tuple[int, int], weights: list[torch.Tensor], inputs: torch.Tensor) -> Layer:
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
    return Layer(features, len(inputs), *map(median, times))


def llama() -> PreTrainedModel:
    """Llama-3.2-1B's shape, random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True, initializer_range=0.05,
        )
    ).eval()  # fmt: skip


def steps(model: PreTrainedModel, rows: int) -> Step:
    """Decode steps of a batch, by stock and patched."""
    ids = torch.randint(
        0, model.config.vocab_size, (rows, PROMPT_TOKENS), generator=torch.Generator().manual_seed(rows)
    )
    stock, patched, answers = [], [], []
    for _ in range(2):
        answers.append(_timed_steps(model, ids, stock))
        with paged(model, prefix_caching=False):
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)  # finds out what is fast
            answers.append(_timed_steps(model, ids, patched))
    equal = all(torch.equal(answers[0], each) for each in answers)
    return Step(rows, median(stock), median(patched), equal)


def _timed_steps(model: PreTrainedModel, ids: torch.Tensor, milliseconds: list[float]) -> torch.Tensor:
    clock = StepClock()
    answer = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS + 1, min_new_tokens=STEPS + 1, do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )  # fmt: skip
    milliseconds += [(end - begin) * 1e3 for begin, end in pairwise(clock.stamps)]
    return answer


def layer_table(measured: list[Layer]) -> Table:
    """Return the ratios for people."""
    made = Table(title="Times as fast by oneDNN (dim: where a patched model does not take it)", title_justify="left")
    made.add_column("in x out")
    for rows in ROWS:
        made.add_column(f"{rows} rows", justify="right")
    for features in SHAPES:
        of_shape = [each for each in measured if each.features == features]
        ratios = (("" if each.is_taken else "[dim]") + f"{each.torch / each.onednn:.2f}" for each in of_shape)
        made.add_row("{} x {}".format(*features), *ratios)
    return made


def step_table(measured: list[Step]) -> Table:
    """Return the steps for people."""
    made = Table(title="Milliseconds of a decode step, Llama-3.2-1B's shape", title_justify="left")
    for name in ("rows", "stock", "patched", "ratio", "tokens equal"):
        made.add_column(name, justify="right")
    for each in measured:
        times = f"{each.stock:.0f}", f"{each.patched:.0f}", f"{each.stock / each.patched:.2f}"
        made.add_row(str(each.rows), *times, "yes" if each.equal else "NO")
    return made


def main() -> int:
    """Measure and write a JSON file; 1 where tokens differ."""
    options = environment.options("linear", __doc__)
    described = environment.describe()
    with torch.inference_mode():
        measured = [layer for features in SHAPES for layer in layers(features)]
    report.console().print(layer_table(measured))
    model = llama()
    taken = [steps(model, rows) for rows in BATCHES]
    report.console().print(step_table(taken))
    path = options.out / "linear.json"
    content = {"layers": [asdict(each) for each in measured], "steps": [asdict(each) for each in taken]}
    report.save(path, {"environment": described, **content})
    report.console().print(f"Written: {path}")
    return 0 if all(each.equal for each in taken) else 1


if __name__ == "__main__":
    sys.exit(main())
