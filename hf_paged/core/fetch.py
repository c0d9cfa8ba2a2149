"""Fetch or compute: how far down a prompt blocks of lower tiers go, and whether reading them is quicker."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from itertools import count as counted
from typing import NamedTuple

from hf_paged.core.blocks import NULL_BLOCK
from hf_paged.core.prefix import TOKEN_BYTES, PrefixIndex, chain_key, pack_tokens, seen_from
from hf_paged.core.tier import Record, TierIndex, TierStack

# Passes over fewer tokens say more about what a pass costs by itself than about its tokens.
MIN_MEASURED_TOKENS = 32
# What is read to find out how quick reading is; after so many choices in favour of computing that is asked again.
TRIAL_BYTES = 4 * 2**20
TRIAL_EVERY = 16

Lower = TierIndex | TierStack


class Hop(NamedTuple):
    """One block down a prompt: its tokens, and where each group's part of it is: in the pool, or on which tier.

    `stop`: the prompt's tokens that end with it.
    """

    parent: bytes
    key: bytes
    packed: bytes
    stop: int
    blocks: list[int]
    records: list[Record | None]


class Option(NamedTuple):
    """Begin with the first `num_hops` hops.

    `gained_tokens` need not be computed then, `num_bytes[level]` have to be read from the tier of that level.
    """

    num_hops: int
    gained_tokens: int
    num_bytes: tuple[int, ...]


def find_hops(index: PrefixIndex, tier: Lower, root: bytes, tokens: Sequence[int], limit: int) -> list[Hop]:
    """The blocks that the first `limit` tokens of a prompt may begin with, as far as any is known.

    Those between them that nobody has any more are among them: a window may lie behind them. One block on the way may
    be partly filled, as in the prefix index.
    """
    packed = pack_tokens(tokens)
    hops = _full_hops(index, tier, root, packed, 0, limit)
    known = _known(hops)
    for count in range(len(hops), known - 1, -1):
        key, at = (hops[count - 1].key, hops[count - 1].stop) if count else (root, 0)
        rest = packed[at * TOKEN_BYTES : (at + index.block_size) * TOKEN_BYTES]
        short = max(tier.longest_short(key, rest), index.longest_short(key, rest), key=len)
        if short and at < limit:
            seam = _hop(index, tier, key, short, at + len(short) // TOKEN_BYTES)
            behind = _full_hops(index, tier, seam.key, packed, seam.stop, limit)
            return [*hops[:count], seam, *behind[: _known(behind)]]
    return hops[:known]


def _known(hops: Sequence[Hop]) -> int:
    """Number of hops up to the last one of which anything is there."""
    return max((i for i, hop in enumerate(hops, start=1) if any(hop.blocks) or any(hop.records)), default=0)


def _full_hops(index: PrefixIndex, tier: Lower, key: bytes, packed: bytes, at: int, limit: int) -> list[Hop]:
    """The full blocks behind `key` that would hold the prompt from token `at` on."""
    hops: list[Hop] = []
    size, begin = index.block_size, at * TOKEN_BYTES
    while at < limit and begin + index.full_bytes <= len(packed):
        end = begin + index.full_bytes
        hop = _hop(index, tier, key, packed[begin:end], at + size)
        hops.append(hop)
        key, at, begin = hop.key, hop.stop, end
    return hops


def _hop(index: PrefixIndex, tier: Lower, parent: bytes, packed: bytes, stop: int) -> Hop:
    key = chain_key(parent, packed)
    blocks = index.blocks_of(key) or (NULL_BLOCK,) * len(index.windows)
    return Hop(parent, key, packed, stop, [*blocks], tier.find(key))


def first_needed(hops: Sequence[Hop], num_tokens: int, window: int | None, start: int = 0) -> int:
    """The first hop from number `start` on that the token behind `num_tokens` tokens still looks at."""
    seen = seen_from(num_tokens, window)
    while start < len(hops) and hops[start].stop <= seen:
        start += 1
    return start


def find_options(
    hops: Sequence[Hop],
    windows: Sequence[int | None],
    record_bytes: Sequence[int],
    in_memory: int,
    limit: int,
    num_levels: int = 1,
) -> list[Option]:
    """Every beginning of `hops` that is whole between pool and tiers, and longer than the `in_memory` tokens there."""
    stops = [min(hop.stop, limit) for hop in hops]
    usable, num_bytes = [True] * len(hops), [[0] * len(hops) for _ in range(num_levels)]
    for group, window in enumerate(windows):
        firsts = _firsts(hops, stops, window)
        away = [None if hop.blocks[group] else hop.records[group] for hop in hops]
        # What lies from the first one that is needed on: sums over all, less those before it.
        lost = _sums(not hop.blocks[group] and hop.records[group] is None for hop in hops)
        usable = [ok and lost[i] == lost[first] for ok, i, first in zip(usable, counted(1), firsts, strict=False)]
        for level, so_far in enumerate(num_bytes):
            read = _sums(record is not None and record.level == level for record in away)
            there = zip(so_far, counted(1), firsts, strict=False)
            num_bytes[level] = [known + (read[i] - read[first]) * record_bytes[group] for known, i, first in there]
    return [
        Option(i, stop - in_memory, each)
        for i, stop, ok, each in zip(counted(1), stops, usable, zip(*num_bytes, strict=True), strict=False)
        if ok and stop > in_memory and any(each)
    ]


def _firsts(hops: Sequence[Hop], stops: Sequence[int], window: int | None) -> list[int]:
    """For each number of hops, counted from 1, the first one that is needed; no more than that number."""
    if window is None:
        return [0] * len(hops)
    firsts, first = [], 0
    for i, stop in enumerate(stops, start=1):
        first = first_needed(hops, stop, window, first)
        firsts.append(min(first, i))
    return firsts


def _sums(numbers: Iterable[int]) -> list[int]:
    """Of the first 0, 1, 2, … of them."""
    return [*accumulate(numbers, initial=0)]


class Rate:
    """A running estimate of units a second. What was measured fades as `memory` units more are."""

    def __init__(self, memory: float):
        self._memory = memory
        self._units = self._seconds = 0.0

    def add(self, units: float, seconds: float) -> None:
        """So many units have taken so long."""
        fade = math.exp(-units / self._memory)
        self._units = self._units * fade + units
        self._seconds = self._seconds * fade + max(seconds, 1e-9)

    @property
    def per_second(self) -> float:
        """The estimate; 0 where nothing was measured."""
        return self._units / self._seconds if self._seconds else 0.0


class Choice(NamedTuple):
    """What to fetch, and whether only to see how long that takes: then ask again."""

    option: Option
    is_trial: bool


class _Reading:
    """How quick reading from one tier is, and how often computing was held to be quicker since that was seen last."""

    def __init__(self) -> None:
        self.rate = Rate(256 * 2**20)
        self.declined = 0

    @property
    def is_doubtful(self) -> bool:
        return not self.rate.per_second or self.declined >= TRIAL_EVERY


class FetchPolicy:
    """Fetches what is read in less time than it is computed, by running estimates of both, one of reading a tier."""

    def __init__(self) -> None:
        self.tokens_computed = Rate(8192)
        self._readings: defaultdict[int, _Reading] = defaultdict(_Reading)

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        """A pass over so many prompt tokens has taken so long."""
        if num_tokens >= MIN_MEASURED_TOKENS:
            self.tokens_computed.add(num_tokens, seconds)

    def note_fetched(self, num_bytes: int, seconds: float, level: int = 0) -> None:
        """So many bytes were fetched from a tier in this time."""
        self._readings[level].rate.add(num_bytes, seconds)
        self._readings[level].declined = 0

    def bytes_per_second(self, level: int = 0) -> float:
        """The estimate of reading from a tier; 0 where nothing was measured."""
        return self._readings[level].rate.per_second

    def choose(self, options: Sequence[Option]) -> Choice | None:
        """One of the options (there is at least one), or `None` to compute."""
        trial = self._trial(options)
        if trial is not None:
            return Choice(trial, True)
        if not self.tokens_computed.per_second:
            return Choice(options[-1], False)
        best = max(options, key=self._seconds_saved)
        is_chosen = self._seconds_saved(best) > 0
        for level, num_bytes in enumerate(options[-1].num_bytes):
            if num_bytes and not (is_chosen and best.num_bytes[level]):
                self._readings[level].declined += 1
        return Choice(best, False) if is_chosen else None

    def _trial(self, options: Sequence[Option]) -> Option | None:
        """What to read to see how quick the nearest tier is of which that is not known well enough."""
        for level in range(len(options[-1].num_bytes)):
            reading = [option for option in options if option.num_bytes[level]]
            if reading and self._readings[level].is_doubtful:
                small = [option for option in reading if option.num_bytes[level] <= TRIAL_BYTES]
                return small[-1] if small else min(reading, key=lambda each: each.num_bytes[level])
        return None

    def _seconds_saved(self, option: Option) -> float:
        to_compute = option.gained_tokens / self.tokens_computed.per_second
        read = [(num_bytes, self.bytes_per_second(level)) for level, num_bytes in enumerate(option.num_bytes)]
        return to_compute - sum(num_bytes / speed for num_bytes, speed in read if num_bytes)
