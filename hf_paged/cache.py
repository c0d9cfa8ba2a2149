"""`PagedCache`: the transformers cache whose layers keep their K and V in blocks."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, LinearAttentionLayer

from hf_paged import compat
from hf_paged.backends import PreparedDecode
from hf_paged.compat import CACHE_NAME
from hf_paged.config import PagedConfig
from hf_paged.core.plan import StepPlan
from hf_paged.core.table import BlockTable
from hf_paged.dense import dense_plan
from hf_paged.dense_host import dense_readers
from hf_paged.kept_states import lone_rows
from hf_paged.layer import PagedLayer
from hf_paged.pool import KVPool
from hf_paged.portable import as_stock, reduced
from hf_paged.prefixes import PrefixRoot
from hf_paged.sequences import Sequences, chosen_rows
from hf_paged.state import is_whole, make_layers, select_states, state_of
from hf_paged.step import Step

# Tokens that a sequence of unknown length is expected to grow by; room behind it costs nothing until used.
DEFAULT_ROOM_TOKENS = 256


class PagedCache(Cache):
    """A cache of `config`'s attention layers in blocks; takes the place of `DynamicCache`, method for method.

    Rows share blocks where they were forked (beams, samples, copies of the cache), padding that an attention mask
    covers is not stored, and each row's tokens lie in adjacent blocks where possible.

    Gradients do not go through it: where K and V need some, a call of the model raises `ValueError`. Call it under
    `torch.no_grad()`, as `generate` does, or train with `use_cache=False` or a `DynamicCache`.

    Args:
        config: the model's config.
        block_size: tokens per block, a power of two from 8 to 256.
        max_memory: budget as in `PagedConfig`, for the devices that K and V are on; on a patched model `None` is that
            model's.

    Raises:
        TypeError: where `config` is no config of transformers.
        ValueError: for a bad `block_size` or `max_memory`, or a config whose layers keep something else than K and V
            or a convolutional or recurrent state.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        block_size: int = 16,
        max_memory: Any = None,
        *,
        pool: KVPool | None = None,
        settings: PagedConfig | None = None,
        layout: compat.CacheLayout | None = None,
    ):
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config must be a transformers config (model.config), got {type(config).__name__}")
        self.settings = settings or PagedConfig(block_size=block_size, max_memory=max_memory)
        if settings is None and self.settings.budget_bytes("disk") is not None:
            raise ValueError("max_memory['disk'] is for cached prefixes, which a patched model keeps; leave 'disk' out")
        self.model_config = config.get_text_config(decoder=True)
        self.layout = compat.cache_layout(self.model_config) if layout is None else layout
        self.windows = self.layout.windows
        super().__init__(layers=make_layers(self))
        self.paged_layers = [layer for layer in self.layers if isinstance(layer, PagedLayer)]
        self.states = [layer for layer in self.layers if compat.keeps_state(layer)]
        self.sequences = Sequences(pool)
        self.has_windows = any(window is not None for window in self.windows)
        self._finalizer = weakref.finalize(self, self.sequences.abandon)
        self.room_tokens = DEFAULT_ROOM_TOKENS
        self.dense_len = 0
        self.columns: torch.Tensor | None = None
        self.finished: set[int] = set()
        self.ended: set[int] = set()  # rows that are done, whether they are finished or computed nevertheless
        self.lone: set[int] = set()  # rows whose states are to be kept when they end
        self.step: Step | None = None
        self.prepared: PreparedDecode | None = None  # of the pass under way
        self.is_copying = False  # whether the pass under way, in any of its chunks, gives rows copies of their tails
        self.pending: list[tuple[Any, ...]] = []
        self.owner: weakref.ref[Any] | None = None  # the model whose weights made K and V, where that is patched
        self.held_by_user = True  # False only for a cache that `generate` made for itself and has not handed out
        # What `generate` is doing with the cache just now.
        self.generating = self.prefilling = self.assisted = self.fell_back = self.reads_blocks = False
        self.keeps_rows = False  # whether rows are computed to the end of the call, done or not
        self.copies_dense = True  # whether dense K and V have no gaps, as stock's: attention may rely on that
        self.root: PrefixRoot | None = None  # where tokens are found and kept; `None`: nothing is reused or kept
        self.alone: Any = None  # of a prompt whose rows are repeated: the call's arguments before that, as `Alone`
        # Found out once a loop of `generate`: what is fast, what that was tried in, and what CUDA graphs are good for.
        self.capability = self.circumstances = self.standing = None
        self.chunk_tokens: int | None = None  # packed ones per forward pass, where the caller limits them

    # -- what the rows hold --------------------------------------------------------------------------------------

    @property
    def tables(self) -> list[BlockTable]:
        """The rows' block tables."""
        return self.sequences.tables

    @property
    def pool(self) -> KVPool:
        """The pool; made when the first tokens come where the cache has one of its own."""
        if self.sequences.pool is None:
            raise ValueError("this PagedCache is empty")
        return self.sequences.pool

    def ensure_rows(self, batch_size: int) -> None:
        """Make tables for `batch_size` rows; `ValueError` where the cache has another number of them."""
        if not self.tables:
            root = None if self.root is None else self.root.key
            self.tables.extend(self.pool.manager.new_table(root) for _ in range(batch_size))
        elif len(self.tables) != batch_size:
            raise ValueError(
                f"{CACHE_NAME} holds {len(self.tables)} rows, the input has {batch_size}: pass as many rows as the "
                "cache was made with, or match them with batch_select_indices / batch_repeat_interleave"
            )

    def stored_columns(self) -> torch.Tensor:
        """`[batch, dense_len]` bool: which dense columns are stored (the others were padding)."""
        if self.columns is None:
            return torch.ones(len(self.tables), self.dense_len, dtype=torch.bool, device="cpu")
        return self.columns

    def columns_with(self, new: torch.Tensor | None, count: int) -> torch.Tensor | None:
        """`columns` with `count` more; `new [batch, count]` says which of these are stored, `None` all."""
        if new is None and self.columns is None:
            return None
        new = torch.ones(len(self.tables), count, dtype=torch.bool, device="cpu") if new is None else new
        return torch.cat([self.stored_columns(), new], dim=1)

    def add_columns(self, new: torch.Tensor | None, count: int) -> None:
        """Note `count` more dense columns, as `columns_with`."""
        self.columns = self.columns_with(new, count)
        self.dense_len += count

    def untrack(self) -> None:
        """Keep nothing of what the rows hold for later calls."""
        self.root = None
        for table in self.tables:
            table.untrack()

    def _is_tracked(self) -> bool:
        """Whether later calls may find what the rows hold: not where the model has changed since they began."""
        if self.root is not None and not self.root.keeps():
            self.untrack()
        return self.root is not None

    def index_rows(self, rows: Sequence[int] | None = None, *, with_tails: bool) -> None:
        """Let later calls find what the rows hold (all rows, or these); `with_tails` where they will not grow."""
        if self._is_tracked():
            for row in range(len(self.tables)) if rows is None else rows:
                self.pool.manager.index_table(self.tables[row], with_tails)

    def end_prompt(self) -> None:
        """The rows hold their prompts, and what follows is generated: later calls may begin with them."""
        self.alone = None  # which may be large
        self.index_rows(with_tails=False)
        for table in self.tables:
            table.prompt_tokens = table.num_tokens
        self.keep_states(range(len(self.tables)))
        self.lone = lone_rows(self.tables) if self.states else set()

    def end_answers(self) -> None:
        """Nothing more is generated: later calls may begin with all that the rows hold."""
        self.index_rows(with_tails=not self.held_by_user)
        self.keep_states(self.lone - self.ended)

    def keep_states(self, rows: Collection[int]) -> None:
        """Let later calls go on from the states that these rows are in, if their tokens say what these depend on."""
        if rows and not self.is_recording and self.states and all(map(is_whole, self.states)):
            places = [(self.tables[row], self.active_rows.index(row)) for row in rows]
            self.pool.kept_states.keep_rows(places, list(map(state_of, self.states)))

    @property
    def active_rows(self) -> list[int]:
        """Those that take part in decode steps, and that states are of."""
        return [row for row in range(len(self.tables)) if row not in self.finished]

    def finish_rows(self, done: Sequence[bool]) -> None:
        """Rows that are done give their blocks back and are left out of later passes; the last one stays.

        Passes that are stock-shaped compute every row, so nothing changes there.
        """
        ending = {row for row, is_done in enumerate(done) if is_done} - self.ended
        if ending & self.lone and self._is_tracked():
            self.keep_states(ending & self.lone)
        self.ended |= ending
        active = self.active_rows
        leaving = [row for row in active if row in self.ended][: len(active) - 1]
        if leaving and not self.keeps_rows and (self.reads_blocks or not self.fell_back):
            self.finished.update(leaving)
            self.index_rows(leaving, with_tails=True)
            self.pool.free([self.tables[row] for row in leaving])
            select_states(self.states, [active.index(row) for row in self.active_rows])

    def readmit_rows(self) -> None:
        """Finished rows take part again, without what they held: for a pass that must compute every row."""
        if self.finished:
            active = self.active_rows
            select_states(self.states, [active.index(row) if row in active else 0 for row in range(len(self.tables))])
            self.columns = self.stored_columns().clone()
            self.columns[list(self.finished)] = False
            for row in self.finished:
                self.tables[row] = self.pool.manager.new_table()
            self.finished.clear()

    def trim(self) -> None:
        """Give up what has fallen out of the layers' windows, unless a `crop` is still to bring some of it back.

        What a prompt has left stays for later calls with the same prompt, what was generated does not.
        """
        if not self.has_windows or self.is_recording:
            return
        manager = self.pool.manager
        if self.root is not None and (ending := [i for i, row in enumerate(self.tables) if manager.ends_prompt(row)]):
            self.index_rows(ending, with_tails=False)
        manager.trim(self.tables)
        manager.settle()

    @property
    def is_recording(self) -> bool:
        """Whether window layers keep what has fallen out, because a `crop` is still to bring some of it back."""
        return any(layer.record_past for layer in self.paged_layers)

    def roll_back(self, lengths: Sequence[int]) -> None:
        """A pass has failed: forget its tokens.

        Where it was to copy blocks, or has given up what the rows' windows saw, or has moved states on, something is
        lost: forget all.
        """
        moved_on = bool(self.states) and self.step is not None
        self.step, self.prepared, copying = None, None, self.is_copying
        self.sequences.unpin()
        if (copying and self.dense_len) or moved_on or not self.sequences.keep_first(lengths):
            self.release()
            return
        for layer in self.paged_layers:
            layer.move_to(self.dense_len)

    def release(self) -> None:
        """Give every block back at once; the cache is empty then."""
        self.sequences.free()
        self.forget()

    def forget(self) -> None:
        """Nothing was seen, and no pass is under way."""
        self.dense_len, self.columns, self.step, self.prepared, self.is_copying = 0, None, None, None, False
        self.finished, self.ended = set(), set()
        for layer in self.paged_layers:
            layer.seen = layer.kept = 0
        for layer in self.states:
            LinearAttentionLayer.reset(layer)

    # -- a forward pass ------------------------------------------------------------------------------------------

    def finish(self, new_columns: torch.Tensor | None, tokens_per_row: int) -> None:
        """The pass is done: its tokens count as seen by every layer that took part."""
        self.add_columns(new_columns, tokens_per_row)
        self.step, self.prepared, self.is_copying = None, None, False
        self.sequences.unpin()
        for layer in [each for each in self.paged_layers if each.seen != self.dense_len]:  # updates have moved others
            layer.move_to(self.dense_len)

    def begin_dense(
        self,
        tokens_per_row: int,
        new_columns: torch.Tensor | None = None,
        over_host: bool = False,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> Step:
        """Append `tokens_per_row` columns to every row, as a step whose layers return dense K and V.

        `new_columns [batch, tokens_per_row]` is False at padding, which is not stored. With `over_host` blocks of the
        rows may lie on the host. `tokens`: each row's, where ids say it all. Raises `PagedMemoryError`.
        """
        columns, sources = self.columns_with(new_columns, tokens_per_row), [range(tokens_per_row)] * len(self.tables)
        if columns is not None:
            sources = [row.nonzero().flatten().tolist() for row in columns[:, self.dense_len :]]
        counts = list(map(len, sources))
        if over_host:
            append = self.pool.appending(self.is_recording or self.dense_len > 0)
            append = partial(append, self.tables, counts, self.room_tokens, tokens)
            growth = self.pool.with_room(self.sequences.movable, append, sum(counts))
        else:
            growth = self.pool.append_dense(self.tables, counts, self.room_tokens)
        self.sequences.pins += growth.pins
        self.is_copying = bool(growth.pins)
        groups = [dense_plan(self.tables, *each, sources, tokens_per_row) for each in enumerate(growth.copies)]
        (plans, new), dense_len = zip(*groups, strict=True), self.dense_len + tokens_per_row
        self.begin(plans, dense_len, tokens_per_row, self.tables, columns)
        self.step.readers = dense_readers(self.pool.overflow, self.tables, new, dense_len, columns)
        return self.step

    def begin(self, plans: Sequence[StepPlan], *args: Any, **kwargs: Any) -> None:
        """Begin a pass with one plan a group; the other arguments are those of `Step`."""
        self.step = Step([plans[group] for group in self.pool.layer_groups], *args, **kwargs)

    def begin_unplanned(self, key: torch.Tensor) -> None:
        """The first layer of a pass that nobody planned: an unpatched model calls `update`."""
        if self.sequences.pool is None:
            self.sequences.pool = KVPool.of_cache(self.settings, self.windows, key)
        self.ensure_rows(key.shape[0])
        self.sequences.unpin()
        self.trim()
        self.begin_dense(key.shape[2]).planned = False
        self.add_columns(None, key.shape[2])

    # -- transformers.Cache --------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new K and V `[batch, kv_heads, tokens, dim]` of one layer; returns those of all tokens."""
        if torch.compiler.is_compiling():  # a compiled layer: it calls us, and goes on behind us
            return _update_uncompiled(self, key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        dense = None if self.prepared is None else self.prepared.update(layer.index, key_states, value_states)
        if dense is not None:
            return dense
        return layer.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Dense columns that a layer has seen, padding included; where it keeps no K and V, that the first has seen."""
        if layer_idx >= len(self.layers):
            return 0
        return self.paged_layers[self.layout.places[layer_idx] or 0].seen

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
        for place in self.layout.places:
            if place is None:
                yield None, None, None
            else:
                layer = self.paged_layers[place]
                window = None if layer.window is None else torch.tensor(layer.window, device="cpu")
                yield layer.keys, layer.values, window

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def is_linear(self) -> list[bool]:
        """Of each layer, whether it keeps a state and no K and V."""
        return [compat.keeps_state(layer) and not isinstance(layer, PagedLayer) for layer in self.layers]

    def reset(self) -> None:
        """Empty the cache; its blocks go back to the pool."""
        self.release()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-n` columns (n < 0), or keep the first `n` (n > 0, transformers up to 5.13).

        Raises `ValueError` where more are to be removed than there are.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        for layer in self.states:
            LinearAttentionLayer.crop(layer, tokens_to_remove)
        keep = self.dense_len + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if tokens_to_remove == 0 and compat.crop_zero_empties():
            keep = 0
        if keep < 0:
            raise ValueError(
                f"crop({tokens_to_remove}) removes more tokens than the {self.dense_len} that {CACHE_NAME} holds"
            )
        if keep < self.dense_len:
            self._go_back(tokens_to_remove, keep)
        if self.has_windows and self.tables:
            self.pool.manager.trim(self.tables)
        for layer in self.paged_layers:
            layer.move_to(min(layer.seen, keep))

    def _go_back(self, tokens_to_remove: int, keep: int) -> None:
        counts = [keep] * len(self.tables) if self.columns is None else self.columns[:, :keep].sum(dim=1).tolist()
        if not self.sequences.keep_first(counts):
            raise ValueError(
                f"crop({tokens_to_remove}): the sliding-window layers of {CACHE_NAME} have given up what lay before "
                f"their window; call {CACHE_NAME}.activate_past_recording() before the tokens that are to be removed"
            )
        if self.columns is not None:
            self.columns = self.columns[:, :keep]
        self.dense_len = keep

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `i` continues what row `beam_idx[i]` holds: a permutation of tables, no data moves."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times in a row."""
        self._select([row for row in range(len(self.tables)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the rows `indices`: numbers (negative ones count from the end) or a mask, in a tensor or a list."""
        self._select(indices)

    def _select(self, indices: Any) -> None:
        if not self.tables:
            return
        rows = chosen_rows(indices, len(self.tables))
        if rows == list(range(len(self.tables))):
            return
        self.sequences.select(rows)
        if self.columns is not None:
            self.columns = self.columns[rows]
        select_states(self.states, rows)

    def activate_past_recording(self) -> None:
        """Window layers keep what falls out of their window from now on, and show it, until the next `crop`.

        States that stock can go back to are kept as well.
        """
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """A cache that continues on its own and shares the blocks until one of the two changes them."""
        twin = PagedCache(self.model_config, pool=self.sequences.pool, settings=self.settings, layout=self.layout)
        memo[id(self)] = twin
        if self.tables:
            twin.tables.extend(self.pool.manager.fork(table) for table in self.tables)
        twin.room_tokens, twin.dense_len = self.room_tokens, self.dense_len
        twin.columns = None if self.columns is None else self.columns.clone()
        twin.finished = set(self.finished)
        twin.root = self.root
        twin.keeps_rows, twin.copies_dense = self.keeps_rows, self.copies_dense
        twin.owner, twin.held_by_user = self.owner, True
        for mine, theirs in zip(self.states, twin.states, strict=True):
            vars(theirs).update(deepcopy(state_of(mine), memo))
        for mine, theirs in zip(self.paged_layers, twin.paged_layers, strict=True):
            theirs.seen, theirs.kept, theirs.record_past = mine.seen, mine.kept, mine.record_past
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(as_stock(self))

    def __repr__(self) -> str:
        return f"PagedCache(rows={len(self.tables)}, tokens={self.dense_len}, layers={len(self.layers)})"


_update_uncompiled = torch.compiler.disable(PagedCache.update)
