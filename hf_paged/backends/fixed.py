"""Decode steps in buffers of fixed size: what a forward pass reads that is captured once and replayed as rows grow.

The numbers of a step are one int32 buffer, so that one copy sends them:

    | which rows of the call | slots of group 0 | work | work | slots of group 1 | work | ...

Rows of the pass that stand for none of the call store nothing (slot -1) and read nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_paged.backends.work import Asked, layout_for, slot_numbers, slots_key, work_key
from hf_paged.core.plan import StepPlan
from hf_paged_kernels.room import Room
from hf_paged_kernels.work import Layout


class UncapturableError(Exception):
    """A forward pass that cannot be captured, and why."""


class FixedNumbers(dict):
    """`StepPlan.prepared` of a captured pass: what is not in it has no place in the buffer."""

    def __setitem__(self, key: Any, value: Any) -> None:
        raise UncapturableError("attention that does not read the buffers of its step")


@dataclass(frozen=True, slots=True, eq=False)
class FixedStep:
    """The numbers of one decode step.

    Attributes:
        rooms: what can take turns in one buffer: equal for steps that one captured pass can carry out.
    """

    rooms: tuple[Any, ...]
    _numbers: list[array]
    _plans: Sequence[StepPlan]
    _asked: Sequence[Sequence[Asked]]
    _active: Sequence[int]
    _rows: int
    _device: torch.device

    @classmethod
    def of(
        cls,
        plans: Sequence[StepPlan],
        asked: Sequence[Sequence[Asked]],
        active: Sequence[int],
        rows: int,
        device: torch.device,
    ) -> FixedStep:
        """Numbers for a pass over `rows` rows.

        Args:
            plans: of the step, by group.
            asked: what attention asks of each of them, as found in `plan.prepared["asked"]` of an earlier step.
            active: for each query of the plans, its row in the call.
            rows: of the pass; at least as many as there are queries.
            device: of the pass.
        """
        rooms: list[Any] = [rows]
        numbers = [_padded(array("i", active), rows, 0)]
        for plan, group_asked in zip(plans, asked, strict=True):
            numbers.append(_padded(slot_numbers(plan, plan.num_queries), rows, -1))
            for each in group_asked:
                layout: Layout = layout_for(plan, each, device)
                room = Room.of(layout, rows)
                rooms.append((each, room))
                numbers.append(room.numbers(layout))
        return cls(tuple(rooms), numbers, plans, asked, active, rows, device)

    def serves(self, active: Sequence[int], asked: Sequence[Sequence[Asked]]) -> bool:
        """Whether it was made for these rows, and for what attention asks."""
        return self._active == active and self._asked is asked

    def next(self, plans: Sequence[StepPlan]) -> FixedStep:
        """The same for the plans of another step of these rows."""
        return FixedStep.of(plans, self._asked, self._active, self._rows, self._device)

    def numbers(self) -> array:
        """What the buffer is to hold."""
        whole = array("i")
        for part in self._numbers:
            whole.extend(part)
        return whole

    def buffer(self) -> torch.Tensor:
        """A buffer, int32 on the device."""
        return torch.zeros(sum(map(len, self._numbers)), dtype=torch.int32, device=self._device)

    def active(self, buffer: torch.Tensor) -> torch.Tensor:
        """For each row of the pass, the row of the call: the first of them where it stands for none, `[rows]`."""
        return buffer[: self._rows]

    def fixed_plans(self, buffer: torch.Tensor) -> list[StepPlan]:
        """Plans by group that read the buffer and nothing else."""
        at = len(self._numbers[0])
        plans = []
        rooms = iter(self.rooms[1:])
        for plan, group_asked in zip(self._plans, self._asked, strict=True):
            prepared: dict[Any, Any] = {"asked": set(group_asked)}
            prepared[slots_key(self._device)] = buffer[at : at + self._rows]
            at += _aligned(self._rows)
            for each in group_asked:
                _, room = next(rooms)
                prepared[work_key(plan, each, self._device)] = room.work(buffer[at : at + room.num_numbers])
                at += room.num_numbers
            plans.append(
                StepPlan(self._rows, [], [], [], [], [], plan.kv_len, plan.window, prepared=FixedNumbers(prepared))
            )
        return plans


def _padded(section: array, rows: int, value: int) -> array:
    """A section of `rows` numbers, up to where the next begins: at a multiple of 16 bytes."""
    return section + array("i", [value]) * (_aligned(rows) - len(section))


def _aligned(count: int) -> int:
    return -(-count // 4) * 4
