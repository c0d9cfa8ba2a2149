"""``python -m benchmarks.prompts``: attention of prompts alone, native and torch's own; and time to the first token.

The latter with SmolLM2, stock and patched, which take turns; nothing is kept from call to call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product

import torch
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from hf_paged import paged
from hf_paged_kernels import NativeKernel, Part, Parts, native_kernels

from . import environment, report, smollm2, text
from .attention import SHAPES
from .measure import compare_first_tokens, first_token, median_seconds

DTYPES = (torch.float32, torch.bfloat16)
CHUNKS = ((0, 32), (0, 128), (0, 512), (0, 2000), (0, 6000), (2000, 32), (2000, 128), (2000, 512))
"""Tokens that are there already, and new ones."""
MOST_PRODUCTS = 5e10
"""Larger shapes are left out: multiplications of one layer, counting what a query does not see."""
PROMPTS = (100, 500, 2000, 6000)
ROUNDS = 3


@dataclass(frozen=True)
class Layer:
    """Milliseconds of one layer's attention, medians of rounds that take turns."""

    shape: str
    dtype: str
    past: int
    new: int
    native: float
    torch: float


@dataclass(frozen=True)
class FirstToken:
    """Seconds of a call of one new token, medians of rounds that take turns."""

    dtype: str
    tokens: int
    stock: float
    patched: float
    equal: bool
    """Whether the tokens are."""


def layers(kernel: NativeKernel) -> Iterator[Layer]:
    """Every shape, dtype and chunk that is not too large."""
    for (name, (heads, kv_heads, dim)), dtype, (past, new) in product(SHAPES.items(), DTYPES, CHUNKS):
        if heads * dim * new * (past + new) > MOST_PRODUCTS:
            continue
        query = torch.randn(new, heads, dim).to(dtype)
        keys, values = (torch.randn(kv_heads, past + new, dim).to(dtype) for _ in range(2))
        parts = Parts(new, [Part(0, new, 0, 1, past)], [(0, past + new)])
        mask = None
        if past:
            is_seen = torch.ones(new, past + new, dtype=torch.bool).tril(past)
            mask = torch.zeros(new, past + new, dtype=dtype).masked_fill_(~is_seen, -torch.inf)
        dense = query.transpose(0, 1).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0)
        how = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": True}
        calls = {
            "native": partial(kernel.attend, query, keys, values, parts, dim**-0.5),
            "torch": partial(scaled_dot_product_attention, *dense, **how),
        }
        seconds = median_seconds(calls, max(5, min(50, int(5e9 / (heads * dim * new * (past + new))))))
        yield Layer(name, str(dtype)[6:], past, new, *(1e3 * each for each in seconds.values()))


def first_tokens(dtype: torch.dtype, tokens: list[int]) -> Iterator[FirstToken]:
    """Prompts of real text."""
    model = smollm2.load_model(dtype)

    def ask(ids: torch.Tensor, is_patched: bool) -> tuple[float, int]:
        with paged(model, prefix_caching=False) if is_patched else nullcontext():
            first_token(model, ids[:, :20])  # a patched model finds out what it can do
            return first_token(model, ids)

    for number in PROMPTS:
        ids = torch.tensor([tokens[:number]])
        ways = {"stock": partial(ask, ids, False), "patched": partial(ask, ids, True)}
        seconds, equal = compare_first_tokens(ways, ROUNDS)
        yield FirstToken(str(dtype)[6:], number, **seconds, equal=equal)


def layer_table(measured: list[Layer]) -> Table:
    """Return the layers for people."""
    made = Table(title="Attention of a prompt in one layer, milliseconds", title_justify="left")
    for name in ("shape", "dtype", "new tokens", "after", "torch", "native", "ratio"):
        made.add_column(name, justify="right")
    for each in measured:
        times = f"{each.torch:.2f}", f"{each.native:.2f}", f"{each.torch / each.native:.2f}"
        made.add_row(each.shape, each.dtype, f"{each.new:,}", f"{each.past:,}", *times)
    return made


def first_table(measured: list[FirstToken]) -> Table:
    """Return the first tokens for people."""
    made = Table(title="Time to the first token, seconds", title_justify="left")
    for name in ("dtype", "prompt tokens", "stock", "patched", "ratio", "token equal"):
        made.add_column(name, justify="right")
    for each in measured:
        times = f"{each.stock:.3f}", f"{each.patched:.3f}", f"{each.stock / each.patched:.2f}"
        made.add_row(each.dtype, f"{each.tokens:,}", *times, "yes" if each.equal else "NO")
    return made


def main() -> int:
    """Measure, print, write a JSON file. The exit status is 1 where float32 tokens differ from stock's."""
    options = environment.parse(environment.parser("benchmarks.prompts", __doc__))
    described = {**environment.describe(), "kernel": native_kernels().reason}
    console = report.console()
    measured = list(layers(native_kernels().kernels[0])) if native_kernels().kernels else []
    console.print(layer_table(measured), described["cpu"], described["kernel"])
    tokens = text.corpus(smollm2.load_tokenizer())
    firsts = [each for dtype in DTYPES for each in first_tokens(dtype, tokens)]
    console.print(first_table(firsts), environment.summary(described))
    path = options.out / "prompts.json"
    results = {"layers": list(map(asdict, measured)), "first_tokens": list(map(asdict, firsts))}
    environment.save(path, {"environment": described, **results})
    console.print(f"Written: {path}")
    return 0 if all(each.equal for each in firsts if each.dtype == "float32") else 1


if __name__ == "__main__":
    sys.exit(main())
