"""Sliding-window models of any window as data: how they are built, asked, and what their memory may be.

A family counts as windowed by its tag "sliding", so one that is added to `families.py` is tested here, too. Windows
are smaller than, equal to and larger than a block, and not all of them multiples of it.
"""

import copy
import functools
import itertools
import random
from dataclasses import dataclass

import torch
from families import FAMILIES, VOCAB
from pair import Pair
from prompts import tokens
from transformers import DynamicCache, StoppingCriteria

WINDOWED = [name for name, family in FAMILIES.items() if "sliding" in family.tags]
PURE, MIXED = "mistral_sliding", "gemma3"  # window layers only; two of them and a full one
WINDOWS = (5, 8, 20, 33)
BLOCK_SIZES = (8, 16)


@functools.cache
def stock_model(name: str, window: int) -> torch.nn.Module:
    """The family's random model with another window, to be copied; chunked attention calls it a chunk."""
    family = FAMILIES[name]
    field = "attention_chunk_size" if "attention_chunk_size" in family.config else "sliding_window"
    with torch.random.fork_rng():
        torch.manual_seed(family.seed)  # some families draw their 1-D parameters when they are made
        return family.build(**{field: window})


def window_pair(name: str = MIXED, window: int = 8, **overrides) -> Pair:
    """Stock and patched models of a family with another window."""
    return Pair(name, wrap=lambda model: copy.deepcopy(stock_model(name, window)), **overrides)


def spread(first, second, *others) -> list[tuple]:
    """Every pair of `first` and `second`, the values of `others` dealt out evenly beside them, in a fixed order."""
    pairs, columns = list(itertools.product(first, second)), []
    for seed, values in enumerate(others):
        column = [values[at % len(values)] for at in range(len(pairs))]
        random.Random(seed).shuffle(column)
        columns.append(column)
    return [(*pair, *rest) for pair, *rest in zip(pairs, *columns, strict=True)]


# What is asked


def parted(row: list[int], keep: int, length: int = 4) -> list[int]:
    """The first `keep` tokens of a row, and then others."""
    other = 3 + (row[keep] - 2) % (VOCAB - 3)
    return [*row[:keep], other, *tokens(length, seed=200 + keep)]


def followers(row: list[int], window: int, block_size: int) -> dict[str, list[int]]:
    """What may be asked after `row`: a prompt and how it relates to `row`."""
    length = len(row)
    return {
        "warm": row,
        "extended": row + tokens(block_size + 3, seed=300),
        "shorter": row[: length // 2],
        "parts inside a block": parted(row, length // block_size * block_size - block_size // 2),
        "parts inside the last window": parted(row, max(1, length - window // 2)),
        "parts before the last window": parted(row, max(1, length - window - block_size - 1)),
        "after all of these": row + tokens(2, seed=301),
    }


class EndsAt(StoppingCriteria):
    """Row i is done after `STEPS[i]` new tokens; it is padded from then on, or else goes on until all are done."""

    STEPS = (7, 3, 11)

    def __init__(self, pads: bool = True):
        self.width = None
        if pads:
            self.eos_token_id = torch.tensor([2])

    def __call__(self, input_ids, scores, **kwargs):
        if self.width is None:
            self.width = input_ids.shape[1] - 1
        steps = torch.tensor([self.STEPS[row % len(self.STEPS)] for row in range(len(input_ids))])
        return input_ids.shape[1] - self.width >= steps


def near(model: torch.nn.Module) -> torch.nn.Module:
    """A draft model that guesses some of a model's tokens; patched where the model is."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return draft


# What it may take


@dataclass(frozen=True)
class Need:
    """Bytes that a model's rows may take by its config: all of their tokens in full layers, a window in the others."""

    windows: tuple[int | None, ...]  # a layer each
    token_bytes: int  # K and V of one token in one layer
    block_size: int

    @classmethod
    def of(cls, model: torch.nn.Module, block_size: int) -> "Need":
        config = model.config
        windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(tuple(windows), 2 * config.num_key_value_heads * head_dim * 4, block_size)

    def full(self, num_tokens: int) -> int:
        """Of one row that keeps all of its tokens in the full layers; none in the others."""
        blocks = -(-num_tokens // self.block_size)
        return self.windows.count(None) * blocks * self.block_size * self.token_bytes

    @property
    def window(self) -> int:
        """Of one row in the window layers, however long it is: the window, and a block that is cut at either end."""
        return sum(window + 2 * self.block_size for window in self.windows if window is not None) * self.token_bytes

    def row(self, num_tokens: int) -> int:
        """Of one row in all layers."""
        return self.full(num_tokens) + self.window

    def everything(self, num_tokens: int) -> int:
        """Of one row whose layers all keep all of its tokens, in whole blocks."""
        return -(-num_tokens // self.block_size) * self.block_size * len(self.windows) * self.token_bytes
