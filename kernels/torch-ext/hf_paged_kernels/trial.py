"""Whether attention over packed codes is right as compiled: found out on the device, once for each shape.

Compilers go wrong over layouts that nobody else asks for. On an H200, as triton 3.6 compiled it, 16 heads to a KV head
with K of dim 96 and V of dim 64 came out up to half of the largest value off, where plain torch and the interpreter
agreed. So the first use of a shape compares both ways of reading records, on numbers of its own.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch

from .formats import FORMATS, KVRecords
from .tuning import PAGE_TOKENS, Tile
from .work import PageTables, cut, send

# Largest difference, relative to the largest value: that of roundings to bfloat16.
_TOLERANCE = 2e-2


class Shape(NamedTuple):
    """What a kernel over records is compiled for."""

    kv_format: str
    key_dim: int
    value_dim: int
    group: int
    tile: Tile
    is_final: bool
    has_sinks: bool
    has_softcap: bool
    has_window: bool


@functools.cache
def packs_right(shape: Shape, device: torch.device) -> bool:
    """Whether packed codes give what numbers made of them give, in a tile whose rows are all in use."""
    try:
        packed, plain = (_result(shape, device, is_packed) for is_packed in (True, False))
        if ((packed - plain).abs().max() <= _TOLERANCE * plain.abs().max()).item():
            return True
        what = "gives other numbers"
    except Exception as error:  # whatever the compiler does not like: one does without
        what = f"has failed: {(str(error).splitlines() or [''])[0]}"
    warnings.warn(f"attention over {shape} as compiled here {what}; codes are read one by one, slower", stacklevel=2)
    return False


def _result(shape: Shape, device: torch.device, is_packed: bool) -> torch.Tensor:
    from .attend import attend  # which asks for the trial

    tile, queries = shape.tile, max(1, shape.tile.rows // shape.group)
    tokens = queries + 2 * tile.tokens + 9
    made = torch.Generator(device).manual_seed(0)

    def numbers(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=made, device=device)

    records = KVRecords(FORMATS[shape.kv_format], shape.key_dim, shape.value_dim)
    slots = (2 + tokens // PAGE_TOKENS) * PAGE_TOKENS  # a null page before them
    keys = records.encode_keys(numbers(1, slots, shape.key_dim))
    values = records.encode_values(numbers(1, slots, shape.value_dim))
    window = tile.tokens + 5 if shape.has_window else None
    tables = PageTables()
    tables.add(0, queries, [(PAGE_TOKENS, tokens)], tokens - queries)
    if not shape.is_final:  # the same once more, as a part that all queries see
        tables.add(0, queries, [(PAGE_TOKENS, tokens)], None if window is None else tokens - queries)
    work = send(cut(tables, range(queries), (tile,), shape.group, 1, 1, window), device)
    return attend(
        numbers(queries, shape.group, shape.key_dim).bfloat16(), keys, values, work, shape.key_dim**-0.5,
        5.0 if shape.has_softcap else None, numbers(shape.group) if shape.has_sinks else None, records, is_packed,
    ).float()  # fmt: skip
