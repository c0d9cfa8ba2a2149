"""The store: the memory behind the blocks, and the only code that knows its layout.

Per layer, K and V are head-major: `[kv_heads, slots, dim]`, where slot `b * block_size + i` is token `i` of block
`b`:

            slot 0 ........ block 1 ........ block 2 ....
    head 0  [null block   ][t0 t1 ... t15 ][t16 ...      ]
    head 1  [null block   ][t0 t1 ... t15 ][t16 ...      ]

so the tokens of adjacent blocks are one strided view `[kv_heads, tokens, dim]` that SDPA reads without a copy. The
tensors are as long as the budget allows; what has no memory yet costs nothing (the CPU's system maps pages on first
touch, GPUs are asked for them, `hf_paged.arena`), and that of free blocks can be given back: memory follows the blocks
that are held, and nothing is copied.

Where KV is stored quantized, `dim` numbers of a slot are a record of bytes (`hf_paged_kernels.formats`), K and V are
encoded as they are written, and every reader gets what is stored: a token's K and V are the same to those that were
computed beside it and to those that find it cached.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from hf_paged.arena import Arena, whole_pages_of_slots
from hf_paged.core.blocks import NULL_BLOCK
from hf_paged.core.chain import Run
from hf_paged.core.plan import RowSpan, StepPlan
from hf_paged_kernels import KVFormat, KVRecords, Writes, native_kernels

# Past this many pieces one indexed copy is quicker than strided ones (8 strided copies: 36 us, indexed: 30 us).
MAX_STRIDED_WRITES = 8
# More tokens at once are copied sooner by torch's threads than by the native store's one; encoding is always its own.
MAX_NATIVE_WRITE_TOKENS = 256

# Tests set this: memory that nobody owns then holds NaN, so that reading it shows.
POISON = os.environ.get("HF_PAGED_POISON") == "1"


class LayerStore:
    """K and V of one layer: `[kv_heads, slots, dim]` each, K and V of the dims they have, or of their records' bytes.

    Args:
        key, value: K and V `[batch, kv_heads, tokens, dim]` as they will come.
        kv_format: of records; `None` stores numbers as they are.

    Attributes:
        group: number of the group of layers whose blocks these are.
        keys, values: the memory.
        dtype, value_dtype: of K and V as they come and are read.
        key_dim, value_dim: of K and V as they come and are read.
        records: what the memory holds; `None`: numbers as they are.
        native: the native store of this memory, where there is one.

    Raises `ValueError` where the format is not there for K and V of these dims.
    """

    def __init__(
        self,
        num_slots: int,
        block_size: int,
        key: torch.Tensor,
        value: torch.Tensor,
        group: int = 0,
        kv_format: KVFormat | None = None,
    ):
        self.group = group
        self.dtype, self.value_dtype = key.dtype, value.dtype
        self.key_dim, self.value_dim = key.shape[3], value.shape[3]
        self._accepted = self._looks(key, value)
        self._block_size = block_size
        self.records = None
        if kv_format is not None:
            kv_format.check(self.key_dim, self.value_dim)
            self.records = KVRecords(kv_format, self.key_dim, self.value_dim)
        key, value = self.encoded(key[:1, :, :1], value[:1, :, :1])
        num_slots = whole_pages_of_slots(num_slots, (key, value))
        self._arenas = [self._allocate(num_slots, block_size, each) for each in (key, value)]
        self.keys, self.values = (arena.tensor for arena in self._arenas)
        self.native = native_kernels().store_for(self.keys, self.values, self.records)

    @staticmethod
    def _allocate(num_slots: int, block_size: int, like: torch.Tensor) -> Arena:
        arena = Arena(num_slots, like)
        if POISON and arena.step_slots is None:
            _fill_nan(arena.tensor[:, block_size:])
        return arena

    @property
    def whole_page_blocks(self) -> int:
        """The smallest number of adjacent blocks that fill whole pages of K and of V."""
        return math.lcm(*(arena.whole_page_blocks(self._block_size) for arena in self._arenas))

    @property
    def step_blocks(self) -> int | None:
        """Adjacent blocks whose memory fills a page a head of K and of V; `None`: blocks need not be asked for."""
        slots = [arena.step_slots for arena in self._arenas if arena.step_slots is not None]
        return -(-max(slots) // self._block_size) if slots else None

    def back(self, blocks: range) -> None:
        """Have memory for blocks; the null block's is zero. Raises `RefusedMemoryError` and changes nothing."""
        slots = blocks.start * self._block_size, blocks.stop * self._block_size
        with ExitStack() as undo:
            for arena in self._arenas:
                arena.back(*slots)
                undo.callback(arena.give_back, *slots)
            undo.pop_all()
        if NULL_BLOCK in blocks:
            for memory in (self.keys, self.values):
                memory[:, : self._block_size] = 0
        self._poison_owned_by_nobody(blocks)

    def give_back(self, blocks: range) -> None:
        """Let the system have the memory of blocks that nobody holds.

        They begin and end with whole pages where the system hands out those, and are as they were backed elsewhere.
        """
        for arena in self._arenas:
            arena.give_back(blocks.start * self._block_size, blocks.stop * self._block_size)
        if self.step_blocks is None:
            self._poison_owned_by_nobody(blocks)

    def _poison_owned_by_nobody(self, blocks: range) -> None:
        if POISON:
            self.poison(range(max(blocks.start, NULL_BLOCK + 1), blocks.stop))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token in this layer."""
        return sum(t.shape[0] * t.shape[2] * t.element_size() for t in (self.keys, self.values))

    def accepts(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether new K and V `[batch, kv_heads, tokens, dim]` fit this layer's shape, dtype and device."""
        return self._looks(key, value) == self._accepted

    @staticmethod
    def _looks(key: torch.Tensor, value: torch.Tensor) -> tuple[object, ...]:
        _, heads, _, dim = key.shape
        _, value_heads, _, value_dim = value.shape
        return heads, dim, key.dtype, key.device, value_heads, value_dim, value.dtype

    def write(self, plan: StepPlan, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write new K and V `[batch, kv_heads, tokens, dim]` (tokens numbered row by row) and do the plan's copies."""
        suits = self.records is not None or plan.num_queries <= MAX_NATIVE_WRITE_TOKENS
        native_store = self.native if suits else None
        if native_store is not None and native_store.write(key, value, native_writes(plan)):
            return
        self.write_stored(plan, *self.encoded(key, value))

    def write_stored(self, plan: StepPlan, key: torch.Tensor, value: torch.Tensor) -> None:
        """The same with K and V as they are stored, `[batch, kv_heads, tokens, dim or record bytes]`."""
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
        self.copy(plan)

    def copy(self, plan: StepPlan) -> None:
        """The plan's copies alone."""
        for copy in plan.copies:
            for memory in (self.keys, self.values):
                memory[:, copy.target : copy.target + copy.tokens] = memory[:, copy.source : copy.source + copy.tokens]

    def encoded(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[..., dim]` as they are stored, `[..., dim or record bytes]`."""
        if self.records is None:
            return key, value
        return self.records.encode_keys(key), self.records.encode_values(value)

    def read(self, view: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What `view` takes of the memory of K, and of V, as numbers; decoded where they are stored as records."""
        return self.read_keys(view), self.read_values(view)

    def read_keys(self, view: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """K, as `read` gives it."""
        return self.keys_of(view(self.keys))

    def read_values(self, view: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """V, as `read` gives it."""
        return self.values_of(view(self.values))

    def keys_of(self, stored: torch.Tensor) -> torch.Tensor:
        """K as numbers, of what this memory holds, or a copy of it elsewhere."""
        return stored if self.records is None else self.records.decode_keys(stored, self.dtype)

    def values_of(self, stored: torch.Tensor) -> torch.Tensor:
        """V as numbers, likewise."""
        return stored if self.records is None else self.records.decode_values(stored, self.value_dtype)

    def append_rows(self, span: RowSpan, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token a row, `[rows, kv_heads, 1, dim]`, where numbers are stored as they are.

        Returns views of all tokens, `[rows, kv_heads, tokens, dim]`.
        """
        _, slot, step, tokens = span
        last = slot + tokens - 1
        if self.native is None or not self.native.write_rows(key, value, last, step or 1):
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
        """K and V of `slots [n]` as they are stored, `[kv_heads, n, dim or record bytes]` copies."""
        return self.keys.index_select(1, slots), self.values.index_select(1, slots)

    def poison(self, blocks: range) -> None:
        """Fill blocks with NaN."""
        for memory in (self.keys, self.values):
            _fill_nan(memory[:, blocks.start * self._block_size : blocks.stop * self._block_size])


def _fill_nan(memory: torch.Tensor) -> None:
    if memory.dtype.is_floating_point:
        memory.fill_(torch.nan)
    elif memory.dtype == torch.uint8:  # records, whose scales are NaN then
        memory.fill_(255)


def native_writes(plan: StepPlan) -> Writes:
    """The plan's writes and copies, laid out for the native store; kept in `plan.prepared`."""
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
