"""A packed pass: the new tokens of all rows in one sequence without padding, each distinct one computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_paged.attention import paged_mask
from hf_paged.backends import AttentionBackend
from hf_paged.cache import PagedCache
from hf_paged.core.blocks import OutOfBlocks
from hf_paged.core.planner import PackedPlan, plan_packed
from hf_paged.forward import TOKEN_TYPES, ModelCall

# Packed tokens per forward pass: bounds activation memory.
PACKED_CHUNK_TOKENS = 8192
# New tokens of a row that are stored before sliding windows give up those that have fallen out.
WINDOW_STRETCH_TOKENS = 1024

_NO_TOKEN = 2**62


def run_packed(
    request: ModelCall,
    cache: PagedCache,
    backend: AttentionBackend,
    keeps_logits: bool,
    windows_seen: dict[int, int | None] | None = None,
    in_one_pass: bool = False,
) -> tuple[Any, int, int]:
    """All new tokens of all rows, each distinct one once, no padding, and nothing that an earlier call has computed.

    Args:
        request: the call.
        cache: its cache; rows end up sharing what they have in common.
        backend: reads the blocks.
        keeps_logits: whether the model can be told whose logits are wanted.
        windows_seen: filled with the sliding window of each layer's attention call.
        in_one_pass: whether sliding windows must not cut the tokens, of which there are few enough (`would_cut`).

    Returns:
        The model's outputs with logits as stock would shape them, the number of tokens that went through the model,
        and the number that earlier calls had computed, every row counted.
    """
    if request.kwargs.get("position_ids") is None:  # what the model would take them to be, were the rows not packed
        positions = torch.arange(cache.dense_len, cache.dense_len + request.tokens, device=request.inputs.device)
        request = replace(request, kwargs={**request.kwargs, "position_ids": positions.unsqueeze(0)})
    columns = _real_columns(request)
    keep = request.kwargs.get("logits_to_keep") or (1 if request.last_only else 0)
    first_wanted = [max(0, len(real) - keep) if keep else 0 for real in columns]
    stretches = _Stretches(cache, _token_keys(request, cache, columns), keep, in_one_pass)
    logits: list[torch.Tensor] = []
    places: dict[tuple[int, int], int] = {}  # row and new token, to the place of its logits
    outputs, computed_tokens, num_logits = None, 0, 0
    for stretch in stretches:
        cache.sequences.pins += stretch.plan.pins
        cache.is_copying = any(part.copies for chunk in stretch.plan.chunks for part in chunk)
        wanted = stretch.packed_indices(first_wanted)
        indices = sorted(set(wanted.values()))
        order = {index: num_logits + i for i, index in enumerate(indices)}
        places.update({place: order[index] for place, index in wanted.items()})
        source = stretch.source(columns, request.tokens).to(request.inputs.device)
        tiers = cache.pool.tiers
        lap = None if tiers is None else tiers.start_pass()
        outputs, picked = _forward(request, cache, backend, keeps_logits, stretch.plan, source, indices)
        if lap is not None:
            tiers.end_pass(lap, stretch.plan.num_tokens)
        logits += picked
        num_logits += len(indices)
        computed_tokens += stretch.plan.num_tokens
        if windows_seen is not None:
            windows_seen.update(cache.step.windows_seen)
    cache.finish(request.new_columns, request.tokens)
    picked = [[places[row, i] for i in range(first_wanted[row], len(real))] for row, real in enumerate(columns)]
    outputs.logits = torch.cat(logits)[torch.tensor(picked, device=request.inputs.device)]
    return outputs, computed_tokens, sum(stretches.reused)


def would_cut(request: ModelCall, cache: PagedCache) -> bool:
    """Whether the new tokens may not go through the model in one pass."""
    return request.real_tokens > (cache.chunk_tokens or PACKED_CHUNK_TOKENS)


@dataclass(frozen=True, slots=True, eq=False)
class _Stretch:
    """New tokens `[starts[i], stops[i])` of the rows `rows[i]`, and the plan that stores them."""

    rows: list[int]
    starts: list[int]
    stops: list[int]
    plan: PackedPlan

    def packed_indices(self, first_wanted: Sequence[int]) -> dict[tuple[int, int], int]:
        """Where the new tokens from number `first_wanted[row]` on are computed, by row and number."""
        return {
            (row, token): self.plan.packed_index(i, token - start)
            for i, (row, start, stop) in enumerate(zip(self.rows, self.starts, self.stops, strict=True))
            for token in range(max(start, first_wanted[row]), stop)
        }

    def source(self, columns: Sequence[Sequence[int]], tokens: int) -> torch.Tensor:
        """Index `[packed tokens]` into the flattened `[batch * tokens]` inputs; `columns` of each row's new tokens."""
        picked = []
        for i, start, stop in self.plan.sources:
            row, first = self.rows[i], self.starts[i]
            picked += [row * tokens + column for column in columns[row][first + start : first + stop]]
        return torch.tensor(picked, device="cpu")


