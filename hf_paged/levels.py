"""What the tiers below the pool have in common: where blocks come from, and what a tier does with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from hf_paged.core.tier import Pending, Record, TierIndex
from hf_paged.layout import RecordLayout
from hf_paged.mover import BlockMover


def first_line(error: BaseException) -> str:
    """What went wrong, short enough to be counted under."""
    return (str(error) or type(error).__name__).splitlines()[0]


class Content(NamedTuple):
    """A block that is to be kept: its key and tokens, and the block or slot where it is now."""

    key: bytes
    parent: bytes
    tokens: bytes
    place: int


class Load(NamedTuple):
    """A record that is to fill the block of hop number `hop`."""

    hop: int
    block: int
    record: Record


# Fills the rows of pieces `[rows, record_bytes]` of host memory with the blocks or slots of one group, in this order.
Source = Callable[[int, Sequence[int], Sequence[torch.Tensor]], Pending]


class Level(ABC):
    """One tier: an index, and the place where its records lie. Used under the manager's lock unless said otherwise.

    Args:
        number: 0 is the nearest.
        budget_bytes: the most that records take.

    Attributes:
        index: which records there are; `None` before `open`.
    """

    name: str

    def __init__(self, number: int, budget_bytes: int):
        self.number, self.budget_bytes = number, budget_bytes
        self.index: TierIndex | None = None

    def __len__(self) -> int:
        return 0 if self.index is None else len(self.index)

    @abstractmethod
    def open(self, layouts: Sequence[RecordLayout], mover: BlockMover, full_bytes: int) -> None:
        """Get ready for blocks of these layouts; packed tokens of a full one take `full_bytes`. Raises if it cannot."""

    @abstractmethod
    def make_room(self, group: int, count: int) -> list[Content]:
        """Forget what must go for so many blocks more; returns what a tier below may read until `put` is called."""

    @abstractmethod
    def put(self, group: int, contents: Sequence[Content], source: Source) -> None:
        """Keep blocks, for which there is room, oldest first."""

    @abstractmethod
    def load(self, group: int, loads: Sequence[Load]) -> tuple[list[bool], Pending]:
        """Begin to fill blocks; says which have a content that is whole. Called without the lock."""

    @abstractmethod
    def clear(self) -> None:
        """Forget everything and give its room back."""

    @abstractmethod
    def close(self) -> None:
        """Give everything up for good. Called without the lock."""
