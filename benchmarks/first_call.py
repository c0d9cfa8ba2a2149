"""``python -m benchmarks.first_call``: what the first ``generate`` of a model takes, patched and stock.

A patched model is tried out on a few tokens of its own before its first call, and again where something else was put
in the place of its ``forward``, as trainers do. Each round has a fresh model for either side, in turn, and calls of one
new token with a prompt of their own. What the process knows of the model's config is forgotten before each round.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from statistics import median

import torch
from rich.table import Table

from hf_paged import footprint, paged

from . import environment, report, smollm2, text
from .measure import first_token, taking_turns

ROUNDS, PROMPT_TOKENS = 7, 20


@dataclass(frozen=True)
class Calls:
    """Seconds of calls of one model, in order; `new_forward` is that after `forward` was replaced."""

    first: float
    second: float
    new_forward: float
    last: float


def round_of(dtype: torch.dtype, prompts: list[torch.Tensor], patched: bool) -> Calls:
    """Time the calls of a fresh model."""
    model = smollm2.load_model(dtype)
    footprint._measure.cache_clear()
    with paged(model) if patched else nullcontext():
        before = [first_token(model, ids)[0] for ids in prompts[:2]]
        model.forward = _wrapped(model.forward)
        after = [first_token(model, ids)[0] for ids in prompts[2:]]
    return Calls(*before, *after)


def _wrapped(forward: Callable[..., object]) -> Callable[..., object]:
    return functools.wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))


def measure(dtype: torch.dtype, tokens: list[int], rounds: int) -> dict[str, list[Calls]]:
    """Rounds of both sides."""
    prompts = [torch.tensor([tokens[i * 50 : i * 50 + PROMPT_TOKENS]]) for i in range(4)]
    sides = {
        side: functools.partial(round_of, dtype, prompts, is_patched)
        for side, is_patched in (("stock", False), ("patched", True))
    }
    return taking_turns(sides, rounds)


def medians(calls: list[Calls]) -> Calls:
    """Of each call, over the rounds."""
    return Calls(*map(median, zip(*(asdict(each).values() for each in calls), strict=True)))


def table(measured: dict[str, list[Calls]]) -> Table:
    """Return the figures for people."""
    made = Table(title="Calls of one new token, milliseconds", title_justify="left")
    made.add_column("")
    for name in ("first", "second", "with a new forward", "after that"):
        made.add_column(name, justify="right")
    for side, calls in measured.items():
        made.add_row(side, *(f"{seconds * 1e3:.0f}" for seconds in asdict(medians(calls)).values()))
    return made


def main() -> int:
    """Measure and write a JSON file."""
    parser = environment.parser("benchmarks.first_call", __doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"fresh models a side (default {ROUNDS})")
    parser.add_argument("--dtype", default="float32", help="of the weights (default float32)")
    options = environment.parse(parser)
    described = environment.describe()
    measured = measure(getattr(torch, options.dtype), text.corpus(smollm2.load_tokenizer()), options.rounds)
    report.console().print(table(measured), environment.summary(described))
    sides = {
        side: {"median": asdict(medians(calls)), "rounds": [asdict(each) for each in calls]}
        for side, calls in measured.items()
    }
    path = options.out / "first-call.json"
    environment.save(path, {"environment": described, "dtype": options.dtype, "prompt_tokens": PROMPT_TOKENS, **sides})
    report.console().print(f"Written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
