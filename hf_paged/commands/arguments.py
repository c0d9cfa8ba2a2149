"""Arguments that commands have in common: what they mean, and what is said where they are wrong."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

from hf_paged.config import KV_CACHE_DTYPES, PagedConfig, parse_bytes

Budget = dict[int | str, int]  # bytes by GPU index, "cpu" or "disk"

_EXAMPLE = 'write 0=8GiB,cpu=16GiB or JSON such as \'{"cpu": "16GiB"}\''


class UsageError(Exception):
    """An argument that cannot be used: which one, why, and what to do instead."""

    def __init__(self, argument: str, message: str):
        super().__init__(f"argument {argument}: {message}")


def count_of(what: str) -> Callable[[str], int]:
    """A type of arguments: a number of `what`, 1 or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"must be a number of {what}, 1 or more, got {text!r}")
        return int(text)

    return parse


def block_size(text: str) -> int:
    """A type of arguments: the block size of `PagedConfig`."""
    try:
        return PagedConfig(block_size=int(text) if text.isdecimal() else text).block_size
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_block_size(parser: argparse.ArgumentParser) -> None:
    """`--block-size`."""
    parser.add_argument(
        "--block-size", type=block_size, default=16, metavar="N", help="tokens per block (default: %(default)s)"
    )


def add_kv_cache_dtype(parser: argparse.ArgumentParser) -> None:
    """`--kv-cache-dtype`."""
    parser.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default="auto",
        help="how KV is stored, as in patch_model (default: %(default)s)",
    )


def memory_budget(text: str) -> Budget:
    """A type of arguments: bytes by device, written as accelerate's `max_memory` or `DEVICE=SIZE,...`."""
    try:
        return _budget(_json_pairs(text) if text.lstrip().startswith("{") else _listed_pairs(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; {_EXAMPLE}") from None


def merged(argument: str, budgets: list[Budget]) -> Budget:
    """Several budgets of one argument together; `UsageError` where no sequence could run on what they name."""
    try:
        budget = _budget([pair for each in budgets for pair in each.items()])
    except ValueError as error:
        raise UsageError(argument, f"{error}; name each device once") from None
    if not budget.keys() - {"disk"}:
        raise UsageError(argument, f"no device for running sequences is named; {_EXAMPLE}")
    return budget


def _json_pairs(text: str) -> list[tuple[object, object]]:
    try:
        return json.loads(text, object_pairs_hook=list)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r} is no JSON ({error})") from None


def _listed_pairs(text: str) -> list[tuple[object, object]]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part.count("=") != 1:
            raise ValueError(f"{part!r} is not DEVICE=SIZE")
    return [tuple(side.strip() for side in part.split("=")) for part in parts]


def _budget(pairs: list[tuple[object, object]]) -> Budget:
    budget: Budget = {}
    for name, size in pairs:
        device = _device(name)
        if device in budget:
            raise ValueError(f"{device} is named twice")
        budget[device] = _size(size)
    return budget


def _device(name: object) -> int | str:
    if name in ("cpu", "disk"):
        return name
    if not str(name).isdecimal():
        raise ValueError(f"{name!r} is no device; the devices are 0, 1, ... for GPUs, cpu and disk")
    return int(str(name))


def _size(size: object) -> int:
    try:
        return parse_bytes(size)
    except ValueError:
        raise ValueError(f"{size!r} is no size") from None