class _Stretches:
    """Takes the rows' new tokens one stretch after the other, all at once where nothing is gained by less.

    With sliding windows a stretch ends before much more than a window is stored: what has fallen out is given up before
    the next one. Where blocks can go to the host, a stretch ends where the device is full. Where memory is short,
    stretches get shorter, down to a block.

    Args:
        cache: begins with what earlier calls have left.
        sequences: the new tokens of each row.
        keep: so many last tokens of a row are computed in any case, for their logits; 0 means all.
        in_one_pass: take all tokens at once whatever the windows.
    """

    def __init__(self, cache: PagedCache, sequences: list[list[int]], keep: int, in_one_pass: bool):
        self._cache = cache
        self._ends_by_window = cache.has_windows and not in_one_pass
        self._may_be_short = self._ends_by_window or (cache.pool.overflow is not None and not in_one_pass)
        self._sequences = sequences
        self._longest = max(map(len, sequences), default=0)
        self.reused = [0] * len(sequences)
        if cache.root is not None and cache.dense_len == 0 and keep:
            self.reused = [
                cache.pool.match(table, sequence, len(sequence) - keep)
                for table, sequence in zip(cache.tables, sequences, strict=True)
            ]
        self._done = list(self.reused)
        self._size_tokens = WINDOW_STRETCH_TOKENS if self._ends_by_window else self._longest

    def __iter__(self) -> Iterator[_Stretch]:
        cache = self._cache
        while any(done < len(sequence) for done, sequence in zip(self._done, self._sequences, strict=True)):
            if self._done != self.reused:
                cache.sequences.unpin()
                cache.is_copying = False
                cache.index_rows(with_tails=False)
                cache.trim()
            stretch = self._next()
            yield stretch
            for row, stop in zip(stretch.rows, stretch.stops, strict=True):
                self._done[row] = stop

    def _next(self) -> _Stretch:
        """The next stretch that fits; raises `PagedMemoryError` where none does."""
        cache = self._cache
        manager = cache.pool.manager
        while True:
            rows = [row for row, sequence in enumerate(self._sequences) if self._done[row] < len(sequence)]
            starts = [self._done[row] for row in rows]
            stops = [min(self._done[row] + self._size_tokens, len(self._sequences[row])) for row in rows]
            new = [self._sequences[row][start:stop] for row, start, stop in zip(rows, starts, stops, strict=True)]
            rest = max(len(self._sequences[row]) - stop for row, stop in zip(rows, stops, strict=True))
            tables = [cache.tables[row] for row in rows]
            chunk_tokens = cache.chunk_tokens or PACKED_CHUNK_TOKENS
            try:
                cache.pool.own_tails(tables)
                plan = plan_packed(manager, tables, new, chunk_tokens, cache.room_tokens + rest)
                return _Stretch(rows, starts, stops, plan)
            except OutOfBlocks as error:
                if not cache.pool.make_room(cache.tables, error) and not self._make_do(error):
                    raise cache.pool.memory_error(error, sum(map(len, new))) from None

    def _make_do(self, error: OutOfBlocks) -> bool:
        """Whether there is a way to need less memory at a time: shorter stretches, or no blocks of earlier calls."""
        cache = self._cache
        may_be_short = self._may_be_short and self._size_tokens > cache.pool.block_size
        # All of the tokens were asked for: the host must have room for the rest of them when their turn comes.
        if may_be_short and not self._ends_by_window and self._size_tokens >= self._longest:
            may_be_short = cache.pool.overflow.could_hold(error)
        if may_be_short:
            self._size_tokens //= 2
            return True
        if not any(self.reused) or self._done != self.reused:
            return False
        for table in cache.tables:
            cache.pool.manager.crop(table, 0)
        self.reused = [0] * len(self.reused)
        self._done = list(self.reused)
        return True


