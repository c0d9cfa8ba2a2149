"""Finds and loads the native library.

The library (`kernels/native`, loaded with ctypes) is made without Python and torch, when the package is
installed, where there is a compiler.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch  # first, so that its OpenMP runtime is loaded

LIBRARY = Path(__file__).with_name("_native.so")
# The environment variable that switches it off, or forces a variant.
SWITCH = "HF_PAGED_NATIVE"

CPU = torch.device("cpu")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NO_MEMORY = 5
ERRORS = {
    1: "a size or dim is out of range",
    2: "a run reaches beyond the slots",
    3: "a part names queries or runs that do not exist",
    4: "the variant does not do this dtype or dim on this CPU",
    NO_MEMORY: "out of memory",
    6: "a write or copy reaches beyond the slots or the new tokens",
}


class NativeError(ValueError):
    """The library has refused a call."""


def error_of(code: int) -> Exception:
    """What to raise where the library has returned `code`, one of `ERRORS`."""
    return MemoryError(ERRORS[code]) if code == NO_MEMORY else NativeError(ERRORS[code])


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, for what every CPU runs; `None` where it was not built, cannot be loaded or is switched off."""
    if os.environ.get(SWITCH) == "off":
        return None
    try:
        return load()
    except OSError:
        return None


@functools.cache
def load() -> ctypes.CDLL:
    """The library, whatever the switch says. Raises `OSError` where it cannot be loaded."""
    library = ctypes.CDLL(str(LIBRARY))
    address, integer = ctypes.c_void_p, ctypes.c_int64
    library.hf_paged_attend.argtypes = (ctypes.c_char_p, address, address)
    library.hf_paged_attend.restype = ctypes.c_int64
    library.hf_paged_store.argtypes = (ctypes.c_char_p, address, address)
    library.hf_paged_store.restype = ctypes.c_int64
    library.hf_paged_linear.argtypes = (ctypes.c_char_p,)
    library.hf_paged_linear.restype = ctypes.c_int64
    library.hf_paged_sample_begin.argtypes = (ctypes.c_char_p, integer, integer, ctypes.POINTER(ctypes.c_void_p))
    library.hf_paged_sample_begin.restype = ctypes.c_int64
    library.hf_paged_sample_end.argtypes = (ctypes.c_void_p,)
    library.hf_paged_sample_end.restype = ctypes.c_int64
    library.hf_paged_variant.argtypes = (ctypes.c_int64, ctypes.POINTER(ctypes.c_int64))
    library.hf_paged_variant.restype = ctypes.c_char_p
    library.hf_paged_use_threads.argtypes = (ctypes.c_void_p,)
    library.hf_paged_use_threads.restype = None
    library.hf_paged_use_threads(openmp_entry())
    return library


def openmp_entry() -> ctypes.c_void_p | None:
    """Where the OpenMP runtime that torch has loaded starts threads; `None`: the library uses one thread."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError, TypeError):  # another runtime; Windows has no global namespace
        return None
