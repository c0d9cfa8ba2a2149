"""What is measured, as data. A scenario says which prompts, how they are generated from, and what to time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One row of the table.

    Prompt ``i`` is ``shared`` tokens that all prompts begin with and ``own[i]`` tokens of its own. No row stops at an
    end-of-sequence token, so that every run does the same work: each row makes ``new`` tokens, or ``ends[i]``.
    """

    name: str
    title: str
    own: tuple[int, ...]
    shared: int = 0
    new: int
    ends: tuple[int, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of ``generate``."""
    timed: Literal["call", "decode"] = "call"
    """The whole call, or the time from the first generated token to the last."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    floor: float | None = None
    """The ratio stock/patched to reach."""
    whole: bool = True
    """False for a shrunk version, to which no limits of speed or memory apply."""
    limit: float | None = None
    """About the ratio that would be reached if only the model's own matrix products took time, by stock's library."""

    def shrunk(self, divisor: int) -> Scenario:
        """Return a smaller version of the same shape, for a quick look."""
        own = tuple(max(1, tokens // divisor) for tokens in self.own)
        title = f"{self.title} (÷ {divisor})"
        shared = self.shared // divisor
        return replace(self, title=title, own=own, shared=shared, whole=False, floor=None, limit=None)

    def in_dtype(self, dtype: Literal["float32", "bfloat16"]) -> Scenario:
        """Return the same scenario in another dtype, without a floor where the dtype changes."""
        return self if dtype == self.dtype else replace(self, dtype=dtype, floor=None, limit=None)


SAMPLES: Mapping[str, Any] = {"do_sample": True, "num_return_sequences": 8}
BEAMS: Mapping[str, Any] = {"num_beams": 4}

ONE_LONG = Scenario(
    name="one-6000", title="1 prompt of 6,000", own=(6000,), new=64, timed="decode", floor=1.1, limit=1.7
)
EIGHT_LONG = Scenario(
    name="eight-2000", title="8 prompts of 2,000", own=(2000,) * 8, new=32, timed="decode", floor=1.5, limit=2.9
)

SCENARIOS: tuple[Scenario, ...] = (
    Scenario(name="one-100", title="1 prompt of 100", own=(100,), new=64, floor=1.0, limit=1.07),
    ONE_LONG,
    replace(ONE_LONG, name="one-6000-bf16", dtype="bfloat16", floor=2.0, limit=None),
    EIGHT_LONG,
    replace(EIGHT_LONG, name="eight-2000-bf16", dtype="bfloat16", floor=3.0, limit=None),
    Scenario(
        name="samples-8",
        title="8 samples of 1,500",
        own=(1500,),
        new=32,
        arguments=SAMPLES,
        floor=4.7,
        limit=5.7,
    ),
    Scenario(name="beams-4", title="4 beams on 1,000", own=(1000,), new=32, arguments=BEAMS, floor=2.0, limit=2.6),
    Scenario(
        name="system-prompt",
        title="8 rows, 1,000 shared, 20 to 500 own",
        own=(20, 50, 100, 150, 200, 300, 400, 500),
        shared=1000,
        new=32,
        floor=3.7,
        limit=4.4,
    ),
    Scenario(
        name="ends-apart",
        title="8 prompts of 1,000, ending after 4 to 128",
        own=(1000,) * 8,
        new=128,
        ends=(4, 8, 16, 24, 32, 48, 64, 128),
        timed="decode",
        floor=1.5,
        limit=2.0,
    ),
)

DEMO: tuple[Scenario, ...] = (
    Scenario(name="samples", title="8 samples of one prompt", own=(1500,), new=32, arguments=SAMPLES),
    Scenario(
        name="batch",
        title="8 questions under one system prompt",
        own=(20, 40, 60, 80, 120, 160, 240, 320),
        shared=800,
        new=32,
    ),
    Scenario(name="beams", title="Beam search, 4 beams", own=(1000,), new=32, arguments=BEAMS),
)


def named(name: str) -> Scenario:
    """Return the scenario called ``name``; ``KeyError`` lists the names there are."""
    for scenario in SCENARIOS:
        if scenario.name == name:
            return scenario
    raise KeyError(f"no scenario {name!r}; there are: {', '.join(s.name for s in SCENARIOS)}")
