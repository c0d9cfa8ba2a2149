"""Moves blocks between the pool and host memory, many at a time.

    pool ──gather──▶ stage ══copy══▶ host        pool ◀──scatter── stage ◀══copy══ host

On a GPU a block lies in as many pieces as there are layers, twice; in a *stage*, a piece of device memory, they are
gathered to records, so that one copy moves as many as it holds. Only copies between device and host (══) and what
follows them are on the side stream. Blocks are gathered on the current stream: whoever writes to them next, on that
stream, comes later, and nobody waits for the host. There are two stages: what a transfer moves beyond these would make
that stream wait for the first one's copy. Or it is gathered on the side stream, too, and who gets such a block before
it was read waits (`before_reuse`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from hf_paged.core.forks import new_lock
from hf_paged.core.tier import Pending
from hf_paged.layout import BlockIds, RecordLayout
from hf_paged.streams import Mark, SideStream

NUM_STAGES = 2


class BlockMover:
    """Copies whole blocks of a pool to and from rows of host memory.

    Args:
        layouts: of each group's records.
        side: of the pool's device; `None`: its memory is the host's, and is copied at once.
        stage_bytes: of each stage.
        is_asked: whether `before_reuse` is called before blocks that were read are written to. Otherwise all of them
            are gathered on the current stream.
    """

    def __init__(
        self, layouts: Sequence[RecordLayout], side: SideStream | None, stage_bytes: int, is_asked: bool = False
    ):
        self._layouts, self._side = layouts, side
        self._num_at_once = NUM_STAGES if side is not None and is_asked else sys.maxsize
        largest = max(layout.record_bytes for layout in layouts)
        self._stage_bytes = sys.maxsize if side is None else max(stage_bytes, largest)
        self._stages: list[_Stage] = []
        self._reading: list[_Reading] = []
        self._turn = 0
        self._lock = new_lock()  # of one part at a time: others may have theirs copied between
        if side is not None:
            for layout in layouts:
                layout.open_kernels()

    @property
    def staging_bytes(self) -> int:
        """Device memory that is held for stages."""
        return len(self._stages) * self._stage_bytes

    def read(self, group: int, blocks: Sequence[int], pieces: Sequence[torch.Tensor]) -> Pending:
        """Copy blocks to the rows of `pieces`, `[rows, record_bytes]` each; they are there when the result is done.

        The blocks may be overwritten at once by the current stream; behind a call of `before_reuse` where `is_asked`.
        """
        layout, ids = self._layouts[group], self._layouts[group].ids(blocks)
        with torch.no_grad():
            ids.send()
            for number, (part, rows) in enumerate(self._parts(layout, pieces)):
                if number == self._num_at_once:
                    ids = layout.ids(blocks)
                    self._side.run(ids.send)
                with self._lock:
                    if number < self._num_at_once:
                        self._send_part(partial(layout.read_blocks, ids, part), rows)
                    else:
                        done = self._read_part_later(layout, ids, part, rows)
                        self._reading.append(_Reading(group, frozenset(blocks[part.start : part.stop]), done))
        return self._all_given()

    def send(self, group: int, fill: Callable[[range, torch.Tensor], None], pieces: Sequence[torch.Tensor]) -> None:
        """Copy records that lie in no block to the rows of `pieces`: `fill` makes a part of them, where it is told."""
        with torch.no_grad():
            for part, rows in self._parts(self._layouts[group], pieces):
                with self._lock:
                    self._send_part(partial(fill, part), rows)

    def _send_part(self, fill: Callable[[torch.Tensor], None], rows: torch.Tensor) -> None:
        if self._side is None:
            fill(rows)
            return
        stage = self._next_stage()
        if stage.taken is not None:
            stage.taken.hold_current()
        records = stage.records(rows)
        fill(records)
        self._side.after_current()
        self._side.run(partial(rows.copy_, records, non_blocking=True))
        stage.taken = self._side.mark()

    def _read_part_later(self, layout: RecordLayout, ids: BlockIds, part: range, rows: torch.Tensor) -> Mark:
        stage = self._next_stage()
        records = stage.records(rows)

        def go() -> None:
            layout.read_blocks(ids, part, records)
            rows.copy_(records, non_blocking=True)

        self._side.run(go)
        stage.taken = self._side.mark()
        return stage.taken

    def before_reuse(self, group: int, blocks: Iterable[int]) -> None:
        """The current stream is about to write to these blocks: let it wait until they were read.

        Called under the lock under which `read` is called.
        """
        if self._reading:
            self._reading = [each for each in self._reading if not each.done.done()]
        for reading in self._reading:
            if reading.group == group and not reading.blocks.isdisjoint(blocks):
                reading.done.hold_current()

    def write(self, group: int, blocks: Sequence[int], pieces: Sequence[torch.Tensor]) -> Pending:
        """Fill blocks from the rows of `pieces`; they are there, for any stream, when what it returns is done.

        After an error or an interrupt call `settle` before anybody else gets the blocks.
        """
        layout, ids = self._layouts[group], self._layouts[group].ids(blocks)
        with torch.no_grad():
            if self._side is None:
                ids.send()
            else:
                self._side.after_current()  # the blocks may still be read for those who had them before
                self._side.run(ids.send)
            for part, rows in self._parts(layout, pieces):
                with self._lock:
                    self._write_part(layout, ids, part, rows)
        return self._all_given()

    def _write_part(self, layout: RecordLayout, ids: BlockIds, part: range, rows: torch.Tensor) -> None:
        if self._side is None:
            layout.write_blocks(ids, part, rows)
            return
        stage = self._next_stage()
        records = stage.records(rows)

        def come() -> None:
            records.copy_(rows, non_blocking=True)
            layout.write_blocks(ids, part, records)

        self._side.run(come)
        stage.taken = self._side.mark()

    def settle(self) -> None:
        """Whatever the current stream does from now on comes after all copies that were begun."""
        if self._side is not None:
            mark = self._side.mark()
            mark.hold_current()
            for stage in self._stages:  # an interrupt may have come before somebody noted that it is taken
                stage.taken = mark

    def release(self) -> None:
        """Wait for all copies and give the stages up."""
        with self._lock:
            if self._side is not None:
                self._side.mark().result()
            self._stages.clear()
            self._reading.clear()

    def _all_given(self) -> Pending:
        return DONE if self._side is None else self._side.mark()

    def _parts(self, layout: RecordLayout, pieces: Sequence[torch.Tensor]) -> Iterator[tuple[range, torch.Tensor]]:
        """Places of blocks and the rows that they go with, as many at a time as a stage holds."""
        at = 0
        for piece in pieces:
            for rows in piece.split(self._stage_bytes // layout.record_bytes):
                yield range(at, at + len(rows)), rows
                at += len(rows)

    def _next_stage(self) -> _Stage:
        self._turn = (self._turn + 1) % NUM_STAGES
        while len(self._stages) <= self._turn:
            self._stages.append(_Stage(self._stage_bytes, self._layouts[0].device))
        return self._stages[self._turn]


class _Reading(NamedTuple):
    """Blocks that the side stream is yet to read, until `done`."""

    group: int
    blocks: frozenset[int]
    done: Mark


class _Stage:
    """Device memory that records pass through. `taken`: when nobody reads from it any more."""

    def __init__(self, num_bytes: int, device: torch.device):
        with torch.inference_mode(False):
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.taken: Mark | None = None

    def records(self, like: torch.Tensor) -> torch.Tensor:
        """Its beginning, in the shape of `like [rows, record_bytes]`."""
        return self._memory[: like.numel()].view(like.shape)


class _Done:
    """What is copied at once is not under way."""

    def done(self) -> bool:
        return True

    def result(self) -> None:
        return None


DONE = _Done()
