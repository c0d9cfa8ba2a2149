"""Blocks of running sequences that lie in host memory, because the device has no room for them.

Chains name them by ids that no block of the device has, so that tables are forked, cropped and given up as ever. They
are never indexed, and written to by the pass alone that they were made for: what was indexed is the block that they
were copied from, which stays cached as any other, and a sequence goes on in blocks of the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hf_paged.core.manager import BlockManager
    from hf_paged.core.table import BlockTable

# The first id of a block on the host: far above what a pool has, so that a slot of one lies outside of every memory.
HOST_BLOCKS = 2**40


class Place(Protocol):
    """Where a block lies."""

    def free(self) -> None:
        """Nobody needs it any more."""


class HostBlocks:
    """The blocks of one group that lie on the host: who holds them, and where they are. An id is never used again."""

    def __init__(self) -> None:
        self._references: dict[int, int] = {}
        self._places: dict[int, Place] = {}
        self._ids = count(HOST_BLOCKS)

    def __len__(self) -> int:
        return len(self._places)

    def add(self, place: Place) -> int:
        """A new block, which nobody holds yet."""
        block = next(self._ids)
        self._references[block], self._places[block] = 0, place
        return block

    def place(self, block: int) -> Place:
        """Where a block lies."""
        return self._places[block]

    def references(self, block: int) -> int:
        """Number of tables that hold a block."""
        return self._references[block]

    def share(self, block: int) -> None:
        """One table more holds a block."""
        self._references[block] += 1

    def drop(self, block: int) -> None:
        """One table less holds a block; its place is free when none does."""
        self._references[block] -= 1
        if not self._references[block]:
            del self._references[block]
            self._places.pop(block).free()

    def check_integrity(self, expected_references: Mapping[int, int]) -> None:
        """Prove that every block is held as often as tables say."""
        assert self._references == expected_references, "references to blocks on the host disagree with the tables"
        assert self._references.keys() == self._places.keys(), "a place was lost"


def movable(manager: BlockManager, tables: Sequence[BlockTable], group: int) -> list[int]:
    """Blocks of the device that nobody but these tables holds and that none of them writes to any more.

    The deepest come first: roots are shared by more rows, now or later. The last block of a table is not among them,
    full or not.
    """
    held: dict[int, int] = {}
    depth: dict[int, int] = {}
    for table in tables:
        chain = table.chains[group]
        for i in range(chain.dropped, min(table.whole_blocks(table.num_tokens), len(chain.blocks) - 1)):
            block = chain.blocks[i]
            if block < HOST_BLOCKS:
                held[block] = held.get(block, 0) + 1
                depth[block] = i
    mine = [block for block, count in held.items() if count == manager.pools[group].references(block)]
    return sorted(mine, key=depth.__getitem__, reverse=True)


def on_host(tables: Iterable[BlockTable], group: int) -> list[int]:
    """The blocks of these tables that lie on the host, each once."""
    chains = [table.chains[group] for table in tables]
    blocks = (block for chain in chains if chain.reaches_host for block in chain.blocks if block >= HOST_BLOCKS)
    return list(dict.fromkeys(blocks))


def relocate(manager: BlockManager, tables: Iterable[BlockTable], group: int, moves: Mapping[int, int]) -> None:
    """From now on `tables` hold block `moves[block]`, which has the same content, in place of `block`.

    What is not theirs alone stays with the others. Under the manager's lock.
    """
    pool = manager.pools[group]
    for table in tables:
        chain = table.chains[group]
        old = [block for block in chain.held if block in moves]
        if old:
            pool.share([moves[block] for block in old])
            chain.replace(moves)
            # A block that is indexed stays cached until its memory is needed: later calls may find it, on some tier.
            pool.drop(old, keep=manager.index.by_block[group].__contains__)
