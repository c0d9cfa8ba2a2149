"""What is noted of a pass that is not fast, or of which nothing is kept."""

from __future__ import annotations

from transformers import PreTrainedModel

from hf_paged.cache import PagedCache
from hf_paged.capabilities import Capabilities
from hf_paged.compat import CACHE_NAME
from hf_paged.forward import ModelCall
from hf_paged.probe import Capability
from hf_paged.stats import Counters
from hf_paged.step import UnsupportedAttentionError


def note_unkept(
    capabilities: Capabilities,
    counters: Counters,
    model: PreTrainedModel,
    request: ModelCall,
    cache: PagedCache,
    known: Capability,
) -> None:
    """Nothing of the rows is kept for later calls, nor found, where more than tokens says what K and V are."""
    unkept = None if cache.root is None else capabilities.unkept(model, request, known)
    if unkept is not None:
        cache.untrack()
        counters.fall_back(f"prefixes not reused: {unkept}")


def note_padded(counters: Counters, cache: PagedCache, obstacle: str) -> None:
    """Count the reason, once a call; `UnsupportedAttentionError` where the prompt is to be cut in stock's way."""
    if cache.chunk_tokens is not None:
        raise UnsupportedAttentionError(obstacle)
    if not cache.fell_back:
        cache.fell_back = True
        counters.fall_back(obstacle)


def check_not_lost(cache: PagedCache, lengths: list[int], obstacle: str) -> None:
    """`RuntimeError` where a pass that could not be fast cannot be repeated either."""
    if lengths and not cache.tables:
        raise RuntimeError(f"{CACHE_NAME} was lost: {obstacle}, in the middle of a pass") from None
