"""What is noted of a pass that is not fast, or of which nothing is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from transformers import PreTrainedModel

from hf_paged.cache import PagedCache
from hf_paged.capabilities import Capabilities
from hf_paged.compat import CACHE_NAME
from hf_paged.forward import ModelCall
from hf_paged.probe import Capability
from hf_paged.stats import Counters
from hf_paged.step import UnsupportedAttentionError

T = TypeVar("T")


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


def fast_or_padded(
    fast: Callable[[], T],
    padded: Callable[[], T],
    counters: Counters,
    cache: PagedCache,
    lengths: list[int],
    obstacle: str | None,
) -> T:
    """What `fast` returns; that of `padded` where there is an obstacle or `fast` meets one, which is counted.

    Args:
        fast: a pass that reads blocks.
        padded: the same pass in stock's shapes.
        counters: told of the obstacle.
        cache: of the pass.
        lengths: tokens that its rows hold before the pass.
        obstacle: why the pass must not be fast.

    Raises:
        RuntimeError: where the pass cannot be repeated.
        UnsupportedAttentionError: where the prompt is to be cut in stock's way.
    """
    if obstacle is None:
        try:
            return fast()
        except UnsupportedAttentionError as error:
            obstacle = str(error)
            cache.roll_back(lengths)
        if lengths and not cache.tables:
            raise RuntimeError(f"{CACHE_NAME} was lost: {obstacle}, in the middle of a pass")
    note_padded(counters, cache, obstacle)
    return padded()
