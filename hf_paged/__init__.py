"""hf_paged: paged, block-table KV caches for plain `transformers` `generate`."""

from hf_paged.cache import PagedCache
from hf_paged.config import PagedConfig
from hf_paged.errors import PagedMemoryError
from hf_paged.patch import paged, patch_model, unpatch_model
from hf_paged.stats import PagedStats

__version__ = "0.1.0"

__all__ = [
    "PagedCache",
    "PagedConfig",
    "PagedMemoryError",
    "PagedStats",
    "paged",
    "patch_model",
    "unpatch_model",
]
