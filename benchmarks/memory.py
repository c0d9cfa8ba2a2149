"""How many bytes of KV a cache holds while it decodes, beside what the tokens themselves need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import LogitsProcessor, PreTrainedConfig, PreTrainedModel

from .measure import Work

MARGIN = 1.04
"""The patched cache may hold this many times the bytes of the distinct real tokens, plus one block a live row."""


class KvProbe(LogitsProcessor):
    """Notes after every forward which tokens the cache now holds, and in how many bytes. Changes no score.

    A logits processor is where both agree: ``generate`` calls it with the very sequences whose KV was just completed,
    in beam search too.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.sequences: list[torch.Tensor] = []
        self.bytes_in_use: list[int] = []
        self.bytes_reserved: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Note the sequences ``[rows, tokens]`` and pass the scores on."""
        self.sequences.append(input_ids)
        stats = self.model.paged.stats()
        self.bytes_in_use.append(stats.bytes_in_use)
        self.bytes_reserved.append(stats.bytes_reserved)
        return scores


@dataclass(frozen=True)
class KvUse:
    """KV bytes of one call, at the step where the patched cache was largest."""

    stock_bytes: int
    """A dense cache at the last step: padding, copies of shared prompts and finished rows included."""
    patched_bytes: int
    real_bytes: int
    """The distinct real tokens of the live rows, at the same step."""
    worst_factor: float
    """The largest ``(patched - one block a live row) / real`` of any step."""
    worst_reserved_factor: float
    """The same of all memory that the pool has taken, cached and free blocks included."""

    @property
    def within_margin(self) -> bool:
        """Whether the patched cache kept to its margin at every step."""
        return self.worst_factor <= MARGIN


def kv_use(work: Work, probe: KvProbe) -> KvUse:
    """Work out what a probe saw."""
    per_token = token_bytes(probe.model.config, probe.model.dtype)
    per_block = per_token * probe.model.paged.config.block_size
    real, factors, reserved_factors = [], [], []
    for sequences, held, reserved in zip(probe.sequences, probe.bytes_in_use, probe.bytes_reserved, strict=True):
        rows = live_rows(work, sequences)
        real.append(per_token * needed_tokens(work, rows, sequences.shape[1] - work.input_ids.shape[1]))
        factors.append((held - per_block * len(rows)) / real[-1])
        reserved_factors.append((reserved - per_block * len(rows)) / real[-1])
    peak = max(range(len(real)), key=probe.bytes_in_use.__getitem__)
    dense = per_token * probe.sequences[-1].numel()
    return KvUse(dense, probe.bytes_in_use[peak], real[peak], max(factors), max(reserved_factors))


def token_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one token's K and V in all layers."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize


def live_rows(work: Work, sequences: torch.Tensor) -> list[list[int]]:
    """Return the tokens of each row that still generates, without padding. Samples and beams repeat the prompts."""
    prompts, longest = work.input_ids.shape
    copies, generated = len(sequences) // prompts, sequences.shape[1] - longest
    padding = (work.attention_mask == 0).sum(dim=1).tolist()
    ends = work.scenario.ends or (work.scenario.new,) * prompts
    return [row[padding[i // copies] :] for i, row in enumerate(sequences.tolist()) if generated < ends[i // copies]]


def needed_tokens(work: Work, rows: Sequence[list[int]], generated: int) -> int:
    """Return how many distinct tokens ``rows`` hold, ``generated`` of each after its prompt.

    Beams descend from one another, so all that they begin with in common is one token each. Rows of their own share
    prompts only: where two samples happen to draw the same token, either has computed its own.
    """
    if work.scenario.arguments.get("num_beams", 1) > 1:
        return distinct_tokens(rows)
    return distinct_tokens([row[: len(row) - generated] for row in rows]) + generated * len(rows)


def distinct_tokens(rows: Sequence[list[int]]) -> int:
    """Return the nodes of the trie of ``rows``: tokens after equal prefixes count once."""
    ordered = sorted(rows)
    shared = sum(common_prefix(a, b) for a, b in pairwise(ordered))
    return sum(map(len, rows)) - shared


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return how many tokens ``a`` and ``b`` begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
