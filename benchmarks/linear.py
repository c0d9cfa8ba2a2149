"""``python -m benchmarks.linear``: linear layers, by what torch takes, by the native kernel and by oneDNN.

And what they are most of the time of: decode steps and first tokens, stock and patched, of SmolLM2, and of the shapes
of Llama-3.2-1B and of OLMoE-1B-7B, a mixture of experts, with random weights. Then the memory of the code that oneDNN
keeps for prompts of all lengths.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from statistics import median

import psutil
import torch
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from hf_paged import paged
from hf_paged.matmul import is_natively_won, is_won, native_linear
from hf_paged.onednn import product
from hf_paged_kernels import NativeLinear, native_kernels

from . import environment, report, smollm2
from .measure import Stamped, compare_first_tokens, first_token, median_seconds, stamped, taking_turns

SMALL = ((576, 192), (576, 576), (576, 1536), (1536, 576), (576, 49152))
LARGE = ((4096, 1024), (4096, 4096), (4096, 14336), (14336, 4096))
"""Features in and out: SmolLM2-135M's and some of Llama-3-8B's."""
DTYPES = {torch.float32: (1, 2, 4, 8, 16, 32, 64, 300)}
DTYPES |= dict.fromkeys((torch.bfloat16, torch.float16), (1, 2, 4, 8, 16, 64))
"""And numbers of rows."""
WORKING_SET = 150e6
"""Bytes of weights that a round goes through, in as many layers as that takes: no cache holds them."""
ROUNDS, CALLS = 3, 2
BATCHES, PROMPT_TOKENS, STEPS = (1, 4, 8), 100, 8
MOST_IN_FLOAT16 = 500_000_000
PROMPTS = {
    "SmolLM2-135M": (100, 300, 1000),
    "Llama-3.2-1B's shape": (100, 300),
    "OLMoE-1B-7B's shape, 4 of 16 layers": (100, 300),
}
LENGTHS = range(1, 1100, 7)
"""Of the prompts whose code is weighed: longer ones are cut into pieces of these lengths."""

Product = Callable[[torch.Tensor, torch.Tensor, None], object]


@dataclass(frozen=True)
class Layer:
    """Microseconds of one layer, medians of rounds that take turns."""

    dtype: str
    features: tuple[int, int]
    rows: int
    torch: float
    native: float
    onednn: float | None
    """With the copies that fill up rows, and put pieces together; of float32 alone."""
    taken: str
    """What a patched model takes here."""


@dataclass(frozen=True)
class Step:
    """Milliseconds of a decode step, medians of two calls' steps; the calls take turns."""

    model: str
    dtype: str
    rows: int
    stock: float
    patched: float
    equal: bool
    """Whether the tokens are."""


@dataclass(frozen=True)
class FirstToken:
    """Milliseconds to the first token of a prompt, medians of rounds that take turns."""

    model: str
    prompt_tokens: int
    stock: float
    off: float
    """Patched, with linear layers by torch's choice."""
    patched: float
    equal: bool
    """Whether the tokens are."""


def layers(kernel: NativeLinear, dtype: torch.dtype, features: tuple[int, int]) -> list[Layer]:
    """Every number of rows for one shape of weights."""
    count = max(2, min(60, int(WORKING_SET / dtype.itemsize / features[0] / features[1])))
    weights = [torch.randn(features[::-1]).to(dtype) for _ in range(count)]
    return [_compare(kernel, weights, torch.randn(rows, 1, features[0]).to(dtype)) for rows in DTYPES[dtype]]


