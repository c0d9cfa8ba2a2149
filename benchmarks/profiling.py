"""Where the time of the decode part goes: by operator and by Python function."""

from __future__ import annotations

import cProfile
import pstats

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import StoppingCriteria

from . import smollm2
from .measure import Work, forget_prefixes, generate
from .runner import Sides
from .scenarios import Scenario


class FromFirstToken(StoppingCriteria):
    """Switches a profiler on at the first token and off at the last."""

    def __init__(self, profiler: cProfile.Profile | profile, tokens: int) -> None:
        self.profiler = profiler
        self.left = tokens
        names = ("enable", "disable") if isinstance(profiler, cProfile.Profile) else ("start", "stop")
        self.begin, self.end = (getattr(profiler, name) for name in names)
        self.begun = False

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        """Count a token; nothing stops."""
        self.left -= 1
        if not self.begun:
            self.begun = True
            self.begin()
        elif self.left == 0:
            self.end()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def show(scenario: Scenario, side: str, lines: int = 25) -> None:
    """Print the top of both lists for one side of a scenario, after a warm-up."""
    model = getattr(Sides.of(smollm2.load_model(getattr(torch, scenario.dtype))), side)
    work = Work.of(scenario, smollm2.load_tokenizer())
    operators, functions = profile(activities=[ProfilerActivity.CPU]), cProfile.Profile()
    for profiler in (operators, functions):
        forget_prefixes(model)
        generate(model, work, FromFirstToken(profiler, scenario.new))
    print(f"{side}, {scenario.title}, {scenario.new - 1} decode steps: operators, by their own time")
    print(operators.key_averages().table(sort_by="self_cpu_time_total", row_limit=lines, max_name_column_width=60))
    print("Python functions, by their own time")
    pstats.Stats(functions).sort_stats("tottime").print_stats(lines)
