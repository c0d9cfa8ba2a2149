"""The host tier on a GPU: long prefixes demoted and promoted, as shares of pinned copies' speed, and decoding beside.

It reaches into a patched model's pool, to evict and fetch when it is to be measured, and not when memory is short.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from statistics import mean, median
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks import gpu_generate
from benchmarks.measure import StepClock, seconds_of, wait
from hf_paged import limits, paged
from hf_paged.core.fetch import Choice, FetchPolicy, Option

COPY_BYTES = 256 * 2**20
RUNS = 3
"""Timed moves each way, after one that is not timed."""
DECODINGS_ALONE, DECODINGS = 2, 6
"""By themselves, and in all: one that is not timed, and three beside transfers."""
TARGET_SHARE, TARGET_SLOWDOWN = 0.8, 0.05
"""Of pinned copies' speed, and of the time that a step takes by itself."""


def _model() -> gpu_generate.Sizes:
    """K and V of Llama-3-8B, and its attention; less of what only takes time to make."""
    return gpu_generate.Sizes(intermediate=4096, vocabulary=32000)


@dataclass(frozen=True)
class Sizes:
    """What is moved, and what is decoded meanwhile."""

    model: gpu_generate.Sizes = field(default_factory=_model)
    prefix: int = 16384
    rows: int = 4
    context: int = 512
    new: int = 256
    copy_bytes: int = COPY_BYTES
    pause: float = 0.25  # seconds from one transfer's begin to the next one's: two a half second
    longest: float = 5.0  # seconds after which a decoding ends, however far it is


TINY = Sizes(gpu_generate.TINY, prefix=64, rows=1, context=9, new=24, copy_bytes=2**12, pause=0.001)


class AlwaysFetch(FetchPolicy):
    """Fetches whatever there is, and remembers how long it took."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[tuple[int, float]] = []

    def choose(self, options: Sequence[Option]) -> Choice | None:
        return Choice(options[-1], False)

    def note_fetched(self, num_bytes: int, seconds: float, level: int = 0) -> None:
        self.fetched.append((num_bytes, seconds))


class Prefix:
    """Prompts of a patched model whose pool is evicted and refilled at will."""

    def __init__(self, model: PreTrainedModel, sizes: Sizes, device: torch.device):
        self.model, self.sizes, self.device = model, sizes, device
        self.rows = [torch.randint(3, sizes.model.vocabulary, (1, sizes.prefix), device=device) for _ in range(2)]
        self._tokens = {id(row): row[0].tolist() for row in self.rows}
        self.policy = AlwaysFetch()

    def compute(self, row: torch.Tensor) -> None:
        """Leave a prompt's blocks in the pool, after another call's."""
        self.model.generate(row, max_new_tokens=1, do_sample=False)
        self.tiers.policy = self.policy

    @property
    def tiers(self) -> Any:
        return self.model.paged._pool.tiers

    @property
    def manager(self) -> Any:
        return self.model.paged._pool.manager

    def evict(self, row: torch.Tensor) -> int:
        """Give up a prompt's blocks; returns the bytes that are on their way to the host."""
        return self._give_up(self._victims(row))

    def _victims(self, row: torch.Tensor) -> list[tuple[Any, int]]:
        pool = self.manager.pools[0]
        return [(pool, each) for each in self._blocks(row)[::-1] if pool.is_cached(each)]

    def _give_up(self, victims: list[tuple[Any, int]]) -> int:
        before = self.model.paged.stats().offloaded_bytes
        with self.manager.lock:
            self.manager.budget.give_up([each for each in victims if each[0].is_cached(each[1])])
        return self.model.paged.stats().offloaded_bytes - before

    def demote(self, row: torch.Tensor) -> tuple[int, float]:
        """The same, and the seconds until they were there. Which blocks go is found out before."""
        victims = self._victims(row)
        begin = time.perf_counter()
        num_bytes = self._give_up(victims)
        if self.tiers._side is not None:
            self.tiers._side.mark().result()
        return num_bytes, time.perf_counter() - begin

    def promote(self, row: torch.Tensor) -> tuple[int, float, float]:
        """Fetch a prompt; bytes, the seconds until its blocks could be used, and those of the copies alone."""
        tokens = self._tokens[id(row)]
        self.policy.fetched.clear()
        begin = time.perf_counter()
        pins = self.tiers.fetch(self._root, tokens, len(tokens))
        seconds = time.perf_counter() - begin
        self.manager.unpin(pins[::-1])
        ((num_bytes, copying),) = self.policy.fetched
        return num_bytes, seconds, copying

    def content(self, row: torch.Tensor) -> list[torch.Tensor]:
        """K and V of a prompt in the first layer and in the last, as they are stored."""
        size = self.manager.block_size
        offsets = torch.arange(size, device=self.device)
        slots = torch.cat([each * size + offsets for each in self._blocks(row)])
        stores = self.model.paged._pool.stores
        return [each for store in (stores[0], stores[-1]) for each in store.gather(slots)]

    @cached_property
    def _root(self) -> bytes:
        return self.model.paged._prefixes.root(None, self.model.paged._pool).key

    def _blocks(self, row: torch.Tensor) -> list[int]:
        tokens = self._tokens[id(row)]
        with self.manager.lock:
            return self.manager.index.match(self._root, tokens, len(tokens)).blocks[0]

    def forget_host(self) -> None:
        """What is in the pool is copied anew when it is evicted."""
        with self.manager.lock:
            self.tiers.levels[0].index.clear()


