"""The budget: what the pools of several groups may hold together, and whose cached blocks go first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import merge
from itertools import count, islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_paged.core.blocks import BlockPool


class Budget:
    """`limit_bytes` for the blocks of all pools that join, cached ones included.

    The null blocks count too. A pool on its own may count in blocks instead: each of them costs 1 then.

    Attributes:
        before_eviction: told which cached blocks of which pools are about to be given up for their memory, oldest
            first, while they still hold what they are kept for.
    """

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self._pools: list[BlockPool] = []
        self._clock = count()
        self.before_eviction: Callable[[list[tuple[BlockPool, int]]], None] | None = None

    def join(self, pool: BlockPool) -> None:
        """`pool` draws on this budget from now on."""
        self._pools.append(pool)

    def stamp(self) -> int:
        """A number that rises from call to call: when a block was last used."""
        return next(self._clock)

    @property
    def free_bytes(self) -> int:
        """What running sequences have left, were every cached block given up."""
        return self.limit_bytes - sum((pool.in_use + 1) * pool.block_bytes for pool in self._pools)

    def make_room(self, num_bytes: int) -> None:
        """Give up the least recently used cached blocks until `num_bytes` more fit, or nothing is cached."""
        short = num_bytes - self.free_bytes + sum(pool.cached * pool.block_bytes for pool in self._pools)
        victims = []
        for pool, block in self._oldest_first():
            if short <= 0:
                break
            victims.append((pool, block))
            short -= pool.block_bytes
        self.give_up(victims)

    def evict(self, num_blocks: int) -> int:
        """Give up the least recently used cached blocks of all pools; returns how many there were."""
        victims = list(islice(self._oldest_first(), num_blocks))
        self.give_up(victims)
        return len(victims)

    def give_up(self, victims: list[tuple[BlockPool, int]]) -> None:
        """Give up the content of these cached blocks, for their memory."""
        if victims and self.before_eviction is not None:
            self.before_eviction(victims)
        for pool, block in victims:
            pool.give_up(block)

    def _oldest_first(self) -> Iterator[tuple[BlockPool, int]]:
        for _, pool, block in merge(*map(_stamped, self._pools), key=lambda each: each[0]):
            yield pool, block


def _stamped(pool: BlockPool) -> Iterable[tuple[int, BlockPool, int]]:
    return ((stamp, pool, block) for block, stamp in pool.oldest_first())
