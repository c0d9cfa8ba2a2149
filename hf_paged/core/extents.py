"""Extents: the runs of blocks that have memory, on devices where memory is asked for before anybody writes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise


class Extents:
    """Of one pool.

    Args:
        step_blocks: memory is asked for in steps of so many blocks, unless the budget has no room for that.
        back: asks for the memory of a run of blocks; returns whether it was there.
        backed: so many blocks have memory from the beginning on, the null block first.

    Attributes:
        runs: in order. Each goes back as a whole; the first, in which the null block is, stays.
    """

    # Longer ones take fewer calls of the driver, and go back more rarely.
    MAX_STEPS = 4

    def __init__(self, step_blocks: int, back: Callable[[range], bool], backed: int):
        self.step_blocks = step_blocks
        self._back = back
        starts = [0, *range(min(step_blocks, backed), backed, step_blocks)]
        self.runs = [range(start, stop) for start, stop in pairwise([*starts, backed])]

    @property
    def num_blocks(self) -> int:
        """Blocks that have memory, the null block included."""
        return sum(map(len, self.runs))

    @property
    def stop(self) -> int:
        """The id behind the last block that has memory."""
        return self.runs[-1].stop

    def get(self, wanted: int, room: int, num_blocks: int) -> range:
        """Memory for the first blocks below `num_blocks` without any: about `wanted`, in steps where there is `room`.

        Returns which, less than wanted where there is no more in a row; none where memory is refused.
        """
        wanted = min(wanted, self.MAX_STEPS * self.step_blocks)
        count = max(wanted, min(-(-wanted // self.step_blocks) * self.step_blocks, room))
        ends = [*self.runs, range(num_blocks, num_blocks)]
        gaps = (range(one.stop, other.start) for one, other in pairwise(ends) if one.stop < other.start)
        gap = next(gaps, range(0))
        for length in sorted({count, min(count, self.step_blocks)}, reverse=True):
            run = gap[:length]
            if run and self._back(run):
                self.runs = sorted([*self.runs, run], key=lambda each: each.start)
                return run
        return range(0)

    def take_idle(self, used: bytearray) -> list[range]:
        """The extents of which no block is `used`, as the null block is; they have no memory any more."""
        idle = [run for run in self.runs if used.find(1, run.start, run.stop) < 0]
        self.runs = [run for run in self.runs if run not in idle]
        return idle
