"""Pairs whose patched model has little memory and a disk below."""

from pair import Pair
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
    assert all(any(known in reason for known in fallbacks) for reason in pair.paged.stats().fallbacks)


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
