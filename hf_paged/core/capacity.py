"""How much fits: what sequences take in blocks and in stock's dense cache, and how many of them a budget holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_ANY_LENGTH = 2**62


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

    def sequences(self, budget_bytes: int, num_tokens: int) -> int:
        """Sequences of `num_tokens` tokens that a pool with this budget carries at once."""
        by_bytes = (budget_bytes - self.null_bytes) // self.sequence_bytes(num_tokens)
        by_ids = min(self._ids(budget_bytes, group) // self.blocks(group, num_tokens) for group in self.groups)
        return max(0, min(by_bytes, by_ids))

    def longest(self, budget_bytes: int) -> int | None:
        """Tokens of the longest sequence that a pool with this budget carries; `None`: any length."""
        if self.sequences(budget_bytes, _ANY_LENGTH):
            return None
        fits, too_long = 0, self.most_tokens // self.block_size + 1  # in blocks
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.sequences(budget_bytes, middle * self.block_size):
                fits = middle
            else:
                too_long = middle
        return fits * self.block_size

    def kept_sequences(self, budget_bytes: int, num_tokens: int) -> int:
        """Sequences of `num_tokens` tokens that a lower tier keeps for later calls."""
        return budget_bytes // self.sequence_bytes(num_tokens)

    def _ids(self, budget_bytes: int, group: GroupCost) -> int:
        return max(
            0, min(budget_bytes // group.block_bytes(self.block_size), self.most_tokens // self.block_size + 1) - 1
        )


def stock_bytes(groups: Sequence[GroupCost], num_tokens: int, rows: int = 1) -> int:
    """What stock's dynamic cache holds for `rows` sequences of `num_tokens` tokens, or shorter ones padded to that.

    Layers with a window hold no more than that, once a token has been generated behind a longer prompt.
    """
    tokens = [num_tokens if group.window is None else min(num_tokens, group.window) for group in groups]
    return rows * sum(count * group.token_bytes for count, group in zip(tokens, groups, strict=True))
