"""``python -m benchmarks.waste``: KV bytes held, over the bytes of the distinct real tokens, in every scenario.

Only the patched side runs, once: these are counts, so other programs may run meanwhile. Prefixes are not kept, so that
all that is held is held for the rows that still generate. The margin is for all memory that is taken, which includes
the free blocks that are kept for the next steps; beside it stand the blocks in use alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch
from rich.table import Table

from hf_paged import patch_model

from . import environment, report, smollm2
from .measure import Work, run
from .memory import MARGIN, KvProbe, KvUse, kv_use
from .scenarios import SCENARIOS, Scenario


def measure(scenarios: Sequence[Scenario]) -> dict[str, KvUse]:
    """Run scenarios of one dtype."""
    tokenizer = smollm2.load_tokenizer()
    model = smollm2.load_model(getattr(torch, scenarios[0].dtype))
    model.generation_config.eos_token_id = None
    patch_model(model, prefix_caching=False)
    used = {}
    for scenario in scenarios:
        probe, work = KvProbe(model), Work.of(scenario, tokenizer)
        run(model, work, probe=probe)
        used[scenario.name] = kv_use(work, probe)
    return used


def table(used: dict[str, KvUse]) -> Table:
    """Return the factors for people."""
    made = Table(
        title=f"(KV bytes held - one block a row) / bytes of real tokens, at most {MARGIN}", title_justify="left"
    )
    made.add_column("scenario", no_wrap=True)
    for name in ("stock MB", "patched MB", "real tokens MB", "all memory taken", "blocks in use"):
        made.add_column(name, justify="right")
    for name, use in used.items():
        sizes = (use.stock_bytes, use.patched_bytes, use.real_bytes)
        made.add_row(
            name,
            *(f"{size / report.MEGABYTE:.1f}" for size in sizes),
            report.coloured(f"{use.worst_reserved_factor:.3f}", use.worst_reserved_factor <= MARGIN),
            f"{use.worst_factor:.3f}",
        )
    return made


def main() -> int:
    """Run everything in float32, or what was asked; the exit status is 1 where a margin was passed."""
    names = [scenario.name for scenario in SCENARIOS]
    parser = environment.parser("benchmarks.waste", __doc__)
    parser.add_argument("--only", metavar="NAME", action="append", choices=names, help=f"one of {', '.join(names)}")
    options = environment.parse(parser)
    chosen = [scenario for scenario in SCENARIOS if options.only is None or scenario.name in options.only]
    used: dict[str, KvUse] = {}
    for dtype in ("float32", "bfloat16"):
        of_dtype = [scenario for scenario in chosen if scenario.dtype == dtype]
        used |= measure(of_dtype) if of_dtype else {}
    described, console = environment.describe(), report.console()
    console.print(table(used))
    content = {
        "environment": described,
        "margin": MARGIN,
        "scenarios": {name: asdict(use) for name, use in used.items()},
    }
    path = options.out / ("kv-waste.json" if options.only is None else "partial.kv-waste.json")
    environment.save(path, content)
    console.print(f"Written: {path}")
    return int(max(use.worst_reserved_factor for use in used.values()) > MARGIN)


if __name__ == "__main__":
    sys.exit(main())
