"""Attention over paged KV: plain-torch operations, and a native kernel for the CPU where it was built."""

from .native import NativeError, NativeKernel, NativeStore, Part, Parts, Writes, kernel_for, native
from .partial import attend_all, attend_partial, merge_partial
from .reference import paged_attention_reference
from .sample import NativeSample, takes

__all__ = [
    "NativeError",
    "NativeKernel",
    "NativeSample",
    "NativeStore",
    "Part",
    "Parts",
    "Writes",
    "attend_all",
    "attend_partial",
    "kernel_for",
    "merge_partial",
    "native",
    "paged_attention_reference",
    "takes",
]
