"""Where the time of the decode part goes: by operator and by Python function."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from itertools import repeat

import torch
from torch.profiler import ProfilerActivity, profile

from . import smollm2
from .measure import StepClock, Work, forget_prefixes, generate
from .runner import Sides
from .scenarios import Scenario


def switch(profiler: cProfile.Profile | profile, tokens: int) -> Callable[[], object]:
    """To be called at each of so many tokens: switches a profiler on at the first and off at the last."""
    names = ("enable", "disable") if isinstance(profiler, cProfile.Profile) else ("start", "stop")
    begin, end = (getattr(profiler, name) for name in names)
    turns = iter([begin, *repeat(lambda: None, tokens - 2), end])
    return lambda: next(turns)()


def show(scenario: Scenario, side: str, lines: int = 25) -> None:
    """Print the top of both lists for one side of a scenario, after a warm-up."""
    model = getattr(Sides.of(smollm2.load_model(getattr(torch, scenario.dtype))), side)
    work = Work.of(scenario, smollm2.load_tokenizer())
    operators, functions = profile(activities=[ProfilerActivity.CPU]), cProfile.Profile()
    for profiler in (operators, functions):
        forget_prefixes(model)
        generate(model, work, StepClock(switch(profiler, scenario.new)))
    print(f"{side}, {scenario.title}, {scenario.new - 1} decode steps: operators, by their own time")
    print(operators.key_averages().table(sort_by="self_cpu_time_total", row_limit=lines, max_name_column_width=60))
    print("Python functions, by their own time")
    pstats.Stats(functions).sort_stats("tottime").print_stats(lines)