def _compare(kernel: NativeLinear, weights: list[torch.Tensor], inputs: torch.Tensor) -> Layer:
    rows, (outputs, features) = len(inputs), weights[0].shape

    def through_all(one: Product) -> None:
        for weight in weights:
            one(inputs, weight, None)

    ways: dict[str, Product] = {"torch": torch.nn.functional.linear, "native": kernel.run}
    if inputs.dtype is torch.float32:
        ways["onednn"] = product
    calls = {name: partial(through_all, way) for name, way in ways.items()}
    seconds = median_seconds(calls, ROUNDS)
    microseconds = {"onednn": None, **{name: each / len(weights) * 1e6 for name, each in seconds.items()}}
    taken = "torch"
    if is_natively_won(rows, weights[0]):
        taken = "native"
    elif inputs.dtype is torch.float32 and is_won(rows, weights[0], outputs):
        taken = "onednn"
    return Layer(str(inputs.dtype)[6:], (features, outputs), rows, **microseconds, taken=taken)


def llama() -> PreTrainedModel:
    """Llama-3.2-1B's shape, random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True, initializer_range=0.05,
        )
    ).eval()  # fmt: skip


def olmoe() -> PreTrainedModel:
    """OLMoE-1B-7B's shape, in float32 as much of it as fits beside the others, random weights."""
    torch.manual_seed(0)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=50_304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=16,
            num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, initializer_range=0.05,
        )
    ).eval()  # fmt: skip


def steps(name: str, model: PreTrainedModel, rows: int) -> Step:
    """Decode steps of a batch, by stock and patched."""
    ids = torch.randint(
        0, model.config.vocab_size, (rows, PROMPT_TOKENS), generator=torch.Generator().manual_seed(rows)
    )

    def patched() -> Stamped:
        with paged(model, prefix_caching=False):
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)  # finds out what is fast
            return stamped(model, ids, STEPS + 1)

    given = taking_turns({"stock": partial(stamped, model, ids, STEPS + 1), "patched": patched}, CALLS)
    times = {
        side: median(chain.from_iterable(call.step_milliseconds for call in calls)) for side, calls in given.items()
    }
    answers = [call.sequences for calls in given.values() for call in calls]
    return Step(name, str(model.dtype)[6:], rows, **times, equal=all(torch.equal(answers[0], each) for each in answers))


def steps_of_all(models: dict[str, PreTrainedModel], dtype: torch.dtype) -> Iterator[Step]:
    """Of each model, but for large ones in float16: their prompts take stock minutes."""
    for name, model in models.items():
        if dtype is not torch.float16 or model.num_parameters() < MOST_IN_FLOAT16:
            yield from (steps(name, model.to(dtype), rows) for rows in BATCHES)


def first_tokens(name: str, model: PreTrainedModel, count: int) -> FirstToken:
    """The first token of random ones, by stock, patched with layers by torch's choice, and patched."""
    ids = torch.randint(0, model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(count))

    def patched(enabled: bool) -> tuple[float, int]:
        with paged(model, prefix_caching=False):
            first_token(model, ids)  # finds out what is fast
            with torch.backends.mkldnn.flags(enabled=enabled):
                return first_token(model, ids)

    stock = partial(first_token, model, ids)
    ways = {"stock": stock, "off": partial(patched, False), "patched": partial(patched, True)}
    seconds, equal = compare_first_tokens(ways, ROUNDS)
    return FirstToken(name, count, **{way: 1e3 * each for way, each in seconds.items()}, equal=equal)


def code_bytes(model: PreTrainedModel) -> int:
    """Memory that the process has grown by after layers of every shape of a model have had prompts of all lengths."""
    weights = {each.weight.shape: each.weight for each in model.model.modules() if isinstance(each, torch.nn.Linear)}
    inputs = {shape: torch.zeros(max(LENGTHS), shape[1]) for shape in weights}

    def ask(lengths: range) -> int:
        for (outputs, _), weight in weights.items():
            for rows in lengths:
                if is_won(rows, weight, outputs):
                    product(inputs[weight.shape][:rows], weight, None)
        return _own_bytes()

    ask(LENGTHS[-1:])
    before = _own_bytes()
    return ask(LENGTHS) - before


def _own_bytes() -> int:
    """Of the process alone, without what its allocator could give back."""
    if hasattr(libc := ctypes.CDLL(ctypes.util.find_library("c")), "malloc_trim"):  # glibc's
        libc.malloc_trim(0)
    return psutil.Process().memory_full_info().uss


