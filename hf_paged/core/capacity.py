"""How much fits: what sequences take in blocks and in stock's dense cache, and how many of them a budget holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_ANY_LENGTH = 2**62
# Full blocks of a running sequence that do not leave the device: the last one, and a new one before that may leave.
LAST_BLOCKS = 2


@dataclass(frozen=True)
class GroupCost:
    """The layers that keep the same tokens: all of them, or those of a sliding window of `window` tokens.

    Attributes:
        window: in tokens; `None` keeps all.
        token_bytes: K and V of one token in all layers of the group.
        num_layers: how many they are.
    """

    window: int | None
    token_bytes: int
    num_layers: int

    def block_bytes(self, block_size: int) -> int:
        """Of one block; never 0, so that budgets stay countable."""
        return max(1, self.token_bytes) * block_size


def group_costs(layer_bytes: Sequence[int], windows: Sequence[int | None]) -> list[GroupCost]:
    """The groups of layers that take `layer_bytes` a token, full attention first, then by window."""
    kinds = sorted(set(windows), key=lambda window: (window is not None, window))
    members = [[size for size, window in zip(layer_bytes, windows, strict=True) if window == kind] for kind in kinds]
    return [GroupCost(kind, sum(sizes), len(sizes)) for kind, sizes in zip(kinds, members, strict=True)]


@dataclass(frozen=True)
class Capacity:
    """What fits into blocks of `block_size` tokens, `most_tokens` of them a group at most, whatever the budget.

    Nothing is taken to be shared; sequences that begin alike take less.
    """

    groups: Sequence[GroupCost]
    block_size: int
    most_tokens: int

    def blocks(self, group: GroupCost, num_tokens: int) -> int:
        """Blocks of a group that a sequence holds at most, until it has `num_tokens` tokens.

        A window reaches into a block that is cut at either end. A long prompt is stored a block at a time where memory
        is short, and takes no more.
        """
        all_tokens = -(-num_tokens // self.block_size)
        if group.window is None:
            return all_tokens
        return min(all_tokens, -(-(group.window - 1) // self.block_size) + 1)

    def sequence_bytes(self, num_tokens: int) -> int:
        """Of one sequence, in whole blocks."""
        return sum(self.blocks(group, num_tokens) * group.block_bytes(self.block_size) for group in self.groups)

    @property
    def null_bytes(self) -> int:
        """Of the blocks that every pool has beside those of sequences."""
        return sum(group.block_bytes(self.block_size) for group in self.groups)

    def sequences(self, budget_bytes: int, num_tokens: int, host_blocks: int = 0) -> int:
        """Sequences of `num_tokens` tokens that a pool with this budget carries at once.

        At most `host_blocks` of theirs lie on the host, in layers without a window.
        """
        too_many = 1 + (budget_bytes + host_blocks * self.null_bytes) // self.sequence_bytes(num_tokens)
        return _most(0, too_many, lambda count: self._fit(count, num_tokens, budget_bytes, host_blocks))

    def _fit(self, count: int, num_tokens: int, budget_bytes: int, host_blocks: int) -> bool:
        """Whether so many sequences do."""
        free_bytes = budget_bytes - self.null_bytes
        for group in self.groups:
            blocks = self.blocks(group, num_tokens)
            here = count * blocks
            if group.window is None:
                here = max(here - host_blocks, count * min(blocks, LAST_BLOCKS))
            free_bytes -= here * group.block_bytes(self.block_size)
            if free_bytes < 0 or here > self._ids(budget_bytes, group):
                return False
        return True

    def longest(self, budget_bytes: int, host_blocks: int = 0) -> int | None:
        """Tokens of the longest sequence that a pool with this budget carries; `None`: any length."""
        if self.sequences(budget_bytes, _ANY_LENGTH, host_blocks):
            return None
        too_long = self.most_tokens // self.block_size + host_blocks + 1  # in blocks
        return self.block_size * _most(
            0, too_long, lambda blocks: self._fit(1, blocks * self.block_size, budget_bytes, host_blocks)
        )

    def kept_sequences(self, budget_bytes: int, num_tokens: int) -> int:
        """Sequences of `num_tokens` tokens that a lower tier keeps for later calls."""
        return budget_bytes // self.sequence_bytes(num_tokens)

    def _ids(self, budget_bytes: int, group: GroupCost) -> int:
        return max(
            0, min(budget_bytes // group.block_bytes(self.block_size), self.most_tokens // self.block_size + 1) - 1
        )


def _most(fits: int, too_many: int, fit: Callable[[int], bool]) -> int:
    """The largest number that is fit, of which all below are."""
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if fit(middle) else (fits, middle)
    return fits


def stock_bytes(groups: Sequence[GroupCost], num_tokens: int, rows: int = 1) -> int:
    """What stock's dynamic cache holds for `rows` sequences of `num_tokens` tokens, or shorter ones padded to that.

    Layers with a window hold no more than that, once a token has been generated behind a longer prompt.
    """
    tokens = [num_tokens if group.window is None else min(num_tokens, group.window) for group in groups]
    return rows * sum(count * group.token_bytes for count, group in zip(tokens, groups, strict=True))
