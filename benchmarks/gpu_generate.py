"""`generate` from end to end on a GPU, on a model of random weights: stock in three ways, and ours."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig, PreTrainedModel

from benchmarks.measure import seconds_of
from hf_paged import paged
from hf_paged.cuda_driver import driver_for

BATCH_PAGE_TOKENS, BATCH_TOKENS = 256, 8192
"""``generate_batch``: its page, which is its default, and the tokens of a pass."""
RUNS = 2
"""Timed calls of each side, after one that is not timed."""
COMPILED_PARTS = ("RMSNorm", "MLP")
"""Modules that a user may compile: what they compute are many small launches."""


@dataclass(frozen=True)
class Sizes:
    """The model, and what is asked of it."""

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    batches: tuple[int, ...] = (1, 8, 64)
    prompt: int = 2048
    new: int = 256
    samples: int = 64
    sampled_prompt: int = 8192

    def config(self) -> LlamaConfig:
        """Llama-3-8B's shape by default."""
        return LlamaConfig(
            hidden_size=self.hidden, intermediate_size=self.intermediate, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, vocab_size=self.vocabulary,
            max_position_embeddings=131072, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            bos_token_id=0, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip

    def kv_bytes(self, tokens: int) -> int:
        """K and V of so many tokens in bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * (self.hidden // self.heads) * tokens


TINY = Sizes(
    hidden=32, intermediate=48, layers=1, heads=2, kv_heads=1, vocabulary=50, batches=(2,), prompt=20, new=2,
    samples=2, sampled_prompt=20,
)  # fmt: skip


def build_tiny(device: torch.device, layers: int) -> PreTrainedModel:
    """A model in float32 whose tokens are compared: two KV heads of dim 16, a vocabulary of 120."""
    torch.manual_seed(0)
    tiny = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=120, eos_token_id=None, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(tiny, dtype=torch.float32).to(device).eval()


def tokens_equal(device: torch.device, sizes: Sizes) -> Iterator[dict[str, object]]:
    """Calls of a tiny model in float32, with and without CUDA graphs: every token must be stock's."""
    model = build_tiny(device, 2)
    prompt = torch.randint(3, 120, (5, 37), device=device)
    mask = torch.ones_like(prompt)
    for row in range(5):
        mask[row, : 6 * row] = 0
    new = 40 if sizes is not TINY else 2
    free = model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False)[:, 37:]
    ends = [int(free[row, (5 * row + 3) % new]) for row in range(3)]
    one, ragged = {"inputs": prompt[:1]}, {"inputs": prompt, "attention_mask": mask}
    calls: dict[str, dict[str, object]] = {
        "greedy": {**one, "do_sample": False},
        "beams": {**one, "do_sample": False, "num_beams": 3},
        "samples": {**one, "do_sample": True, "num_return_sequences": 3},
        "ragged rows that end": {**ragged, "do_sample": False, "eos_token_id": ends},
    }
    for name, arguments in calls.items():
        torch.manual_seed(1)
        expected = model.generate(max_new_tokens=new, **arguments)
        for graphs in (False, True):
            with paged(model, attention_backend="triton", cuda_graphs=graphs):
                for time in ("first", "again"):  # which finds its graphs captured
                    torch.manual_seed(1)
                    actual = model.generate(max_new_tokens=new, **arguments)
                    stats = model.paged.stats()  # with fallbacks, it was not the kernels that were right
                    replayed = stats.replayed_steps > 0
                    yield {
                        "call": f"{name}, {time}",
                        "graphs": graphs,
                        "passed": torch.equal(expected, actual)
                        and not stats.fallbacks
                        and replayed == (graphs and device.type == "cuda"),
                        "fallbacks": stats.fallbacks,
                        "replayed_steps": stats.replayed_steps,
                    }


