"""Models whose prompts cannot be packed: may their decode steps read the blocks? Tried on a step of a real call."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_paged.backends import AttentionBackend
from hf_paged.cache import PagedCache
from hf_paged.compat import CACHE_NAME
from hf_paged.draws import draws_kept
from hf_paged.encdec import paged_part
from hf_paged.errors import PagedMemoryError, is_refusal
from hf_paged.foreign import foreign_attention
from hf_paged.forward import ModelCall, run_decode, run_padded, usual_tokens
from hf_paged.own_state import OWN_STATE, OwnState
from hf_paged.probe import difference, in_one_line, tolerance_of, tolerance_with
from hf_paged.step import UnsupportedAttentionError

# With fewer tokens to attend to, a model that the fast path gets wrong might not show it.
MIN_TRIAL_TOKENS = 8


def try_decode(
    model: nn.Module, request: ModelCall, cache: PagedCache, backend: AttentionBackend
) -> tuple[Any, str | None]:
    """One decode step, computed both ways: as stock does, then by the fast path on a copy of the cache.

    Returns the outputs of the former, and why steps like this must not be fast, or `None`. Raises `PagedMemoryError`.
    """
    foreign, ids = foreign_attention(model.config, map(type, model.modules())), usual_tokens(request, cache)
    if foreign is not None:
        return run_padded(request, cache, ids), foreign
    twin = deepcopy(request.kwargs[CACHE_NAME])
    _pair(cache, paged_part(twin))
    try:
        before = OwnState(model)
        outputs = run_padded(request, cache, ids)
        if before.is_changed():
            return outputs, OWN_STATE
        request = replace(request, kwargs={**request.kwargs, CACHE_NAME: twin})
        with draws_kept(model):
            return outputs, _obstacle(model, request, paged_part(twin), backend, outputs.logits)
    finally:
        cache.sequences.twin = None
        twin.reset()


def _pair(cache: PagedCache, twin: PagedCache) -> None:
    """They hold the same blocks, which either may move."""
    cache.sequences.twin, twin.sequences.twin = twin.sequences, cache.sequences


def _obstacle(
    model: nn.Module, request: ModelCall, cache: PagedCache, backend: AttentionBackend, expected: torch.Tensor
) -> str | None:
    """Why a fast decode step is not as `expected`, its logits `[rows, 1, vocabulary]`; or `None`."""
    cache.room_tokens = 0
    windows: dict[int, int | None] = {}
    try:
        fast = run_decode(request, cache, backend, windows).logits
    except UnsupportedAttentionError as error:
        return str(error)
    except Exception as error:  # whatever a model does with what it did not expect, the padded path is right
        if isinstance(error, PagedMemoryError) or is_refusal(error):
            raise
        return in_one_line(error)
    if any(windows.get(layer) != window for layer, window in enumerate(cache.windows)):
        return "sliding window that attention is not told of"
    error = difference(fast, expected)
    # Logits may be finer than what they were made from: accelerate gives out float32 under autocast.
    if error <= max(tolerance_of(expected.dtype), tolerance_with(model, cache.pool)):
        return None
    return f"decoded logits differ from stock by {error:.1g} of the largest"
