"""``python -m benchmarks.own_share``: what hf_paged itself takes of a decode step of SmolLM2, by clocks.

Ours is all of `PagedCache.update` (the store of new tokens included), all of the attention function but the kernel, the
looks at linear layers, and what happens around the model's forward pass: plans, checks, statistics. The clocks count as
ours, too.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest import mock

import torch

from hf_paged import attention, cache, linear, patch_model, runtime
from hf_paged_kernels import NativeKernel, native_kernels

from . import environment, report, smollm2
from .measure import StepClock, Work, forget_prefixes, generate
from .scenarios import SCENARIOS

CLOCKED = ("step", "update", "attention", "kernel", "linear")
CALLS = 3
"""Of each kind; the first is not counted."""


class Clocks:
    """Seconds by name since the last step, and the steps before."""

    def __init__(self) -> None:
        self.now: Counter[str] = Counter()
        self.steps: list[Counter[str]] = []
        self._last = time.perf_counter()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with a clock around it."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.now[name] += time.perf_counter() - begin

        return timed

    def step(self) -> None:
        """A token is done."""
        now = time.perf_counter()
        self.now["step"], self._last = now - self._last, now
        self.steps.append(self.now)
        self.now = Counter()

    def milliseconds(self, name: str) -> float:
        """Median over the steps; the first two tell of the prompt."""
        return median(step[name] for step in self.steps[2:]) * 1e3


@contextmanager
def clocked(clocks: Clocks) -> Iterator[None]:
    """Clocks around what is ours, and around what is not and runs inside of it, for models that are patched here."""
    run = runtime.PagedRuntime.run

    def run_clocked(self: runtime.PagedRuntime, call: Callable[..., Any], *args: Any) -> Any:
        return run(self, clocks.around("model", call), *args)

    with (
        mock.patch.object(runtime.PagedRuntime, "run", clocks.around("all", run_clocked)),
        mock.patch.object(cache.PagedCache, "update", clocks.around("update", cache.PagedCache.update)),
        mock.patch.object(
            attention, "paged_attention_forward", clocks.around("attention", attention.paged_attention_forward)
        ),
        mock.patch.object(linear, "way_to_take", clocks.around("linear", linear.way_to_take)),
        mock.patch.object(NativeKernel, "run_whole", clocks.around("kernel", NativeKernel.run_whole)),
    ):
        yield


def measure(name: str) -> Iterator[dict[str, Any]]:
    """Figures of a scenario, in milliseconds a step: with a new prompt, and with the same prompt again."""
    scenario = next(each for each in SCENARIOS if each.name == name)
    clocks = Clocks()
    with clocked(clocks):
        model = patch_model(smollm2.load_model(getattr(torch, scenario.dtype)))
        work = Work.of(scenario, smollm2.load_tokenizer())
        for prompt in ("new", "again"):
            calls = []
            for _ in range(CALLS):
                if prompt == "new":
                    forget_prefixes(model)
                clocks.steps.clear()
                generate(model, work, StepClock(clocks.step))
                calls.append({each: clocks.milliseconds(each) for each in CLOCKED})
                calls[-1]["around"] = clocks.milliseconds("all") - clocks.milliseconds("model")
            medians = {each: median(call[each] for call in calls[1:]) for each in calls[0]}
            ours = sum(medians[each] for each in ("update", "attention", "linear", "around")) - medians["kernel"]
            yield {"scenario": name, "prompt": prompt, **medians, "ours": ours, "share": ours / medians["step"]}


def main() -> None:
    """Measure, print, write."""
    made = environment.parser("benchmarks.own_share", __doc__)
    made.add_argument("--scenarios", nargs="+", choices=[each.name for each in SCENARIOS], default=["one-100"])
    options = environment.parse(made)
    described = {**environment.describe(), "kernel": native_kernels().reason}
    console, results = report.console(), []
    for name in options.scenarios:
        for result in measure(name):
            results.append(result)
            console.print(
                f"{name}, prompt {result['prompt']:5}  step {result['step']:6.2f} ms  ours {result['ours']:.2f} ms, "
                f"{result['share']:.2%} (around the pass {result['around']:.2f} ms)"
            )
    environment.save(options.out / "own-share.json", {"environment": described, "results": results})


if __name__ == "__main__":
    main()
