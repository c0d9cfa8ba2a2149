"""``python -m benchmarks.quantized_stock``: quantized KV beside stock's own ``QuantizedCache``, on SmolLM2.

One prompt and one answer for every side. The answer's tokens are those of full precision, so that each step's logits
can be held against full precision's, and every side does the same work. hqq's 4 bits want an even number of groups:
with SmolLM2's three heads of 64 numbers, an even number of tokens in the prompt.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib import metadata
from statistics import mean, median

import torch
from rich.table import Table
from transformers import LogitsProcessor, PreTrainedModel

from hf_paged import paged

from . import environment, report, smollm2
from .measure import StepClock, forget_prefixes
from .text import corpus

PROMPT, NEW, RUNS = 2000, 64, 3
PACKAGES = ("optimum-quanto", "hqq")


@dataclass(frozen=True)
class Side:
    """One way to keep K and V; ``arguments`` go to stock's ``generate``, ``settings`` to ``paged``."""

    name: str
    arguments: dict[str, object] = field(default_factory=dict)
    settings: dict[str, object] | None = None


def stock_quantized(backend: str, nbits: int, axis: int) -> Side:
    """Stock's cache as its documentation advises: axis 0 for quanto, 1 for hqq; all else is its default."""
    settings = {"backend": backend, "nbits": nbits, "axis_key": axis, "axis_value": axis}
    return Side(f"stock, {backend} {nbits} bits", {"cache_implementation": "quantized", "cache_config": settings})


SIDES = (
    Side("stock"),
    stock_quantized("quanto", 4, 0),
    stock_quantized("hqq", 4, 1),
    stock_quantized("hqq", 8, 1),
    Side("hf_paged", settings={}),
    Side("hf_paged, int8", settings={"kv_cache_dtype": "int8"}),
    Side("hf_paged, int4", settings={"kv_cache_dtype": "int4"}),
)


