"""Block tables: which tokens a sequence holds, and its blocks in every group of layers."""

from __future__ import annotations

from collections.abc import Sequence

from hf_paged.core.chain import BlockChain
from hf_paged.core.prefix import are_plain, pack_tokens


class BlockTable:
    """The blocks of one sequence, in order; block `i` begins with token `block_start(i)`, `i * block_size` as a rule.

    Each group of layers has blocks of its own for it, a `BlockChain`; where blocks begin is the same in all of them.
    A table may have one *seam*: a block that is left partly filled, because others hold it too, and behind which the
    sequence goes on in a block of its own. Samples and beams of a prompt part there, so that none copies its tail:

        prompt of 27 tokens   [ 16 ][ 11 . ]          block_start: 0, 16
        a sample of it        [ 16 ][ 11 . ][ 5 . ]   block_start: 0, 16, 27 = seam_tokens; seam_blocks = 2

    Only the manager changes a table.
    """

    __slots__ = (
        "block_size",
        "chains",
        "is_forked",
        "keys",
        "num_tokens",
        "prompt_tokens",
        "root",
        "seam_blocks",
        "seam_tokens",
        "shifts",
        "tokens",
    )

    def __init__(self, block_size: int, num_groups: int, root: bytes | None = None):
        self.block_size = block_size
        self.chains = [BlockChain(self) for _ in range(num_groups)]
        self.num_tokens = 0
        self.prompt_tokens = 0  # of these, what came with the last prompt and before it
        self.seam_tokens = self.seam_blocks = 0
        # Whether another sequence of the same call began as a copy of this one, or this one as a copy of another.
        self.is_forked = False
        # Where the prefix index begins for this sequence, `None` where it is not to be indexed; then its token ids,
        # and the keys of its first blocks as far as they are known.
        self.root = root
        self.tokens: list[int] = []
        self.keys: list[bytes] = []
        # How far positions of the next tokens are ahead of their number, in each plane of these; none: not at all.
        self.shifts: Sequence[float] = ()

    @property
    def num_blocks(self) -> int:
        """Blocks in each group, those given up included."""
        return len(self.chains[0].blocks)

    def block_start(self, block: int) -> int:
        """Tokens before the table's block number `block`."""
        if block < self.seam_blocks:
            return block * self.block_size
        return self.seam_tokens + (block - self.seam_blocks) * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that the first `num_tokens` tokens lie in."""
        if num_tokens <= self.seam_tokens:
            return -(-num_tokens // self.block_size)
        return self.seam_blocks - (self.seam_tokens - num_tokens) // self.block_size

    def whole_blocks(self, num_tokens: int) -> int:
        """Of these, the blocks that get no more tokens as the sequence grows."""
        if num_tokens < self.seam_tokens:
            return num_tokens // self.block_size
        return self.seam_blocks + (num_tokens - self.seam_tokens) // self.block_size

    @property
    def tail_tokens(self) -> int:
        """Tokens in a last block that has room for more; 0 where the next token needs another block."""
        return self.num_tokens - self.block_start(self.whole_blocks(self.num_tokens))

    def open_seam(self) -> None:
        """Go on in a new block behind a tail that others hold too."""
        self.seam_tokens, self.seam_blocks = self.num_tokens, self.num_blocks

    def packed(self, block: int) -> bytes:
        """The tokens of the table's block number `block`."""
        return pack_tokens(self.tokens[self.block_start(block) : self.block_start(block + 1)])

    def track(self, tokens: Sequence[int] | None) -> None:
        """These tokens follow; `None`, or numbers that are no plain ids, if the sequence can be indexed no more."""
        if self.root is None:
            return
        if tokens is None or not are_plain(tokens):
            self.untrack()
        else:
            self.tokens.extend(tokens)

    def untrack(self) -> None:
        """Something was stored that token ids do not describe: the sequence is not indexed any more."""
        self.root = None
        self.tokens.clear()
        self.keys.clear()

    def truncate(self, num_blocks: int) -> list[list[int]]:
        """Cut the table to `num_blocks` blocks; returns the removed ones of each group, last first."""
        if num_blocks < self.seam_blocks:
            self.seam_tokens = self.seam_blocks = 0
        return [chain.truncate(num_blocks) for chain in self.chains]

    def copy_from(self, other: BlockTable, num_tokens: int) -> None:
        """Hold the first `num_tokens` tokens of `other` (the caller counts the references)."""
        num_blocks = other.blocks_for(num_tokens)
        for mine, theirs in zip(self.chains, other.chains, strict=True):
            mine.copy_from(theirs, num_blocks)
        self.num_tokens = num_tokens
        self.prompt_tokens = min(other.prompt_tokens, num_tokens)
        has_seam = num_tokens >= other.seam_tokens
        self.seam_tokens, self.seam_blocks = (other.seam_tokens, other.seam_blocks) if has_seam else (0, 0)
        self.is_forked = other.is_forked = True
        self.root, self.shifts = other.root, other.shifts
        self.tokens = other.tokens[:num_tokens]
        self.keys = other.keys[: self.whole_blocks(num_tokens)]
