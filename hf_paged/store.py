"""The store: the memory behind the blocks, and the only code that knows its layout.

Per layer, K and V are head-major: `[kv_heads, slots, dim]`, where slot `b * block_size + i` is token `i` of block
`b`:

            slot 0 ........ block 1 ........ block 2 ....
    head 0  [null block   ][t0 t1 ... t15 ][t16 ...      ]
    head 1  [null block   ][t0 t1 ... t15 ][t16 ...      ]

so the tokens of adjacent blocks are one strided view `[kv_heads, tokens, dim]` that SDPA reads without a copy. The
tensors are as long as the budget allows; pages that were never written cost nothing (the system maps them on first
touch), and those of free blocks can be given back: memory follows the blocks that are held, and nothing is copied.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch

from hf_paged.arena import Arena, whole_pages_of_slots
from hf_paged.core.blocks import NULL_BLOCK
from hf_paged.core.chain import Run
from hf_paged.core.plan import RowSpan, StepPlan
from hf_paged_kernels import Writes, native

# Past this many pieces one indexed copy is quicker than strided ones (8 strided copies: 36 us, indexed: 30 us).
MAX_STRIDED_WRITES = 8
# More tokens at once are copied sooner by torch's threads than by the native store's one.
MAX_NATIVE_WRITE_TOKENS = 256

# Tests set this: memory that nobody owns then holds NaN, so that reading it shows.
POISON = os.environ.get("HF_PAGED_POISON") == "1"


class LayerStore:
    """K and V of one layer: `[kv_heads, slots, dim]` each, K and V of the dims they have.

    Attributes:
        group: number of the group of layers whose blocks these are.
    """

    def __init__(self, num_slots: int, block_size: int, key: torch.Tensor, value: torch.Tensor, group: int = 0):
        self.group = group
        self._block_size = block_size
        num_slots = whole_pages_of_slots(num_slots, (key, value))
        self._arenas = [self._allocate(num_slots, block_size, each) for each in (key, value)]
        self.keys, self.values = (arena.tensor for arena in self._arenas)
        self._key_shape, self._value_shape = key.shape[1::2], value.shape[1::2]  # (heads, dim)
        self._native = native().store_for(self.keys, self.values)

    @staticmethod
    def _allocate(num_slots: int, block_size: int, like: torch.Tensor) -> Arena:
        arena = Arena(num_slots, like)
        if POISON:
            arena.tensor[:, block_size:] = torch.nan
        return arena

    @property
    def whole_page_blocks(self) -> int:
        """The smallest number of adjacent blocks that fill whole pages of K and of V."""
        return math.lcm(*(arena.whole_page_blocks(self._block_size) for arena in self._arenas))

    def give_back(self, blocks: range) -> None:
        """Let the system have the memory of blocks that nobody holds; they begin and end with whole pages."""
        for arena in self._arenas:
            arena.give_back(blocks.start * self._block_size, blocks.stop * self._block_size)
        if POISON:
            self.poison(range(max(blocks.start, NULL_BLOCK + 1), blocks.stop))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token in this layer."""
        return sum(t.shape[0] * t.shape[2] * t.element_size() for t in (self.keys, self.values))

    def accepts(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether new K and V `[batch, kv_heads, tokens, dim]` fit this layer's shape, dtype and device."""
        return (
            key.shape[1::2] == self._key_shape
            and value.shape[1::2] == self._value_shape
            and key.dtype == self.keys.dtype
            and value.dtype == self.values.dtype
            and key.device == self.keys.device
        )

    def write(self, plan: StepPlan, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write new K and V `[batch, kv_heads, tokens, dim]` (tokens numbered row by row) and do the plan's copies."""
        native_store = self._native if plan.num_queries <= MAX_NATIVE_WRITE_TOKENS else None
        if native_store is not None and native_store.write(key, value, _native_writes(plan)):
            return
        for memory, new in ((self.keys, key), (self.values, value)):
            heads, slots, dim = memory.shape
            if len(plan.writes) == 1 and new.shape[0] == 1:  # one row, or packed tokens, in adjacent slots
                _, count, slot, step = plan.writes[0]
                if step == 1 and count == new.shape[2]:
                    memory[:, slot : slot + count] = new[0]
                    continue
            flat = new.transpose(0, 1).reshape(heads, -1, dim)
            if len(plan.writes) > MAX_STRIDED_WRITES:
                source, target = _write_indices(plan, memory.device)
                memory.index_copy_(1, target, flat.index_select(1, source))
                continue
            for first, count, slot, step in plan.writes:
                view = memory.as_strided((heads, count, dim), (slots * dim, step * dim, 1), slot * dim)
                view.copy_(flat[:, first : first + count])
        for copy in plan.copies:
            for memory in (self.keys, self.values):
                memory[:, copy.target : copy.target + copy.tokens] = memory[:, copy.source : copy.source + copy.tokens]

    def append_rows(self, span: RowSpan, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token a row, `[rows, kv_heads, 1, dim]`; returns views of all, `[rows, kv_heads, tokens, dim]`."""
        _, slot, step, tokens = span
        last = slot + tokens - 1
        if self._native is None or not self._native.write_rows(key, value, last, step or 1):
            newest = span._replace(slot=last, tokens=1)
            span_view(self.keys, newest).copy_(key)
            span_view(self.values, newest).copy_(value)
        return span_view(self.keys, span), span_view(self.values, span)

    def blocks(self, first: int, count: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of adjacent blocks as views `[count, kv_heads, block_size, dim]`."""
        slots = slice(first * block_size, (first + count) * block_size)
        keys, values = (m[:, slots].unflatten(1, (count, block_size)).transpose(0, 1) for m in (self.keys, self.values))
        return keys, values

    def gather(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of `slots [n]` as `[kv_heads, n, dim]` copies."""
        return self.keys.index_select(1, slots), self.values.index_select(1, slots)

    def poison(self, blocks: range) -> None:
        """Fill blocks with NaN."""
        for memory in (each for each in (self.keys, self.values) if each.dtype.is_floating_point):
            memory[:, blocks.start * self._block_size : blocks.stop * self._block_size] = torch.nan


def _native_writes(plan: StepPlan) -> Writes:
    if "native writes" not in plan.prepared:
        plan.prepared["native writes"] = Writes(plan.writes, plan.copies)
    return plan.prepared["native writes"]


def _write_indices(plan: StepPlan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    key = ("write", device)
    if key not in plan.prepared:
        source = [w.source + i for w in plan.writes for i in range(w.tokens)]
        target = [w.slot + i * w.step for w in plan.writes for i in range(w.tokens)]
        plan.prepared[key] = torch.tensor([source, target], device=device).unbind(0)
    return plan.prepared[key]


def span_view(memory: torch.Tensor, span: RowSpan) -> torch.Tensor:
    """The rows of a span as a view `[rows, kv_heads, tokens, dim]`."""
    rows, slot, step, tokens = span
    heads, slots, dim = memory.shape
    return memory.as_strided((rows, heads, tokens, dim), (step * dim, slots * dim, dim, 1), slot * dim)


def strided_view(memory: torch.Tensor, run: Run) -> torch.Tensor:
    """The tokens of a run as a view `[kv_heads, tokens, dim]`."""
    return memory[:, run.slot : run.slot + run.tokens]


def run_slots(runs: Sequence[Run], device: torch.device) -> torch.Tensor:
    """The slots of `runs`, `[tokens]`."""
    if not runs:
        return torch.zeros(0, dtype=torch.long, device=device)
    return torch.cat([torch.arange(run.slot, run.slot + run.tokens, device=device) for run in runs])
