"""``python -m benchmarks.attention``: decode attention of one layer alone, in multiples of a read of K and V."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import torch
from rich.table import Table

from hf_paged_kernels import FORMATS, KVRecords, NativeKernel, Part, Parts, attend_partial, native_kernels
from hf_paged_kernels.native import variants

from . import environment, report
from .measure import seconds_of_many

BLOCK = 16
SHAPES = {"9/3/64": (9, 3, 64), "32/8/128": (32, 8, 128)}
"""Heads, KV heads and dim: SmolLM2-135M and Llama-3-8B."""
CONTEXTS = (512, 2048, 8192, 32768)
BATCHES = (1, 4, 16)
DTYPES = ("float32", "bfloat16", *FORMATS)
"""How K and V are stored; queries are float32 where that is a quantized format."""
WORKING_SET = 400e6
"""Bytes that a round goes through, in as many layers as that takes: no cache holds them."""
MOST_BYTES = 2.2e9
"""Larger shapes are left out."""
SECONDS = 0.7
"""Time for each figure."""


@dataclass(frozen=True)
class Result:
    """Times of one layer in microseconds; ``None``: not run."""

    shape: str
    dtype: str
    batch: int
    context: int
    read: float
    """All threads read the bytes of K and V once."""
    native: float | None
    native_random: float | None
    """Blocks in random order instead of one after the other."""
    sdpa: float
    """torch's own on a view, query heads packed by KV head."""
    stock: float | None
    """What transformers does: put the new token behind K and V, then SDPA."""


def bytes_of(stored: str, dim: int) -> int:
    """Of a token's K and V in one head."""
    if stored not in FORMATS:
        return 2 * dim * getattr(torch, stored).itemsize
    records = KVRecords(FORMATS[stored], dim, dim)
    return records.key_bytes + records.value_bytes


class Layers:
    """K and V of several layers, so that each is out of every cache when its turn comes again."""

    def __init__(self, shape: str, stored: str, batch: int, context: int) -> None:
        self.heads, self.kv_heads, self.dim = SHAPES[shape]
        self.batch, self.context = batch, context
        slots = batch * context + BLOCK
        self.records = KVRecords(FORMATS[stored], self.dim, self.dim) if stored in FORMATS else None
        dtype = getattr(torch, stored) if self.records is None else torch.float32
        self.bytes = self.kv_heads * batch * context * bytes_of(stored, self.dim)
        count = max(2, min(30, int(WORKING_SET / self.bytes)))
        memory = (self.kv_heads, slots, self.dim)
        numbers = [(torch.randn(memory).to(dtype), torch.randn(memory).to(dtype)) for _ in range(count)]
        self.memories = numbers
        if self.records is not None:
            keys, values = self.records.kv_format.keys, self.records.kv_format.values
            self.memories = [(keys.encode(key), values.encode(value)) for key, value in numbers]
        self.query = torch.randn(batch, self.heads, self.dim).to(dtype)

    def microseconds(self, one: Callable[[torch.Tensor, torch.Tensor], object]) -> float:
        """Median time of ``one(keys, values)`` on a layer."""

        def through_all() -> None:
            for keys, values in self.memories:
                one(keys, values)

        return seconds_of_many(through_all, 4, SECONDS) / len(self.memories) * 1e6

    def read(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """A sum is the plainest of torch's operators that reads everything once, on all threads."""
        for memory in (keys, values):
            memory.flatten()[: memory.numel() // 4 * 4].view(torch.float32).sum()

    def parts(self, is_random: bool) -> Parts:
        """One part a row; its blocks adjacent or anywhere."""
        blocks = list(range(1, self.batch * self.context // BLOCK + 1))
        if not is_random:
            runs = [(BLOCK + row * self.context, self.context) for row in range(self.batch)]
            return Parts(self.batch, [Part(row, row + 1, row, row + 1) for row in range(self.batch)], runs)
        random.Random(0).shuffle(blocks)
        each = self.context // BLOCK
        parts = [Part(row, row + 1, row * each, row * each + each) for row in range(self.batch)]
        return Parts(self.batch, parts, [(block * BLOCK, BLOCK) for block in blocks])

    def native(self, kernel: NativeKernel, is_random: bool) -> float:
        """The native kernel's time."""
        parts = self.parts(is_random)
        more = (None, None, self.records)
        return self.microseconds(
            lambda keys, values: kernel.attend(self.query, keys, values, parts, self.dim**-0.5, *more)
        )

    def rows(self, memory: torch.Tensor) -> torch.Tensor:
        """``[batch, kv_heads, context, dim]``, a view."""
        return memory[:, BLOCK:].unflatten(1, (self.batch, self.context)).transpose(0, 1)

    def sdpa(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """What the `cpu` backend does without a native kernel."""
        key, value = self.rows(keys), self.rows(values)
        if self.records is not None:
            key, value = self.records.decode_keys(key, torch.float32), self.records.decode_values(value, torch.float32)
        attend_partial(self.query.unsqueeze(2), key, value, self.dim**-0.5)

    def stock(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """A copy of everything a token longer, and SDPA on it."""
        key, value = (torch.cat([self.rows(m)[:, :, :-1], self.rows(m)[:, :, -1:]], dim=2) for m in (keys, values))
        torch.nn.functional.scaled_dot_product_attention(self.query.unsqueeze(2), key, value, enable_gqa=True)


def measure(options: argparse.Namespace) -> Iterator[Result]:
    """Every combination that fits."""
    if options.variant:
        kernel = variants()[options.variant]
    else:
        kernel = next(iter(native_kernels().kernels), None)
    for shape, dtype, context, batch in product(options.shapes, options.dtypes, options.contexts, options.batches):
        _, kv_heads, dim = SHAPES[shape]
        if kv_heads * batch * context * bytes_of(dtype, dim) > MOST_BYTES:
            continue
        layers = Layers(shape, dtype, batch, context)
        yield Result(
            shape=shape,
            dtype=dtype,
            batch=batch,
            context=context,
            read=layers.microseconds(layers.read),
            native=layers.native(kernel, False) if kernel else None,
            native_random=layers.native(kernel, True) if kernel else None,
            sdpa=layers.microseconds(layers.sdpa),
            stock=None if dtype in FORMATS else layers.microseconds(layers.stock),
        )


def table(results: Sequence[Result]) -> Table:
    """Times as multiples of the read."""
    made = Table(title="Decode attention of one layer, multiples of a read of the same bytes")
    for name in ("shape", "dtype", "batch × context", "read µs", "native", "native, random", "SDPA", "stock"):
        made.add_column(name, justify="right")
    for r in results:
        times = (r.native, r.native_random, r.sdpa, r.stock)
        made.add_row(
            r.shape, r.dtype, f"{r.batch} × {r.context}", f"{r.read:.0f}",
            *("—" if t is None else f"{t / r.read:.2f}" for t in times),
        )  # fmt: skip
    return made


def main() -> None:
    """Measure, print, write."""
    made = environment.parser("benchmarks.attention", __doc__)
    made.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    made.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    made.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    made.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    made.add_argument("--variant", help="of the native kernel; the one that is used unasked where left out")
    options = environment.parse(made)
    described = {**environment.describe(), "kernel": options.variant or native_kernels().reason}
    results = list(measure(options))
    console = report.console()
    console.print(table(results), described["cpu"], described["kernel"])
    path = options.out / f"attention-cpu-{options.threads}-threads.json"
    environment.save(path, {"environment": described, "results": list(map(asdict, results))})
    console.print(f"Written: {path}")


if __name__ == "__main__":
    main()
