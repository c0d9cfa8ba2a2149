"""Measure a model of yours: the calls of the demo, several times, stock and patched taking turns; medians."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from hf_paged.commands import calls
from hf_paged.commands.arguments import UsageError, count_of
from hf_paged.commands.calls import Answer, Call, ask, dense_bytes, dtype_name, equal
from hf_paged.commands.progress import progress_bar
from hf_paged.patch import paged
from hf_paged.stats import format_bytes


@dataclass(frozen=True)
class Measured:
    """One call: answers of stock and of the patched model, run by run."""

    call: Call
    stock: list[Answer]
    patched: list[Answer]

    @property
    def medians(self) -> tuple[float, float]:
        """Seconds, stock and patched."""
        return median(each.seconds for each in self.stock), median(each.seconds for each in self.patched)

    @property
    def same(self) -> bool:
        """Whether every run of both gave the same tokens."""
        return all(map(equal, self.stock, self.patched))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-paged bench`."""
    calls.add_arguments(parser)
    parser.add_argument(
        "--runs", type=count_of("runs"), default=3, metavar="N", help="runs of each side (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write what was measured, as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and show; 1 where tokens differ in float32, in which they must not."""
    if args.out is not None and not args.out.parent.is_dir():
        raise UsageError("--out", f"there is no folder {args.out.parent}")
    model, asked = calls.load(args)
    console = Console()
    with progress_bar(console) as progress:
        steps = 2 * args.runs * args.new * sum(len(call.prompts) for call in asked)
        task = progress.add_task("measuring", total=steps)
        measured = _measure(model, asked, args, lambda: progress.advance(task))
    console.print(_table(args, model, measured))
    console.print(f"Medians of {args.runs}; torch {torch.__version__}, {torch.get_num_threads()} threads, "
                  f"transformers {transformers.__version__}")  # fmt: skip
    if args.out is not None:
        args.out.write_text(json.dumps(_content(args, model, measured), indent=2) + "\n")
    return 0 if all(each.same for each in measured) or model.dtype != torch.float32 else 1


def _measure(
    model: PreTrainedModel, asked: Sequence[Call], args: argparse.Namespace, at_step: Callable[[], None]
) -> list[Measured]:
    measured = [Measured(call, [], []) for call in asked]
    for _ in range(args.runs):
        for each in measured:
            each.stock.append(ask(model, each.call, at_step))
        with paged(model, block_size=args.block_size):
            calls.warm_up(model, asked[0])
            for each in measured:
                each.patched.append(ask(model, each.call, at_step))
    return measured


def _table(args: argparse.Namespace, model: PreTrainedModel, measured: Sequence[Measured]) -> Table:
    table = Table(title=f"{args.model}, {dtype_name(model)}", title_justify="left")
    table.add_column("generate")
    for name in ("stock s", "patched s", "times faster", "KV, stock", "KV, patched"):
        table.add_column(name, justify="right")
    table.add_column("tokens")
    for each in measured:
        before, after = each.medians
        table.add_row(
            each.call.title,
            f"{before:.2f}",
            f"{after:.2f}",
            f"{before / after:.2f}",
            format_bytes(dense_bytes(model, each.stock[0])),
            format_bytes(each.patched[0].kv_bytes),
            "same" if each.same else "DIFFER",
        )
    return table


def _content(args: argparse.Namespace, model: PreTrainedModel, measured: Sequence[Measured]) -> dict[str, object]:
    return {
        "model": args.model,
        "dtype": dtype_name(model),
        "block_size": args.block_size,
        "length_tokens": args.length,
        "new_tokens": args.new,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "calls": [
            {
                "title": each.call.title,
                "stock_seconds": [answer.seconds for answer in each.stock],
                "patched_seconds": [answer.seconds for answer in each.patched],
                "ratio": each.medians[0] / each.medians[1],
                "stock_kv_bytes": dense_bytes(model, each.stock[0]),
                "patched_kv_bytes": each.patched[0].kv_bytes,
                "computed_tokens": each.patched[0].computed_tokens,
                "same_tokens": each.same,
            }
            for each in measured
        ],
    }
