"""Does a patched model answer as stock does? Asked in ways that take different paths, on the model's own weights."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hf_paged import compat
from hf_paged.compat import CACHE_NAME
from hf_paged.probe import difference, in_one_line, tolerance_of
from hf_paged.quality import rounding_cache
from hf_paged.stats import PagedStats
from hf_paged_kernels import KVFormat

DEFAULT_LENGTH = 64
NEW_TOKENS = 16  # decode steps of encoder-decoders and hybrids are tried at the eighth
MIN_LENGTH = 16
_SEED = 20


class NotAskableError(ValueError):
    """Stock itself does not answer prompts of token ids."""


class Question(NamedTuple):
    """One `generate` call: its name, `input_ids` and `attention_mask`, other arguments."""

    name: str
    inputs: dict[str, torch.Tensor]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """How one question was answered.

    Attributes:
        name: of the question.
        way: "fast", "reused" (what an earlier call had computed was not computed again), "padded" or "stock".
        reasons: why it is not fast, or why nothing is kept of it.
        error: largest difference of logits (of beams: of their scores), as a part of the largest.
        tolerance: the largest that is taken for rounding.
        mismatch: what is wrong, or `None`.
    """

    name: str
    way: str
    reasons: tuple[str, ...]
    error: float
    tolerance: float
    mismatch: str | None


def check(model: Any, length: int = DEFAULT_LENGTH) -> list[Finding]:
    """Ask the patched `model` and stock, prompts of up to `length` tokens, and compare.

    Stock is the same model with transformers' own cache, rounded where KV is stored quantized. Random numbers are drawn
    from a generator of their own, and prefixes kept under a salt of their own; statistics begin anew. Raises
    `NotAskableError`.
    """
    runtime, findings, salt = model.paged, [], secrets.token_hex(16)
    before = runtime.stats()
    with torch.random.fork_rng(), torch.no_grad():
        for question in _questions(model, length):
            expected = _ask_stock(model, question, runtime.config.kv_format)
            runtime.reset_stats()
            actual = _ask(model, question, cache_salt=salt)
            findings.append(_finding(question, runtime.stats(), expected, actual, tolerance_of(model.dtype)))
            del expected, actual
    kept = before.blocks_cached + before.blocks_host + before.blocks_disk
    if not kept:  # else what was asked goes when its memory is needed
        runtime.clear()
    runtime.reset_stats()
    return findings


def mismatches(findings: list[Finding]) -> str:
    """What is wrong, in one line; empty where nothing is."""
    return "; ".join(f"{each.name}: {each.mismatch}" for each in findings if each.mismatch)


def _questions(model: Any, length: int) -> Iterator[Question]:
    vocabulary, device = compat.vocabulary_size(model.config), compat.compute_device(model)
    tokens = [(5 + 11 * i + 7 * i * i) % vocabulary for i in range(length)]
    others = [(3 + 13 * i + 3 * i * i) % vocabulary for i in range(length)]
    half = length // 2
    rows = [tokens, tokens[:half] + others[: half // 2], others[:5]]
    longest = max(map(len, rows))
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    padded = [[0] * (longest - len(row)) + row for row in rows]
    batch = {"input_ids": torch.tensor(padded, device=device), "attention_mask": torch.tensor(mask, device=device)}
    one = {name: each[:1] for name, each in batch.items()}
    holed = {**batch, "attention_mask": batch["attention_mask"].clone()}
    holed["attention_mask"][0, half - 2 : half] = 0
    yield Question("prompts of unequal length", batch, {"do_sample": False})
    yield Question("the same again", batch, {"do_sample": False})
    yield Question("samples of one prompt", one, {"do_sample": True, "num_return_sequences": 3})
    yield Question("beams", batch, {"do_sample": False, "num_beams": 3})
    yield Question("a hole in the mask", holed, {"do_sample": False})
    yield Question("with hidden states", batch, {"do_sample": False, "output_hidden_states": True})


def _ask_stock(model: Any, question: Question, kv_format: KVFormat | None) -> Any:
    given = {"cache_implementation": "dynamic"}
    if kv_format is not None:
        given = {CACHE_NAME: rounding_cache(model.config, kv_format)}
    try:
        return _ask(model, question, **given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise NotAskableError(f"stock does not answer a prompt of token ids: {in_one_line(error)}") from error


def _ask(model: Any, question: Question, **more: Any) -> Any:
    torch.manual_seed(_SEED)
    config = model.generation_config
    pad = 0 if config.pad_token_id is None else config.pad_token_id
    return model.generate(
        **question.inputs,
        **question.arguments,
        **more,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )


def _finding(question: Question, stats: PagedStats, expected: Any, actual: Any, tolerance: float) -> Finding:
    reasons = tuple(stats.fallbacks)
    slow = [reason for reason in reasons if not reason.startswith("prefixes not reused: ")]
    if any(reason.startswith("stock generate: ") for reason in slow):
        way = "stock"
    elif slow:
        way = "padded"
    else:
        way = "reused" if stats.reused_tokens else "fast"
    error = (_beam_error if "num_beams" in question.arguments else _step_error)(expected, actual)
    mismatch = None if error <= tolerance else f"differs by {error:.1g} of the largest, allowed {tolerance:.1g}"
    return Finding(question.name, way, reasons, error, tolerance, mismatch)


def _step_error(expected: Any, actual: Any) -> float:
    """Of the logits up to the step where tokens part, if they do: from there on the texts are different ones."""
    if expected.sequences.shape != actual.sequences.shape:
        return float("inf")
    new = expected.sequences.shape[1] - len(expected.logits)
    parted = (expected.sequences != actual.sequences)[:, new:].any(dim=0)
    steps = int(parted.nonzero()[0]) + 1 if parted.any() else len(expected.logits)
    return max(map(_error, expected.logits[:steps], actual.logits[:steps]))


def _beam_error(expected: Any, actual: Any) -> float:
    """Of the scores of the beams that were found; which of two equally good ones is a matter of rounding."""
    return _error(expected.sequences_scores, actual.sequences_scores)


def _error(expected: torch.Tensor, actual: torch.Tensor) -> float:
    if expected.shape != actual.shape or actual.isnan().any():
        return float("inf")
    finite = expected.isfinite() & actual.isfinite()
    if not torch.equal(expected.isfinite(), actual.isfinite()):
        return float("inf")
    return difference(actual[finite], expected[finite])
