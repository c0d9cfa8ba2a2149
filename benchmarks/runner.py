"""Runs scenarios: stock and patched in one process, on the same parameters, taking turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_paged import patch_model

from . import smollm2
from .measure import Run, Work, equal_share, run
from .memory import KvProbe, KvUse, kv_use
from .peer import PeerRun, run_peer
from .scenarios import Scenario


class Progress(Protocol):
    """Hears which run is under way and each token it makes."""

    def run(self, name: str, tokens: int) -> Callable[[], None]:
        """A run that will make ``tokens`` tokens a row begins; call the result for each."""


@dataclass(frozen=True)
class Sides:
    """Three models on the same parameters, so that each stays as it is between runs."""

    stock: PreTrainedModel
    patched: PreTrainedModel
    peer: PreTrainedModel

    @classmethod
    def of(cls, model: PreTrainedModel) -> Sides:
        """Patch one of three twins. None of them knows an end-of-sequence token: runs do equal work."""
        model.generation_config.eos_token_id = None
        return cls(model, patch_model(smollm2.twin(model)), smollm2.twin(model))


@dataclass(frozen=True)
class Outcome:
    """Everything measured in one scenario."""

    scenario: Scenario
    stock_seconds: tuple[float, ...]
    patched_seconds: tuple[float, ...]
    equal_share: float
    """Share of generated and prompt tokens equal to stock's, the worst run."""
    kv: KvUse
    prompt_tokens: int
    computed_tokens: int
    peer: PeerRun
    sample: torch.Tensor
    """The patched side's first row ``[tokens]``."""

    @property
    def ratio(self) -> float:
        """Stock's time over ours, the median over pairs of neighbouring runs."""
        return median(s / p for s, p in zip(self.stock_seconds, self.patched_seconds, strict=True))

    @property
    def reached(self) -> bool | None:
        """Whether the floor was reached; ``None`` where none applies."""
        return None if self.scenario.floor is None else self.ratio >= self.scenario.floor

    @property
    def lean(self) -> bool | None:
        """Whether KV memory kept to its margin; ``None`` where prompts are too short for the margin to mean much."""
        return self.kv.within_margin if self.scenario.whole else None

    @property
    def exact(self) -> bool:
        """Whether the tokens are as promised: all equal in float32, nothing promised in other dtypes."""
        return self.equal_share == 1.0 or self.scenario.dtype != "float32"


def run_all(scenarios: Sequence[Scenario], *, runs: int, with_peer: bool, progress: Progress) -> Iterator[Outcome]:
    """Measure ``scenarios`` in order, loading the model once for each dtype."""
    tokenizer = smollm2.load_tokenizer()
    sides: dict[str, Sides] = {}
    for scenario in scenarios:
        if scenario.dtype not in sides:
            sides = {scenario.dtype: Sides.of(smollm2.load_model(getattr(torch, scenario.dtype)))}
        yield run_one(scenario, sides[scenario.dtype], tokenizer, runs=runs, with_peer=with_peer, progress=progress)


def run_one(
    scenario: Scenario,
    sides: Sides,
    tokenizer: PreTrainedTokenizerBase,
    *,
    runs: int,
    with_peer: bool,
    progress: Progress,
    warm_up: bool = True,
) -> Outcome:
    """Warm both sides up, then take turns. Memory is looked at while warming up, or in the run where nothing warms."""
    work = Work.of(scenario, tokenizer)
    probe = KvProbe(sides.patched)

    def one(model: PreTrainedModel, name: str, probe: KvProbe | None = None) -> Run:
        return run(model, work, on_token=progress.run(f"{scenario.name} {name}", scenario.new), probe=probe)

    if warm_up:
        one(sides.stock, "stock, warm-up")
        one(sides.patched, "patched, warm-up", probe)
    pairs: list[tuple[Run, Run]] = []
    for i in range(runs):
        which = f"{i + 1}/{runs}"
        sides.patched.paged.reset_stats()
        pairs.append(
            (one(sides.stock, f"stock {which}"), one(sides.patched, f"patched {which}", None if warm_up else probe))
        )
    stats = sides.patched.paged.stats()
    stock, patched = pairs[-1]
    if with_peer:
        progress.run(f"{scenario.name} continuous batching", 0)
        peer = run_peer(sides.peer, work, stock.sequences[:, work.input_ids.shape[1] :].tolist())
    else:
        peer = PeerRun(None, "not run")
    return Outcome(
        scenario=scenario,
        stock_seconds=tuple(stock.seconds(scenario) for stock, _ in pairs),
        patched_seconds=tuple(patched.seconds(scenario) for _, patched in pairs),
        equal_share=min(equal_share(patched.sequences, stock.sequences) for stock, patched in pairs),
        kv=kv_use(work, probe),
        prompt_tokens=stats.prompt_tokens,
        computed_tokens=stats.computed_tokens,
        peer=peer,
        sample=patched.sequences[0],
    )
