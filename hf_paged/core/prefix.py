"""The prefix index: which block holds the KV of which tokens after which tokens.

A block's key is a chained hash, `blake2b(parent key, token ids)`, that begins at a root which stands for everything
else that K and V depend on (weights, adapters, salt: `identity.py`). Equal keys therefore mean equal content, whoever
computed it. A look-up walks down from the root, so a block counts only as long as its ancestors do.

    root ──▶ [t0 … t15] ──▶ [t16 … t31] ──▶ [t32 … t38]        the end of a sequence may fill its block in part
                       └──▶ [t16 … t20, u … ]                  another sequence, which parts inside a block
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

KEY_BYTES = 32
# Token ids are hashed as unsigned ints of this width; a number that does not fit is no plain token.
TOKEN_LIMIT = 2**32
_TOKEN_CODE, _TOKEN_BYTES = "I", 4
# Blocks that are compared token by token where a prompt parts from all of them; the newest ones.
_MAX_COMPARED = 32


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as bytes, four each."""
    return array(_TOKEN_CODE, tokens).tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    """The reverse of `pack_tokens`."""
    return array(_TOKEN_CODE, packed).tolist()


def chain_key(parent: bytes, packed: bytes) -> bytes:
    """Key of a block with these packed tokens behind the block `parent`. Both have a fixed width a token or key."""
    return blake2b(parent + packed, digest_size=KEY_BYTES).digest()


def root_key(identity: bytes, salt: str | None) -> bytes:
    """Where chains begin: for one model in one state, and one salt or none."""
    typed = b"none" if salt is None else b"salt" + salt.encode("utf-8", "surrogatepass")
    return blake2b(len(identity).to_bytes(8, "little") + identity + typed, digest_size=KEY_BYTES).digest()


@dataclass(frozen=True, slots=True)
class Entry:
    """One indexed block: `tokens` are packed and fill it, or its beginning."""

    block: int
    key: bytes
    parent: bytes
    tokens: bytes

    @property
    def num_tokens(self) -> int:
        """Tokens in the block."""
        return len(self.tokens) // _TOKEN_BYTES


class Match(NamedTuple):
    """The first `num_tokens` tokens of a prompt lie in `blocks`; `keys` are those of the blocks that match whole.

    Behind block number `seam_blocks`, if that is not 0, the sequence goes on although the block is not full.
    """

    blocks: list[int]
    keys: list[bytes]
    num_tokens: int
    seam_blocks: int = 0
    seam_tokens: int = 0


