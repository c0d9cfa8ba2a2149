"""What a lower tier holds: which record has the KV of which block, where it lies, and whose place is taken next.

    key of a block, one dict a group          records of one size, one file or piece of memory a group
    ┌────────────────────────────┐            ┌────────┬────────┬────────┬────────┬─
    │ oldest  k7 ─▶ slot 2       │            │ slot 0 │ slot 1 │ slot 2 │ slot 3 │ …
    │         k3 ─▶ slot 0       │            │   k3   │  free  │   k7   │   k9   │
    │ newest  k9 ─▶ slot 3       │            └────────┴────────┴────────┴────────┴─
    └────────────────────────────┘

Keys are those of the prefix index: equal keys mean equal content, whenever it was written.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hf_paged.core.prefix import chain_key


class Pending(Protocol):
    """Something that is under way on another thread or stream; a `Future` is one."""

    def done(self) -> bool:
        """Whether it has come to its end."""

    def result(self) -> object:
        """Wait for its end."""


@dataclass(slots=True, eq=False)
class Record:
    """One block of one group: the KV of `tokens` (packed) behind `parent`, on the tier number `level`, 0 the nearest.

    `key` is that of the block, in the prefix index.
    `checksum` is that of the content, `None` until it has been written whole; 0 in memory, where nobody checks it, from
    when the copy is on its way. `written` is done when that has been tried, `None` until somebody is about to.
    """

    key: bytes
    parent: bytes
    tokens: bytes
    slot: int
    level: int = 0
    written: Pending | None = None
    checksum: int | None = None

    @property
    def is_lost(self) -> bool:
        """Whether the content never came to lie where it was to."""
        return self.checksum is None and (self.written is None or self.written.done())


class TierIndex:
    """Key to record, least recently used first. Knows nothing of files or memory.

    Args:
        num_groups: groups of layers; each has slots of its own.
        num_slots: of each group. All groups get as many, because a token takes one block in each of them.
        full_bytes: packed tokens of a block that is full.
        level: number of the tier.

    Attributes:
        num_gone: records that were forgotten, ever.
    """

    def __init__(self, num_groups: int, num_slots: int, full_bytes: int, level: int = 0):
        self._num_slots, self._level = num_slots, level
        self._limits = [num_slots] * num_groups
        self._full_bytes = full_bytes
        self._records: list[OrderedDict[bytes, Record]] = [OrderedDict() for _ in range(num_groups)]
        self._free: list[list[int]] = [[] for _ in range(num_groups)]
        self._retired: list[list[int]] = [[] for _ in range(num_groups)]
        self._lent: list[set[int]] = [set() for _ in range(num_groups)]
        self._high_water = [0] * num_groups
        self.num_gone = 0
        # Blocks that are not full, by parent: they cannot be found by the key of what a prompt has in their place.
        self._short: dict[bytes, Counter[bytes]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._records))

    def get(self, group: int, key: bytes) -> Record | None:
        """The record of a block, if there is one and it has not been lost."""
        record = self._records[group].get(key)
        return record if record is None or record.checksum is not None or not record.is_lost else None

    def find(self, key: bytes) -> list[Record | None]:
        """The record of a block in each group, as `get` gives it."""
        return [self.get(group, key) for group in range(len(self._records))]

    def longest_short(self, parent: bytes, packed: bytes) -> bytes:
        """The most tokens that `packed` begins with and that a block which is not full holds behind `parent`."""
        return max(filter(packed.startswith, self._short.get(parent, ())), key=len, default=b"")

    def add(self, group: int, key: bytes, parent: bytes, tokens: bytes) -> Record | None:
        """A new record for a block, in place of the least recently used one where no slot is free.

        `key` is that of `tokens` behind `parent`. `None` where there is no room for any.
        """
        records, free = self._records[group], self._free[group]
        if key in records:
            self.remove(group, key)
        if not free and self._high_water[group] == self._limits[group]:
            if not records:
                return None
            self.remove(group, next(iter(records)))
        if free:
            slot = free.pop()
        else:
            slot = self._high_water[group]
            self._high_water[group] += 1
        record = records[key] = Record(key, parent, tokens, slot, self._level)
        if len(tokens) < self._full_bytes:
            self._short.setdefault(parent, Counter())[tokens] += 1
        return record

    def make_room(self, group: int, count: int) -> list[Record]:
        """Forget the least recently used records until `count` can be added, or none is left; returns them in order."""
        records, gone = self._records[group], []
        while records and len(self._free[group]) + self._limits[group] - self._high_water[group] < count:
            key, record = next(iter(records.items()))
            gone.append(record)
            self.remove(group, key)
        return gone

    def holds(self, group: int, record: Record) -> bool:
        """Whether this very record is there and its content is, or will be before anybody reads it."""
        return self.get(group, record.key) is record

    def capacity(self, group: int) -> int:
        """Records that there is room for, were nothing there."""
        return self._limits[group] - len(self._retired[group]) - len(self._lent[group])

    def touch(self, group: int, keys: Iterable[bytes]) -> None:
        """These records, as far as they exist, count as the most recently used, the last one most of all."""
        records = self._records[group]
        for key in keys:
            if key in records:
                records.move_to_end(key)

    def remove(self, group: int, key: bytes) -> None:
        """Forget a record; harmless where there is none."""
        record = self._records[group].pop(key, None)
        if record is None:
            return
        self.num_gone += 1
        self._free[group].append(record.slot)
        if len(record.tokens) < self._full_bytes:
            siblings = self._short[record.parent]
            siblings[record.tokens] -= 1
            if not siblings[record.tokens]:
                del siblings[record.tokens]
            if not siblings:
                del self._short[record.parent]

    def discard(self, group: int, record: Record) -> bool:
        """Forget this very record; whether it was still there."""
        if self._records[group].get(record.key) is not record:
            return False
        self.remove(group, record.key)
        return True

    def retire(self, group: int, record: Record) -> None:
        """Forget a record for which there was no room after all: its slot is not used again, and no more are begun."""
        if self.discard(group, record):
            self._retired[group].append(self._free[group].pop())
            self._limits[group] = self._high_water[group]

    def can_lend(self, group: int, slots: range) -> bool:
        """Whether all of these slots can be had."""
        gone = self._lent[group].union(self._retired[group])
        return slots.stop <= self._limits[group] and gone.isdisjoint(slots)

    def count_in(self, group: int, slots: range) -> int:
        """How many records lie in these slots."""
        return sum(record.slot in slots for record in self._records[group].values())

    def lend(self, group: int, slots: range) -> list[Record]:
        """Keep nothing in these slots until `take_back`; returns what is forgotten for them, oldest first."""
        gone = [record for record in self._records[group].values() if record.slot in slots]
        for record in gone:
            self.remove(group, record.key)
        begun = range(self._high_water[group], max(self._high_water[group], slots.stop))
        self._high_water[group] = max(self._high_water[group], slots.stop)
        self._free[group] = [slot for slot in (*self._free[group], *begun) if slot not in slots]
        self._lent[group].update(slots)
        return gone

    def take_back(self, group: int, slots: range) -> None:
        """What was lent may hold records again."""
        self._lent[group].difference_update(slots)
        self._free[group] += slots

    def clear(self) -> None:
        """Forget every record. What is lent stays so."""
        for group, records in enumerate(self._records):
            self.num_gone += len(records)
            records.clear()
            self._retired[group].clear()
            self._high_water[group] = max(self._lent[group], default=-1) + 1
            self._free[group] = [slot for slot in range(self._high_water[group]) if slot not in self._lent[group]]
            self._limits[group] = self._num_slots
        self._short.clear()

    def check_integrity(self) -> None:
        """Prove that every slot is taken once or free."""
        short: dict[bytes, Counter[bytes]] = {}
        for group, records in enumerate(self._records):
            taken = [record.slot for record in records.values()]
            slots = sorted([*self._free[group], *self._retired[group], *self._lent[group], *taken])
            assert slots == list(range(self._high_water[group])), "a slot is lost, or taken twice"
            assert len(slots) <= self._limits[group] <= self._num_slots, "more slots than there may be"
            for key, record in records.items():
                own = chain_key(record.parent, record.tokens)
                assert key == record.key == own, "a record has a key that is not its own"
                if len(record.tokens) < self._full_bytes:
                    short.setdefault(record.parent, Counter())[record.tokens] += 1
        assert short == self._short, "blocks that are not full are listed wrongly"


class TierStack:
    """Several tiers as one: what is on any of them, from the nearest that has it."""

    def __init__(self, tiers: Sequence[TierIndex]):
        self._tiers = tiers

    def find(self, key: bytes) -> list[Record | None]:
        """The nearest record of a block in each group."""
        nearest, *others = self._tiers
        found = nearest.find(key)
        for tier in others if None in found else ():
            found = [mine or other for mine, other in zip(found, tier.find(key), strict=True)]
        return found

    def longest_short(self, parent: bytes, packed: bytes) -> bytes:
        """As that of `TierIndex`."""
        return max((tier.longest_short(parent, packed) for tier in self._tiers), key=len, default=b"")
