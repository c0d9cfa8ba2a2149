"""Calls on a GPU that holds a third of their blocks: tokens, and decoding beside stock's offloaded cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from benchmarks import gpu_generate, gpu_offload
from benchmarks.measure import wait
from hf_paged import limits, paged


@dataclass(frozen=True)
class Sizes:
    """What is checked by a tiny model, and what is decoded in time measurements."""

    checked_prompt: int = 400
    checked_new: int = 40

    model: gpu_generate.Sizes = field(default_factory=gpu_generate.Sizes)
    rows: int = 4
    context: int = 8192
    new: int = 32
    copy_bytes: int = gpu_offload.COPY_BYTES


TINY = Sizes(100, 8, gpu_generate.TINY, rows=1, context=160, new=3, copy_bytes=2**12)


def overflow(device: torch.device, sizes: Sizes) -> Iterator[dict[str, object]]:
    """Right first, then how quick."""
    key = limits.budget_key(device)
    if key == "cpu":
        yield {"work": "overflow", "skipped": "a model on the CPU has no host below it"}
        return
    yield from tokens_equal(device, key, sizes)
    yield from decoding(device, key, sizes)


def tokens_equal(device: torch.device, key: str | int, sizes: Sizes) -> Iterator[dict[str, object]]:
    """A tiny model in float32 with a third of the blocks that each call needs: every token must be stock's."""
    model = gpu_generate.build_tiny(device, 3)
    prompt, block_bytes = torch.randint(3, 120, (3, sizes.checked_prompt), device=device), 16 * 2 * 2 * 3 * 16 * 4
    calls: dict[str, tuple[torch.Tensor, dict[str, object]]] = {
        "greedy": (prompt[:1], {"do_sample": False}),
        "batch": (prompt, {"do_sample": False}),
        "beams": (prompt[:1], {"do_sample": False, "num_beams": 3}),
        "samples": (prompt[:1], {"do_sample": True, "num_return_sequences": 3}),
        "stock-shaped passes": (prompt, {"do_sample": False, "output_attentions": True}),
    }
    for name, (rows, arguments) in calls.items():
        new, sequences = sizes.checked_new, 3 if name in ("beams", "samples") else len(rows)
        stored = rows.numel() + sequences * new
        blocks = max(stored // 16 // 3, 2 * sequences)
        torch.manual_seed(1)
        expected = model.generate(rows, max_new_tokens=new, **arguments)
        with paged(model, max_memory={key: (blocks + 1) * block_bytes, "cpu": 200 * block_bytes}):
            torch.manual_seed(1)
            actual = model.generate(rows, max_new_tokens=new, **arguments)
            stats = model.paged.stats()
            yield {
                "work": f"tokens, {name}",
                "passed": torch.equal(expected, actual) and stats.fetched_bytes > 0 == stats.blocks_in_use,
                "fallbacks": stats.fallbacks,
                "offloaded_bytes": stats.offloaded_bytes,
                "fetched_bytes": stats.fetched_bytes,
            }


def decoding(device: torch.device, key: str | int, sizes: Sizes) -> Iterator[dict[str, object]]:
    """Seconds of a decode step with all blocks on the device, with a third of them, and on stock's offloaded cache."""
    model = gpu_generate.build(device, sizes.model)
    prompts = torch.randint(3, sizes.model.vocabulary, (sizes.rows, sizes.context), device=device)
    all_bytes = sizes.model.kv_bytes(sizes.rows * (sizes.context + sizes.new + 32))
    speed = dict(gpu_offload.pinned_speeds(device, sizes))["to the device"]
    budgets = {"all blocks on the device": all_bytes, "a third of the blocks on the device": all_bytes // 3}
    for what, budget in budgets.items():
        with paged(model, max_memory={key: budget, "cpu": 2 * all_bytes}, prefix_caching=False):
            yield {"work": what, **_step(model, prompts, sizes, speed, lambda: model.paged.stats().fetched_bytes)}
    if device.type == "cuda":  # stock's is for nothing else
        yield {
            "work": "stock's offloaded cache",
            **_step(model, prompts, sizes, speed, lambda: 0, cache_implementation="offloaded"),
        }


def _step(
    model: PreTrainedModel,
    prompts: torch.Tensor,
    sizes: Sizes,
    speed: float,
    fetched: Callable[[], int],
    **arguments: object,
) -> dict[str, object]:
    """Of a decode step: seconds, bytes that came from the host, and what share of a pinned copy's speed that is."""
    figures = []
    for new in (1, 1 + sizes.new):  # each twice; the second one counts
        for _ in range(2):
            before, begin = fetched(), time.perf_counter()
            model.generate(prompts, max_new_tokens=new, do_sample=False, **arguments)
            wait(prompts.device)
        figures.append((time.perf_counter() - begin, fetched() - before))
    (prompt_seconds, prompt_bytes), (seconds, num_bytes) = figures
    step, moved = (seconds - prompt_seconds) / sizes.new, (num_bytes - prompt_bytes) / sizes.new
    return {
        "prompt_seconds": prompt_seconds,
        "step_seconds": step,
        "step_bytes": moved,
        "share_of_pinned_copy": moved / step / speed,
    }
