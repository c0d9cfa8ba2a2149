"""One timed run of one scenario on one model, and calls that take turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, TypeVar

import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from hf_paged.commands.calls import Watch

from . import text
from .scenarios import Scenario

SEED = 0
CPU = torch.device("cpu")
T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """A scenario made concrete. Every side gets the same tensors."""

    scenario: Scenario
    input_ids: torch.Tensor
    """``[rows, longest]``, padded on the left."""
    attention_mask: torch.Tensor

    @classmethod
    def of(cls, scenario: Scenario, tokenizer: PreTrainedTokenizerBase) -> Work:
        """Cut the scenario's prompts from real text."""
        return cls(scenario, *text.prompts(scenario, tokenizer))

    @property
    def prompts(self) -> list[list[int]]:
        """The rows without their padding."""
        return [row[mask.bool()].tolist() for row, mask in zip(self.input_ids, self.attention_mask, strict=True)]


@dataclass(frozen=True)
class Run:
    """What one call of ``generate`` took and gave."""

    call_seconds: float
    decode_seconds: float
    sequences: torch.Tensor = field(repr=False)

    def seconds(self, scenario: Scenario) -> float:
        """Return the part of the time that the scenario is about."""
        return self.decode_seconds if scenario.timed == "decode" else self.call_seconds


class StepClock(Watch):
    """Stamps the time at every generated token and never stops anything."""

    def __init__(self, on_token: Callable[[], object] = lambda: None) -> None:
        super().__init__(on_token)
        self.stamps: list[float] = []

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Note the time, then call `on_token`."""
        self.stamps.append(time.perf_counter())
        return super().__call__(*args, **kwargs)


@dataclass(frozen=True)
class Stamped:
    """One greedy call: seconds to its first token, milliseconds of each step after that, and all tokens."""

    first_seconds: float
    step_milliseconds: list[float]
    sequences: torch.Tensor


def stamped(model: PreTrainedModel, ids: torch.Tensor, new: int) -> Stamped:
    """Ask for `new` tokens after ``[rows, tokens]`` without padding."""
    clock, begin = StepClock(), time.perf_counter()
    sequences = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        stopping_criteria=[clock],
    )  # fmt: skip
    steps = [(end - before) * 1e3 for before, end in pairwise(clock.stamps)]
    return Stamped(clock.stamps[0] - begin, steps, sequences)


class RowsEnd(StoppingCriteria):
    """Row ``i`` is done after ``ends[i]`` new tokens and padded from then on.

    ``generate`` pads finished rows only where some criterion has an ``eos_token_id``; its value is not looked at.
    """

    eos_token_id = torch.tensor([-1])

    def __init__(self, ends: Sequence[int], prompt_length: int) -> None:
        self.ends = torch.tensor(ends)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        """Return ``[rows]``, true where a row has made all its tokens."""
        return (input_ids.shape[1] - self.prompt_length) >= self.ends.to(input_ids.device)


def run(
    model: PreTrainedModel,
    work: Work,
    *,
    on_token: Callable[[], object] = lambda: None,
    probe: LogitsProcessor | None = None,
) -> Run:
    """Generate once, from a clean slate: same seed, no prefix kept from an earlier call."""
    forget_prefixes(model)
    gc.collect()
    torch.manual_seed(SEED)
    clock = StepClock(on_token)
    begin = time.perf_counter()
    sequences = generate(model, work, clock, probe)
    end = time.perf_counter()
    return Run(end - begin, clock.stamps[-1] - clock.stamps[0], sequences)


def generate(
    model: PreTrainedModel, work: Work, clock: StoppingCriteria, probe: LogitsProcessor | None = None
) -> torch.Tensor:
    """Call the model's ``generate`` as a user would, and return the sequences ``[rows, longest + new]``."""
    scenario = work.scenario
    criteria = [clock]
    if scenario.ends:
        criteria.insert(0, RowsEnd(scenario.ends, work.input_ids.shape[1]))
    return model.generate(
        input_ids=work.input_ids,
        attention_mask=work.attention_mask,
        max_new_tokens=scenario.new,
        stopping_criteria=criteria,
        logits_processor=[probe] if probe is not None else [],
        **{"do_sample": False, **scenario.arguments},
    )


def first_token(model: PreTrainedModel, ids: torch.Tensor) -> tuple[float, int]:
    """Seconds to the first new token of a prompt `[1, tokens]`, and that token."""
    begin = time.perf_counter()
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    return time.perf_counter() - begin, int(answer[0, -1])


def compare_first_tokens(
    ways: dict[str, Callable[[], tuple[float, int]]], rounds: int
) -> tuple[dict[str, float], bool]:
    """Median seconds of each way to a first token, as `first_token` returns them, and whether the tokens are equal."""
    given = taking_turns(ways, rounds)
    seconds = {way: median(each for each, _ in pairs) for way, pairs in given.items()}
    return seconds, len({token for pairs in given.values() for _, token in pairs}) == 1


def median_seconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Of each call, over rounds in which they take turns."""
    given = taking_turns({name: partial(seconds_of, call) for name, call in calls.items()}, rounds)
    return {name: median(each) for name, each in given.items()}


def taking_turns(calls: dict[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each call returns, a value a round; a first round that warms up does not count."""
    for call in calls.values():
        call()
    given: dict[str, list[T]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            given[name].append(call())
    return given


def seconds_of_many(call: Callable[[], object], least: int, seconds: float, device: torch.device = CPU) -> float:
    """Median seconds of a call, repeated for so long and so often at the least; the first of several does not count."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < least or time.perf_counter() - begin < seconds:
        times.append(seconds_of(call, device))
    return median(times[1:] or times)


def seconds_of(call: Callable[[], object], device: torch.device = CPU) -> float:
    """Of one call, all that it has a GPU do included."""
    wait(device)
    begin = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - begin


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_prefixes(model: PreTrainedModel) -> None:
    """Drop what a patched model kept of earlier prompts; nothing to do on a stock one."""
    runtime = getattr(model, "paged", None)
    if runtime is not None:
        runtime.clear()


def equal_share(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the share of equal tokens of two ``[rows, tokens]``, 0 where even the shapes differ."""
    if ours.shape != theirs.shape:
        return 0.0
    return (ours == theirs).float().mean().item()
