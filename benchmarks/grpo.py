"""A GRPO step of TRL on SmolLM2, stock and patched taking turns: the generation, and the whole step.

Each side is a trainer in a thread of its own; one of them runs, up to its next step. Both train from the same weights
on the same prompts with the same random numbers; completions must be equal. The first step of each is not counted::

    python -m benchmarks.grpo --steps 3
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from hf_paged import patch_model

from . import environment, report, smollm2, text

GENERATIONS, PROMPT_TOKENS = 8, 1_000
RESULTS = Path(__file__).parent / "results"


@dataclass
class Side:
    """What one model has done, a figure a step."""

    step_seconds: list[float] = field(default_factory=list)
    generate_seconds: list[float] = field(default_factory=list)
    completions: list[list[str]] = field(default_factory=list)

    def reward(self, completions: list[str], **kwargs: object) -> list[float]:
        """Different words; keeps what was sampled."""
        self.completions.append(list(completions))
        return [float(len(set(completion.split()))) for completion in completions]

    @property
    def medians(self) -> tuple[float, float]:
        """Seconds of the generation and of the whole step, the first one left out."""
        return median(self.generate_seconds[1:]), median(self.step_seconds[1:])


class Turns:
    """Lets one of two threads run at a time, and gives each its own random numbers."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.current, self.left = 0, {0, 1}
        self.random_states = [torch.get_rng_state()] * 2

    def begin(self, index: int) -> None:
        """Wait for the first turn."""
        with self.changed:
            self._wait(index)

    def give_up(self, index: int, *, is_last: bool = False) -> None:
        """Let the other one run; returns with the next turn, or at once where there is none."""
        with self.changed:
            self.random_states[index] = torch.get_rng_state()
            if is_last:
                self.left.discard(index)
            if self.left:
                self.current = 1 - index if 1 - index in self.left else index
            self.changed.notify_all()
            if not is_last:
                self._wait(index)

    def _wait(self, index: int) -> None:
        self.changed.wait_for(lambda: self.current == index)
        torch.set_rng_state(self.random_states[index])


class Timed(GRPOTrainer):
    """GRPO that notes how long a step and the `generate` in it take, and takes turns."""

    side: Side
    take_turn: Callable[[], None]

    def training_step(self, *args: object, **kwargs: object) -> torch.Tensor:
        if self.side.step_seconds:
            self.take_turn()
        begin = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self.side.step_seconds.append(time.perf_counter() - begin)
        return loss

    def _generate_single_turn(self, *args: object, **kwargs: object) -> object:
        begin = time.perf_counter()
        result = super()._generate_single_turn(*args, **kwargs)
        self.side.generate_seconds.append(time.perf_counter() - begin)
        return result


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    side: Side,
    options: argparse.Namespace,
    take_turn: Callable[[], None],
) -> None:
    """GRPO steps, onto `side`."""
    tokens = text.corpus(tokenizer)[:PROMPT_TOKENS]
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            folder,
            max_steps=options.steps,
            num_generations=GENERATIONS,
            per_device_train_batch_size=GENERATIONS,
            max_completion_length=options.new,
            gradient_checkpointing=True,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        prompts = Dataset.from_dict({"prompt": [tokenizer.decode(tokens)] * GENERATIONS * options.steps})
        trainer = Timed(model, side.reward, settings, prompts, processing_class=tokenizer)
        trainer.side, trainer.take_turn = side, take_turn
        trainer.train()


def train_in_turns(
    models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> list[Side]:
    """What stock and patched do, step by step in turn."""
    sides, turns = [Side(), Side()], Turns()

    def run(index: int) -> None:
        torch.set_num_threads(options.threads)  # each thread has a number of its own
        turns.begin(index)
        try:
            train(models[index], tokenizer, sides[index], options, partial(turns.give_up, index))
        finally:
            turns.give_up(index, is_last=True)

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(run, index) for index in range(2)]:
            done.result()
    return sides


def main() -> int:
    """Measure. The exit status is 1 where a completion differs from stock's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpo", description=__doc__)
    parser.add_argument("--steps", type=int, default=4, help="steps of each side, the first not counted (default 4)")
    parser.add_argument("--new", type=int, default=32, help="tokens of a completion (default 32)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args()
    environment.prepare(options.threads)
    described = environment.describe() | {"trl": environment.version("trl")}
    tokenizer = smollm2.load_tokenizer()
    models = [smollm2.load_model(torch.float32), patch_model(smollm2.load_model(torch.float32))]
    stock, patched = train_in_turns(models, tokenizer, options)
    ratios = [before / after for before, after in zip(stock.medians, patched.medians, strict=True)]
    is_equal = stock.completions == patched.completions
    console = report.console()
    for name, before, after, ratio in zip(("generation", "step"), stock.medians, patched.medians, ratios, strict=True):
        console.print(f"{name:10}  stock {before:6.2f} s  patched {after:6.2f} s  {ratio:.2f}×")
    console.print(f"completions equal: {is_equal}", environment.summary(described))
    content = {
        "environment": described,
        "settings": vars(options) | {"out": None, "generations": GENERATIONS, "prompt_tokens": PROMPT_TOKENS},
        "generation_ratio": ratios[0],
        "step_ratio": ratios[1],
        "completions_equal": is_equal,
        "stock": vars(stock),
        "patched": vars(patched),
    }
    report.save(options.out / "grpo.json", content)
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
