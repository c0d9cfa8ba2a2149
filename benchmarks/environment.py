"""What benchmarks begin and end with: arguments; where a result came from (hardware, versions, commit); its file."""

from __future__ import annotations

import argparse
import json
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


def parser(
    name: str, description: str | None, *, out: Path = RESULTS, what: str = "folder for the JSON"
) -> argparse.ArgumentParser:
    """The command line of `python -m NAME`: `--threads` and `--out`; a benchmark adds what is its own.

    Args:
        out: the default of `--out`.
        what: is to be there, for people.
    """
    made = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    made.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    made.add_argument("--out", type=Path, default=out, help=what)
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """What a benchmark is asked with; sets the threads, and has transformers be silent, so that tables stand alone."""
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return options


def save(path: Path, content: object) -> None:
    """Write the result of a benchmark."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


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
