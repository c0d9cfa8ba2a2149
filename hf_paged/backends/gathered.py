"""What a plan reads, put together elsewhere: for backends that go through it more than once, or in another form."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from hf_paged.core.chain import BlockChain, Run
from hf_paged.core.plan import Piece, StepPlan
from hf_paged.store import run_slots, strided_view

# Past this many runs one indexed copy is quicker than one of each.
_MAX_SLICES = 8


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """Runs that a plan reads, one behind the other, and the plan in which slots are places there.

    Attributes:
        runs: of the memory, none of which overlap.
        plan: writes nothing.
        pairs: of a query and a token that it sees, in the plan.
    """

    runs: Sequence[Run]
    plan: StepPlan
    pairs: int

    @classmethod
    def of(cls, plan: StepPlan) -> Gathered:
        """That of a plan, kept in `plan.prepared`."""
        if "gathered" not in plan.prepared:
            plan.prepared["gathered"] = _gathered(plan)
        return plan.prepared["gathered"]

    @property
    def tokens(self) -> int:
        """How many are read."""
        return sum(run.tokens for run in self.runs)

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """What is read of `memory [heads, slots, dim]`, `[heads, tokens, dim]`; a copy where it is several runs."""
        if len(self.runs) == 1:
            return strided_view(memory, self.runs[0])
        if len(self.runs) <= _MAX_SLICES:
            return torch.cat([strided_view(memory, run) for run in self.runs], dim=1)
        key = ("gathered", memory.device)
        if key not in self.plan.prepared:
            self.plan.prepared[key] = run_slots(self.runs, memory.device)
        return memory.index_select(1, self.plan.prepared[key])


class _MovedChain:
    """A chain whose runs lie elsewhere."""

    def __init__(self, chain: BlockChain, moves: _Moves):
        self._chain, self._moves = chain, moves
        self.first_token = chain.first_token

    def runs(self, begin: int, end: int) -> Iterator[Run]:
        """As `BlockChain.runs`."""
        return map(self._moves.moved, self._chain.runs(begin, end))


class _Moves:
    """Where runs go: those that overlap or are adjacent stay so, and others follow."""

    def __init__(self, runs: Sequence[Run]):
        self.runs: list[Run] = []
        self._places: list[int] = []
        end = 0
        for slot, tokens in sorted(set(runs)):
            last = self.runs[-1] if self.runs else None
            if last is not None and slot <= last.slot + last.tokens:
                longer = max(last.tokens, slot + tokens - last.slot)
                end += longer - last.tokens
                self.runs[-1] = Run(last.slot, longer)
            else:
                self.runs.append(Run(slot, tokens))
                self._places.append(end)
                end += tokens
        self._slots = [run.slot for run in self.runs]

    def moved(self, run: Run) -> Run:
        """Where a run, or a part of one, has gone."""
        i = bisect_right(self._slots, run.slot) - 1
        return Run(self._places[i] + run.slot - self._slots[i], run.tokens)


def _gathered(plan: StepPlan) -> Gathered:
    chains = {id(segment.chain): segment.chain for segment in plan.segments}
    ends = dict.fromkeys(chains, 0)
    for segment in plan.segments:
        ends[id(segment.chain)] = max(ends[id(segment.chain)], segment.kv_len)
    runs = [run for piece in (*plan.own, *plan.shared) for run in piece.runs]
    for key, chain in chains.items():  # which may reach further than pieces that leave out what no window shows
        runs += chain.runs(chain.first_token, ends[key])
    moves = _Moves(runs)
    moved = {key: _MovedChain(chain, moves) for key, chain in chains.items()}
    elsewhere = replace(
        plan,
        writes=[],
        copies=[],
        own=[_moved_piece(piece, moves) for piece in plan.own],
        shared=[_moved_piece(piece, moves) for piece in plan.shared],
        segments=[segment._replace(chain=moved[id(segment.chain)]) for segment in plan.segments],
        span=None,
        prepared={},
    )
    return Gathered(moves.runs, elsewhere, sum(map(_pairs, (*plan.own, *plan.shared))))


def _moved_piece(piece: Piece, moves: _Moves) -> Piece:
    return piece._replace(runs=tuple(map(moves.moved, piece.runs)))


def _pairs(piece: Piece) -> int:
    pairs = (piece.stop - piece.start) * sum(run.tokens for run in piece.runs)
    return pairs // 2 if piece.causal else pairs
