"""``python -m benchmarks.identity``: what seeing that a model is as it was takes of real calls of ``generate``.

A call looks three times: when it begins (a sample of the weights, begun as ``generate`` is entered and waited for where
prefixes are looked up), when its prompt is computed, and when it ends. Caches are as the model's passes leave them. The
clocks are around the calls that hf_paged itself makes; time between them, in which other threads sample, is not theirs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from rich.table import Table
from transformers import PreTrainedModel

from hf_paged import paged
from hf_paged.prefixes import Prefixes, PrefixRoot

from . import environment, report, smollm2, text

CALLS, PROMPT_TOKENS, NEW_TOKENS = 30, 100, 8
# What is computed and kept before the last calls, to see that looks do not depend on it.
KEPT_BATCHES, KEPT_ROWS, KEPT_TOKENS = 4, 8, 500
# Between calls: threads of OpenMP wait actively for some milliseconds after a pass, and take time of those that sample.
PAUSE_SECONDS = 0.05


@dataclass(frozen=True)
class Looks:
    """Milliseconds of each look of a call, and of all three: medians over the calls."""

    title: str
    cached_blocks: int
    begin: float
    prompt: float
    end: float
    whole: float


class Clock:
    """Seconds of the three looks of one call."""

    def __init__(self) -> None:
        self.seconds = [0.0]

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Time what `generate` does while this is open."""
        with ExitStack() as stack:
            for owner, name in ((Prefixes, "begin_look"), (Prefixes, "root"), (PrefixRoot, "holds")):
                stack.enter_context(patch.object(owner, name, self._timed(getattr(owner, name), name == "holds")))
            yield

    def _timed(self, look: Callable[..., Any], is_another: bool) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return look(*args)
            finally:
                if is_another:
                    self.seconds.append(0.0)
                self.seconds[-1] += time.perf_counter() - begin

        return timed


def looks(title: str, model: PreTrainedModel, prompts: list[torch.Tensor], pause_seconds: float = 0.0) -> Looks:
    """Measure a call for each prompt, of a patched model; `RuntimeError` where one does not look three times."""
    calls = []
    for ids in prompts:
        time.sleep(pause_seconds)
        clock = Clock()
        with clock.measured():
            _generate(model, ids)
        if len(clock.seconds) != 3:
            raise RuntimeError(f"a call has looked {len(clock.seconds)} times")
        calls.append([seconds * 1e3 for seconds in clock.seconds])
    parts = map(median, zip(*calls, strict=True))
    return Looks(title, model.paged.stats().blocks_cached, *parts, median(map(sum, calls)))


def measure(model: PreTrainedModel, tokens: list[int]) -> list[Looks]:
    """Patch the model, and measure calls with nothing and with much in the cache."""
    prompts = [torch.tensor([tokens[i * 7 : i * 7 + PROMPT_TOKENS]]) for i in range(CALLS)]
    with paged(model):
        _generate(model, prompts[0])  # finds out what the model can do
        measured = [
            looks("one call right after the other", model, prompts),
            looks(f"{PAUSE_SECONDS * 1e3:.0f} ms between calls", model, prompts, PAUSE_SECONDS),
        ]
        for batch in range(KEPT_BATCHES):
            starts = range(batch * KEPT_ROWS, (batch + 1) * KEPT_ROWS)
            _generate(model, torch.tensor([tokens[start : start + KEPT_TOKENS] for start in starts]))
        return [*measured, looks("right after the other, more cached", model, prompts)]


def _generate(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)


def table(measured: list[Looks]) -> Table:
    """Return the figures for people."""
    made = Table(title="Seeing that the model is as it was, milliseconds of a call", title_justify="left")
    made.add_column("calls", no_wrap=True)
    for name in ("cached blocks", "begin", "after the prompt", "end", "all three"):
        made.add_column(name, justify="right")
    for each in measured:
        parts = (each.begin, each.prompt, each.end, each.whole)
        made.add_row(each.title, f"{each.cached_blocks:,}", *(f"{part:.2f}" for part in parts))
    return made


def main() -> int:
    """Measure and write a JSON file."""
    options = environment.parse(environment.parser("benchmarks.identity", __doc__))
    described = environment.describe()
    measured = measure(smollm2.load_model(torch.float32), text.corpus(smollm2.load_tokenizer()))
    report.console().print(table(measured), environment.summary(described))
    path = options.out / "identity.json"
    environment.save(path, {"environment": described, "looks": [asdict(each) for each in measured]})
    report.console().print(f"Written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
