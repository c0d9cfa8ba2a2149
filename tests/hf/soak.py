"""A long series of random calls on little memory with tiers below. ``make soak`` runs 500; a few are in the suite.

Prompts are shared, within a batch and with earlier calls; now and then everything is forgotten or released, blocks are
evicted, files are cut short and weights are edited. Every answer must be stock's, every block must be in one place and
the budget must hold after each call, and the process's memory must not grow.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # otherwise pytest's conftest does it
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from disk import NAMES, check, disk, files_of, tiered
from families import PAD
from host import as_gpu, hosted
from pair import Pair, distinct_pieces, evict
from prompts import tokens
from resident import MIB, resident
from test_sharing import BLOCK_BYTES

BLOCKS = 26  # of 8 tokens: fewer than the prompts of two calls take
MEASURE_EVERY = 10  # calls
WAYS = {
    "greedy": {},
    "greedy, two rows": {"rows": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "beams, two rows": {"num_beams": 2, "rows": 2},
    "salt": {"salt": "a"},
    "sample, other salt": {"salt": "b", "do_sample": True},
}


def hosted_pairs() -> list[Pair]:
    """One of each of `NAMES`, on a CPU that is taken for a GPU, with a host tier and a disk below."""
    return [hosted(name, BLOCKS, host="48KiB", disk="300KiB", policy=None) for name in NAMES]


class Soak:
    """Random calls on `pairs` with memory for `BLOCKS` blocks; by default one of each of `NAMES`, with a disk below.

    Attributes:
        counts: of what was done.
        held: the process's memory, in bytes, after every few calls.
    """

    def __init__(self, seed: int, pairs: Sequence[Pair] | None = None):
        self.draw = random.Random(seed)
        self.pairs = pairs or [tiered(name, BLOCKS, disk="300KiB", policy=None) for name in NAMES]
        self.said = [distinct_pieces(8, 45) for _ in self.pairs]
        self.counts: Counter[str] = Counter()
        self.held: list[int] = []

    def run(self, calls: int) -> None:
        """So many calls; raises `AssertionError` where anything is wrong after one."""
        for call in range(calls):
            which = self.draw.randrange(len(self.pairs))
            self._disturb(self.pairs[which])
            self._call(self.pairs[which], self.said[which])
            if call % MEASURE_EVERY == 0:
                self.held.append(resident())

    def _disturb(self, pair: Pair) -> None:
        events = {"nothing": 84, "clear": 3, "release": 3, "evict": 4, "edit": 3, "truncate": 3}
        (event,) = self.draw.choices(list(events), list(events.values()))
        if event in ("clear", "release"):
            getattr(pair.paged, event)()
        elif event == "edit":
            pair.both(lambda model: model.lm_head.weight.data.mul_(1.01))
        elif event == "evict" and pair.paged.stats().blocks_cached:
            evict(pair, self.draw.randint(1, pair.paged.stats().blocks_cached))
        elif event == "truncate" and pair.paged.stats().blocks_disk:
            disk(pair).flush()
            file = self.draw.choice(files_of(pair))
            os.truncate(file, self.draw.randint(0, file.stat().st_size))
        self.counts[event] += 1

    def _call(self, pair: Pair, said: list[list[int]]) -> None:
        name = self.draw.choice(list(WAYS))
        arguments = {"rows": 1, **WAYS[name]}
        begin = self.draw.choice(said)[: self.draw.randint(9, 60)]
        rows = [
            begin + tokens(self.draw.randint(1, 5), seed=self.draw.randrange(9)) for _ in range(arguments.pop("rows"))
        ]
        answer = pair.ask(rows, max_new_tokens=self.draw.randint(1, 12), **arguments)
        told = [token for token in answer[0].tolist() if token != PAD]
        said[self.draw.randrange(len(said))] = told[:60]
        check(pair, ["damaged"])
        stats = pair.paged.stats()
        staging = pair.paged._pool.tiers.staging_bytes
        assert stats.bytes_reserved <= (BLOCKS + 1) * BLOCK_BYTES + staging, "more memory than the budget"
        self.counts[name] += 1
        self.counts["tokens reused"] += stats.reused_tokens
        self.counts["bytes fetched"] += stats.fetched_bytes
        self.counts["blocks evicted"] += stats.evicted_blocks

    @property
    def growth(self) -> int:
        """Bytes by which the process has grown since a third of the calls, at the most."""
        later = self.held[len(self.held) // 3 :]
        return max(later) - later[0]


def main() -> int:
    """Print what was done and how memory moved; the exit status is 1 where memory grew."""
    parser = argparse.ArgumentParser(prog="python tests/hf/soak.py", description=__doc__)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument(
        "--below", choices=["disk", "host"], default="disk", help="host: and a disk, on a CPU that is taken for a GPU"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth", type=float, default=4, help="MiB that the process may grow by (default 4)")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if options.below == "host":
        as_gpu(pytest.MonkeyPatch())
    pairs = hosted_pairs() if options.below == "host" else None
    soak, begin = Soak(options.seed, pairs), time.monotonic()
    soak.run(options.calls)
    seconds = time.monotonic() - begin
    for name, count in sorted(soak.counts.items()):
        print(f"{count:12,}  {name}")
    print(f"{options.calls} calls as stock in {seconds:.0f} s; memory after every {MEASURE_EVERY} of them, MiB:")
    print(*(f"{(held - soak.held[0]) / MIB:.1f}" for held in soak.held))
    print(f"grown by {soak.growth / MIB:.1f} MiB since the first third")
    return int(soak.growth > options.growth * MIB)


if __name__ == "__main__":
    sys.exit(main())
