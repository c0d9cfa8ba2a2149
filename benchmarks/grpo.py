"""A GRPO step of TRL on SmolLM2, stock and patched taking turns: the generation, and the whole step.

Both train from the same weights on the same prompts with the same random numbers; completions must be equal. A turn is
a trainer's first two steps, of which the second counts: each trainer puts a `forward` of its own into the model, which
hf_paged tries before it uses it::

    python -m benchmarks.grpo --turns 3
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, field
from statistics import median

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from hf_paged import patch_model

from . import environment, report, smollm2, text

GENERATIONS, PROMPT_TOKENS = 8, 1_000


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
        """Seconds of the generation and of the whole step, every trainer's first left out."""
        return median(self.generate_seconds[1::2]), median(self.step_seconds[1::2])


class Timed(GRPOTrainer):
    """GRPO that notes how long a step and the `generate` in it take."""

    side: Side

    def training_step(self, *args: object, **kwargs: object) -> torch.Tensor:
        begin = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self.side.step_seconds.append(time.perf_counter() - begin)
        return loss

    def _generate_single_turn(self, *args: object, **kwargs: object) -> object:
        begin = time.perf_counter()
        result = super()._generate_single_turn(*args, **kwargs)
        self.side.generate_seconds.append(time.perf_counter() - begin)
        return result


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, side: Side, new: int, seed: int) -> None:
    """A trainer's first two GRPO steps, onto `side`."""
    tokens = text.corpus(tokenizer)[:PROMPT_TOKENS]
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            folder,
            max_steps=2,
            seed=seed,
            num_generations=GENERATIONS,
            per_device_train_batch_size=GENERATIONS,
            max_completion_length=new,
            gradient_checkpointing=True,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        prompts = Dataset.from_dict({"prompt": [tokenizer.decode(tokens)] * GENERATIONS})
        trainer = Timed(model, side.reward, settings, prompts, processing_class=tokenizer)
        trainer.side = side
        trainer.train()


def main() -> int:
    """Measure. The exit status is 1 where a completion differs from stock's."""
    parser = environment.parser("benchmarks.grpo", __doc__)
    parser.add_argument("--turns", type=int, default=3, help="counted steps of each side (default 3)")
    parser.add_argument("--new", type=int, default=32, help="tokens of a completion (default 32)")
    options = environment.parse(parser)
    described = environment.describe() | {"trl": environment.version("trl")}
    tokenizer = smollm2.load_tokenizer()
    models = [smollm2.load_model(torch.float32), patch_model(smollm2.load_model(torch.float32))]
    sides = [Side(), Side()]
    for turn in range(options.turns):
        for index in (0, 1) if turn % 2 else (1, 0):
            train(models[index], tokenizer, sides[index], options.new, seed=turn)
    stock, patched = sides
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
    environment.save(options.out / "grpo.json", content)
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