def offload(device: torch.device, sizes: Sizes) -> Iterator[dict[str, object]]:
    """Copies of pinned memory, then the tier's moves, then decoding with and without them."""
    key = limits.budget_key(device)
    if key == "cpu":
        yield {"work": "host tier", "skipped": "a model on the CPU has none"}
        return
    speeds = dict(pinned_speeds(device, sizes))
    for way, speed in speeds.items():
        yield {"work": f"pinned copy, {way}", "bytes_per_second": speed}
    model = gpu_generate.build(device, sizes.model)
    # So much that nothing is evicted but what is to be measured.
    tokens = 2 * sizes.prefix + DECODINGS * sizes.rows * (sizes.context + sizes.new + 64) + 1024
    # The host has room for one prefix: the second one finds the first one's memory, pinned already.
    memory = {key: sizes.model.kv_bytes(tokens), "cpu": int(1.05 * sizes.model.kv_bytes(sizes.prefix + 64))}
    with torch.no_grad(), paged(model, max_memory=memory):
        prefix = Prefix(model, sizes, device)
        first, second = prefix.rows
        prefix.compute(first)
        yield _moved("demoted, memory pinned on the way", *prefix.demote(first), speeds["to the host"])
        prefix.promote(first)
        prefix.compute(second)
        before = prefix.content(second)
        down, up = [], []
        for _ in range(RUNS):
            wait(device)
            prefix.forget_host()
            down.append(prefix.demote(second))
            up.append(prefix.promote(second))
        equal = all(map(torch.equal, before, prefix.content(second)))
        yield _moved("demoted", *_median(down), speeds["to the host"])
        num_bytes, seconds, copying = _median(up)
        fallbacks = model.paged.stats().fallbacks
        yield (
            _moved("promoted", num_bytes, seconds, speeds["to the device"])
            | {"share_of_the_copies_alone": num_bytes / copying / speeds["to the device"]}
            | {"passed": equal and not any("tier" in reason for reason in fallbacks), "fallbacks": fallbacks}
        )
        yield from decoding(prefix, second)