class Dictation(LogitsProcessor):
    """Notes the logits of each step, and leaves one choice: the token that is dictated, or the best if none is."""

    def __init__(self, tokens: torch.Tensor | None) -> None:
        self.tokens = tokens  # [new]
        self.logits: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` ``[1, vocabulary]`` in, the same with one finite entry out."""
        step = len(self.logits)
        self.logits.append(scores[0].float())
        chosen = scores[0].argmax() if self.tokens is None else self.tokens[step]
        only = torch.full_like(scores, -torch.inf)
        only[0, chosen] = 0.0
        return only


@dataclass(frozen=True)
class Run:
    """One call: seconds to the first token and from there to the last, bytes of K and V at its end, logits."""

    first_seconds: float
    decode_seconds: float
    kv_bytes: int
    logits: torch.Tensor = field(repr=False)  # [new, vocabulary]


def call(model: PreTrainedModel, prompt: torch.Tensor, tokens: torch.Tensor | None, new: int, side: Side) -> Run:
    """Generate once from a clean slate; ``prompt`` is ``[1, tokens]``."""
    forget_prefixes(model)
    gc.collect()
    dictation, begun, clock = Dictation(tokens), StepClock(), StepClock()
    begun(prompt, None)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        do_sample=False,
        logits_processor=[dictation],
        stopping_criteria=[clock],
        eos_token_id=None,
        return_dict_in_generate=True,
        **side.arguments,
    )
    cache = output.past_key_values
    held = model.paged.stats().bytes_in_use if side.settings is not None else kv_bytes(cache)
    stamps = clock.stamps
    return Run(stamps[0] - begun.stamps[0], stamps[-1] - stamps[0], held, torch.stack(dictation.logits))


def kv_bytes(cache: object) -> int:
    """Bytes of all tensors in the layers of one of stock's caches, each memory once."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors(cache.layers)}
    return sum(found.values())


def tensors(value: object) -> Iterator[torch.Tensor]:
    """The plain tensors in a layer, in what a backend packs them into, and in tensors made of tensors."""
    if isinstance(value, torch.Tensor) and not hasattr(value, "__tensor_flatten__"):
        yield value
    elif isinstance(value, torch.Tensor):
        names, _ = value.__tensor_flatten__()
        for name in names:
            yield from tensors(getattr(value, name))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif hasattr(value, "is_initialized"):  # a layer
        yield from tensors(vars(value))


def mean_kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean over the steps of the KL divergence from ``reference``, in nats; both ``[new, vocabulary]``."""
    wanted, found = (each.double().log_softmax(-1) for each in (reference, logits))
    return (wanted.exp() * (wanted - found)).sum(-1).mean().item()


def measure(dtype: torch.dtype, length: int, new: int, runs: int) -> Iterator[list[dict[str, object]]]:
    """The sides of one dtype, taking turns; each side's turn begins with a short call to warm up.

    Yields what there is after each call, as some sides take minutes.
    """
    stock = smollm2.load_model(dtype)
    twin = smollm2.twin(stock)
    prompt = torch.tensor([corpus(smollm2.load_tokenizer())[:length]])
    reference = call(stock, prompt, None, new, SIDES[0])
    tokens = reference.logits.argmax(-1)
    found: dict[str, list[Run]] = {side.name: [] for side in SIDES}
    for _ in range(runs):
        for side in SIDES:
            with nullcontext(stock) if side.settings is None else paged(twin, **side.settings) as model:
                call(model, prompt[:, : length // 8], tokens, 2, side)
                found[side.name].append(call(model, prompt, tokens, new, side))
            name = str(dtype).removeprefix("torch.")
            yield [row(name, side, each, reference) for side, each in found.items() if each]


def row(dtype: str, name: str, runs: list[Run], reference: Run) -> dict[str, object]:
    """A line of the results."""
    kls = {mean_kl(reference.logits, run.logits) for run in runs}
    return {
        "dtype": dtype,
        "side": name,
        "first_token_seconds": [run.first_seconds for run in runs],
        "decode_seconds": [run.decode_seconds for run in runs],
        "kv_bytes": max(run.kv_bytes for run in runs),
        "mean_kl": mean(kls),
    }


def table(rows: list[dict[str, object]], length: int, new: int) -> Table:
    """The results for people: medians."""
    made = Table(title=f"One prompt of {length:,} tokens, {new} new", title_justify="left")
    made.add_column("dtype")
    made.add_column("K and V")
    for name in ("first token s", "decode s", "KV MB", "mean KL"):
        made.add_column(name, justify="right")
    for each in rows:
        seconds = (f"{median(each[name]):.2f}" for name in ("first_token_seconds", "decode_seconds"))
        kv = f"{each['kv_bytes'] / report.MEGABYTE:.1f}"
        made.add_row(each["dtype"], each["side"], *seconds, kv, f"{each['mean_kl']:.5f}")
    return made


def main() -> int:
    """Measure, print, write."""
    out = environment.RESULTS / "quantized-stock.json"
    parser = environment.parser("benchmarks.quantized_stock", __doc__, out=out, what="the JSON")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--length", type=int, default=PROMPT)
    parser.add_argument("--new", type=int, default=NEW)
    parser.add_argument("--runs", type=int, default=RUNS)
    options = environment.parse(parser)
    described, console = environment.describe(), report.console()
    described["versions"] |= {name: metadata.version(name) for name in PACKAGES}
    settings = {"prompt_tokens": options.length, "new_tokens": options.new, "runs": options.runs}
    sides = [asdict(side) for side in SIDES]
    rows: list[dict[str, object]] = []
    for name in options.dtypes:
        done = rows
        for found in measure(getattr(torch, name), options.length, options.new, options.runs):
            rows = done + found
            environment.save(options.out, {"environment": described, **settings, "sides": sides, "results": rows})
            console.print(table(found, options.length, options.new))
    console.print(table(rows, options.length, options.new))
    console.print(f"Written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
