"""Where a result came from: hardware, versions, commit. Part of every result file."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from transformers.utils import logging

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("hf-paged", "torch", "transformers", "accelerate", "numpy")


def options(name: str, description: str | None) -> argparse.Namespace:
    """Parse what a benchmark is asked with: `--threads`, which are set, and `--out`, a folder for its JSON."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parsed = parser.parse_args()
    prepare(parsed.threads)
    return parsed


def prepare(threads: int) -> None:
    """Threads of torch, and silence from transformers, so that tables stand alone."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def describe() -> dict[str, object]:
    """Return the machine and the software as plain values."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_before": os.getloadavg()[0],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def summary(described: dict[str, object]) -> str:
    """Return one line for the foot of a table or plot."""
    versions = described["versions"]
    return (
        f"SmolLM2-135M-Instruct · {described['cpu']} · {described['threads']} threads · "
        f"torch {versions['torch']} · transformers {versions['transformers']}"
    )


def cpu_name() -> str:
    """Return the processor's name and instruction set, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit of the checkout, with ``+`` where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return "unknown"
    return done.stdout.strip() or "unknown"


def version(name: str) -> str:
    """Return the installed version of a package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
