"""Pairs whose patched model has little memory and a disk below."""

import contextlib
import random
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from pair import NEW, Pair
from prompts import batch
from test_sharing import BLOCK_BYTES

from hf_paged.core.fetch import Choice, FetchPolicy
from hf_paged.disk import DiskLevel

NAMES = ["llama", "gemma3", "mistral_sliding"]


class Always(FetchPolicy):
    """Tests do not depend on which is quicker here."""

    def choose(self, options):
        return Choice(options[-1], False)


class Never(FetchPolicy):
    def choose(self, options):
        return None


def tiered(name="llama", blocks=12, disk="10MiB", policy=Always, make=Pair, **overrides) -> Pair:
    """A pair with memory for so many blocks, and the null blocks, and a disk below."""
    pair = make(name, max_memory={"cpu": (blocks + 1) * BLOCK_BYTES, "disk": disk}, **overrides)
    if policy is not None:
        pair.paged._current_pool(pair.model).tiers.policy = policy()
    return pair


def disk(pair: Pair):
    return pair.paged._pool.tiers.levels[-1]


def check(pair: Pair, fallbacks=()) -> None:
    """Everything is in one place, and nothing went wrong but what the test is about."""
    pair.check()
    if isinstance(disk(pair), DiskLevel):
        disk(pair).flush()
    stats = pair.paged.stats()
    for level in pair.paged._pool.tiers.levels:
        if level.index is not None:
            with pair.pool.lock:
                level.index.check_integrity()
        assert getattr(stats, f"blocks_{level.name}") == len(level)
    unknown = [reason for reason in pair.paged.stats().fallbacks if not any(known in reason for known in fallbacks)]
    assert not unknown, unknown


def rotate(pair: Pair, rows, rounds=2, fallbacks=(), **kwargs) -> list[int]:
    """Ask the same again and again; returns what the last round took from earlier ones."""
    for _ in range(rounds):
        reused = []
        for row in rows:
            pair.ask([row], **kwargs)
            check(pair, fallbacks)
            reused.append(pair.reused)
    return reused


def files_of(pair: Pair) -> list:
    return sorted(disk(pair)._folder.path.glob("*.kv"))


def failing_now_and_then(function, error, calls: list):
    """`function`, of which the first of each three calls raises; `calls` notes all of them."""

    def failing(self, *args):
        calls.append(args)
        if len(calls) % 3 == 1:
            raise error("a transfer")
        return function(self, *args)

    return failing


def ask_through_failures(pair: Pair, rows, error) -> None:
    """Each row once, while transfers fail: the answer is right, or the call was interrupted and nothing is lost."""
    for row in rows:
        if error is KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt):
                pair.model.generate(**batch([row]), do_sample=False, max_new_tokens=NEW)
            check(pair)
        else:
            pair.ask([row])
            check(pair, ["a transfer"])


def ask_from_threads(pair: Pair, rows, calls: int, seconds: float = 20) -> None:
    """Three threads ask for random rows, so many times each or for so long: every answer is stock's."""
    expected = [pair.stock.generate(**batch([row]), do_sample=False, max_new_tokens=NEW) for row in rows]
    wrong, stop = [], time.monotonic() + seconds

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(calls):
            at = draw.randrange(len(rows))
            answer = pair.model.generate(**batch([rows[at]]), do_sample=False, max_new_tokens=NEW)
            if not torch.equal(answer, expected[at]):
                wrong.append(at)
            if time.monotonic() > stop:
                return

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(work, range(3)))  # raises what they have raised
    assert not wrong
    check(pair)
    assert pair.paged.stats().fetched_bytes > 0