def layer_table(measured: list[Layer]) -> Table:
    """Return the ratios for people."""
    made = Table(
        title="Times as fast as torch: native kernel / oneDNN; * what a patched model takes", title_justify="left"
    )
    columns = sorted({each.rows for each in measured})
    for name in ("dtype", "in x out", *(f"{rows} rows" for rows in columns)):
        made.add_column(name, justify="right")
    for dtype, features in {(each.dtype, each.features): None for each in measured}:
        of_shape = [each for each in measured if (each.dtype, each.features) == (dtype, features)]
        ratios = {each.rows: _ratios(each) for each in of_shape}
        made.add_row(dtype, "{} x {}".format(*features), *(ratios.get(rows, "") for rows in columns))
    return made


def _ratios(layer: Layer) -> str:
    ways = {"native": layer.native, "onednn": layer.onednn}
    return " / ".join(
        f"{layer.torch / taken:.2f}{'*' if layer.taken == name else ''}" for name, taken in ways.items() if taken
    )


def step_table(measured: list[Step]) -> Table:
    """Return the steps for people."""
    made = Table(title="Milliseconds of a decode step", title_justify="left")
    for name in ("model", "dtype", "rows", "stock", "patched", "ratio", "tokens equal"):
        made.add_column(name, justify="right")
    for each in measured:
        times = f"{each.stock:.0f}", f"{each.patched:.0f}", f"{each.stock / each.patched:.2f}"
        made.add_row(each.model, each.dtype, str(each.rows), *times, "yes" if each.equal else "NO")
    return made


def first_table(measured: list[FirstToken]) -> Table:
    """Return the first tokens for people."""
    made = Table(title="Milliseconds to the first token of one prompt", title_justify="left")
    for name in ("model", "tokens", "stock", "patched, by torch's choice", "patched", "ratio to stock", "tokens equal"):
        made.add_column(name, justify="left" if name == "model" else "right")
    for each in measured:
        times = f"{each.stock:.0f}", f"{each.off:.0f}", f"{each.patched:.0f}", f"{each.stock / each.patched:.2f}"
        made.add_row(each.model, str(each.prompt_tokens), *times, "yes" if each.equal else "NO")
    return made


def main() -> int:
    """Measure and write a JSON file; 1 where tokens differ."""
    options = environment.parse(environment.parser("benchmarks.linear", __doc__))
    described = {**environment.describe(), "kernel": native_kernels().reason}
    if (kernel := native_linear()) is None:
        report.console().print(f"Not known to be faster here ({described['kernel']}); HF_PAGED_NATIVE forces a variant")
        return 1
    models = dict(zip(PROMPTS, (smollm2.load_model(), llama(), olmoe()), strict=True))
    with torch.inference_mode():
        code = {name: code_bytes(model) for name, model in models.items()}
        shapes = [(dtype, features) for dtype in DTYPES for features in (*SMALL, *LARGE)]
        measured = [layer for shape in shapes for layer in layers(kernel, *shape)]
    report.console().print(layer_table(measured))
    first = [first_tokens(name, models[name], count) for name, counts in PROMPTS.items() for count in counts]
    report.console().print(first_table(first))
    taken = [each for dtype in DTYPES for each in steps_of_all(models, dtype)]
    report.console().print(step_table(taken))
    kept = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in code.items())
    report.console().print(f"Code kept by oneDNN after {len(LENGTHS)} lengths of prompts: {kept}")
    path = options.out / "linear.json"
    tables = {"layers": measured, "steps": taken, "first_tokens": first}
    content = {name: [asdict(each) for each in rows] for name, rows in tables.items()}
    environment.save(path, {"environment": described, **content, "code_bytes": code})
    report.console().print(f"Written: {path}")
    exact = [each for each in taken if each.dtype == "float32"]
    return 0 if all(each.equal for each in (*exact, *first)) else 1


if __name__ == "__main__":
    sys.exit(main())
