"""Calls of generate that stock and patched models are compared on: what they ask, take and give."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from hf_paged import compat
from hf_paged.commands.arguments import UsageError, add_block_size, count_of
from hf_paged.commands.loading import ARGUMENT, load_model
from hf_paged.commands.subject import DTYPES, add_dtype
from hf_paged.core.capacity import group_costs, stock_bytes
from hf_paged.footprint import footprint

MIN_LENGTH = 32
ROWS = 8


@dataclass(frozen=True)
class Call:
    """One or more calls of `generate` that are timed together: each prompt `[rows, tokens]` in turn."""

    title: str
    prompts: list[torch.Tensor]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a `Call` took and gave."""

    seconds: float
    sequences: list[torch.Tensor]
    kv_bytes: int = 0
    computed_tokens: int = 0


class Watch(StoppingCriteria):
    """Calls `at_step` at every new token; stops nothing."""

    def __init__(self, at_step: Callable[[], None]):
        self._at_step = at_step

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._at_step()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and how long its prompts and answers are."""
    parser.add_argument("model", metavar=ARGUMENT, help="hub id or folder")
    add_dtype(parser)
    add_block_size(parser)
    parser.add_argument(
        "--length",
        type=count_of("tokens"),
        default=512,
        metavar="N",
        help="tokens of the prompts (default: %(default)s)",
    )
    parser.add_argument(
        "--new", type=count_of("tokens"), default=16, metavar="N", help="tokens of the answers (default: %(default)s)"
    )


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, list[Call]]:
    """The model that was named, and what it will be asked. `UsageError` where it cannot be."""
    if args.length < MIN_LENGTH:
        raise UsageError("--length", f"must be {MIN_LENGTH} or more, got {args.length}")
    model = load_model(args.model, DTYPES.get(args.dtype))
    if model.config.is_encoder_decoder:
        raise UsageError(ARGUMENT, f"{args.model} is an encoder-decoder model; these prompts are for decoders only")
    return model, list(_calls(_text(args.model, 2 * args.length), args.length, args.new))


def _text(source: str, length: int) -> list[int]:
    """English text that every Python carries, as tokens of the model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers, tokenizers and the hub raise many kinds
        said = next(iter(str(error).splitlines()), "")
        raise UsageError(ARGUMENT, f"{source} has no tokenizer ({type(error).__name__}: {said})") from None
    text = "\n\n".join(sorted(topics.values(), key=len, reverse=True)[:24])
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < length:
        raise UsageError("--length", f"there are {len(tokens) // 2} tokens of text at most")
    return tokens[:length]


def _calls(text: list[int], length: int, new: int) -> Iterator[Call]:
    prompt = torch.tensor([text[:length]])
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    yield Call(f"{ROWS} samples of one prompt", [prompt], {**settings, "do_sample": True, "num_return_sequences": ROWS})
    own = length // 16
    rows = [text[:length] + text[length + i * own : length + (i + 1) * own] for i in range(ROWS)]
    yield Call(f"{ROWS} questions under one prompt", [torch.tensor(rows)], settings)
    turns = [torch.tensor([text[: length + i * own]]) for i in range(4)]
    yield Call("a prompt that grows, 4 calls", turns, settings)


def warm_up(model: PreTrainedModel, call: Call) -> None:
    """A short call, in which a patched model finds its way once."""
    model.generate(call.prompts[0][:, :MIN_LENGTH].to(model.device), max_new_tokens=2, do_sample=False)


def ask(model: PreTrainedModel, call: Call, at_step: Callable[[], None]) -> Answer:
    """One after the other, from no cached prefix; `at_step` is called at every new token."""
    runtime = getattr(model, "paged", None)
    peak = 0

    def watch() -> None:
        nonlocal peak
        peak = max(peak, runtime.stats().bytes_in_use if runtime else 0)
        at_step()

    if runtime:
        runtime.clear()
        runtime.reset_stats()
    torch.manual_seed(0)
    sequences, begin = [], time.perf_counter()
    for prompt in call.prompts:
        inputs = {"input_ids": prompt.to(model.device), "attention_mask": torch.ones_like(prompt, device=model.device)}
        criteria = StoppingCriteriaList([Watch(watch)])
        sequences.append(model.generate(**inputs, stopping_criteria=criteria, **call.arguments))
    seconds = time.perf_counter() - begin
    return Answer(seconds, sequences, peak, runtime.stats().computed_tokens if runtime else 0)


def dense_bytes(model: PreTrainedModel, answer: Answer) -> int:
    """Bytes of a dense cache of the largest of the calls."""
    windows = compat.cache_layout(model.config.get_text_config(decoder=True)).windows
    groups = group_costs(footprint(type(model), model.config, model.dtype).layer_bytes, windows)
    return max(len(rows) * stock_bytes(groups, rows.shape[1]) for rows in answer.sequences)


def equal(first: Answer, second: Answer) -> bool:
    """Whether all tokens are the same."""
    return all(map(torch.equal, first.sequences, second.sequences))


def dtype_name(model: PreTrainedModel) -> str:
    """Of the weights, as people write it."""
    return str(model.dtype).removeprefix("torch.")
