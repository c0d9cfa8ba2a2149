"""See it on a model of yours: the same calls of generate on stock and patched; time, tokens, memory, equal tokens."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from hf_paged.commands import calls
from hf_paged.commands.calls import Answer, Call, ask, dense_bytes, dtype_name, equal
from hf_paged.commands.progress import progress_bar
from hf_paged.patch import paged
from hf_paged.stats import format_bytes

add_arguments = calls.add_arguments


def run(args: argparse.Namespace) -> int:
    """Run and show; 1 where tokens differ in float32, in which they must not."""
    model, asked = calls.load(args)
    console = Console()
    with progress_bar(console) as progress:
        steps = args.new * sum(len(call.prompts) for call in asked)
        task = progress.add_task("stock", total=2 * steps)
        stock = [ask(model, call, lambda: progress.advance(task)) for call in asked]
        progress.update(task, description="patched")
        with paged(model, block_size=args.block_size):
            calls.warm_up(model, asked[0])
            patched = [ask(model, call, lambda: progress.advance(task)) for call in asked]
            fallbacks = model.paged.stats().fallbacks
    console.print(_table(args, model, asked, stock, patched))
    for reason in fallbacks:
        console.print(f"Not fast, or not kept for later calls, because of: {reason}")
    same = all(map(equal, stock, patched))
    if not same and model.dtype != torch.float32:
        console.print(f"In {dtype_name(model)} near-ties may fall either way; --dtype float32 compares exactly.")
    return 0 if same or model.dtype != torch.float32 else 1


def _table(
    args: argparse.Namespace,
    model: PreTrainedModel,
    calls: Sequence[Call],
    stock: Sequence[Answer],
    patched: Sequence[Answer],
) -> Table:
    table = Table(title=f"{args.model}, {dtype_name(model)}: stock → patched", title_justify="left")
    table.add_column("generate")
    for name in ("seconds", "times faster", "prompt tokens computed", "KV at the peak"):
        table.add_column(name, justify="right")
    table.add_column("tokens")
    for call, before, after in zip(calls, stock, patched, strict=True):
        copies = call.arguments.get("num_return_sequences", 1)
        table.add_row(
            call.title,
            f"{before.seconds:.2f} → {after.seconds:.2f}",
            f"{before.seconds / after.seconds:.1f}",
            f"{copies * sum(prompt.numel() for prompt in call.prompts):,} → {after.computed_tokens:,}",
            f"{format_bytes(dense_bytes(model, before))} → {format_bytes(after.kv_bytes)}",
            "same" if equal(before, after) else "DIFFER",
        )
    return table
