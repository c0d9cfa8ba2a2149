"""`python benchmarks/gpu.py`: on a machine with a GPU, checks every Triton kernel compiled and measures what there is.

Writes benchmarks/results/gpu-NAME.json after every line, so that what fails or is cut off costs nothing but itself.
Without a GPU it says so and exits with 2. Exits with 1 where a check has failed.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

if __name__ == "__main__":  # as a script, in a checkout that need not be installed: not from this folder
    ROOT = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(ROOT), str(ROOT / "kernels" / "torch-ext")]

import torch

from benchmarks import environment
from hf_paged_kernels.launch import is_interpreted, triton_obstacle

Rows = Iterator[dict[str, object]]


def parts(device: torch.device, is_tiny: bool, sides: Sequence[str]) -> dict[str, Callable[[], Rows]]:
    """What there is to do, by name, in order; `sides` are those of `generate` that take part, all where empty."""
    from benchmarks import gpu_generate, gpu_kernels, gpu_memory, gpu_offload, gpu_overflow, gpu_records
    from hf_paged.cuda_driver import driver_for

    kernels = gpu_kernels.TINY if is_tiny else gpu_kernels.Sizes()
    whole = gpu_generate.TINY if is_tiny else gpu_generate.Sizes()
    sides = sides or list(gpu_generate.SIDES)
    moved = gpu_offload.TINY if is_tiny else gpu_offload.Sizes()
    spilled = gpu_overflow.TINY if is_tiny else gpu_overflow.Sizes()

    @cache
    def bandwidth() -> float:
        return gpu_kernels.copy_bandwidth(device, kernels)

    return {
        "bandwidth": lambda: iter([{"bytes_per_second": bandwidth()}]),
        "check": lambda: gpu_kernels.check(device, kernels),
        "tokens": lambda: gpu_generate.tokens_equal(device, whole),
        "memory": lambda: gpu_memory.memory(device, driver_for(device)),
        "decode": lambda: gpu_kernels.decode(device, kernels, bandwidth()),
        "check-records": lambda: gpu_records.check(device, kernels),
        "decode-records": lambda: gpu_records.decode(device, kernels, bandwidth()),
        "moves": lambda: gpu_kernels.moves(device, kernels, bandwidth()),
        "prefill": lambda: gpu_kernels.prefill(device, kernels),
        "tiles": lambda: gpu_kernels.tiles(device, kernels, bandwidth()),
        "end-to-end": lambda: gpu_generate.end_to_end(device, whole, sides),
        "samples": lambda: gpu_generate.samples(device, whole, sides),
        "offload": lambda: gpu_offload.offload(device, moved),
        "overflow": lambda: gpu_overflow.overflow(device, spilled),
    }


def describe(device: torch.device) -> dict[str, object]:
    """The machine, its GPU and the software."""
    import triton

    described = {**environment.describe(), "triton": triton.__version__, "interpreted": is_interpreted()}
    if device.type == "cuda":
        seen = torch.cuda.get_device_properties(device)
        described |= {
            "gpu": seen.name,
            "gpu_memory_bytes": seen.total_memory,
            "gpu_processors": seen.multi_processor_count,
            "gpu_capability": f"{seen.major}.{seen.minor}",
            "cuda": torch.version.cuda,
        }
    return described


def run(name: str, rows: Callable[[], Rows], keep: Callable[[dict[str, object]], None]) -> dict[str, object]:
    """One part, line by line; `keep` is given what it has found so far."""
    print(f"\n{name}", flush=True)
    found, begin = [], time.perf_counter()
    outcome: dict[str, object] = {"rows": found}
    try:
        for row in rows():
            found.append(row)
            print("  " + ", ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
            keep({**outcome, "cut_off": True})
    except Exception as error:  # the next part may do better
        traceback.print_exc()
        outcome["failed"] = f"{type(error).__name__}: {error}"
    return outcome | {"seconds": time.perf_counter() - begin}


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def has_failed(outcome: dict[str, object]) -> bool:
    """Whether a part has ended early, or a check has not passed."""
    return "failed" in outcome or any(row.get("passed") is False for row in outcome["rows"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for; returns the exit status."""
    names = (
        "bandwidth", "check", "tokens", "memory", "decode", "check-records", "decode-records", "moves", "prefill",
        "tiles", "end-to-end", "samples", "offload", "overflow",
    )  # fmt: skip
    made = argparse.ArgumentParser(prog="python benchmarks/gpu.py", description=__doc__)
    made.add_argument("--only", nargs="+", choices=names, default=names, help="parts to run")
    made.add_argument("--sides", nargs="+", default=(), help="of end-to-end and samples, as they are named in results")
    made.add_argument("--out", type=Path, default=environment.RESULTS, help="folder of the results")
    made.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # tries the script itself, interpreted
    options = made.parse_args(arguments)
    from benchmarks.gpu_generate import SIDES

    if unknown := set(options.sides) - SIDES.keys():
        made.error(f"--sides: {'; '.join(sorted(unknown))}: choose from {'; '.join(SIDES)}")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    obstacle = triton_obstacle(device)
    if obstacle or (device.type == "cpu" and not options.tiny):
        print(f"There is nothing to measure: {obstacle or 'this machine has no CUDA device'}.", file=sys.stderr)
        return 2
    described = describe(device)
    results: dict[str, dict[str, object]] = {}

    def keep(name: str, outcome: dict[str, object]) -> None:
        results[name] = outcome
        environment.save(path, {"environment": described, "results": results})

    label = re.sub(r"\W+", "-", str(described.get("gpu", "interpreted"))).lower()
    path = options.out / f"gpu-{label}.json"
    for name, rows in parts(device, options.tiny, options.sides).items():
        if name in options.only:
            keep(name, run(name, rows, partial(keep, name)))
    print(f"\nWritten: {path}")
    return int(any(map(has_failed, results.values())))


if __name__ == "__main__":
    sys.exit(main())
