"""Stock-shaped passes over rows of which some blocks lie on the host: K and V are dense, one layer at a time.

key, value of the pass ──▶ blocks of the pool     ──┐
                       ──▶ new blocks on the host   ├──▶ dense K and V of this layer, until its attention is done
older blocks on the host ══in two areas══▶        ──┘
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from hf_paged.core.overflow import HOST_BLOCKS
from hf_paged.core.plan import StepPlan
from hf_paged.core.table import BlockTable
from hf_paged.dense import DenseView, NewElsewhere
from hf_paged.layout import RecordLayout
from hf_paged.mover import BlockMover
from hf_paged.staging import PartReads, Place, Staging, in_order, reads_by_part, stretches
from hf_paged.store import LayerStore
from hf_paged.streams import SideStream

if TYPE_CHECKING:
    from hf_paged.overflow import Overflow

Dense = tuple[torch.Tensor, torch.Tensor]


class AsComputed:
    """Layers of rows that hold nothing but what the pass computes, and are not to keep all of that."""

    def update(self, store: LayerStore, plan: StepPlan, key: torch.Tensor, value: torch.Tensor) -> Dense:
        """Store what the plan says of K and V `[rows, kv_heads, columns, dim]`; returns all of it as it is stored."""
        key, value = store.encoded(key, value)
        store.write_stored(plan, key, value)
        return store.keys_of(key), store.values_of(value)


class HostLayers(NamedTuple):
    """Layers whose blocks may lie on the host, and the ways there and back.

    Attributes:
        stores, layouts: of each layer.
        mover: to the host, through device memory that it has.
        side: of the device.
        part_blocks: blocks that come back at a time.
        block_size: tokens per block.
    """

    stores: Sequence[LayerStore]
    layouts: Sequence[RecordLayout]
    mover: BlockMover
    side: SideStream | None
    part_blocks: int
    block_size: int


class OverHost:
    """The layers of one pass.

    Args:
        layers: these.
        view: of the rows, the new tokens included.
        new: which of these go to the host.
        place_of: where a block on the host lies.

    Attributes:
        num_fetched, num_sent: blocks that come from the host, and that go there.
    """

    def __init__(self, layers: HostLayers, view: DenseView, new: NewElsewhere, place_of: Callable[[int], Place]):
        self._layers, self._shape = layers, view.shape
        device, size = layers.layouts[0].device, layers.block_size
        slots = view.slots().flatten()
        on_device = ((slots > 0) & (slots < HOST_BLOCKS)).nonzero().flatten()  # slot 0 stands for padding
        on_host = (slots >= HOST_BLOCKS).nonzero().flatten()

        new_slots, order = torch.tensor(new.slots, dtype=torch.long, device="cpu").sort()
        sources = torch.tensor(new.sources, dtype=torch.long, device="cpu")[order]
        is_new = torch.isin(slots[on_host], new_slots)
        new_at, old_at = on_host[is_new], on_host[~is_new]
        here = sources[torch.searchsorted(new_slots, slots[new_at])]
        self._from_pool = on_device.to(device), slots[on_device].to(device)
        self._from_pass = new_at.to(device), here.to(device)

        blocks, places = _by_place((new_slots // size).unique(), place_of)
        self._sources = sources.view(-1, size)[blocks].to(device)
        self._rows = stretches(places)
        self.num_sent = len(places)

        known = (slots[old_at] // size).unique()
        order, places = _by_place(known, place_of)
        self.num_fetched = len(places)
        self._staging, self._from_host = None, []
        if places:
            parts = reads_by_part(slots[old_at], known[order].tolist(), layers.part_blocks, size)
            self._from_host = [PartReads(old_at[index].to(device), inside.to(device)) for index, inside in parts]
            self._staging = Staging(layers.layouts, places, layers.side, layers.part_blocks)

    def update(self, store: LayerStore, plan: StepPlan, key: torch.Tensor, value: torch.Tensor) -> Dense:
        """Store K and V `[rows, kv_heads, columns, dim]` of the pass; returns all that rows have, zeros at padding."""
        layer = next(i for i, each in enumerate(self._layers.stores) if each is store)
        stored = store.encoded(key, value)
        store.write_stored(plan, *stored)
        stored = [each.transpose(0, 1).flatten(1, 2) for each in stored]
        if self._rows:
            self._layers.mover.send(layer, partial(self._fill, layer, stored), [rows.of(layer) for rows in self._rows])
        dense = [each.new_zeros(each.shape[0], self._shape.numel(), each.shape[2]) for each in stored]
        _put(dense, (store.keys, store.values), *self._from_pool)
        _put(dense, stored, *self._from_pass)
        if self._staging is not None:
            for part, come in zip(self._from_host, self._staging.read(layer), strict=True):
                _put(dense, come, *part)
        keys, values = (each.unflatten(1, self._shape).transpose(0, 1) for each in dense)
        return store.keys_of(keys), store.values_of(values)

    def _fill(self, layer: int, stored: Sequence[torch.Tensor], part: range, records: torch.Tensor) -> None:
        sources = self._sources[part.start : part.stop].flatten()
        self._layers.layouts[layer].set_tokens(records, *(each.index_select(1, sources) for each in stored))


def dense_readers(
    overflow: Overflow | None,
    tables: Sequence[BlockTable],
    new: Sequence[NewElsewhere],
    dense_len: int,
    columns: torch.Tensor | None,
) -> dict[int, AsComputed | OverHost]:
    """Who gives a stock-shaped pass its K and V, by group, where the device does not hold all that it reads.

    `tables` have `dense_len` columns, the `new` tokens of each group included; `columns [rows, dense_len]` says which
    are stored.
    """
    readers = {group: AsComputed() for group, each in enumerate(new) if each.left_out}
    if overflow is not None and any(table.chains[overflow.group].reaches_host for table in tables):
        view = DenseView(tables, overflow.group, dense_len, columns)
        readers[overflow.group] = overflow.dense(view, new[overflow.group])
    return readers


def _by_place(blocks: torch.Tensor, place_of: Callable[[int], Place]) -> tuple[list[int], list[Place]]:
    """An order of blocks on the host in which neighbours follow one another, and where they lie."""
    places = [place_of(block) for block in blocks.tolist()]
    order = in_order(places)
    return order, [places[i] for i in order]


def _put(dense: Sequence[torch.Tensor], given: Sequence[torch.Tensor], at: torch.Tensor, slots: torch.Tensor) -> None:
    """K and V of `slots` of what is given, `[kv_heads, slots, dim]`, to places `at` of the dense ones."""
    for whole, part in zip(dense, given, strict=True):
        whole.index_copy_(1, at, part.index_select(1, slots))
