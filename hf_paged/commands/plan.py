"""How much fits: tokens and sequences for a memory budget, in blocks and on stock's cache; no weights are loaded."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from hf_paged.commands.arguments import Budget, add_block_size, add_kv_cache_dtype, count_of, memory_budget, merged
from hf_paged.commands.columns import aligned
from hf_paged.commands.subject import DTYPES, Subject, add_dtype, find_subject
from hf_paged.core.capacity import Capacity, GroupCost, stock_bytes
from hf_paged.host import lendable_blocks
from hf_paged.pool import most_tokens
from hf_paged.stats import format_bytes
from hf_paged_kernels import FORMATS

DEFAULT_LENGTH = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-paged plan`."""
    parser.add_argument("model", metavar="MODEL_OR_CONFIG", help="hub id, folder or config.json")
    parser.add_argument(
        "--max-memory",
        required=True,
        action="append",
        type=memory_budget,
        metavar="DEVICE=SIZE[,...]",
        help='for KV, as in accelerate: 0=8GiB,cpu=16GiB,disk=50GiB, or JSON: \'{"cpu": "16GiB"}\'; may be repeated',
    )
    parser.add_argument(
        "--length",
        type=count_of("tokens"),
        default=DEFAULT_LENGTH,
        metavar="N",
        help="tokens of a sequence, prompt and answer (default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=count_of("sequences"), default=1, metavar="N", help="sequences at once (default: %(default)s)"
    )
    add_block_size(parser)
    add_dtype(parser)
    add_kv_cache_dtype(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    budget = merged("--max-memory", args.max_memory)
    subject = find_subject(args.model, DTYPES.get(args.dtype), FORMATS.get(args.kv_cache_dtype))
    print("\n".join(_lines(subject, budget, args)))
    return 0


def _lines(subject: Subject, budget: Budget, args: argparse.Namespace) -> Iterator[str]:
    dtype = str(subject.dtype).removeprefix("torch.")
    stored = "" if args.kv_cache_dtype == "auto" else f", {args.kv_cache_dtype} KV"
    yield f"{subject.source}: {subject.kind.__name__}, {dtype}, {args.block_size} tokens a block{stored}"
    yield ""
    yield from aligned(_costs(subject, args))
    yield ""
    yield from aligned(_tiers(subject, budget, args))
    yield ""
    yield from (f"- {note}" for note in _notes(subject, budget, args))


# What things take


def _costs(subject: Subject, args: argparse.Namespace) -> Iterator[Sequence[str]]:
    capacity = _capacity(subject, args)
    about = "about " if subject.cost.estimated else ""
    for group in subject.groups:
        yield f"a token in {_name(group)}", about + format_bytes(group.token_bytes)
    size, stock = capacity.sequence_bytes(args.length), stock_bytes(subject.stock_groups, args.length)
    yield f"a sequence of {args.length:,} tokens", f"{about}{format_bytes(size)} (stock: {format_bytes(stock)})"
    if args.batch > 1:
        total = f"{about}{format_bytes(args.batch * size)} (stock: {format_bytes(args.batch * stock)})"
        yield f"{args.batch:,} of them", total
    if subject.cost.weight_bytes is not None and getattr(subject.config, "quantization_config", None) is None:
        yield "the weights, beside the budget", format_bytes(subject.cost.weight_bytes)


def _name(group: GroupCost) -> str:
    layers = f"{group.num_layers} layer{'s' * (group.num_layers > 1)}"
    return f"{layers} of full attention" if group.window is None else f"{layers} with a window of {group.window:,}"


def _capacity(subject: Subject, args: argparse.Namespace) -> Capacity:
    return Capacity(subject.groups, args.block_size, most_tokens(args.block_size))


# What fits


def _tiers(subject: Subject, budget: Budget, args: argparse.Namespace) -> Iterator[Sequence[str]]:
    yield (
        "tier",
        "budget",
        "longest sequence",
        f"of {args.length:,} tokens",
        "on stock",
        *([f"{args.batch:,} at once"] if args.batch > 1 else []),
    )
    on_device, below = _split(budget)
    for device in on_device:
        yield _row(subject, str(device), device, budget, args)
    if _overflows(subject, budget):
        yield _row(subject, f"{on_device[0]}+cpu", on_device[0], budget, args, over_host=True)
    for tier in below:
        kept = _capacity(subject, args).kept_sequences(budget[tier], args.length)
        yield f"{tier} (kept prefixes)", format_bytes(budget[tier]), "-", f"{kept:,}", "-"


def _row(
    subject: Subject, name: str, device: int | str, budget: Budget, args: argparse.Namespace, over_host: bool = False
) -> Sequence[str]:
    """What runs on a device, or there and on the host."""
    size, capacity = budget[device], _capacity(subject, args)
    host_blocks = _host_blocks(capacity, budget["cpu"]) if over_host else 0
    longest = capacity.longest(size, host_blocks)
    count = capacity.sequences(size, args.length, host_blocks)
    return (
        name,
        format_bytes(size + (budget["cpu"] if over_host else 0)),
        "any length" if longest is None else f"{longest:,} tokens",
        f"{count:,}",
        "-" if over_host else f"{size // stock_bytes(subject.stock_groups, args.length):,}",
        *(["yes" if count >= args.batch else "no"] if args.batch > 1 else []),
    )


def _overflows(subject: Subject, budget: Budget) -> bool:
    """Whether sequences that fill the device go on with a part of their blocks on the host."""
    on_device, below = _split(budget)
    has_full_layers = any(group.window is None for group in subject.groups)
    return len(on_device) == 1 and "cpu" in below and has_full_layers


def _host_blocks(capacity: Capacity, host_bytes: int) -> int:
    """Blocks of full layers that fit the host."""
    groups = capacity.groups
    full = next(number for number, group in enumerate(groups) if group.window is None)
    return lendable_blocks(host_bytes, [group.block_bytes(capacity.block_size) for group in groups], full)


def _split(budget: Budget) -> tuple[list[int | str], list[str]]:
    """Devices where sequences run, and the tiers below them."""
    gpus = sorted(device for device in budget if isinstance(device, int))
    below = [tier for tier in ("cpu", "disk") if tier in budget]
    return (gpus, below) if gpus else (["cpu"], below[1:])


def _notes(subject: Subject, budget: Budget, args: argparse.Namespace) -> Iterator[str]:
    on_device, _ = _split(budget)
    yield "Nothing is taken to be shared: what sequences begin with in common is stored once, so that more of them fit."
    yield "Stock: its dynamic cache between two steps, every row padded to the longest; copies while it grows left out."
    if subject.has_states:
        yield "Convolutional and recurrent states are left out: they take the same on both, whatever the length."
    if subject.cost.estimated:
        yield f"Estimated from fields of the config, which may not say it all: {subject.cost.estimated}."
    if not subject.dtype_is_known:
        yield "The config does not say which dtype the weights have; float32 is assumed. Set --dtype."
    most_tokens = getattr(subject.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most_tokens is not None and args.length > most_tokens:
        yield f"The model was made for {most_tokens:,} tokens; --length is more."
    if getattr(subject.config, "use_cache", True) is False:
        yield "The config switches caches off: pass use_cache=True to generate."
    if len(on_device) > 1:
        yield "Each GPU is reckoned as if it held all layers; of those that lie on several, each budget is for its own."
    for device in on_device:
        capacity = _capacity(subject, args)
        if capacity.longest(budget[device]) == capacity.most_tokens:
            yield (
                f"{device}: a pool keeps {capacity.most_tokens:,} tokens at most, whatever the budget; more in larger "
                "blocks."
            )
    if _overflows(subject, budget):
        yield (
            f"{on_device[0]}+cpu: sequences that fill the device go on with blocks of full layers in cpu, in place of "
            "prefixes. Each step waits until these were read."
        )
