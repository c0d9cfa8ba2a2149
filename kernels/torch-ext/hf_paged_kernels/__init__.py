"""Attention over paged KV: formats it is stored in, plain-torch operations, a native CPU kernel where it was built."""

from .entries import ModuleEntries
from .formats import FORMATS, KVFormat, KVRecords, TokenFormat
from .latent import attend_latents
from .native import Availability, NativeKernel, Part, Parts, kernel_for, native_kernels, place_at
from .native_library import NativeError
from .native_linear import NativeLinear
from .native_store import NativeStore, Writes, place_from
from .partial import attend_all, attend_partial, flash_takes, merge_partial
from .reference import paged_attention_reference
from .rotation import rotated
from .sample import NativeSample, can_sample

__all__ = [
    "FORMATS",
    "Availability",
    "KVFormat",
    "KVRecords",
    "ModuleEntries",
    "NativeError",
    "NativeKernel",
    "NativeLinear",
    "NativeSample",
    "NativeStore",
    "Part",
    "Parts",
    "TokenFormat",
    "Writes",
    "attend_all",
    "attend_latents",
    "attend_partial",
    "can_sample",
    "flash_takes",
    "kernel_for",
    "merge_partial",
    "native_kernels",
    "paged_attention_reference",
    "place_at",
    "place_from",
    "rotated",
]
