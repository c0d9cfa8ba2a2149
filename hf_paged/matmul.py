"""Who multiplies by the weights of linear layers faster than torch's choice: the native kernel, or oneDNN.

Few rows, as decode steps have, are bound by reading the weights. On a Zen 4 the native kernel reads them once and in
order in 0.2 to 0.8 of torch's time, whose choice is Intel's MKL for float32, oneDNN for bfloat16 and plain loops for
float16. More rows of float32, as prompts have, are multiplied by torch's oneDNN faster than by MKL, which is at its
best on Intel's own CPUs. Sums differ in their last bits, as between two versions of one library.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_paged import onednn, torch_compat
from hf_paged_kernels import NativeLinear, native_kernels
from hf_paged_kernels.processor import beats_mkl

# By the native kernel: from how many rows on, up to how many, up to how many numbers that go in, and by how many
# weights at least; as `benchmarks/linear.py` says. torch multiplies one row of float16 well, but not more.
NATIVE_ROWS = {
    torch.float32: (1, math.inf, 2**17),
    torch.bfloat16: (1, 24, 2**24),
    torch.float16: (2, 2**20, 2**24),
}
LEAST_WEIGHTS = 2**14
# By oneDNN: up to how many rows layers of how many weights and features out, or more, take it, by the same benchmark.
# Below 2**18 a call costs more than it saves: 576 x 192 takes longer, 576 x 576 does not. Of more rows less is to be
# won, and the copies that fill them up and put pieces together cost all of it where few features come out.
LEAST: tuple[tuple[float, int, int], ...] = ((64, 2**18, 1), (256, 2**19, 768), (math.inf, 2**21, 1024))
# What torch has to find in a CPU, as measured by `benchmarks/linear.py`.
_CAPABILITIES = ("AVX512",)
# transformers' own, as long as nobody replaces it.
_FORWARDS = nn.Linear.forward, Conv1D.forward
# Of input, weights `[features_out, features_in]` and bias.
Product = Callable[..., torch.Tensor]


class _Scope(threading.local):
    """Of a thread: whether layers may be multiplied by others than torch chooses."""

    is_open = False


_scope = _Scope()


@contextmanager
def multiplied_faster() -> Iterator[None]:
    """Within `one_pass`: layers are multiplied by who is fastest, where nobody has replaced what they call."""
    before = _scope.is_open
    _scope.is_open = is_faster() and not is_switched_off()
    try:
        yield
    finally:
        _scope.is_open = before


def may_choose() -> bool:
    """Whether a layer that is computed in this thread may ask others than torch."""
    return not torch.compiler.is_compiling() and _scope.is_open  # in this order: compilers know no threads' own


def is_replaced() -> bool:
    """Whether torch's functions are not what they are from the start."""
    return not torch_compat.calls_own_linear() or (nn.Linear.forward, Conv1D.forward) != _FORWARDS


def is_switched_off() -> bool:
    """Whether nobody but torch is to multiply: its functions are replaced, or may not take oneDNN."""
    return is_replaced() or not torch_compat.may_take_onednn()


def fastest(rows: int, weight: torch.Tensor, is_transposed: bool = False) -> Product | None:
    """Who multiplies that many rows faster than torch, by weights `[features_out, features_in]`; or `None`.

    `is_transposed`: they are `[features_in, features_out]`.
    """
    if not is_transposed and is_natively_won(rows, weight):
        return native_linear().run
    if weight.dtype is torch.float32 and is_won(rows, weight, weight.shape[1 if is_transposed else 0]):
        return onednn.product
    return None


def is_natively_won(rows: int, weight: torch.Tensor) -> bool:
    """Whether the native kernel is faster with `rows` rows, by weights `[features_out, features_in]`."""
    kernel, features = native_linear(), weight.shape[1]
    least_rows, most_rows, most_numbers = NATIVE_ROWS[weight.dtype]
    return (
        kernel is not None
        and least_rows <= rows <= most_rows
        and rows * features <= most_numbers
        and weight.numel() >= LEAST_WEIGHTS
        and kernel.takes(weight.dtype, features)
    )


def is_won(rows: int, weight: torch.Tensor, outputs: int) -> bool:
    """Whether oneDNN is faster than torch's choice for float32, its copies included."""
    if not has_onednn():
        return False
    for most_rows, weights, least_outputs in LEAST:
        if rows <= most_rows:
            return weight.numel() >= weights and outputs >= least_outputs
    return False


def ways(weight: torch.Tensor, is_transposed: bool = False) -> list[str]:
    """Who may multiply faster by weights `[features_out, features_in]`, for people."""
    kernel, found = native_linear(), []
    is_large = not is_transposed and weight.numel() >= LEAST_WEIGHTS
    if is_large and kernel is not None and kernel.takes(weight.dtype, weight.shape[1]):
        found.append("native kernel")
    if weight.dtype is torch.float32 and weight.numel() >= LEAST[0][1] and has_onednn():
        found.append("oneDNN")
    return found


def is_plain(tensor: Any) -> bool:
    """Whether these are weights or a bias as models have them, which the ways that are faster can read."""
    return (
        type(tensor) is nn.Parameter
        and tensor.dtype in NATIVE_ROWS
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


@functools.cache
def is_faster() -> bool:
    """Whether anybody is known to be faster than torch on this machine."""
    return native_linear() is not None or has_onednn()


def native_linear() -> NativeLinear | None:
    """The native kernel for linear layers, where it is known to be faster."""
    return native_kernels().linear


@functools.cache
def has_onednn() -> bool:
    """Whether torch takes MKL on this machine, oneDNN is faster, and can be asked for a linear layer."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    is_known = beats_mkl() and torch.backends.cpu.get_cpu_capability() in _CAPABILITIES
    return is_known and torch_compat.can_multiply()
