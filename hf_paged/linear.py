"""Linear layers of decode steps by oneDNN, on CPUs where torch takes a slower library for them.

For float32 torch takes Intel's MKL, which is at its best on Intel's own CPUs. On a Zen 4 torch's oneDNN, which it takes
for bfloat16, multiplies up to 64 rows by the same weights 1 to 3.5 times as fast, as they lie in memory. Sums differ in
their last bits, as between two versions of one library.
"""

from __future__ import annotations

import functools
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

MAX_ROWS = 64
# Below it a call of oneDNN costs more than it saves: 576 x 192 takes longer, 576 x 576 does not.
MIN_WEIGHTS = 2**18
# For each number of rows oneDNN makes code anew, in some 0.5 ms and 0.7 MB for each shape of weights: more rows than
# this are filled up to a multiple of it.
_STEP_ROWS = 8
# Where it is faster, as measured by `benchmarks/linear.py`.
_VENDORS = ("AuthenticAMD",)
_CPU_INFO = Path("/proc/cpuinfo")
# What torch and transformers have for linear layers as long as nobody replaces it.
_FUNCTIONS = nn.Linear.forward, functional.linear, Conv1D.forward, torch.addmm


class _Scope(threading.local):
    is_open = False


_scope = _Scope()


class _TakenLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if not torch.compiler.is_compiling() and _scope.is_open:
            weight = self._parameters.get("weight")
            rows = few_rows_of(input, weight, 1)
            if rows is not None:
                return _product(input, rows, weight, self._parameters["bias"])
        return super().forward(input)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _as_original(self)


class _TakenConv1D(Conv1D):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`; weights are `[in_features, out_features]`."""
        if not torch.compiler.is_compiling() and _scope.is_open:
            weight = self._parameters.get("weight")
            rows = few_rows_of(x, weight, 0)
            if rows is not None:
                return _product(x, rows, weight.T, self._parameters["bias"])
        return super().forward(x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _as_original(self)


# The classes that layers of a patched model have; by their names, and outside of `few_rows`, they are the originals.
_TAKEN = {nn.Linear: _TakenLinear, Conv1D: _TakenConv1D}
_ORIGINALS = {taken: original for original, taken in _TAKEN.items()}
for _taken, _original in _ORIGINALS.items():
    for _name in ("__name__", "__qualname__", "__module__"):
        setattr(_taken, _name, getattr(_original, _name))


def _as_original(layer: nn.Module) -> tuple[Any, ...]:
    """For copies and files, which need no hf_paged."""
    return object.__new__, (_ORIGINALS[type(layer)],), vars(layer)


def few_rows_of(input: torch.Tensor, weight: torch.Tensor | None, axis: int) -> int | None:
    """How many rows `input` has, where oneDNN is faster and does what torch would; else `None`.

    `axis`: of the weights, that of features in. Asked of each layer in each step, it takes a microsecond.
    """
    is_plain = (
        type(weight) is nn.Parameter
        and weight.numel() >= MIN_WEIGHTS
        and input.dtype is weight.dtype is torch.float32
        and type(input) is torch.Tensor
        and input.is_cpu
        and weight.is_cpu
        and weight.is_contiguous()
        and input.dim()
    )
    if not is_plain or input.shape[-1] != (features := weight.shape[axis]):
        return None
    rows = input.numel() // features
    return rows if rows <= MAX_ROWS else None


def _product(input: torch.Tensor, rows: int, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`functional.linear` by oneDNN."""
    if rows <= _STEP_ROWS or not rows % _STEP_ROWS:
        return multiply(input, weight, bias)
    filled = functional.pad(input.reshape(rows, -1), (0, 0, 0, -rows % _STEP_ROWS))
    return multiply(filled, weight, bias)[:rows].view(*input.shape[:-1], -1)


def multiply(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """torch's operator for it, which has no gradients."""
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


def take_layers(model: nn.Module) -> None:
    """Let the linear layers of a model take oneDNN in `few_rows`, where that is of use on this machine."""
    if is_faster():
        for each in model.modules():
            is_own = type(each) in _TAKEN and "forward" not in vars(each)
            if is_own and each.weight.numel() >= MIN_WEIGHTS:
                each.__class__ = _TAKEN[type(each)]


def give_layers_back(model: nn.Module) -> None:
    """Undo `take_layers`."""
    for each in model.modules():
        if type(each) in _ORIGINALS:
            each.__class__ = _ORIGINALS[type(each)]


@contextmanager
def few_rows() -> Iterator[None]:
    """Around a pass of a patched model in this thread: layers whose input has few rows take oneDNN.

    Not where gradients, autocast, a transform or a mode of torch's, or who has replaced its functions, is to see them.
    """
    before = _scope.is_open
    _scope.is_open = is_faster() and _nobody_looks()
    try:
        yield
    finally:
        _scope.is_open = before


def _nobody_looks() -> bool:
    return not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or not torch.backends.mkldnn.enabled
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or (nn.Linear.forward, functional.linear, Conv1D.forward, torch.addmm) != _FUNCTIONS
    )


def describe(model: nn.Module) -> str:
    """Which library multiplies in a patched model's steps, for people."""
    is_taken = any(
        type(each) in _ORIGINALS and each.weight.dtype == torch.float32 and each.weight.device.type == "cpu"
        for each in model.modules()
    )
    return f"oneDNN, up to {MAX_ROWS} rows" if is_taken else "torch's choice"


@functools.cache
def is_faster() -> bool:
    """Whether torch takes MKL on this machine, oneDNN is faster, and can be asked for a linear layer."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    return _vendor() in _VENDORS and _is_there()


def _vendor() -> str:
    """Who has made the CPU, as an x86-64 names its vendor; anything else elsewhere."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:  # not Linux; Windows says it last
        return (platform.processor().split() or [""])[-1]
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def _is_there() -> bool:
    """Whether this torch has the operator, with the arguments that those of 2.11 to 2.13 have."""
    input, weight, bias = (torch.arange(size, dtype=torch.float32) for size in (6, 12, 4))
    input, weight = input.view(2, 3), weight.view(4, 3)
    try:
        with torch.no_grad():
            return torch.equal(multiply(input, weight, bias), functional.linear(input, weight, bias))
    except (AttributeError, RuntimeError):
        return False
