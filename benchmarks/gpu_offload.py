"""The host tier on a GPU: long prefixes demoted and promoted, as shares of pinned copies' speed, and decoding beside.

It reaches into a patched model's pool, to evict and fetch when it is to be measured, and not when memory is short.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks import gpu_generate
from hf_paged import paged, pool
from hf_paged.core.fetch import Choice, FetchPolicy, Option

COPY_BYTES = 256 * 2**20
DECODINGS = 5
TARGET_SHARE, TARGET_SLOWDOWN = 0.8, 0.05
"""Of pinned copies' speed, and of the time that decoding takes by itself."""


@dataclass(frozen=True)
class Sizes:
    """What is moved, and what is decoded meanwhile."""

    model: gpu_generate.Sizes = field(default_factory=gpu_generate.Sizes)
    prefix: int = 16384
    rows: int = 4
    context: int = 512
    new: int = 256
    copy_bytes: int = COPY_BYTES


TINY = Sizes(gpu_generate.TINY, prefix=64, rows=1, context=9, new=3, copy_bytes=2**12)


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
        before = self.model.paged.stats().offloaded_bytes
        with self.manager.lock:
            pool = self.manager.pools[0]
            self.manager.budget.give_up([(pool, each) for each in self._blocks(row)[::-1] if pool.is_cached(each)])
        return self.model.paged.stats().offloaded_bytes - before

    def demote(self, row: torch.Tensor) -> tuple[int, float]:
        """The same, and the seconds until they were there."""
        _wait(self.device)
        begin = time.perf_counter()
        num_bytes = self.evict(row)
        if self.tiers._side is not None:
            self.tiers._side.mark().result()
        _wait(self.device)
        return num_bytes, time.perf_counter() - begin

    def promote(self, row: torch.Tensor) -> tuple[int, float]:
        """Fetch a prompt; bytes, and the seconds until they were there."""
        tokens = row[0].tolist()
        self.policy.fetched.clear()
        self.manager.unpin(self.tiers.fetch(self._root, tokens, len(tokens))[::-1])
        (moved,) = self.policy.fetched
        return moved

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
        tokens = row[0].tolist()
        with self.manager.lock:
            return self.manager.index.match(self._root, tokens, len(tokens)).blocks[0]

    def forget_host(self) -> None:
        """What is in the pool is copied anew when it is evicted."""
        with self.manager.lock:
            self.tiers.levels[0].index.clear()


def offload(device: torch.device, sizes: Sizes) -> Iterator[dict[str, object]]:
    """Copies of pinned memory, then the tier's moves, then decoding with and without them."""
    key = pool.budget_key(device)
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
        prefix.compute(second)
        before = prefix.content(second)
        yield _moved("demoted", *prefix.demote(second), speeds["to the host"])
        promoted = _moved("promoted", *prefix.promote(second), speeds["to the device"])
        equal = all(map(torch.equal, before, prefix.content(second)))
        fallbacks = model.paged.stats().fallbacks
        yield promoted | {"passed": equal and not any("tier" in reason for reason in fallbacks), "fallbacks": fallbacks}
        yield from decoding(prefix, second)


def pinned_speeds(device: torch.device, sizes: Sizes) -> Iterator[tuple[str, float]]:
    """Bytes per second of plain copies between pinned memory and the device, each way."""
    there = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device)
    here = torch.empty(sizes.copy_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for way, target, source in (("to the host", here, there), ("to the device", there, here)):
        times = []
        for _ in range(5):
            _wait(device)
            begin = time.perf_counter()
            target.copy_(source, non_blocking=True)
            _wait(device)
            times.append(time.perf_counter() - begin)
        yield way, sizes.copy_bytes / min(times)


def decoding(prefix: Prefix, row: torch.Tensor) -> Iterator[dict[str, object]]:
    """Rows that decode by themselves, while a long prefix comes all the time, and while it comes and goes.

    It comes at no cost to the stream that computes. When it goes, that stream waits for all but the last of it.
    """
    sizes, device = prefix.sizes, prefix.device
    prompts = torch.randint(3, sizes.model.vocabulary, (sizes.rows, sizes.context), device=device)

    def decode() -> float:
        _wait(device)
        begin = time.perf_counter()
        # Under a salt of its own each time, so that the prompts are computed in any case.
        prefix.model.generate(prompts, max_new_tokens=sizes.new, do_sample=False, cache_salt=str(begin))
        _wait(device)
        return time.perf_counter() - begin

    decode()
    alone = min(decode() for _ in range(2))
    for what, goes in (("it is promoted", False), ("it is demoted and promoted", True)):
        seconds, demoted, promoted = _meanwhile(decode, prefix, row, goes)
        yield {
            "work": f"decoding {sizes.rows} × {sizes.context} + {sizes.new} while {what}",
            "seconds_alone": alone,
            "seconds": seconds,
            "slowdown": seconds / alone - 1,
            "target": TARGET_SLOWDOWN,
            "demoted_bytes": demoted,
            "promoted_bytes": promoted,
        }


def _meanwhile(decode: Callable[[], float], prefix: Prefix, row: torch.Tensor, goes: bool) -> tuple[float, int, int]:
    """Seconds of decoding, and the bytes that another thread has demoted and promoted meanwhile."""
    demoted, promoted, stop, errors = 0, 0, threading.Event(), []

    def move() -> None:
        nonlocal demoted, promoted
        try:
            while not stop.is_set():
                if goes:
                    prefix.forget_host()
                demoted += prefix.evict(row)
                promoted += prefix.promote(row)[0]
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=move)
    thread.start()
    try:
        seconds = decode()
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]
    return seconds, demoted, promoted


def _moved(what: str, num_bytes: int, seconds: float, speed: float) -> dict[str, object]:
    return {
        "work": what,
        "bytes": num_bytes,
        "seconds": seconds,
        "share_of_pinned_copy": num_bytes / seconds / speed,
        "target": TARGET_SHARE,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
