"""Models whose prompts cannot be packed: may their decode steps read the blocks? Tried on a step of a real call."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from hf_paged.backends import AttentionBackend
from hf_paged.cache import PagedCache
from hf_paged.encdec import paged_part
from hf_paged.errors import PagedMemoryError
from hf_paged.forward import ModelCall, run_decode, run_padded
from hf_paged.probe import TOLERANCES
from hf_paged.step import UnsupportedAttentionError

# With fewer tokens to attend to, a model that the fast path gets wrong might not show it.
MIN_TRIAL_TOKENS = 8


def try_decode(request: ModelCall, cache: PagedCache, backend: AttentionBackend) -> tuple[Any, str | None]:
    """One decode step, computed both ways: on a copy of the cache by the fast path, then as stock does.

    Returns the outputs of the latter, and why steps like this must not be fast, or `None`. Raises `PagedMemoryError`
    as the padded path does.
    """
    twin = deepcopy(request.kwargs["past_key_values"])
    part = paged_part(twin)
    windows: dict[int, int | None] = {}
    fast, obstacle = None, None
    try:
        part.room_tokens = 0
        kwargs = {**request.kwargs, "past_key_values": twin}
        fast = run_decode(replace(request, kwargs=kwargs), part, backend, windows).logits
    except PagedMemoryError:
        raise
    except UnsupportedAttentionError as error:
        obstacle = str(error)
    except Exception as error:  # whatever a model does with what it did not expect, the padded path is right
        obstacle = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    finally:
        (twin.release if part is twin else twin.reset)()
    outputs = run_padded(request, cache)
    if obstacle is None:
        obstacle = _difference(fast, outputs.logits)
    if obstacle is None and any(windows.get(layer) != window for layer, window in enumerate(cache.windows)):
        obstacle = "sliding window that attention is not told of"
    return outputs, obstacle


def _difference(fast: torch.Tensor, expected: torch.Tensor) -> str | None:
    """How logits `[rows, 1, vocabulary]` of the fast path differ from those expected, where they do."""
    error = (fast - expected).float().abs().max() / expected.float().abs().max().clamp(min=1e-6)
    if float(error) <= TOLERANCES.get(expected.dtype, 8e-2):
        return None
    return f"decoded logits differ from stock by {float(error):.1g} of the largest"
