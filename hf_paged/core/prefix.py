"""The prefix index: which blocks hold the KV of which tokens after which tokens.

A block's key is a chained hash, `blake2b(parent key, token ids)`, that begins at a root which stands for everything
else that K and V depend on (weights, adapters, salt: `identity.py`). Equal keys therefore mean equal content, whoever
computed it. Layers that keep all tokens must have the blocks of the whole prefix; layers of a window only those that
the next token's window reaches into.

    root ──▶ [t0 … t15] ──▶ [t16 … t31] ──▶ [t32 … t38]        the end of a sequence may fill its block in part
                       └──▶ [t16 … t20, u … ]                  another sequence, which parts inside a block
"""

from __future__ import annotations

import operator
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

from hf_paged.core.blocks import NULL_BLOCK

KEY_BYTES = 32
# Token ids are hashed as unsigned ints of this width; a number that does not fit is no plain token.
TOKEN_LIMIT = 2**32
_TOKEN_CODE, TOKEN_BYTES = "I", 4
# Blocks that are compared token by token where a prompt parts from all of them; the newest ones.
_MAX_COMPARED = 32


def are_plain(tokens: Sequence[int]) -> bool:
    """Whether all are token ids and nothing else."""
    return not tokens or (min(tokens) >= 0 and max(tokens) < TOKEN_LIMIT)


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as bytes, four each."""
    return array(_TOKEN_CODE, tokens).tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    """The reverse of `pack_tokens`."""
    return array(_TOKEN_CODE, packed).tolist()


def chain_key(parent: bytes, packed: bytes) -> bytes:
    """Key of a block with these packed tokens behind the block `parent`. Both have a fixed width a token or key."""
    return blake2b(parent + packed, digest_size=KEY_BYTES).digest()


def root_key(identity: bytes, salt: str | None, kv_format: str | None = None) -> bytes:
    """Where chains begin: for one model in one state, one salt or none, and how K and V are stored."""
    typed = b"none" if salt is None else b"salt" + salt.encode("utf-8", "surrogatepass")
    stored = (kv_format or "").encode()
    header = b"".join(len(part).to_bytes(8, "little") + part for part in (identity, stored))
    return blake2b(header + typed, digest_size=KEY_BYTES).digest()


@dataclass(slots=True, eq=False)
class Entry:
    """What one block holds: `tokens` are packed and fill it, or its beginning.

    `blocks` has one id for each group of layers, the null block where that group's has been given up. An entry without
    any block stays as long as others follow it: their windows may not reach back to it, but their keys do.
    """

    key: bytes
    parent: bytes
    tokens: bytes
    blocks: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens in the block."""
        return len(self.tokens) // TOKEN_BYTES


class Match(NamedTuple):
    """The first `num_tokens` tokens of a prompt lie in `blocks`, for each group of layers one list.

    Null blocks stand for those that lie outside a group's window. `keys` are those of the blocks that match whole.
    Behind block number `seam_blocks`, if that is not 0, the sequence goes on although the block is not full.
    """

    blocks: list[list[int]]
    keys: list[bytes]
    num_tokens: int
    seam_blocks: int = 0
    seam_tokens: int = 0


class _Hop(NamedTuple):
    """One block on the way down a prompt, and how many of the prompt's tokens end with it."""

    entry: Entry
    stop: int
    is_whole: bool = True


