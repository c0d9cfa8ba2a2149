"""Brings blocks that lie on the host to the device, layer by layer, while what came before is computed with.

    host, a slab      layer 0: [row][row]...  layer 1: [row][row]...          a row of a layer: K and V of one block
                        ══copy══▶ area 0         ══copy══▶ area 1   (then area 0 again, when it was read)

A layer's blocks come in *parts*, as many as an area of device memory holds, so that what this takes does not depend on
how many there are. While one part is attended to, the next one is on its way: of the same layer, or of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from hf_paged.layout import RecordLayout
from hf_paged.streams import Mark, SideStream

NUM_AREAS = 2


class Slab:
    """Host memory for blocks, in which those of a layer are neighbours.

    Args:
        memory: `[bytes]` uint8.
        layer_bytes: of one block in each layer.
        give_back: called when nobody needs the memory any more.

    Attributes:
        layers: of each layer, `[rows, layer_bytes]`; nothing any more when the memory was given back.
    """

    def __init__(self, memory: torch.Tensor, layer_bytes: Sequence[int], give_back: Callable[[], None]):
        self._num_rows = len(memory) // sum(layer_bytes)
        parts = memory[: self._num_rows * sum(layer_bytes)].split([self._num_rows * size for size in layer_bytes])
        self.layers = [part.view(self._num_rows, size) for part, size in zip(parts, layer_bytes, strict=True)]
        self._give_back = give_back
        self._free = list(range(self._num_rows))

    @property
    def has_room(self) -> bool:
        """Whether a row is free."""
        return bool(self._free and self.layers)

    def take(self, most: int) -> list[int]:
        """At most so many free rows."""
        self._free.sort()
        taken, self._free = self._free[:most], self._free[most:]
        return taken

    def free(self, row: int) -> None:
        """Nobody needs the row any more. The memory goes back with the last one."""
        self._free.append(row)
        if len(self._free) == self._num_rows:
            self.layers.clear()
            self._give_back()


class Place(NamedTuple):
    """Where a block lies on the host."""

    slab: Slab
    row: int

    def free(self) -> None:
        """Nobody needs it any more. Copies that are under way still find what was there."""
        self.slab.free(self.row)


def in_order(places: Sequence[Place]) -> list[int]:
    """Indices of `places`, neighbours one after the other."""
    return sorted(range(len(places)), key=lambda i: (id(places[i].slab), places[i].row))


class Stretch(NamedTuple):
    """Rows `[start, stop)` of a slab."""

    slab: Slab
    start: int
    stop: int

    def of(self, layer: int) -> torch.Tensor:
        """Those of a layer, `[rows, layer_bytes]`."""
        return self.slab.layers[layer][self.start : self.stop]


def stretches(places: Sequence[Place]) -> list[Stretch]:
    """The rows of `places`, in order, as few stretches as possible."""
    found: list[Stretch] = []
    for slab, row in places:
        if found and found[-1].slab is slab and found[-1].stop == row:
            found[-1] = found[-1]._replace(stop=row + 1)
        else:
            found.append(Stretch(slab, row, row + 1))
    return found


class PartReads(NamedTuple):
    """Of some slots on the host, those that lie in one part: their indices, and the slots of the part, `[n]` each."""

    index: torch.Tensor
    inside: torch.Tensor


def reads_by_part(slots: torch.Tensor, blocks: Sequence[int], part_blocks: int, block_size: int) -> list[PartReads]:
    """Where `slots [tokens]` of blocks on the host come to lie, for each part; `blocks` are staged in this order."""
    known, place = torch.tensor(blocks, device="cpu").sort()
    at = place[torch.searchsorted(known, slots // block_size)]
    inside = at % part_blocks * block_size + slots % block_size
    number = at // part_blocks
    indices = [(number == part).nonzero().flatten() for part in range(-(-len(blocks) // part_blocks))]
    return [PartReads(index, inside[index]) for index in indices]


class Staging:
    """Two areas of device memory through which the blocks of one step come, a layer after the other.

    Args:
        layouts: of each layer's records.
        places: of the blocks, neighbours one after the other.
        side: of the device; `None`: copies are made at once.
        part_blocks: blocks of a part, at most.
    """

    def __init__(
        self, layouts: Sequence[RecordLayout], places: Sequence[Place], side: SideStream | None, part_blocks: int
    ):
        self._layouts, self._side = layouts, side
        parts = [places[at : at + part_blocks] for at in range(0, len(places), part_blocks)]
        self._sizes = [len(part) for part in parts]
        self._parts = [stretches(part) for part in parts]
        area_bytes = self._sizes[0] * max(layout.record_bytes for layout in layouts)
        with torch.inference_mode(False):
            self._areas = [
                torch.empty(area_bytes, dtype=torch.uint8, device=layouts[0].device) for _ in range(NUM_AREAS)
            ]
        self._arrived: list[Mark | None] = [None] * NUM_AREAS
        if side is not None:
            for area in self._areas:
                side.share(area)
        self._start(0)

    def read(self, layer: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """K and V of each part, `[kv_heads, blocks * block_size, dim or record bytes]`: to be used before the next.

        Layers are expected in order; any other is there later.
        """
        if self._next != layer * len(self._parts):
            self._start(layer * len(self._parts))
        for num_blocks in self._sizes:
            turn = self._next % NUM_AREAS
            if self._arrived[turn] is not None:
                self._arrived[turn].hold_current()
            yield self._layouts[layer].tokens(self._records(turn, layer, num_blocks))
            self._next += 1
            self._send(self._next + 1)

    def _start(self, number: int) -> None:
        """Part `number`, counted through all layers, is the next one to be read."""
        self._next = number
        for ahead in range(NUM_AREAS):
            self._send(number + ahead)

    def _send(self, number: int) -> None:
        """Begin to copy a part, if there is one: to the area that was read before all that is on its way."""
        layer, part = divmod(number, len(self._parts))
        if layer >= len(self._layouts):
            return
        turn = number % NUM_AREAS
        records = self._records(turn, layer, self._sizes[part])
        if self._side is not None:
            self._side.after_current()
        at = 0
        for stretch in self._parts[part]:
            rows = stretch.of(layer)
            copy = partial(records[at : at + len(rows)].copy_, rows, non_blocking=True)
            if self._side is None:
                copy()
            else:
                self._side.run(copy)
            at += len(rows)
        if self._side is not None:
            self._arrived[turn] = self._side.mark()

    def _records(self, turn: int, layer: int, num_blocks: int) -> torch.Tensor:
        """The beginning of an area, `[blocks, layer_bytes]`."""
        record_bytes = self._layouts[layer].record_bytes
        return self._areas[turn][: num_blocks * record_bytes].view(num_blocks, record_bytes)
