"""Exceptions of hf_paged."""

import torch

# How torch says so on the CPU, for which it has no class.
_REFUSED_ON_CPU = ("can't allocate memory", "not enough memory")


class PagedMemoryError(RuntimeError):
    """A sequence cannot fit in the KV pool even after every cached block was evicted.

    The message says how many tokens were asked for, how many fit, and which setting to raise. The model, the
    pool and other callers' sequences stay usable.
    """


class ForeignKVError(ValueError):
    """K and V of other tokens than a row's new ones, or of another shape than the layer has blocks for."""


class PoolInUseError(ValueError):
    """Calls of other threads run on a pool whose K and V are of another dtype than one's own, or elsewhere."""


class UnseenLayersError(PagedMemoryError):
    """The host would have room, once it is known what each layer keeps: nothing has gone through the model yet."""


class RefusedMemoryError(PagedMemoryError):
    """The system refuses what the budget allows."""


def is_refusal(error: BaseException) -> bool:
    """Whether the system or a device refused memory: that says nothing about what was tried, and may pass."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | RefusedMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _REFUSED_ON_CPU)
