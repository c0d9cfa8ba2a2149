"""Builds step plans: a packed pass over the trie of new tokens, a decode step of one token a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_paged.core.chain import BlockChain, Run
from hf_paged.core.manager import BlockManager
from hf_paged.core.plan import Copy, Piece, Pin, Segment, StepPlan, Write, row_span, strided_writes
from hf_paged.core.prefix import seen_from
from hf_paged.core.table import BlockTable
from hf_paged.core.trie import TrieNode, build_trie
from hf_paged.core.whole import whole

if TYPE_CHECKING:
    from hf_paged.core.foresight import Foreseen


@dataclass(frozen=True, slots=True, eq=False)
class PackedPlan:
    """A pass over the distinct new tokens of several rows, in depth-first order of their trie.

    Attributes:
        chunks: successive forward passes, each over at most the chunk size of tokens: one plan a group.
        sources: `(row, start, stop)` stretches of the rows' new tokens whose concatenation is the packed input.
        ends: packed index behind each node's tokens.
        deepest: index of the last node of each row.
        nodes: the trie; positions count from 1, element 0 stands for the row's past.
        pins: blocks to unpin when the passes are done.
    """

    chunks: list[list[StepPlan]]
    sources: list[tuple[int, int, int]]
    ends: list[int]
    deepest: list[int]
    nodes: list[TrieNode]
    pins: list[Pin]

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return self.ends[-1]

    def packed_index(self, row: int, token: int) -> int:
        """Where new token `token` of `row` is computed."""
        index: int | None = self.deepest[row]
        while index is not None:
            node = self.nodes[index]
            if node.start - 1 <= token:
                return self.ends[index] - (node.stop - 1 - token)
            index = node.parent
        raise IndexError(f"row {row} has no new token {token}")


class _Stretch(NamedTuple):
    """New tokens whose slots are adjacent and which belong to one node and one chunk."""

    start: int
    run: Run
    kv_len: int
    chain: BlockChain
    node: int
    copies: Sequence[Copy]


class _View(NamedTuple):
    """Packed queries `[start, stop)` see all of `runs`."""

    start: int
    stop: int
    runs: tuple[Run, ...]


@whole
def plan_packed(
    manager: BlockManager,
    tables: Sequence[BlockTable],
    tokens: Sequence[Sequence[int]],
    chunk_tokens: int,
    room_tokens: int = 0,
) -> PackedPlan:
    """Append each row's new `tokens` (at least one) to its table, computing what rows have in common once.

    Rows whose pasts are equal and whose tokens begin alike end up sharing blocks; `room_tokens` more are expected
    behind each row. Raises `OutOfBlocks` and changes nothing where the pool cannot hold the new tokens.
    """
    pasts: dict[Any, int] = {}
    keys = [pasts.setdefault(_past(table), -1 - len(pasts)) for table in tables]
    nodes = build_trie([[key, *row] for key, row in zip(keys, tokens, strict=True)])
    bases = [table.num_tokens for table in tables]
    _check_room(manager, tables, nodes, bases)

    groups = range(len(manager.pools))
    stretches: list[list[_Stretch]] = [[] for _ in groups]
    sources: list[tuple[int, int, int]] = []
    starts: list[int] = []
    ends: list[int] = []
    deepest = [0] * len(tables)
    pins: list[Pin] = []
    at = 0
    for index, node in enumerate(nodes):
        owner = node.rows[0]
        table, base = tables[owner], bases[owner]
        start, stop = max(node.start - 1, 0), node.stop - 1
        if node.parent is not None and nodes[node.parent].rows[0] != owner:
            pins += manager.assign(table, tables[nodes[node.parent].rows[0]], base + start)
        room = len(tokens[owner]) - stop + room_tokens
        growth = manager.append([table], stop - start, room, [tokens[owner][start:stop]])
        pins += growth.pins
        starts.append(at)
        if stop > start:
            sources.append((owner, start, stop))
        for chain, copies, into in zip(table.chains, growth.copies, stretches, strict=True):
            into += _stretches(chain, base + start, base + stop, at, chunk_tokens, index, copies)
        at += stop - start
        ends.append(at)
        for row in node.rows:
            deepest[row] = index
    for row, index in enumerate(deepest):
        owner = nodes[index].rows[0]
        if owner != row:
            pins += manager.assign(tables[row], tables[owner], bases[row] + len(tokens[row]))
    tails = _subtree_ends(nodes, ends)
    views = [_views(tables, nodes, bases, starts, tails, group, stretches[group]) for group in groups]
    chunks = [
        [_chunk_plan(stretches[group], views[group], lo, min(lo + chunk_tokens, at)) for group in groups]
        for lo in range(0, at, chunk_tokens)
    ]
    return PackedPlan(chunks, sources, ends, deepest, nodes, pins)


def _past(table: BlockTable) -> Any:
    """Equal for tables that hold the same tokens in the same blocks."""
    return table.num_tokens, *(tuple(chain.blocks) for chain in table.chains)


def _stretches(
    chain: BlockChain, start: int, stop: int, at: int, chunk_tokens: int, node: int, copies: Sequence[Copy]
) -> Iterator[_Stretch]:
    """Tokens `[start, stop)` of a chain, the first of which is packed query `at`; copies go with the first stretch."""
    for run in _cut(chain.runs(start, stop), at, chunk_tokens):
        start += run.tokens
        yield _Stretch(at, run, start, chain, node, copies)
        at, copies = at + run.tokens, []


def _views(
    tables: Sequence[BlockTable],
    nodes: Sequence[TrieNode],
    bases: Sequence[int],
    starts: Sequence[int],
    tails: Sequence[int],
    group: int,
    stretches: Sequence[_Stretch],
) -> list[_View]:
    """What the nodes' pasts, as far as they are kept, and each stretch show to the queries behind them."""
    views = []
    for index, node in enumerate(nodes):
        chain, base = tables[node.rows[0]].chains[group], bases[node.rows[0]]
        if node.parent is None and base:
            views.append(_View(starts[index], tails[index], tuple(chain.runs(min(chain.first_token, base), base))))
    return views + [_View(s.start + s.run.tokens, tails[s.node], (s.run,)) for s in stretches]


