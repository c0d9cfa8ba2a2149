"""Exceptions of hf_paged."""


class PagedMemoryError(RuntimeError):
    """A sequence cannot fit in the KV pool even after every cached block was evicted.

    The message says how many tokens were asked for, how many fit, and which setting to raise. The model, the
    pool and other callers' sequences stay usable.
    """


class UnseenLayersError(PagedMemoryError):
    """The host would have room, once it is known what each layer keeps: nothing has gone through the model yet."""
