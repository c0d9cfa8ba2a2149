"""``python -m benchmarks.latents``: models that keep latents in the place of K and V, stock and patched.

Four layers of DeepSeek-V2-Lite's shape, one with an MLP and three with experts, with random weights: milliseconds of a
decode step and seconds to the first token, by rows and tokens of their prompts; then a second turn of a chat.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import torch
from rich.table import Table
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedModel

from hf_paged import paged
from hf_paged_kernels import native_kernels

from . import environment, report
from .measure import Stamped, stamped, taking_turns

DTYPES = (torch.float32, torch.bfloat16)
BATCHES = ((1, 500), (1, 2000), (1, 6000), (8, 500))
"""Rows, and tokens of each prompt."""
NEW_TOKENS, CALLS = 9, 2
TURN_TOKENS = 60
"""What is new in a second turn, beside the answer to the first."""


@dataclass(frozen=True)
class Calls:
    """Medians of calls of a batch: seconds to the first token, and milliseconds of a step."""

    dtype: str
    rows: int
    prompt_tokens: int
    reused_tokens: int
    stock_first: float
    patched_first: float
    stock_step: float
    patched_step: float
    equal: bool


def lite() -> PreTrainedModel:
    """As much of DeepSeek-V2-Lite's shape as fits in float32."""
    torch.manual_seed(0)
    return DeepseekV2ForCausalLM(
        DeepseekV2Config(
            vocab_size=102_400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
            num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, kv_lora_rank=512,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, n_shared_experts=2,
            num_experts_per_tok=6, n_group=1, topk_group=1, topk_method="greedy", first_k_dense_replace=1,
            max_position_embeddings=8192, initializer_range=0.05, eos_token_id=None,
        )
    ).eval()  # fmt: skip


def compare(model: PreTrainedModel, ids: torch.Tensor, known: torch.Tensor | None = None) -> Calls:
    """Stock and patched on ``[rows, tokens]``; `known`: what a patched model was asked before."""

    def patched() -> tuple[Stamped, int]:
        with paged(model, prefix_caching=known is not None):
            stamped(model, ids[:1, :20] if known is None else known, 2)  # finds out what is fast
            model.paged.reset_stats()
            return stamped(model, ids, NEW_TOKENS), model.paged.stats().reused_tokens

    given = taking_turns({"stock": partial(stamped, model, ids, NEW_TOKENS), "patched": patched}, CALLS)
    sides = {"stock": given["stock"], "patched": [each for each, _ in given["patched"]]}
    first = {f"{side}_first": median(each.first_seconds for each in calls) for side, calls in sides.items()}
    steps = {
        f"{side}_step": median(step for each in calls for step in each.step_milliseconds)
        for side, calls in sides.items()
    }
    answers = [each.sequences for calls in sides.values() for each in calls]
    return Calls(
        str(model.dtype)[6:], *ids.shape, given["patched"][0][1], **first, **steps,
        equal=all(torch.equal(answers[0], each) for each in answers),
    )  # fmt: skip


def of_dtype(model: PreTrainedModel) -> list[Calls]:
    """All batches, then a second turn."""
    generator = torch.Generator().manual_seed(0)

    def some(rows: int, tokens: int) -> torch.Tensor:
        return torch.randint(0, model.config.vocab_size, (rows, tokens), generator=generator)

    made = [compare(model, some(*shape)) for shape in BATCHES]
    first = some(1, 2000)
    second = torch.cat([stamped(model, first, NEW_TOKENS).sequences, some(1, TURN_TOKENS)], dim=1)
    return [*made, compare(model, second, known=first)]


def table(measured: list[Calls]) -> Table:
    """Return the calls for people."""
    made = Table(title="Latents, 4 layers of DeepSeek-V2-Lite's shape: stock / patched", title_justify="left")
    for name in ("dtype", "rows", "tokens", "reused", "first token, s", "ratio", "a step, ms", "ratio", "tokens equal"):
        made.add_column(name, justify="right")
    for each in measured:
        first, step = (each.stock_first, each.patched_first), (each.stock_step, each.patched_step)
        made.add_row(
            each.dtype, str(each.rows), f"{each.prompt_tokens:,}", f"{each.reused_tokens:,}",
            "{:.2f} / {:.2f}".format(*first), f"{first[0] / first[1]:.2f}",
            "{:.0f} / {:.0f}".format(*step), f"{step[0] / step[1]:.2f}", "yes" if each.equal else "NO",
        )  # fmt: skip
    return made


def main() -> int:
    """Measure and write a JSON file; 1 where tokens of float32 differ."""
    options = environment.parse(environment.parser("benchmarks.latents", __doc__))
    described = {**environment.describe(), "kernel": native_kernels().reason}
    model = lite()
    measured = [each for dtype in DTYPES for each in of_dtype(model.to(dtype))]
    report.console().print(table(measured))
    path = options.out / "latents.json"
    environment.save(path, {"environment": described, "calls": list(map(asdict, measured))})
    report.console().print(f"Written: {path}")
    return 0 if all(each.equal for each in measured if each.dtype == "float32") else 1


if __name__ == "__main__":
    sys.exit(main())
