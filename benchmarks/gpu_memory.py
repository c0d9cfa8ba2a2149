"""Memory on demand on a GPU: whether there is a driver for it, what a step takes, and that it follows the calls."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence

import torch

from benchmarks import gpu_generate
from hf_paged import paged
from hf_paged.arena import Arena
from hf_paged.virtual import Driver

# K or V of a layer of Llama-3-8B, and what is asked for at a time.
HEADS, DIM, SLOTS, STEPS = 8, 128, 2**20, 8
LENGTHS = (2_000, 40_000, 2_000)
NEW = 40


def memory(
    device: torch.device, driver: Driver | None, lengths: Sequence[int] = LENGTHS
) -> Iterator[dict[str, object]]:
    """The driver first; without one there is nothing else to see. Then calls with prompts of these lengths."""
    yield {"work": "driver", "passed": driver is not None}
    if driver is not None:
        yield _steps(device)
        yield from _follows(device, lengths)


def _steps(device: torch.device) -> dict[str, object]:
    """Seconds that a GiB takes to come and to go."""
    arena = Arena(SLOTS, torch.empty(1, HEADS, 1, DIM, dtype=torch.bfloat16, device=device))
    step = arena.step_slots
    parts = [(number * step, (number + 1) * step) for number in range(1, 1 + STEPS)]
    seconds = []
    for move in (arena.back, arena.give_back):
        begin = time.perf_counter()
        for part in parts:
            move(*part)
        seconds.append(time.perf_counter() - begin)
    gib = STEPS * step * HEADS * DIM * 2 / 2**30
    return {
        "work": "memory that comes and goes",
        "step_slots": step,
        "seconds_per_gib_to_come": seconds[0] / gib,
        "seconds_per_gib_to_go": seconds[1] / gib,
    }


def _follows(device: torch.device, lengths: Sequence[int]) -> Iterator[dict[str, object]]:
    """Tokens are stock's, and the device's memory is back where it was after the calls."""
    model = gpu_generate.build_tiny(device, 3)
    before = _used(device)
    with paged(model, prefix_caching=False, cuda_graphs=False):
        held = {}
        for length in lengths:
            prompt = torch.randint(3, 120, (1, length), device=device)
            arguments = {"max_new_tokens": NEW, "do_sample": False}
            equal = torch.equal(
                model.generate(prompt, **arguments), model.generate(prompt, cache_implementation="dynamic", **arguments)
            )
            after = _used(device) - before
            first = held.setdefault(length, after)
            yield {
                "work": f"memory after {length} tokens",
                "passed": equal and after <= first and model.paged.stats().fallbacks == {},
                "held_bytes": after,
                "bytes_reserved": model.paged.stats().bytes_reserved,
            }
        model.paged.release()
        left = _used(device) - before
        yield {"work": "memory after release", "passed": left < 2**26, "held_bytes": left}


def _used(device: torch.device) -> int:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free
