"""Attention over paged KV: plain-torch operations, needing nothing but torch."""

from .partial import attend_all, attend_partial, merge_partial
from .reference import paged_attention_reference

__all__ = ["attend_all", "attend_partial", "merge_partial", "paged_attention_reference"]
