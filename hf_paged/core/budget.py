"""The budget: what the pools of several groups may hold together, and whose cached blocks go first."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_paged.core.blocks import BlockPool


class Budget:
    """`limit_bytes` for the blocks of all pools that join, cached ones included.

    The null blocks count too. A pool on its own may count in blocks instead: each of them costs 1 then.
    """

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self._pools: list[BlockPool] = []
        self._clock = count()

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
        while self.free_bytes - sum(pool.cached * pool.block_bytes for pool in self._pools) < num_bytes:
            if not self.evict(1):
                return

    def evict(self, num_blocks: int) -> int:
        """Give up the least recently used cached blocks of all pools; returns how many there were."""
        for done in range(num_blocks):
            caching = [pool for pool in self._pools if pool.cached]
            if not caching:
                return done
            min(caching, key=lambda pool: pool.oldest).evict(1)
        return num_blocks