def _check_room(
    manager: BlockManager, tables: Sequence[BlockTable], nodes: Sequence[TrieNode], bases: Sequence[int]
) -> None:
    """Raise `OutOfBlocks` where the blocks that the nodes will take are more than the pool has."""
    needed = 0
    shapes: list[BlockTable] = []  # how the tokens of each node fall into blocks: as in its root's table
    for node in nodes:
        owner = node.rows[0]
        shape = tables[owner] if node.parent is None else shapes[node.parent]
        shapes.append(shape)
        start, stop = bases[owner] + max(node.start - 1, 0), bases[owner] + node.stop - 1
        in_place = node.parent is None or nodes[node.parent].rows[0] == owner
        if stop == start:
            continue
        if in_place and start == bases[owner]:
            needed += manager.blocks_needed(tables[owner], stop - start)
        else:
            needed += shape.blocks_for(stop) - (shape.blocks_for(start) if in_place else shape.whole_blocks(start))
    manager.check_room(needed)


def _cut(runs: Iterable[Run], at: int, chunk_tokens: int) -> Iterator[Run]:
    """Cut runs where a chunk ends."""
    for slot, tokens in runs:
        while tokens:
            part = min(tokens, chunk_tokens - at % chunk_tokens)
            yield Run(slot, part)
            slot, tokens, at = slot + part, tokens - part, at + part


def _subtree_ends(nodes: Sequence[TrieNode], ends: Sequence[int]) -> list[int]:
    """Packed index behind the last descendant of each node; descendants follow their node without a gap."""
    tails = list(ends)
    for index in range(len(nodes) - 1, -1, -1):
        parent = nodes[index].parent
        if parent is not None:
            tails[parent] = max(tails[parent], tails[index])
    return tails


def _chunk_plan(stretches: Sequence[_Stretch], views: Sequence[_View], lo: int, hi: int) -> StepPlan:
    """The plan of packed queries `[lo, hi)`."""
    inside = [s for s in stretches if lo <= s.start < hi]
    own = [Piece(s.start - lo, s.start - lo + s.run.tokens, (s.run,), True) for s in inside]
    shared = [
        Piece(max(view.start, lo) - lo, min(view.stop, hi) - lo, view.runs, False)
        for view in views
        if max(view.start, lo) < min(view.stop, hi)
    ]
    return StepPlan(
        num_queries=hi - lo,
        writes=[Write(s.start - lo, s.run.tokens, s.run.slot, 1) for s in inside],
        copies=[copy for s in inside for copy in s.copies],
        own=own,
        shared=shared,
        segments=[Segment(s.chain, s.start - lo, s.run.tokens, s.kv_len) for s in inside],
        kv_len=max(s.kv_len for s in inside),
    )