class PrefixIndex:
    """Content key to blocks. Knows nothing of references; the manager tells it which blocks are gone.

    Args:
        block_size: tokens per block.
        windows: of each group of layers the sliding window in tokens, `None` where they keep all tokens.
    """

    def __init__(self, block_size: int, windows: Sequence[int | None] = (None,)):
        self.block_size = block_size
        self.full_bytes = block_size * TOKEN_BYTES  # packed tokens of a full block
        self.windows = tuple(windows)
        self._entries: dict[bytes, Entry] = {}
        # Of each group. A block may stand for several entries: for all that it holds, and for a beginning behind which
        # another sequence has parted.
        self.by_block: list[dict[int, list[Entry]]] = [{} for _ in windows]
        # By parent and first token, oldest first.
        self._children: dict[tuple[bytes, bytes], dict[bytes, Entry]] = {}
        self._parents: Counter[bytes] = Counter()  # how many entries follow each

    def __len__(self) -> int:
        return len(self._entries)

    def blocks_of(self, key: bytes) -> list[int] | None:
        """The blocks with that key, one a group."""
        entry = self._entries.get(key)
        return None if entry is None else entry.blocks

    def is_fixed(self, group: int, block: int, num_tokens: int) -> bool:
        """Whether a block may not get more than its first `num_tokens` tokens, because others may find it."""
        # One that others follow is a seam of theirs, which it stays only as it is.
        entries = self.by_block[group].get(block)
        if entries is None:
            return False
        return any(entry.num_tokens > num_tokens or entry.key in self._parents for entry in entries)

    def below(self, root: bytes) -> list[Entry]:
        """All entries that can be reached from `root`, parents before their children."""
        children: dict[bytes, list[Entry]] = {}
        for entry in self._entries.values():
            children.setdefault(entry.parent, []).append(entry)
        found = list(children.get(root, ()))
        for entry in found:
            found += children.get(entry.key, ())
        return found

    # -- looking up ----------------------------------------------------------------------------------------------

    def match(self, root: bytes, tokens: Sequence[int], limit: int) -> Match:
        """The longest usable prefix of `tokens`, at most `limit` tokens; the last block may be used in part."""
        packed = pack_tokens(tokens[: max(limit, 0)])
        hops = self._walk(root, packed, 0)
        plain = self._usable(hops)
        whole = [hop for hop in hops if hop.is_whole]
        key, at = (whole[-1].entry.key, whole[-1].stop * TOKEN_BYTES) if whole else (root, 0)
        short = self._seam_behind(key, packed[at:])
        if short is not None:
            stop = at + len(short.tokens)
            seam = _Hop(short, stop // TOKEN_BYTES)
            seamed = self._usable([*whole, seam, *self._walk(short.key, packed, stop)])
            if _stop(seamed) > _stop(plain):
                return self._match(seamed, len(whole) + 1)
        return self._match(plain)

    def _match(self, hops: Sequence[_Hop], seam_blocks: int = 0) -> Match:
        num_tokens = _stop(hops)
        blocks = []
        for group, window in enumerate(self.windows):
            first = seen_from(num_tokens, window)
            blocks.append([hop.entry.blocks[group] if hop.stop > first else NULL_BLOCK for hop in hops])
        keys = [hop.entry.key for hop in hops if hop.is_whole]
        return Match(blocks, keys, num_tokens, seam_blocks, hops[seam_blocks - 1].stop if seam_blocks else 0)

    def _walk(self, key: bytes, packed: bytes, at: int) -> list[_Hop]:
        """The blocks behind `key` that hold `packed` from byte `at` on, and the head of one more."""
        width = self.full_bytes
        hops: list[_Hop] = []
        while at + width <= len(packed):
            entry = self._entries.get(chain_key(key, packed[at : at + width]))
            if entry is None:
                break
            key, at = entry.key, at + width
            hops.append(_Hop(entry, at // TOKEN_BYTES))
        part, common = self._best_part(key, packed[at : at + width])
        if part is not None:
            hops.append(_Hop(part, at // TOKEN_BYTES + common, False))
        return hops

    def _usable(self, hops: Sequence[_Hop]) -> Sequence[_Hop]:
        """The longest beginning of `hops` that has the blocks which the token behind it will look at."""
        if all(NULL_BLOCK not in hop.entry.blocks for hop in hops):
            return hops
        usable = 0
        held_from = [0] * len(self.windows)  # each group has the tokens from there on without a gap
        for count, hop in enumerate(hops, start=1):
            for group in range(len(self.windows)):
                if hop.entry.blocks[group] == NULL_BLOCK:
                    held_from[group] = hop.stop
            if all(map(operator.le, held_from, (seen_from(hop.stop, window) for window in self.windows))):
                usable = count
        return hops[:usable]

    def _seam_behind(self, parent: bytes, packed: bytes) -> Entry | None:
        """A partly filled block behind `parent` that `packed` begins with, and behind which others are indexed."""
        fitting = [
            entry
            for entry in self._siblings(parent, packed)
            if len(entry.tokens) < self.full_bytes and entry.key in self._parents and packed.startswith(entry.tokens)
        ]
        return max(fitting, key=lambda entry: len(entry.tokens), default=None)

    def longest_short(self, parent: bytes, packed: bytes) -> bytes:
        """The most tokens that `packed` begins with and that a partly filled block holds behind `parent`."""
        fitting = [entry.tokens for entry in self._siblings(parent, packed) if packed.startswith(entry.tokens)]
        return max((tokens for tokens in fitting if len(tokens) < self.full_bytes), key=len, default=b"")

    def _best_part(self, parent: bytes, packed: bytes) -> tuple[Entry | None, int]:
        """The block behind `parent` that begins most like `packed`, and how many tokens they have in common."""
        whole = [entry for entry in self._siblings(parent, packed) if NULL_BLOCK not in entry.blocks]
        best = max(whole, key=lambda entry: _common_tokens(entry.tokens, packed), default=None)
        return best, 0 if best is None else _common_tokens(best.tokens, packed)

    def _siblings(self, parent: bytes, packed: bytes) -> Iterable[Entry]:
        """Entries behind `parent` that begin with the first token of `packed`, the newest ones first."""
        siblings = self._children.get((parent, packed[:TOKEN_BYTES]), {}) if packed else {}
        return islice(reversed(siblings.values()), _MAX_COMPARED)

    # -- changing ------------------------------------------------------------------------------------------------

    def add(self, parent: bytes, packed: bytes, blocks: Sequence[int], key: bytes | None = None) -> bytes:
        """Index `blocks`, one a group, as those that hold these tokens behind `parent`; returns the key.

        `key` is that key, where the caller knows it.
        Where a group has a block for them already, nothing changes there; null blocks are passed over. Call `prune`
        once nothing more is to follow.
        """
        key = chain_key(parent, packed) if key is None else key
        entry = self._entries.get(key) or Entry(key, parent, packed, [NULL_BLOCK] * len(blocks))
        for group, block in enumerate(blocks):
            if block and not entry.blocks[group]:
                entry.blocks[group] = block
                self.by_block[group].setdefault(block, []).append(entry)
        if key not in self._entries:
            self._entries[key] = entry
            self._children.setdefault((parent, packed[:TOKEN_BYTES]), {})[key] = entry
            self._parents[parent] += 1
        return key

    def lacks(self, key: bytes, blocks: Sequence[int]) -> bool:
        """Whether one of `blocks`, null blocks apart, could be added to those with that key."""
        entry = self._entries.get(key)
        return entry is None or any(block and not known for block, known in zip(blocks, entry.blocks, strict=True))

    def is_covered(self, parent: bytes, packed: bytes) -> bool:
        """Whether blocks behind `parent` begin with these tokens, in every group."""
        return any(
            entry.tokens.startswith(packed) and NULL_BLOCK not in entry.blocks
            for entry in self._siblings(parent, packed)
        )

    def covered_by(self, parent: bytes, packed: bytes) -> list[Entry]:
        """Entries behind `parent` that hold a proper beginning of these tokens, and that nothing follows."""
        if (parent, packed[:TOKEN_BYTES]) not in self._children:
            return []
        return [
            entry
            for entry in self._siblings(parent, packed)
            if len(entry.tokens) < len(packed) and packed.startswith(entry.tokens) and entry.key not in self._parents
        ]

    def forget(self, group: int, block: int) -> None:
        """The block no longer holds what it was indexed for; harmless where it was not."""
        for entry in self.by_block[group].pop(block, ()):
            entry.blocks[group] = NULL_BLOCK
            self.prune(entry.key)

    def remove(self, entry: Entry) -> list[tuple[int, int]]:
        """Forget an entry that nothing follows; returns the groups and blocks that stand for no other one."""
        idle = []
        for group, block in enumerate(entry.blocks):
            if block:
                self.by_block[group][block].remove(entry)
                if not self.by_block[group][block]:
                    del self.by_block[group][block]
                    idle.append((group, block))
        entry.blocks[:] = [NULL_BLOCK] * len(entry.blocks)
        self.prune(entry.key)
        return idle

    def prune(self, key: bytes) -> None:
        """Forget the entry with that key, and those before it, as far as they have no block and nothing follows."""
        entry = self._entries.get(key)
        while entry is not None and not any(entry.blocks) and entry.key not in self._parents:
            del self._entries[entry.key]
            self._parents[entry.parent] -= 1
            if not self._parents[entry.parent]:
                del self._parents[entry.parent]
            place = (entry.parent, entry.tokens[:TOKEN_BYTES])
            siblings = self._children[place]
            del siblings[entry.key]
            if not siblings:
                del self._children[place]
            entry = self._entries.get(entry.parent)

    def clear(self) -> None:
        """Forget every block."""
        self._entries.clear()
        for known in self.by_block:
            known.clear()
        self._children.clear()
        self._parents.clear()

    def check_integrity(self) -> None:
        """Prove that the views of the entries agree."""
        for group, known in enumerate(self.by_block):
            held = Counter((entry.blocks[group], entry.key) for entry in self._entries.values() if entry.blocks[group])
            listed = Counter((block, entry.key) for block, entries in known.items() for entry in entries)
            assert held == listed, "entries disagree with the blocks"
            assert all(known.values()), "a block is indexed for nothing"
        listed = {key: entry for siblings in self._children.values() for key, entry in siblings.items()}
        assert listed == self._entries, "children disagree with the entries"
        assert all(self._children.values()), "an empty list of children was kept"
        assert self._parents == Counter(entry.parent for entry in self._entries.values())
        for entry in self._entries.values():
            assert any(entry.blocks) or entry.key in self._parents, "an entry was kept for nothing"
            assert entry.key == chain_key(entry.parent, entry.tokens)
            assert 0 < entry.num_tokens <= self.block_size


def _stop(hops: Sequence[_Hop]) -> int:
    """Tokens up to the end of the last hop."""
    return hops[-1].stop if hops else 0


def seen_from(num_tokens: int, window: int | None) -> int:
    """The first of `num_tokens` tokens that the next one looks at."""
    return 0 if window is None else max(0, num_tokens - window + 1)


def _common_tokens(a: bytes, b: bytes) -> int:
    """How many packed tokens two blocks begin with in common."""
    if a == b:
        return len(a) // TOKEN_BYTES
    first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return first // TOKEN_BYTES
