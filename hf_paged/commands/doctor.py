"""Is it right, and what is fast: a model asked in a few ways, patched and by stock, and why what is not fast is not."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence

import torch
import transformers

from hf_paged import faster_layers
from hf_paged.backends import backend_for
from hf_paged.check import DEFAULT_LENGTH, MIN_LENGTH, Finding, NotAskableError, check
from hf_paged.commands.arguments import UsageError, add_block_size, add_kv_cache_dtype, count_of
from hf_paged.commands.columns import aligned
from hf_paged.commands.loading import ARGUMENT, load_model
from hf_paged.commands.subject import DTYPES, add_dtype
from hf_paged.config import ATTENTION_BACKENDS
from hf_paged.footprint import formats_for
from hf_paged.patch import patch_model
from hf_paged.quality import MAX_MEAN_KL, Quality, measure, prompt_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-paged doctor`."""
    parser.add_argument(
        "model",
        metavar=ARGUMENT,
        help="hub id or folder; a config.json is built with random weights, which is no test"
        " of weights but of the code",
    )
    add_dtype(parser)
    parser.add_argument(
        "--length",
        type=count_of("tokens"),
        default=DEFAULT_LENGTH,
        metavar="N",
        help="tokens of the longest prompt (default: %(default)s)",
    )
    add_block_size(parser)
    add_kv_cache_dtype(parser)
    parser.add_argument(
        "--attention-backend", choices=ATTENTION_BACKENDS, default="auto", help="as in patch_model (default: auto)"
    )


def run(args: argparse.Namespace) -> int:
    """Print what was found; 1 where an answer differs from stock's."""
    if args.length < MIN_LENGTH:
        raise UsageError("--length", f"must be {MIN_LENGTH} or more, got {args.length}")
    model = load_model(args.model, DTYPES.get(args.dtype))
    try:
        patch_model(
            model,
            block_size=args.block_size,
            attention_backend=args.attention_backend,
            kv_cache_dtype=args.kv_cache_dtype,
            verify=False,  # what it would do is done here
        )
    except (TypeError, ValueError) as error:
        raise UsageError(ARGUMENT, str(error)) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says it
        try:
            findings, qualities = check(model, args.length), _qualities(model)
        except NotAskableError as error:
            raise UsageError(ARGUMENT, f"{args.model} cannot be examined: {error}") from None
    print("\n".join(_lines(args, model, findings, qualities)))
    is_off = any(not each.mean_kl <= MAX_MEAN_KL for name, each in qualities.items() if name == args.kv_cache_dtype)
    return 1 if is_off or any(finding.mismatch for finding in findings) else 0


def _qualities(model: transformers.PreTrainedModel) -> dict[str, Quality]:
    """Of all formats where one is asked for, so that another one can be chosen."""
    if model.paged.config.kv_format is None:
        return {}
    found = measure(model, prompt_of(model), formats_for(model))
    return {name: each for name, each in found.items() if name != "auto"}


def _lines(
    args: argparse.Namespace,
    model: transformers.PreTrainedModel,
    findings: Sequence[Finding],
    qualities: dict[str, Quality],
) -> Iterator[str]:
    dtype = str(model.dtype).removeprefix("torch.")
    yield f"{args.model}: {type(model).__name__}, {dtype}, {args.block_size} tokens a block"
    yield f"transformers {transformers.__version__}, torch {torch.__version__}"
    yield ""
    attention = backend_for(args.attention_backend, model.device).describe()
    yield from aligned([("attention", attention), ("linear layers", faster_layers.describe(model))])
    yield ""
    yield from aligned([("question", "way", "off by", "allowed", ""), *map(_row, findings)])
    if qualities:
        yield ""
        yield from aligned([("KV stored as", "mean KL", "allowed", ""), *map(_quality_row, qualities.items())])
    reasons = list(dict.fromkeys(reason for finding in findings for reason in finding.reasons))
    if reasons:
        yield ""
        yield "Not fast, or not kept for later calls, because of:"
        yield from (f"- {reason} ({', '.join(_asked(findings, reason))})" for reason in reasons)
    yield ""
    yield from _verdict(args, model, findings)


def _row(finding: Finding) -> Sequence[str]:
    verdict = "DIFFERS" if finding.mismatch else "same"
    return finding.name, finding.way, f"{finding.error:.1e}", f"{finding.tolerance:.0e}", verdict


def _quality_row(named: tuple[str, Quality]) -> Sequence[str]:
    name, quality = named
    return (
        name,
        f"{quality.mean_kl:.1e}",
        f"{MAX_MEAN_KL}",
        "passes" if quality.mean_kl <= MAX_MEAN_KL else "TOO FAR OFF",
    )


def _asked(findings: Sequence[Finding], reason: str) -> list[str]:
    names = [finding.name for finding in findings if reason in finding.reasons]
    return ["all"] if len(names) == len(findings) else names


def _verdict(
    args: argparse.Namespace, model: transformers.PreTrainedModel, findings: Sequence[Finding]
) -> Iterator[str]:
    wrong = [finding.name for finding in findings if finding.mismatch]
    if wrong:
        yield f"{len(wrong)} of {len(findings)} answers differ from stock's: {', '.join(wrong)}."
    else:
        rounded = " on KV rounded in the same way" if model.paged.config.kv_format else ""
        yield f"All answers are those of stock{rounded}."
    windows = {window for window in model.paged.layout().windows if window is not None and window >= args.length}
    if windows:
        shortest = min(windows)
        yield f"Windows of {shortest:,} tokens are longer than the prompts; --length {2 * shortest} looks beyond."