@whole
def plan_decode(
    manager: BlockManager,
    tables: Sequence[BlockTable],
    tokens: Sequence[Sequence[int]] | None = None,
    room_tokens: int = 0,
    foreseen: Foreseen | None = None,
) -> tuple[list[StepPlan], list[Pin]]:
    """Append one token to every table, `tokens[row][0]` if it is known: one query a row.

    Returns a plan for each group, those that were `foreseen` where it came so, and the blocks to unpin when the pass is
    done. Raises `OutOfBlocks` and changes nothing.
    """
    growth = manager.append(tables, 1, room_tokens, tokens, may_part=True)
    if foreseen is not None and not any(growth.copies) and foreseen.holds(tables):
        return foreseen.plans, growth.pins
    return decode_plans(manager, tables, growth.copies), growth.pins


def decode_plans(
    manager: BlockManager, tables: Sequence[BlockTable], copies: Sequence[list[Copy]] | None = None
) -> list[StepPlan]:
    """Plans for tables whose newest token is the step's, one a group."""
    return [
        _decode_plan(tables, group, window, [] if copies is None else copies[group])
        for group, window in enumerate(manager.windows)
    ]


def _decode_plan(tables: Sequence[BlockTable], group: int, window: int | None, copies: list[Copy]) -> StepPlan:
    kv_len = max(table.num_tokens for table in tables)
    if window is not None and kv_len <= window:
        window = None
    order, own, shared = _decode_pieces(tables, group, window)
    rows = range(len(tables)) if order is None else order
    return StepPlan(
        num_queries=len(tables),
        writes=strided_writes([table.chains[group].slot(table.num_tokens - 1) for table in tables]),
        copies=copies,
        own=own,
        shared=shared,
        segments=[
            Segment(tables[row].chains[group], query, 1, tables[row].num_tokens) for query, row in enumerate(rows)
        ],
        kv_len=kv_len,
        window=window,
        span=None if shared or copies else row_span([piece.runs[0] for piece in own]),
        order=order,
    )


def _decode_pieces(
    tables: Sequence[BlockTable], group: int, window: int | None
) -> tuple[list[int] | None, list[Piece], list[Piece]]:
    """Pieces of one query a row, and the order of the rows that makes the sharing rows neighbours."""
    chains = [table.chains[group] for table in tables]
    starts = [seen_from(table.num_tokens - 1, window) for table in tables]  # the newest token is there already
    order, shared = None, []
    firsts = [table.whole_blocks(start) for table, start in zip(tables, starts, strict=True)]
    if len({chain.blocks[first] for chain, first in zip(chains, firsts, strict=True)}) < len(tables):
        # Rows whose windows begin at different tokens cannot share what they see.
        seen = [[start, *chain.blocks[first:]] for start, chain, first in zip(starts, chains, firsts, strict=True)]
        nodes = build_trie(seen)
        order = _leaf_order(nodes, len(tables))
        query = {row: i for i, row in enumerate(order)}
        for node in nodes:
            if len(node.rows) > 1:
                first = min(query[row] for row in node.rows)
                # Rows that left a block at different tokens share what the first of them to leave has seen.
                stop = min(tables[row].block_start(firsts[row] + node.stop - 1) for row in node.rows)
                runs = tuple(chains[node.rows[0]].runs(starts[node.rows[0]], stop))
                if runs:
                    shared.append(Piece(first, first + len(node.rows), runs, False))
                    for row in node.rows:
                        starts[row] = stop
        if order == list(range(len(tables))):
            order = None
    own: list[Piece] = []
    for query_index, row in enumerate(order or range(len(tables))):
        *earlier, last = chains[row].runs(starts[row], tables[row].num_tokens)
        own.append(Piece(query_index, query_index + 1, (last,), False))
        if earlier:
            shared.append(Piece(query_index, query_index + 1, tuple(earlier), False))
    return order, own, shared


def _leaf_order(nodes: Sequence[TrieNode], num_rows: int) -> list[int]:
    """Rows in an order in which those of every node are neighbours, close to the order they came in."""
    children: dict[int | None, list[int]] = {}
    for index, node in enumerate(nodes):
        children.setdefault(node.parent, []).append(index)
    order: list[int] = []

    def visit(index: int) -> None:
        inner = sorted(children.get(index, ()), key=lambda child: min(nodes[child].rows))
        below = {row for child in inner for row in nodes[child].rows}
        order.extend(row for row in sorted(nodes[index].rows) if row not in below)
        for child in inner:
            visit(child)

    for root in sorted(children.get(None, ()), key=lambda child: min(nodes[child].rows)):
        visit(root)
    assert len(order) == num_rows
    return order
