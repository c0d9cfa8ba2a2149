"""What one forward pass does to the blocks: plain records that glue builds and backends read.

Queries are numbered `0 .. num_queries - 1` in the order in which the forward pass sees them (decode: one per row).
The KV that a query may see is the union of *pieces*: every query is in exactly one `own` piece and in any number of
`shared` ones, and the partial results are merged by log-sum-exp. Shared pieces are read once for all their queries
(Hydragen, https://arxiv.org/abs/2402.05099; cascade attention). `segments` say the same without sharing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hf_paged.core.chain import BlockChain, Run


class Write(NamedTuple):
    """New tokens `[source, source + tokens)` go to slots `slot, slot + step, ...`."""

    source: int
    tokens: int
    slot: int
    step: int


class Copy(NamedTuple):
    """`tokens` slots from `source` on are copied to `target` on (copy-on-write)."""

    source: int
    target: int
    tokens: int


Pin = tuple[int, int]  # group, block


class Growth(NamedTuple):
    """What appending asks for: `copies` of each group, to make after the new tokens are written, and what they read.

    The blocks are pinned: nobody else gets them before `unpin`, which comes when the pass is done.
    """

    copies: list[list[Copy]]
    pins: list[Pin]


class Piece(NamedTuple):
    """Queries `[start, stop)` see the tokens of `runs`: all of them, or (`causal`) each up to its own.

    A causal piece has one run with one token per query.
    """

    start: int
    stop: int
    runs: tuple[Run, ...]
    causal: bool


class RowSpan(NamedTuple):
    """Row `i` holds `tokens` adjacent slots that begin at `slot + i * step`."""

    rows: int
    slot: int
    step: int
    tokens: int


class Segment(NamedTuple):
    """Queries `[start, start + length)` are tokens `[kv_len - length, kv_len)` of `chain` and see all before them."""

    chain: BlockChain
    start: int
    length: int
    kv_len: int


@dataclass(slots=True, eq=False)
class StepPlan:
    """One forward pass in one group of layers: what is written where, and what each query sees.

    Attributes:
        num_queries: tokens that go through the model.
        writes, copies: what `update` does in every layer; copies come after the writes, in order.
        own, shared: the pieces above.
        segments: the same visibility as ragged queries over tables.
        span: where decode rows lie, if they share nothing, are equally long and equally far apart, else `None`.
        order: `order[i]` is the row of query `i` where decode rows were permuted, else `None`.
        kv_len: the longest sequence after this pass, in tokens.
        window: where `own` and `shared` leave out what lies outside this sliding window, else `None`: they hold all.
        prepared: what backends derive from the plan once and use in every layer.
    """

    num_queries: int
    writes: list[Write]
    copies: list[Copy]
    own: list[Piece]
    shared: list[Piece]
    segments: list[Segment]
    kv_len: int
    window: int | None = None
    span: RowSpan | None = None
    order: list[int] | None = None
    prepared: dict[Any, Any] = field(default_factory=dict)

    def still_hiding(self, window: int | None) -> int | None:
        """`window`, or `None` where it hides nothing that `own` and `shared` do not leave out already."""
        return None if window is None or self.kv_len <= window or self.window == window else window


def joined(segments: Sequence[Segment]) -> list[Segment]:
    """Segments that go on where the one before ends, in the same chain, as one."""
    made: list[Segment] = []
    for segment in segments:
        if made and _goes_on(made[-1], segment):
            last = made[-1]
            made[-1] = Segment(segment.chain, last.start, last.length + segment.length, segment.kv_len)
        else:
            made.append(segment)
    return made


def _goes_on(last: Segment, segment: Segment) -> bool:
    return (
        last.chain is segment.chain
        and last.start + last.length == segment.start
        and last.kv_len + segment.length == segment.kv_len
    )


def row_span(runs: Sequence[Run]) -> RowSpan | None:
    """The runs, one a row, as one span; `None` where they do not form one."""
    if not runs:
        return None
    slot, tokens = runs[0]
    step = runs[1].slot - slot if len(runs) > 1 else 0
    if step < 0 or any(run != (slot + i * step, tokens) for i, run in enumerate(runs)):
        return None
    return RowSpan(len(runs), slot, step, tokens)


def strided_writes(slots: list[int], source: int = 0) -> list[Write]:
    """Token `source + i` goes to `slots[i]`: as few writes of equal step as a greedy walk finds."""
    writes: list[Write] = []
    at = 0
    while at < len(slots):
        step = slots[at + 1] - slots[at] if at + 1 < len(slots) else 1
        end = at + 1
        while step > 0 and end < len(slots) and slots[end] - slots[end - 1] == step:
            end += 1
        writes.append(Write(source + at, end - at, slots[at], max(step, 1)))
        at = end
    return writes


def matched_writes(sources: list[int], slots: list[int]) -> list[Write]:
    """Token `sources[i]` goes to `slots[i]`, both rising: one write per stretch in which both rise by one."""
    writes: list[Write] = []
    for source, slot in zip(sources, slots, strict=True):
        if writes and source == writes[-1].source + writes[-1].tokens and slot == writes[-1].slot + writes[-1].tokens:
            writes[-1] = writes[-1]._replace(tokens=writes[-1].tokens + 1)
        else:
            writes.append(Write(source, 1, slot, 1))
    return writes