def build(device: torch.device, sizes: Sizes) -> PreTrainedModel:
    """The model, in bfloat16, made where it will run."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(sizes.config(), dtype=torch.bfloat16, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def end_to_end(device: torch.device, sizes: Sizes, sides: Sequence[str]) -> Iterator[dict[str, object]]:
    """Greedy decoding of prompts that share nothing."""
    model = build(device, sizes)
    for batch in sizes.batches:
        prompts = torch.randint(3, sizes.vocabulary, (batch, sizes.prompt), device=device)
        yield from Work(model, sizes, prompts, 1).run(sides, f"{batch} × {sizes.prompt} + {sizes.new}")


def samples(device: torch.device, sizes: Sizes, sides: Sequence[str]) -> Iterator[dict[str, object]]:
    """Many samples of one long prompt."""
    model = build(device, sizes)
    prompt = torch.randint(3, sizes.vocabulary, (1, sizes.sampled_prompt), device=device)
    what = f"{sizes.samples} samples of {sizes.sampled_prompt} + {sizes.new}"
    yield from Work(model, sizes, prompt, sizes.samples).run(sides, what)


class Work:
    """The same work on each side.

    Args:
        prompts: `[rows, tokens]`.
        copies: samples of each; 1: greedy.
    """

    def __init__(self, model: PreTrainedModel, sizes: Sizes, prompts: torch.Tensor, copies: int):
        self.model, self.sizes, self.prompts, self.copies = model, sizes, prompts, copies
        self.rows, self.device = prompts.shape[0] * copies, prompts.device
        self.arguments: dict[str, object] = {"max_new_tokens": sizes.new, "do_sample": copies > 1}
        if copies > 1:
            self.arguments["num_return_sequences"] = copies

    def run(self, sides: Sequence[str], what: str) -> Iterator[dict[str, object]]:
        """What fails (mostly for memory) says so and the next one goes on."""
        for name in sides:
            yield {"work": what, "side": name} | SIDES[name](self)

    def measure(self, call: Callable[[], object]) -> dict[str, object]:
        return _measure(call, self.rows * self.sizes.new, self.device)

    def stock(self) -> dict[str, object]:
        return self.measure(lambda: self.model.generate(self.prompts, **self.arguments))

    def static(self) -> dict[str, object]:
        return self.measure(lambda: self.model.generate(self.prompts, cache_implementation="static", **self.arguments))

    def batched(self) -> dict[str, object]:
        model, new, copies = self.model, self.sizes.new, self.copies
        num_blocks = self.rows * (-(-(self.prompts.shape[1] + new) // BATCH_PAGE_TOKENS) + 1) + 4
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            num_blocks = min(num_blocks, int(0.8 * free / self.sizes.kv_bytes(BATCH_PAGE_TOKENS)))
        config = GenerationConfig(max_new_tokens=new, do_sample=copies > 1, eos_token_id=-1, pad_token_id=0)

        def call() -> None:
            made = model.generate_batch(
                # A request per sample, which may share blocks: asked for several of one, 5.17 does not return them all.
                self.prompts.repeat_interleave(copies, 0).tolist(),
                generation_config=config,
                # Room for the work; left alone, it takes most of the device, and a try on the CPU takes minutes.
                continuous_batching_config=ContinuousBatchingConfig(
                    num_blocks=num_blocks, max_batch_tokens=BATCH_TOKENS
                ),
                persistent_manager=True,
            )
            if len(made) != self.rows:
                raise RuntimeError(f"{len(made)} of {self.rows} rows came back")

        try:
            return self.measure(call)
        finally:
            model.destroy_cached_continuous_batching_manager()

    def ours(self, graphs: bool = True) -> dict[str, object]:
        # Room for the work, and for a tenth more: what a pool may take is taken at once on a GPU.
        key = "cpu" if self.device.type == "cpu" else self.device.index or 0
        tokens = self.prompts.numel() + self.rows * self.sizes.new
        budget = int(1.1 * self.sizes.kv_bytes(tokens + 64 * (self.rows + 2)))
        with paged(self.model, attention_backend="triton", max_memory={key: budget}, cuda_graphs=graphs):

            def call() -> None:
                self.model.paged.clear()
                self.model.generate(self.prompts, **self.arguments)

            outcome = self.measure(call)
            stats = self.model.paged.stats()
        return {"fallbacks": stats.fallbacks, "replayed_steps": stats.replayed_steps} | outcome

    def ours_compiled(self) -> dict[str, object]:
        parts = [each for each in self.model.modules() if type(each).__name__.endswith(COMPILED_PARTS)]
        for part in parts:
            part.compile()
        try:
            return self.ours()
        finally:
            for part in parts:
                part._compiled_call_impl = None


SIDES: dict[str, Callable[[Work], dict[str, object]]] = {
    "hf_paged": Work.ours,
    "hf_paged, parts compiled": Work.ours_compiled,
    "stock, static": Work.static,
    "stock, dynamic": Work.stock,
    "hf_paged, no CUDA graphs": lambda work: work.ours(graphs=False),
    "generate_batch": Work.batched,
}
"""By name, the quick ones first."""


def _measure(call: Callable[[], int], num_tokens: int, device: torch.device) -> dict[str, object]:
    """New tokens per second, the prompt's time included, and the most memory beyond what was held before."""
    _collect(device)
    before = _held_at_most(device)
    try:
        call()
        times = [seconds_of(call, device) for _ in range(RUNS)]
        peak = _held_at_most(device) - before if device.type == "cuda" else None
        return {"tokens_per_second": num_tokens / median(times), "seconds": times, "peak_bytes": peak}
    except Exception as error:  # out of memory is a result, too
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        _collect(device)


def _held_at_most(device: torch.device) -> int:
    """Bytes since the last `_collect`: torch's, and the pools' that torch does not know of. 0 on the CPU."""
    driver = driver_for(device)
    torch_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return torch_bytes + (0 if driver is None else driver.most_bytes)


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        if (driver := driver_for(device)) is not None:
            driver.most_bytes = driver.backed_bytes