class PrefixIndex:
    """Content key to block. Knows nothing of references; the manager tells it which blocks are gone."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.full_bytes = block_size * _TOKEN_BYTES  # packed tokens of a full block
        self._entries: dict[bytes, Entry] = {}
        self._by_block: dict[int, Entry] = {}
        # By parent and first token, oldest first.
        self._children: dict[tuple[bytes, bytes], dict[bytes, Entry]] = {}
        self._parents: Counter[bytes] = Counter()  # how many entries follow each

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block: int) -> bool:
        return block in self._by_block

    def block_of(self, key: bytes) -> int | None:
        """The block with that key."""
        entry = self._entries.get(key)
        return None if entry is None else entry.block

    def tokens_in(self, block: int) -> int:
        """How many of the block's first tokens are indexed."""
        entry = self._by_block.get(block)
        return 0 if entry is None else entry.num_tokens

    def is_followed(self, block: int) -> bool:
        """Whether blocks are indexed behind this one."""
        entry = self._by_block.get(block)
        return entry is not None and entry.key in self._parents

    def below(self, root: bytes) -> list[Entry]:
        """All entries that can be reached from `root`, parents before their children."""
        children: dict[bytes, list[Entry]] = {}
        for entry in self._entries.values():
            children.setdefault(entry.parent, []).append(entry)
        found = list(children.get(root, ()))
        for entry in found:
            found += children.get(entry.key, ())
        return found

    def match(self, root: bytes, tokens: Sequence[int], limit: int) -> Match:
        """The longest indexed prefix of `tokens`, at most `limit` tokens; the last block may be used in part."""
        packed = pack_tokens(tokens[: max(limit, 0)])
        plain = self._walk(root, packed, 0)
        key, at = (plain.keys[-1], len(plain.keys) * self.full_bytes) if plain.keys else (root, 0)
        short = self._seam_behind(key, packed[at:])
        if short is None:
            return plain
        rest = self._walk(short.key, packed, at + len(short.tokens))
        if rest.num_tokens <= plain.num_tokens:
            return plain
        blocks = [*plain.blocks[: len(plain.keys)], short.block]
        seam_tokens = at // _TOKEN_BYTES + short.num_tokens
        return Match(
            [*blocks, *rest.blocks], [*plain.keys, short.key, *rest.keys], rest.num_tokens, len(blocks), seam_tokens
        )

    def _walk(self, key: bytes, packed: bytes, at: int) -> Match:
        """Full blocks behind `key` that hold `packed` from byte `at` on, and the head of one more."""
        width = self.full_bytes
        blocks: list[int] = []
        keys: list[bytes] = []
        while at + width <= len(packed):
            child = chain_key(key, packed[at : at + width])
            entry = self._entries.get(child)
            if entry is None:
                break
            blocks.append(entry.block)
            keys.append(child)
            key, at = child, at + width
        part = self._best_part(key, packed[at : at + width])
        if part is not None:
            blocks.append(part[0])
            at += part[1] * _TOKEN_BYTES
        return Match(blocks, keys, at // _TOKEN_BYTES)

    def _seam_behind(self, parent: bytes, packed: bytes) -> Entry | None:
        """A partly filled block behind `parent` that `packed` begins with, and behind which others are indexed."""
        siblings = self._children.get((parent, packed[:_TOKEN_BYTES]), {})
        fitting = [
            entry
            for entry in islice(reversed(siblings.values()), _MAX_COMPARED)
            if len(entry.tokens) < self.full_bytes and entry.key in self._parents and packed.startswith(entry.tokens)
        ]
        return max(fitting, key=lambda entry: len(entry.tokens), default=None)

    def _best_part(self, parent: bytes, packed: bytes) -> tuple[int, int] | None:
        """The child block that begins most like `packed`, and how many tokens they have in common."""
        siblings = self._children.get((parent, packed[:_TOKEN_BYTES])) if packed else None
        if not siblings:
            return None
        best = max(
            islice(reversed(siblings.values()), _MAX_COMPARED),
            key=lambda entry: _common_tokens(entry.tokens, packed),
        )
        return best.block, _common_tokens(best.tokens, packed)

    def add(self, parent: bytes, packed: bytes, block: int) -> bytes:
        """Index `block` as the one that holds these tokens behind `parent`; the first one stays. Returns the key."""
        key = chain_key(parent, packed)
        if key not in self._entries and block not in self._by_block:
            entry = Entry(block, key, parent, packed)
            self._entries[key] = self._by_block[block] = entry
            self._children.setdefault((parent, packed[:_TOKEN_BYTES]), {})[key] = entry
            self._parents[parent] += 1
        return key

    def is_covered(self, parent: bytes, packed: bytes) -> bool:
        """Whether a block behind `parent` begins with these tokens."""
        siblings = self._children.get((parent, packed[:_TOKEN_BYTES]), {})
        return any(entry.tokens.startswith(packed) for entry in islice(reversed(siblings.values()), _MAX_COMPARED))

    def covered_by(self, parent: bytes, packed: bytes) -> list[int]:
        """Blocks behind `parent` that hold a proper beginning of these tokens, and that nothing follows."""
        siblings = self._children.get((parent, packed[:_TOKEN_BYTES]), {})
        return [
            entry.block
            for entry in islice(reversed(siblings.values()), _MAX_COMPARED)
            if len(entry.tokens) < len(packed) and packed.startswith(entry.tokens) and entry.key not in self._parents
        ]

    def forget(self, block: int) -> None:
        """The block no longer holds what it was indexed for; harmless where it was not."""
        entry = self._by_block.pop(block, None)
        if entry is None:
            return
        del self._entries[entry.key]
        self._parents[entry.parent] -= 1
        if not self._parents[entry.parent]:
            del self._parents[entry.parent]
        place = (entry.parent, entry.tokens[:_TOKEN_BYTES])
        siblings = self._children[place]
        del siblings[entry.key]
        if not siblings:
            del self._children[place]

    def clear(self) -> None:
        """Forget every block."""
        self._entries.clear()
        self._by_block.clear()
        self._children.clear()
        self._parents.clear()

    def check_integrity(self) -> None:
        """Prove that the three views of the entries agree."""
        assert {entry.block: entry for entry in self._entries.values()} == self._by_block
        listed = {key: entry for siblings in self._children.values() for key, entry in siblings.items()}
        assert listed == self._entries, "children disagree with the entries"
        assert all(self._children.values()), "an empty list of children was kept"
        assert self._parents == Counter(entry.parent for entry in self._entries.values())
        for entry in self._entries.values():
            assert entry.key == chain_key(entry.parent, entry.tokens)
            assert 0 < entry.num_tokens <= self.block_size


def _common_tokens(a: bytes, b: bytes) -> int:
    """How many packed tokens two blocks begin with in common."""
    if a == b:
        return len(a) // _TOKEN_BYTES
    first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return first // _TOKEN_BYTES
