"""``python -m benchmarks.stock_shapes``: prompts that are not packed, in calls that follow one another and as samples.

Two models that nobody has to download: SmolLM2's own weights below an image encoder of SmolVLM-256M's shape with
random weights, and random weights of LFM2-350M's shape, ten layers of short convolutions and six of attention. What a
model is, its answers are compared with stock's on the same weights. Calls take turns: each is made of the one model,
then of the other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, Lfm2Config, PreTrainedModel, SmolVLMConfig
from transformers import SmolVLMForConditionalGeneration as SmolVLM

from hf_paged import patch_model

from . import environment, report, smollm2, text
from .measure import forget_prefixes

IMAGE_TOKEN = 49_150
TILES, TILE_TOKENS, TILE_PIXELS = 5, 64, 512
TURNS, TURN_TOKENS, NEW_TOKENS, SAMPLES = 4, 16, 16, 8

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Call:
    """One call of both models: seconds, prompt tokens that went through the patched one, whether the answers agree."""

    name: str
    stock_seconds: float
    patched_seconds: float
    prompt_tokens: int
    computed_tokens: int
    equal: bool


def vision_language_model() -> PreTrainedModel:
    """SmolLM2 below an image encoder of SmolVLM-256M's shape, whose weights are random."""
    language = smollm2.load_model(torch.float32)
    vision = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": TILE_PIXELS, "patch_size": 16,
    }  # fmt: skip
    config = SmolVLMConfig(
        vision_config=vision, text_config=language.config.to_dict(), image_token_id=IMAGE_TOKEN, scale_factor=4
    )
    torch.manual_seed(0)
    model = SmolVLM(config).eval()
    model.model.text_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    return model


def hybrid_model() -> PreTrainedModel:
    """Random weights of LFM2-350M's shape, with SmolLM2's vocabulary."""
    kinds = {"c": "conv", "a": "full_attention"}
    config = Lfm2Config(
        vocab_size=49_152, hidden_size=1024, intermediate_size=6656, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=8, conv_L_cache=3, max_position_embeddings=8192, initializer_range=0.05,
        layer_types=[kinds[each] for each in "ccaccaccacacacac"],
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def image_inputs(tokens: list[int]) -> Inputs:
    """A prompt with an image that is cut into tiles, as SmolVLM's processor does it."""
    ids = [*tokens[:20], *[IMAGE_TOKEN] * (TILES * TILE_TOKENS), *tokens[20:60]]
    pixels = torch.randn(1, TILES, 3, TILE_PIXELS, TILE_PIXELS, generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels}


def text_inputs(tokens: list[int]) -> Inputs:
    """A prompt of 1,000 tokens."""
    return {"input_ids": torch.tensor([tokens[:1000]])}


MODELS: dict[str, tuple[str, Callable[[], PreTrainedModel], Callable[[list[int]], Inputs]]] = {
    "image": ("an image of 5 tiles, 320 tokens", vision_language_model, image_inputs),
    "hybrid": ("1,000 tokens, convolutions and attention", hybrid_model, text_inputs),
}


def calls(stock: PreTrainedModel, patched: PreTrainedModel, first: Inputs, tokens: list[int]) -> Iterator[Call]:
    """A dialogue from nothing, then samples of its first prompt, and of one that nobody has seen."""

    def call(name: str, inputs: Inputs, **kwargs: object) -> tuple[Call, torch.Tensor]:
        answers, seconds = [], []
        patched.paged.reset_stats()
        for model in (stock, patched):
            torch.manual_seed(0)
            begin = time.perf_counter()
            mask = torch.ones_like(inputs["input_ids"])
            answers.append(model.generate(**inputs, attention_mask=mask, max_new_tokens=NEW_TOKENS, **kwargs))
            seconds.append(time.perf_counter() - begin)
        stats = patched.paged.stats()
        made = Call(name, *seconds, stats.prompt_tokens, stats.computed_tokens, torch.equal(*answers))
        return made, answers[0]

    inputs = first
    for turn in range(TURNS):
        made, answer = call(f"turn {turn + 1}", inputs, do_sample=False)
        yield made
        own = tokens[2000 + turn * TURN_TOKENS :][:TURN_TOKENS]
        inputs = {**first, "input_ids": torch.cat([answer, torch.tensor([own])], dim=1)}
    samples = {"do_sample": True, "num_return_sequences": SAMPLES}
    yield call(f"{SAMPLES} samples of turn 1's prompt", first, **samples)[0]
    forget_prefixes(patched)
    yield call(f"{SAMPLES} samples, from nothing", first, **samples)[0]


def table(title: str, made: list[Call]) -> Table:
    """Return the calls for people."""
    shown = Table(title=f"Prompts in stock's shapes: {title}", title_justify="left")
    for name in ("call", "stock s", "patched s", "ratio", "prompt tokens", "computed", "equal"):
        shown.add_column(name, justify="left" if name == "call" else "right")
    for each in made:
        shown.add_row(
            each.name,
            f"{each.stock_seconds:.2f}",
            f"{each.patched_seconds:.2f}",
            f"{each.stock_seconds / each.patched_seconds:.2f}",
            f"{each.prompt_tokens:,}",
            f"{each.computed_tokens:,}",
            "yes" if each.equal else "[bold red]NO[/]",
        )
    return shown


def main() -> int:
    """Run both dialogues twice, the first time on a model that nobody has asked before; 1 where an answer differs."""
    parser = environment.parser("benchmarks.stock_shapes", __doc__)
    parser.add_argument("--only", choices=MODELS, action="append")
    options = environment.parse(parser)
    described, console = environment.describe(), report.console()
    tokens = text.corpus(smollm2.load_tokenizer())
    results = {}
    for name in options.only or MODELS:
        title, build, inputs_of = MODELS[name]
        stock = build()
        stock.generation_config.eos_token_id = None
        patched = patch_model(smollm2.twin(stock))
        rounds = {}
        for which in ("a model that was never asked", "the same again"):
            forget_prefixes(patched)
            made = list(calls(stock, patched, inputs_of(tokens), tokens))
            console.print(table(f"{title}, {which}", made))
            rounds[which] = [asdict(each) for each in made]
        results[name] = {"title": title, "rounds": rounds}
    path = options.out / ("stock-shapes.json" if options.only is None else "partial.stock-shapes.json")
    environment.save(path, {"environment": described, "new_tokens": NEW_TOKENS, "models": results})
    console.print(f"Written: {path}")
    return 0 if all(each["equal"] for model in results.values() for r in model["rounds"].values() for each in r) else 1


if __name__ == "__main__":
    sys.exit(main())
