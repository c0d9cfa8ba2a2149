"""The manager: sequences' tables on top of the pools and the prefix index, with fork, copy-on-write and crop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter

from hf_paged.core.blocks import NULL_BLOCK, BlockPool, OutOfBlocks
from hf_paged.core.budget import Budget
from hf_paged.core.chain import BlockChain
from hf_paged.core.forks import new_rlock, tell_forks
from hf_paged.core.integrity import check_integrity
from hf_paged.core.plan import Copy, Growth, Pin
from hf_paged.core.prefix import Entry, PrefixIndex, are_plain, chain_key, seen_from
from hf_paged.core.table import BlockTable
from hf_paged.core.whole import whole


class BlockManager:
    """Owns the pools, the prefix index and every live table. Operations are short, hold `lock` and touch no tensors.

    A *group* is the layers that keep the same tokens: all of them, or those of a sliding window. Each has a pool of its
    own; all pools share one budget. A table takes and gives blocks in all groups alike, except that `trim` gives up
    what has fallen out of a window.

    A block that several tables hold is never written, nor is that part of a block which is indexed: `append` gives the
    table a block of its own and says which slots are to be copied. An operation that raises `OutOfBlocks` has changed
    nothing.

    Args:
        num_blocks: block ids of each group, that of the null block included.
        block_size: tokens per block.
        windows: of each group, in tokens; `None` keeps all tokens.
        block_bytes: what a block of each group costs; by default 1.
        budget_bytes: for all groups together; by default enough for every id.
        find_limit: as `Budget` takes it.

    Attributes:
        is_torn: whether an operation was left half done, by an exception from nowhere; then nothing is found here.
    """

    def __init__(
        self,
        num_blocks: int | Sequence[int],
        block_size: int,
        windows: Sequence[int | None] = (None,),
        block_bytes: Sequence[int] | None = None,
        budget_bytes: int | None = None,
        find_limit: Callable[[int], int] | None = None,
    ):
        ids = [num_blocks] * len(windows) if isinstance(num_blocks, int) else num_blocks
        costs = [1] * len(windows) if block_bytes is None else block_bytes
        enough = sum(count * cost for count, cost in zip(ids, costs, strict=True))
        self.block_size = block_size
        self.windows = tuple(windows)
        self.index = PrefixIndex(block_size, windows)
        self.budget = Budget(enough if budget_bytes is None else budget_bytes, find_limit)
        self.pools = [
            BlockPool(count, partial(self.index.forget, group), None, self.budget, cost)
            for group, (count, cost) in enumerate(zip(ids, costs, strict=True))
        ]
        self.lock = new_rlock()
        tell_forks(self, self.lock)
        self.copied_blocks = 0
        self.is_torn = False
        self._tables: dict[int, BlockTable] = {}
        self._pinned: Counter[Pin] = Counter()

    def after_fork(self, was_locked: bool) -> None:
        """In a forked process nobody ends what another thread has begun."""
        self.is_torn |= was_locked

    @property
    def in_use(self) -> int:
        """Blocks that tables hold, in all groups."""
        return sum(pool.in_use for pool in self.pools)

    @property
    def cached(self) -> int:
        """Blocks that no table holds and whose content is kept, in all groups."""
        return sum(pool.cached for pool in self.pools)

    @property
    def evicted(self) -> int:
        """Blocks whose content was given up for their memory, in all groups."""
        return sum(pool.evicted for pool in self.pools)

    @property
    def available(self) -> int:
        """Blocks that tables could take in every group at once."""
        ids = min(pool.free_ids for pool in self.pools)
        return max(0, min(ids, self.budget.free_bytes // sum(pool.block_bytes for pool in self.pools)))

    @whole
    def new_table(self, root: bytes | None = None) -> BlockTable:
        """An empty table, live until `free`; `root` is where its tokens are looked for and kept in the prefix index."""
        table = BlockTable(self.block_size, len(self.pools), root)
        self._tables[id(table)] = table
        return table

    @whole
    def fork(self, source: BlockTable, num_tokens: int | None = None) -> BlockTable:
        """A new table that shares the first `num_tokens` tokens of `source` (default: all)."""
        table = self.new_table()
        self.assign(table, source, source.num_tokens if num_tokens is None else num_tokens)
        return table

    @whole
    def assign(self, target: BlockTable, source: BlockTable, num_tokens: int) -> list[Pin]:
        """Make `target` share the first `num_tokens` tokens of `source`.

        Returns the blocks that it held before, pinned: pending copies may still read them.
        """
        num_blocks = source.blocks_for(num_tokens)
        for pool, chain in zip(self.pools, source.chains, strict=True):
            pool.share(chain.blocks[chain.dropped : num_blocks])
        for group, chain in enumerate(target.chains):
            self._unclaim(group, chain)
        before = [(group, block) for group, blocks in enumerate(target.truncate(0)) for block in blocks]
        target.copy_from(source, num_tokens)
        self._pinned.update(before)
        return before

    @whole
    def unpin(self, pins: Sequence[Pin]) -> None:
        """Let go of blocks that `append`, `assign`, `hold_prefixes`, `hold` and the like have pinned."""
        self._pinned.subtract(pins)
        for group, each in groupby(pins, key=itemgetter(0)):
            self._drop(group, [block for _, block in each])

    def blocks_needed(self, table: BlockTable, num_tokens: int) -> int:
        """Blocks that appending `num_tokens` tokens to `table` takes from each pool."""
        return self._blocks_needed(table, num_tokens, self.must_leave_tail(table), False)

    def _blocks_needed(self, table: BlockTable, num_tokens: int, leaves: bool, parts: bool) -> int:
        if num_tokens == 0:
            return 0
        if parts:
            return -(-num_tokens // self.block_size)
        return table.blocks_for(table.num_tokens + num_tokens) - table.num_blocks + leaves

    def must_leave_tail(self, table: BlockTable) -> bool:
        """Whether the next token of `table` would fall into a block that others hold too, or may yet find."""
        filled = table.tail_tokens
        if filled == 0:
            return False
        for group, (pool, chain) in enumerate(zip(self.pools, table.chains, strict=True)):
            tail = chain.blocks[-1]
            if pool.references(tail) > 1 or self.index.is_fixed(group, tail, filled):
                return True
        return False

    @whole
    def append(
        self,
        tables: Sequence[BlockTable],
        num_tokens: int | Sequence[int],
        room_tokens: int = 0,
        tokens: Sequence[Sequence[int]] | None = None,
        may_part: bool = False,
    ) -> Growth:
        """Make room for `num_tokens` more tokens in each table; `room_tokens` more are expected later.

        `tokens` are their ids; without them, or with numbers that are no plain ids, a table is not indexed any more.
        Every table whose tail block is shared gets a tail of its own, all of them, so that none writes into what
        another is yet to copy. With `may_part` forked tables leave it where it is and go on behind it, once a table:
        beams part again and again; were each time to leave a block behind, there would be many of a few tokens.
        Raises `OutOfBlocks`.
        """
        counts = [num_tokens] * len(tables) if isinstance(num_tokens, int) else num_tokens
        leaves = [self.must_leave_tail(table) for table in tables]
        parts = [
            may_part and leave and table.is_forked and table.seam_blocks == 0
            for table, leave in zip(tables, leaves, strict=True)
        ]
        each = list(zip(tables, counts, leaves, parts, strict=True))
        begun_runs = sum(count > 0 and (leave or not table.num_blocks) for table, count, leave, _ in each)
        rooms = [-(-self._room(group, room_tokens) // self.block_size) for group in range(len(self.pools))]
        hoped = [begun_runs * blocks for blocks in rooms]
        self.check_room(sum(self._blocks_needed(*one) for one in each), hoped)
        growth = Growth([[] for _ in self.pools], [])
        for table, count, leave, part in each:
            if part and count:
                table.open_seam()
            self._append(table, count, room_tokens, leave and not part, growth)
        self._pinned.update(growth.pins)
        for i, table in enumerate(tables):
            table.track(None if tokens is None else tokens[i])
        return growth

    def _room(self, group: int, room_tokens: int) -> int:
        """What a group keeps behind a sequence: windows go on over what they have left behind."""
        window = self.windows[group]
        return room_tokens if window is None else min(room_tokens, window)

    def check_room(self, num_blocks: int, hoped: Sequence[int] | None = None) -> None:
        """Give up cached blocks until `num_blocks` are free in each pool; `OutOfBlocks` where fewer are available."""
        if num_blocks:
            self.make_room([num_blocks] * len(self.pools), hoped)

    @whole
    def make_room(self, counts: Sequence[int], hoped: Sequence[int] | None = None) -> None:
        """Give up cached blocks until there is room for `counts[group]` more blocks in each pool, or `OutOfBlocks`.

        Memory that has to be asked for is there then, if possible for `hoped[group]` more. All of that
        before anything else changes, because giving up may take time and be interrupted.
        """
        num_bytes = sum(count * pool.block_bytes for count, pool in zip(counts, self.pools, strict=True))
        self.budget.look_up(num_bytes)
        short = any(count > pool.available for count, pool in zip(counts, self.pools, strict=True))
        if short or num_bytes > self.budget.free_bytes:
            raise OutOfBlocks(max(counts), self.available, num_bytes)
        self.budget.make_room(num_bytes)
        for count, pool in zip(counts, self.pools, strict=True):
            pool.make_room(count)
        self.budget.fit(counts)
        for count, room, pool in zip(counts, hoped or [0] * len(counts), self.pools, strict=True):
            pool.get_memory(count, room)

    def _append(self, table: BlockTable, num_tokens: int, room_tokens: int, leaves: bool, growth: Growth) -> None:
        total = table.num_tokens + num_tokens
        total_blocks = table.blocks_for(total)
        filled = table.tail_tokens if num_tokens and leaves else 0
        for group, chain in enumerate(table.chains):
            window = self.windows[group]
            room_blocks = table.blocks_for(total + self._room(group, room_tokens)) - total_blocks
            if filled:
                (shared,) = chain.truncate(len(chain.blocks) - 1)
                # The copy and what follows it are taken together, so that they lie side by side.
                self._extend(table, group, total_blocks, None, room_blocks)
                own = chain.blocks[table.whole_blocks(table.num_tokens)]
                growth.copies[group].append(Copy(shared * self.block_size, own * self.block_size, filled))
                growth.pins.append((group, shared))
                self.copied_blocks += 1
            elif len(chain.blocks) < total_blocks:
                # Behind a seam all rows look for room of their own, so that they come to lie at equal distance.
                goes_on = len(chain.blocks) > table.seam_blocks
                if goes_on and window is not None and not chain.has_claimed(chain.blocks[-1] + 1):
                    self._unclaim(group, chain)  # its own blocks of before come next, not new ones behind the last
                    goes_on = False
                self._extend(table, group, total_blocks, chain.blocks[-1] if goes_on else None, room_blocks)
        table.num_tokens = total

    def _extend(self, table: BlockTable, group: int, num_blocks: int, after: int | None, room: int) -> None:
        chain = table.chains[group]
        blocks, claim = self.pools[group].take(num_blocks - len(chain.blocks), after, room)
        chain.extend(blocks)
        if claim:
            chain.claims.append(claim)

    @whole
    def crop(self, table: BlockTable, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens; only where `reaches(table, num_tokens)`."""
        for group, blocks in enumerate(table.truncate(table.blocks_for(num_tokens))):
            self._drop(group, blocks)
        if num_tokens < table.seam_tokens:
            table.seam_tokens = table.seam_blocks = 0
        table.num_tokens = num_tokens
        table.prompt_tokens = min(table.prompt_tokens, num_tokens)
        del table.tokens[num_tokens:]
        del table.keys[table.whole_blocks(num_tokens) :]

    def reaches(self, table: BlockTable, num_tokens: int) -> bool:
        """Whether `table` still has what the token behind its first `num_tokens` tokens looks at, in every window."""
        return num_tokens == 0 or all(
            chain.first_token <= seen_from(num_tokens, window)
            for chain, window in zip(table.chains, self.windows, strict=True)
        )

    @whole
    def trim(self, tables: Sequence[BlockTable]) -> None:
        """Give up the blocks that have fallen out of their group's window; those that are indexed stay cached."""
        for table in tables:
            for group, gone in self._fallen_out(table):
                self._drop(group, table.chains[group].drop_front(gone))

    def ends_prompt(self, table: BlockTable) -> bool:
        """Whether `trim` would give up the last block of the table's prompt, which may not be indexed yet."""
        last = table.blocks_for(table.prompt_tokens) - 1
        return any(table.chains[group].dropped <= last < gone for group, gone in self._fallen_out(table))

    def _fallen_out(self, table: BlockTable) -> Iterator[tuple[int, int]]:
        """Groups, and the number of blocks before their windows where that is more than were given up already."""
        for group, window in enumerate(self.windows):
            if window is not None:
                gone = table.whole_blocks(seen_from(table.num_tokens, window))
                if gone > table.chains[group].dropped:
                    yield group, gone

    @whole
    def free(self, table: BlockTable) -> None:
        """Give up the table; freeing twice is harmless."""
        if self._tables.pop(id(table), None) is not None:
            self._empty(table)

    @whole
    def settle(self) -> None:
        """Let the system have the memory that the sequences which are left do not need."""
        self.budget.settle(sum(table.num_tokens > 0 for table in self._tables.values()))

    def _empty(self, table: BlockTable) -> None:
        for group, chain in enumerate(table.chains):
            self._unclaim(group, chain)
        used = [[chain.blocks[i] for chain in table.chains] for i in range(len(table.keys))]
        for group, blocks in enumerate(table.truncate(0)):
            self._drop(group, blocks)
        table.num_tokens = table.prompt_tokens = 0
        table.tokens.clear()
        for key, mine in zip(table.keys[::-1], used[::-1], strict=True):
            # Where another block holds the same content, that one was used, ends before roots.
            for group, block in enumerate(self.index.blocks_of(key) or ()):
                if mine[group] != NULL_BLOCK:
                    self.pools[group].touch(block)

    def _drop(self, group: int, blocks: Sequence[int]) -> None:
        """One reference less; a block that is indexed stays cached."""
        self.pools[group].drop(blocks, keep=self.index.by_block[group].__contains__)

    def _unclaim(self, group: int, chain: BlockChain) -> None:
        for claim in chain.claims:
            self.pools[group].unclaim(claim)
        chain.claims.clear()

    # -- prefixes ------------------------------------------------------------------------------------------------

    @whole
    def match(self, table: BlockTable, tokens: Sequence[int], limit: int) -> int:
        """Let an empty table begin with blocks of earlier sequences that hold its `tokens`, at most `limit` of them.

        Returns the number of tokens that need not be computed.
        """
        if table.root is None or self.is_torn or not are_plain(tokens):
            return 0
        found = self.index.match(table.root, tokens, limit)
        table.seam_blocks, table.seam_tokens = found.seam_blocks, found.seam_tokens
        for pool, chain, blocks in zip(self.pools, table.chains, found.blocks, strict=True):
            chain.extend(blocks)
            pool.share(chain.held)
        table.num_tokens = found.num_tokens
        table.tokens, table.keys = list(tokens[: found.num_tokens]), found.keys
        return found.num_tokens

    def common_tokens(self, root: bytes, tokens: Sequence[int], limit: int) -> int:
        """How many of `tokens`, at most `limit`, earlier sequences that are still there begin with as well."""
        with self.lock:
            return 0 if self.is_torn or not are_plain(tokens) else self.index.match(root, tokens, limit).num_tokens

    @whole
    def index_table(self, table: BlockTable, with_tail: bool) -> None:
        """Let later sequences find the full blocks of a table, and with `with_tail` the last, partly filled one.

        Only for content that is complete in memory.
        """
        if table.root is None:
            return
        parent, whole = table.root, table.whole_blocks(table.num_tokens)
        chains = [chain.on_device for chain in table.chains]
        for i in range(whole):
            blocks = [chain[i] for chain in chains]
            if i == len(table.keys) or self.index.lacks(table.keys[i], blocks):
                table.keys[i:] = [self.index_blocks(parent, table.packed(i), blocks), *table.keys[i + 1 :]]
            parent = table.keys[i]
        tail = [chain[whole] for chain in chains] if with_tail and table.tail_tokens else [NULL_BLOCK]
        if NULL_BLOCK not in tail and not self.index.is_covered(parent, table.packed(whole)):
            self.index_blocks(parent, table.packed(whole), tail)
        self.index.prune(parent)

    @whole
    def take_blocks(
        self, parent: bytes, packed: bytes, groups: Sequence[bool], after: Sequence[int]
    ) -> tuple[list[int], list[bool]]:
        """Blocks for tokens that come from elsewhere, in those of `groups` that have none; pinned until `unpin`.

        Returns one a group, the null block where it is not to have one, and which of them are new. These lie behind the
        blocks `after` where possible, and go to `index_blocks` when their content is there. Raises `OutOfBlocks`.
        """
        blocks = list(self.index.blocks_of(chain_key(parent, packed)) or [NULL_BLOCK] * len(self.pools))
        is_covered = self.index.is_covered(parent, packed)
        is_new = [wanted and not block and not is_covered for wanted, block in zip(groups, blocks, strict=True)]
        self.check_room(int(any(is_new)))
        for pool, block in zip(self.pools, blocks, strict=True):
            pool.share([block] if block else [])
        for group, pool in enumerate(self.pools):
            if is_new[group]:
                (blocks[group],), claim = pool.take(1, after[group] or None)
                pool.unclaim(claim)
        self._pinned.update((group, block) for group, block in enumerate(blocks) if block)
        return blocks, is_new

    @whole
    def hold(self, pins: Sequence[Pin]) -> None:
        """Pin blocks that are there until `unpin`."""
        for group, each in groupby(pins, key=itemgetter(0)):
            self.pools[group].share([block for _, block in each])
        self._pinned.update(pins)

    @whole
    def take_runs(self, counts: Sequence[int], after: Sequence[int], room: int) -> list[list[int]]:
        """`counts[group]` new blocks of each group, pinned until `unpin`, behind block `after[group]` where possible.

        `room` more blocks are expected behind them. Raises `OutOfBlocks` and changes nothing.
        """
        self.make_room(counts)
        taken = []
        for pool, count, before in zip(self.pools, counts, after, strict=True):
            blocks, claim = pool.take(count, before or None, room)
            pool.unclaim(claim)
            taken.append(blocks)
        self._pinned.update((group, block) for group, blocks in enumerate(taken) for block in blocks)
        return taken

    @whole
    def index_blocks(self, parent: bytes, packed: bytes, blocks: Sequence[int], key: bytes | None = None) -> bytes:
        """Index `blocks`, one a group, in place of those that hold a beginning of these tokens; returns their key.

        `key` is that key, where the caller knows it.
        """
        for entry in self.index.covered_by(parent, packed):
            for group, block in self.index.remove(entry):
                self.pools[group].discard(block)
        return self.index.add(parent, packed, blocks, key)

    @whole
    def hold_prefixes(self, root: bytes) -> tuple[list[Entry], list[Pin]]:
        """What is indexed under `root`, parents first, with the blocks as they are now, pinned until `unpin`."""
        entries = [replace(entry, blocks=entry.blocks.copy()) for entry in self.index.below(root)]
        pins = [(group, block) for entry in entries for group, block in enumerate(entry.blocks) if block]
        self.hold(pins)
        return entries, pins

    @whole
    def forget_prefixes(self) -> None:
        """Give up every cached block, with its memory, and forget what the others hold."""
        self.index.clear()
        for pool in self.pools:
            pool.discard_all()
        self.budget.give_back()

    def check_integrity(self) -> None:
        """Prove that the pools and the index agree with the live tables; for tests."""
        with self.lock:
            check_integrity(self, self._tables.values(), self._pinned)