def _forward(
    request: ModelCall,
    cache: PagedCache,
    backend: AttentionBackend,
    keeps_logits: bool,
    plan: PackedPlan,
    source: torch.Tensor,
    indices: Sequence[int],
) -> tuple[Any, list[torch.Tensor]]:
    """Compute the plan's tokens `source`, chunk by chunk; returns the last outputs and the logits of `indices`."""
    outputs, logits = None, []
    done = 0
    for chunk in plan.chunks:
        num_queries = chunk[0].num_queries
        here = source[done : done + num_queries]
        cache.begin(chunk, cache.dense_len + request.tokens, 0, backend=cache.pool.over_host(backend, chunk))
        kwargs = _packed_arguments(request, here)
        wanted = [index - done for index in indices if done <= index < done + num_queries]
        picked = torch.tensor(wanted or [0], device=here.device)
        if keeps_logits:
            kwargs["logits_to_keep"] = picked
        outputs = request.call(**kwargs)
        if wanted:
            logits.append(outputs.logits[0] if keeps_logits else outputs.logits[0].index_select(0, picked))
        done += num_queries
    return outputs, logits


def _real_columns(request: ModelCall) -> list[list[int]]:
    if request.new_columns is None:
        return [list(range(request.tokens))] * request.rows
    return [row.nonzero().flatten().tolist() for row in request.new_columns]


def _token_keys(request: ModelCall, cache: PagedCache, columns: list[list[int]]) -> list[list[int]]:
    """Per row one int per new token; equal ints (after equal pasts) mean equal KV."""
    if request.input_name == "input_ids":
        keys = request.inputs.long()  # which may be int32; below, numbers get larger
    else:
        # Equal embeddings get equal numbers, none of which could be a token id.
        flat = request.inputs.flatten(0, 1)
        keys = torch.unique(flat, dim=0, return_inverse=True)[1].view(request.inputs.shape[:2]) + _NO_TOKEN
    positions = request.positions
    if positions is not None:
        positions = (positions[0] if positions.dim() == 3 else positions).long()  # planes are all the same then
        usual = torch.zeros_like(keys)
        for row, real in enumerate(columns):
            usual[row, real] = torch.arange(len(real), device=keys.device) + cache.tables[row].num_tokens
        positions = positions.expand_as(keys)
        # Custom positions are part of what a token is.
        keys = torch.where(positions != usual, keys + (2 * positions.abs() + (positions < 0) + 1) * 2**32, keys)
    listed = keys.tolist()
    return [[row[column] for column in real] for row, real in zip(listed, columns, strict=True)]


def _packed_arguments(request: ModelCall, source: torch.Tensor) -> dict[str, Any]:
    kwargs = dict(request.kwargs)
    kwargs[request.input_name] = request.inputs.flatten(0, 1).index_select(0, source).unsqueeze(0)
    for name in (request.names.positions, *TOKEN_TYPES):
        each = kwargs.get(name)
        if each is not None:
            each = each[..., -request.tokens :].expand(*each.shape[:-2], *request.inputs.shape[:2])
            kwargs[name] = each.flatten(-2).index_select(-1, source).unsqueeze(-2)
    kwargs["attention_mask"] = paged_mask(source.device)
    kwargs.pop("logits_to_keep", None)
    kwargs.pop("cache_position", None)
    return kwargs