def _median(runs: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """The run that took the median time."""
    return sorted(runs, key=lambda run: run[1])[len(runs) // 2]


def pinned_speeds(device: torch.device, sizes: Sizes) -> Iterator[tuple[str, float]]:
    """Bytes per second of plain copies between pinned memory and the device, each way."""
    there = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device)
    here = torch.empty(sizes.copy_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for way, target, source in (("to the host", here, there), ("to the device", there, here)):
        copy = partial(target.copy_, source, non_blocking=True)
        yield way, sizes.copy_bytes / min(seconds_of(copy, device) for _ in range(5))


class Steps(StepClock):
    """Notes when each step of a decoding ends, and ends it when it takes too long."""

    def __init__(self, longest: float):
        super().__init__()
        self._latest = time.perf_counter() + longest

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        never = super().__call__(*args, **kwargs)
        return never.logical_not_() if self.stamps[-1] > self._latest else never

    @property
    def seconds(self) -> list[float]:
        """Of each step behind the prompt's."""
        return [end - begin for begin, end in pairwise(self.stamps)]

    def beside(self, spans: Sequence[tuple[float, float]]) -> list[float]:
        """Of those during which one of these spans of time began, ended or went on."""
        steps = pairwise(self.stamps)
        return [end - begin for begin, end in steps if any(a < end and begin < b for a, b in spans)]


class Mover(threading.Thread):
    """Moves a long prefix to the host and back, or only back, until it is told to stop.

    Attributes:
        spans: when each transfer began and when it had ended.
    """

    def __init__(self, prefix: Prefix, row: torch.Tensor, goes: bool, pause: float):
        super().__init__()
        self._prefix, self._row, self._goes, self._pause = prefix, row, goes, pause
        self.spans: list[tuple[float, float]] = []
        self.demoted = self.promoted = 0
        self._is_over, self._error = threading.Event(), None

    def run(self) -> None:
        try:
            while not self._is_over.is_set():
                if self._goes:
                    self._prefix.forget_host()
                    self.demoted += self._timed(self._prefix.demote)
                else:
                    self._prefix.evict(self._row)  # the host has it: nothing moves
                self.promoted += self._timed(self._prefix.promote)
        except Exception as error:
            self._error = error

    def _timed(self, move: Callable[[torch.Tensor], tuple[float, ...]]) -> int:
        begin = time.perf_counter()
        num_bytes = move(self._row)[0]
        self.spans.append((begin, time.perf_counter()))
        self._is_over.wait(max(0.0, begin + self._pause - time.perf_counter()))
        return num_bytes

    def finish(self) -> None:
        """Stop after the transfer that is under way; raises what went wrong."""
        self._is_over.set()
        self.join()
        if self._error is not None:
            raise self._error


def decoding(prefix: Prefix, row: torch.Tensor) -> Iterator[dict[str, object]]:
    """Steps of rows that decode by themselves, and while a long prefix comes and goes on another thread.

    Now and then, as prompts come to a server; and without a pause, which is as bad as it gets.
    """
    sizes, device = prefix.sizes, prefix.device
    prompts = torch.randint(3, sizes.model.vocabulary, (sizes.rows, sizes.context), device=device)

    def decode() -> Steps:
        wait(device)
        steps = Steps(sizes.longest)
        # Under a salt of its own each time, so that the prompts are computed in any case.
        salt = str(time.perf_counter())
        prefix.model.generate(
            prompts, max_new_tokens=sizes.new, do_sample=False, cache_salt=salt, stopping_criteria=[steps]
        )
        return steps

    decode()
    alone = [each for _ in range(DECODINGS_ALONE) for each in decode().seconds]
    for what, goes, pause in (
        (f"it is demoted and promoted, one each {2 * sizes.pause:g} s", True, sizes.pause),
        ("it is promoted without a pause", False, 0.0),
        ("it is demoted and promoted without a pause", True, 0.0),
    ):
        mover = Mover(prefix, row, goes, pause)
        mover.start()
        try:
            steps = decode()
        finally:
            mover.finish()
        beside = steps.beside(mover.spans)
        yield {
            "work": f"decoding {sizes.rows} × {sizes.context} + {sizes.new} while {what}",
            "model": f"intermediate {sizes.model.intermediate}, vocabulary {sizes.model.vocabulary}",
            "median_step_alone": median(alone),
            "median_step": median(beside),
            "slowdown": median(beside) / median(alone) - 1,
            "target": TARGET_SLOWDOWN,
            "slowdown_of_the_whole": mean(steps.seconds) / mean(alone) - 1,
            "longest_step_alone": max(alone),
            "longest_step": max(steps.seconds),
            "steps": len(steps.seconds),
            "steps_beside_transfers": len(beside),
            "transfers": len(mover.spans),
            "demoted_bytes": mover.demoted,
            "promoted_bytes": mover.promoted,
        }


def _moved(what: str, num_bytes: int, seconds: float, speed: float) -> dict[str, object]:
    return {
        "work": what,
        "bytes": num_bytes,
        "seconds": seconds,
        "share_of_pinned_copy": num_bytes / seconds / speed,
        "target": TARGET_SHARE,
    }
