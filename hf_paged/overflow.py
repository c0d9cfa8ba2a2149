"""Running sequences that no longer fit the device: part of their blocks goes to host memory, and passes read it there.

    pool ──full blocks of the call that asks──▶ host ══layer by layer, in two areas══▶ attention
      ▲                                          │
      └───────── all of them, where they fit ◀───┘

A call moves its own blocks only, such as nobody else holds: others may be in the midst of a pass that reads theirs. The
memory is lent by the host tier, a slab at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_paged.backends import AttentionBackend
from hf_paged.backends.staged import MAX_PART_TOKENS, StagedBackend, blocks_read_on_host, host_reads
from hf_paged.core.apart import append_apart, outdated_blocks, whole_new_blocks
from hf_paged.core.blocks import OutOfBlocks
from hf_paged.core.manager import BlockManager
from hf_paged.core.overflow import HOST_BLOCKS, movable, on_host, relocate
from hf_paged.core.plan import Growth, StepPlan
from hf_paged.core.table import BlockTable
from hf_paged.dense import DenseView, NewElsewhere
from hf_paged.dense_host import HostLayers, OverHost
from hf_paged.layout import RecordLayout
from hf_paged.levels import first_line
from hf_paged.mover import BlockMover
from hf_paged.staging import Place, Slab, Staging, in_order, stretches
from hf_paged.stats import Counters
from hf_paged.store import LayerStore
from hf_paged.streams import SideStream
from hf_paged.tiers import Tiers

# Of the pool's budget, at the most, for each of two stages on the way to the host and two areas on the way back.
STAGE_SHARE = 1 / 64
STAGE_BYTES = 64 * 2**20


class UnseenLayers(OutOfBlocks):
    """The host has room for new blocks, but what the layers keep is not known before they were seen once."""


class Overflow:
    """Blocks that running sequences hold on the host. Bookkeeping is done under the manager's lock.

    Args:
        manager: whose sequences these are.
        group: number of that of the layers that keep all tokens; blocks of windows stay on the device.
        stores: of the manager's layers; nothing is moved before those of the group are there.
        side: of the pool's device.
        host_bytes: what the host tier may take.
        counters: told of bytes and faults.

    Attributes:
        group: as given.
        lender: has the host memory.
    """

    def __init__(
        self,
        manager: BlockManager,
        group: int,
        stores: Sequence[LayerStore | None],
        side: SideStream | None,
        host_bytes: int,
        counters: Counters,
    ):
        self._manager, self.group, self._all_stores, self._side = manager, group, stores, side
        self._host_bytes, self._counters = host_bytes, counters
        self._pool = manager.pools[group]
        self._stores: list[LayerStore] = []
        self._layouts: list[RecordLayout] = []
        self._mover: BlockMover | None = None
        self._slabs: list[Slab] = []
        self.lender: Tiers | None = None

    def __len__(self) -> int:
        return len(self._pool.overflow)

    @property
    def staging_bytes(self) -> int:
        """Device memory that blocks pass through on their way to the host."""
        return 0 if self._mover is None else self._mover.staging_bytes

    def give_back(self) -> None:
        """Wait for all copies, and give that memory up until it is needed again. Blocks on the host stay."""
        if self._mover is not None:
            self._mover.release()

    def could_hold(self, error: OutOfBlocks) -> bool:
        """Whether the host is large enough for what was wanted and not available, were nothing but that there."""
        with self._manager.lock:
            return self._missing(error) <= self._host_bytes // self._pool.block_bytes - len(self)

    def _missing(self, error: OutOfBlocks) -> int:
        """Blocks of the group that must go for what was wanted; none where there is room by now."""
        missing_bytes = error.wanted_bytes - self._manager.budget.free_bytes
        return max(0, -(-missing_bytes // self._pool.block_bytes), error.wanted - self._pool.free_ids)

    # -- down ----------------------------------------------------------------------------------------------------

    def make_room(self, tables: Sequence[BlockTable], error: OutOfBlocks) -> bool:
        """Move blocks of `tables` to the host, as many as were wanted and not available; whether that was possible."""
        manager = self._manager
        with manager.lock:
            count = max(1, self._missing(error))
            blocks = movable(manager, tables, self.group)
            if len(blocks) < count or not self._is_open():
                return False
            return self._move(tables, blocks[:count][::-1])

    def append(
        self,
        tables: Sequence[BlockTable],
        counts: Sequence[int],
        room_tokens: int,
        tokens: Sequence[Sequence[int]] | None,
        keeps_past: bool,
    ) -> Growth:
        """`BlockManager.append`, with new blocks on the host where the device has no room: such as the tokens fill.

        Unless it `keeps_past`, nothing is kept of a first prompt that falls out of a window with its last token. For
        passes that put K and V there as they come. Raises `OutOfBlocks`, and `UnseenLayers` before the layers' K and V
        were seen where the host has room.
        """
        with self._manager.lock:
            try:
                return self._manager.append(tables, counts, room_tokens, tokens)
            except OutOfBlocks as error:
                given = self._given(tables, counts, error, keeps_past)
                if given is None:
                    raise
            try:
                return append_apart(self._manager, tables, counts, room_tokens, given, tokens)
            except BaseException:
                self._pool.drop([block for each in given for block in each[self.group]])
                raise

    def _given(
        self, tables: Sequence[BlockTable], counts: Sequence[int], error: OutOfBlocks, keeps_past: bool
    ) -> list[list[list[int]]] | None:
        """By table and group: new blocks that take nothing of the device; `None` where there are none."""
        spare, pools = list(map(whole_new_blocks, tables, counts)), self._manager.pools
        given = [[[] for _ in pools] for _ in tables]
        if not keeps_past:
            given = [outdated_blocks(self._manager, *each) for each in zip(tables, counts, strict=True)]
        saved_bytes = sum(
            len(blocks) * pool.block_bytes for each in given for blocks, pool in zip(each, pools, strict=True)
        )
        error = OutOfBlocks(error.wanted, error.available, error.wanted_bytes - saved_bytes)
        if None in self._all_stores and self.could_hold(error):
            raise UnseenLayers(error.wanted, error.available, error.wanted_bytes)
        places = self._take_places(min(sum(spare), self._missing(error))) if any(spare) and self._is_open() else None
        if places is None:
            return None
        blocks = [self._pool.overflow.add(place) for place in places]
        self._pool.share(blocks)
        for each, most in zip(given, spare, strict=True):
            each[self.group], blocks = blocks[:most], blocks[most:]
        return given

    def _is_open(self) -> bool:
        """Whether blocks can be moved; found out when the layers' shapes are known."""
        if self._mover is None:
            groups = [store for store in self._all_stores if store is None or store.group == self.group]
            if None in groups or len({store.keys.device for store in groups}) > 1:
                return False
            self._stores = groups
            self._layouts = [RecordLayout([store], self._manager.block_size) for store in groups]
            stage_bytes = min(STAGE_BYTES, int(self._manager.budget.limit_bytes * STAGE_SHARE))
            self._mover = BlockMover(self._layouts, self._side, stage_bytes)
        return True

    def _move(self, tables: Sequence[BlockTable], blocks: Sequence[int]) -> bool:
        places = self._take_places(len(blocks))
        if places is None:
            return False
        try:
            for layer in range(len(self._layouts)):
                self._mover.read(layer, blocks, [rows.of(layer) for rows in stretches(places)])
        except BaseException as error:
            self._mover.settle()
            _free(places)
            if not isinstance(error, Exception):
                raise
            self._counters.fall_back(f"overflow: {first_line(error)}")
            return False
        moves = {}
        for block, place in zip(blocks, places, strict=True):
            moves[block] = self._pool.overflow.add(place)
        relocate(self._manager, tables, self.group, moves)
        self._counters.add(offloaded_bytes=len(blocks) * self._record_bytes)
        return True

    @property
    def _record_bytes(self) -> int:
        return sum(layout.record_bytes for layout in self._layouts)

    def _take_places(self, count: int) -> list[Place] | None:
        self._slabs = [slab for slab in self._slabs if slab.layers]  # the others were given back
        places: list[Place] = []
        while len(places) < count:
            slab = next((slab for slab in self._slabs if slab.has_room), None) or self._borrow()
            if slab is None:
                _free(places)
                return None
            places += [Place(slab, row) for row in slab.take(count - len(places))]
        return places

    def _borrow(self) -> Slab | None:
        loan = self.lender.lend(self.group)
        if loan is None:
            return None
        slab = Slab(loan.memory, [layout.record_bytes for layout in self._layouts], loan.give_back)
        self._slabs.append(slab)
        return slab

    # -- up ------------------------------------------------------------------------------------------------------

    def bring_back_tails(self, tables: Sequence[BlockTable]) -> None:
        """Bring those blocks back that are written to next, because a sequence was cropped. Raises `OutOfBlocks`."""
        if len(self):
            tails = [table.chains[self.group].blocks[-1] for table in tables if table.tail_tokens]
            self._bring_back(tables, [block for block in dict.fromkeys(tails) if block >= HOST_BLOCKS])

    def bring_back(self, tables: Sequence[BlockTable]) -> None:
        """Bring all blocks of `tables` back. Raises `OutOfBlocks`."""
        if len(self):
            self._bring_back(tables, on_host(tables, self.group))

    def bring_back_where_ample(self, tables: Sequence[BlockTable]) -> None:
        """The same, where at least as much is free then as comes back: others have ended."""
        if len(self):
            blocks = on_host(tables, self.group)
            with self._manager.lock:
                if 2 * len(blocks) <= self._pool.available:
                    self._bring_back(tables, blocks)

    def _bring_back(self, tables: Sequence[BlockTable], blocks: Sequence[int]) -> None:
        if not blocks:
            return
        manager, group = self._manager, self.group
        with manager.lock:
            counts = [len(blocks) if each == group else 0 for each in range(len(manager.pools))]
            taken = manager.take_runs(counts, [0] * len(counts), 0)[group]
            try:
                places = [self._pool.overflow.place(block) for block in blocks]
                order = in_order(places)
                places, into = [places[i] for i in order], [taken[i] for i in order]
                for layer in range(len(self._layouts)):
                    self._mover.write(layer, into, [rows.of(layer) for rows in stretches(places)])
                relocate(manager, tables, group, dict(zip(blocks, taken, strict=True)))
            finally:
                self._mover.settle()  # whoever reads them, or gets them after an error, comes later
                manager.unpin([(group, block) for block in taken])
        self._counters.add(fetched_bytes=len(blocks) * self._record_bytes)

    # -- reading -------------------------------------------------------------------------------------------------

    def over_host(self, backend: AttentionBackend, plans: Sequence[StepPlan]) -> AttentionBackend:
        """The backend of a step with these plans, one a group: `backend` where nothing that they read is here."""
        plan, size = plans[self.group], self._manager.block_size
        blocks = blocks_read_on_host(plan, size) if len(self) else []
        if not blocks:
            return backend
        places = [self._pool.overflow.place(block) for block in blocks]
        order = in_order(places)
        places, blocks = [places[i] for i in order], [blocks[i] for i in order]
        staging = Staging(self._layouts, places, self._side, self._part_blocks)
        reads = host_reads(plan, blocks, self._part_blocks, size, self._layouts[0].device)
        self._counters.add(fetched_bytes=len(blocks) * self._record_bytes)
        return StagedBackend(backend, plan, self._stores, staging, reads)

    def dense(self, view: DenseView, new: NewElsewhere) -> OverHost:
        """Reads the rows of a stock-shaped pass, and puts there what of its tokens goes to `new` blocks."""
        size = self._manager.block_size
        layers = HostLayers(self._stores, self._layouts, self._mover, self._side, self._part_blocks, size)
        reader = OverHost(layers, view, new, self._pool.overflow.place)
        self._counters.add(
            fetched_bytes=reader.num_fetched * self._record_bytes, offloaded_bytes=reader.num_sent * self._record_bytes
        )
        return reader

    @property
    def _part_blocks(self) -> int:
        """Blocks of a part: what an area holds, and what is attended to at once."""
        area_bytes = self._manager.budget.limit_bytes * STAGE_SHARE
        fits = int(area_bytes) // max(layout.record_bytes for layout in self._layouts)
        return max(1, min(fits, MAX_PART_TOKENS // self._manager.block_size))


def _free(places: Sequence[Place]) -> None:
    for place in places:
        place.free()
