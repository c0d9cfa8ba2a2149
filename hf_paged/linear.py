"""Linear layers by the native kernel and by oneDNN, on CPUs where torch is slower.

Few rows, as decode steps have, are bound by reading the weights. On a Zen 4 the native kernel reads them once and in
order in 0.2 to 0.8 of torch's time, whose choice is Intel's MKL for float32, oneDNN for bfloat16 and plain loops for
float16. More rows of float32, as prompts have, are multiplied by torch's oneDNN faster than by MKL, which is at its
best on Intel's own CPUs. Sums differ in their last bits, as between two versions of one library.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_paged import torch_compat
from hf_paged.core.forks import new_lock
from hf_paged.torch_compat import multiply
from hf_paged.watched import is_unwatched
from hf_paged_kernels import NativeLinear, native_kernels
from hf_paged_kernels.processor import beats_mkl

# By the native kernel: from how many rows on, up to how many, up to how many numbers that go in, and by how many
# weights at least; as `benchmarks/linear.py` says. torch multiplies one row of float16 well, but not more.
NATIVE_ROWS = {
    torch.float32: (1, math.inf, 2**17),
    torch.bfloat16: (1, 24, math.inf),
    torch.float16: (2, 2**20, 2**24),
}
LEAST_WEIGHTS = 2**14
# By oneDNN: more rows than this are multiplied in pieces.
PIECE_ROWS = 512
# Up to how many rows layers of how many weights and features out, or more, take it, by `benchmarks/linear.py`. Below
# 2**18 a call costs more than it saves: 576 x 192 takes longer, 576 x 576 does not. Of more rows less is to be won, and
# the copies that fill them up and put pieces together cost all of it where few features come out.
LEAST: tuple[tuple[float, int, int], ...] = ((64, 2**18, 1), (256, 2**19, 768), (math.inf, 2**21, 1024))
# oneDNN keeps code for each number of rows and shape of weights, made in some 0.5 ms and of 0.6 MB, however many rows
# they are. So up to the next power of two there are no more numbers of rows than this.
_STEPS = 8
# What torch has to find in a CPU, as measured by `benchmarks/linear.py`.
_CAPABILITIES = ("AVX512",)
_ABSENT = object()
# Of input, weights `[features_out, features_in]` and bias.
Product = Callable[..., torch.Tensor]
# transformers' own, as long as nobody replaces it.
_FORWARDS = nn.Linear.forward, Conv1D.forward


class _Scope(threading.local):
    """Of a thread: whether layers may be multiplied by others than torch chooses."""

    is_open = False


_scope = _Scope()


class _TakenLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if not torch.compiler.is_compiling() and _scope.is_open:
            multiply = way_to_take(input, self._parameters, 1)
            if multiply is not None:
                return multiply(input, self._parameters["weight"], self._parameters["bias"])
        return nn.Linear.forward(self, input)  # by name: accelerate calls this method of layers that were given back

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and files have the original class, and need no hf_paged."""
        if type(self) is not _TakenLinear:
            return super().__reduce_ex__(protocol)
        return nn.Linear, (1, 1, False, "meta"), vars(self)  # which draws no numbers


class _TakenConv1D(Conv1D):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`; weights are `[in_features, out_features]`."""
        if not torch.compiler.is_compiling() and _scope.is_open:
            multiply = way_to_take(x, self._parameters, 0)
            if multiply is not None:
                return multiply(x, self._parameters["weight"].T, self._parameters["bias"])
        return Conv1D.forward(self, x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As above."""
        if type(self) is not _TakenConv1D:
            return super().__reduce_ex__(protocol)
        return object.__new__, (Conv1D,), vars(self)


# The classes that layers of a patched model have; by their names, and outside of `multiplied_faster`, these are the
# originals.
_TAKEN = {nn.Linear: _TakenLinear, Conv1D: _TakenConv1D}
_ORIGINALS = {taken: original for original, taken in _TAKEN.items()}
for _taken, _original in _ORIGINALS.items():
    for _name in ("__name__", "__qualname__", "__module__"):
        setattr(_taken, _name, getattr(_original, _name))

# Whose they are: models may have layers in common.
_models_of: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
_lock = new_lock()


def way_to_take(input: torch.Tensor, parameters: Mapping[str, Any], axis: int) -> Product | None:
    """Who multiplies faster than torch, where nobody sees that it is asked; else `None`.

    `axis`: of a layer's weights, that of features in. Asked of each layer in each step; it takes 2 us, more where
    caches are cold.
    """
    weight, bias = parameters.get("weight"), parameters.get("bias", _ABSENT)
    is_plain = (
        _is_plain(weight)
        and weight.dim() == 2
        and (
            bias is None or (_is_plain(bias) and bias.dtype is weight.dtype and bias.shape == (weight.shape[1 - axis],))
        )
        and type(input) is torch.Tensor
        and input.dtype is weight.dtype
        and input.is_cpu
        and input.layout is torch.strided
        and input.dim()
    )
    if not is_plain or input.shape[-1] != (features := weight.shape[axis]) or not is_unwatched():
        return None
    rows = input.numel() // features
    if axis and is_natively_won(rows, weight):
        return native_linear().run
    if input.dtype is torch.float32 and is_won(rows, weight, weight.shape[1 - axis]):
        return product
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


def _is_plain(tensor: Any) -> bool:
    return (
        type(tensor) is nn.Parameter
        and tensor.dtype in NATIVE_ROWS
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
    )


def product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`functional.linear` by oneDNN."""
    rows = input.numel() // weight.shape[1]
    if rows <= PIECE_ROWS and rows == _filled_up(rows):
        return multiply(input, weight, bias)
    flat = input.reshape(rows, -1)
    if rows <= PIECE_ROWS:
        answer = _piece(flat, weight, bias)
    else:
        answer = input.new_empty(rows, len(weight))
        for piece, into in zip(flat.split(PIECE_ROWS), answer.split(PIECE_ROWS), strict=True):
            into.copy_(_piece(piece, weight, bias))
    return answer.view(*input.shape[:-1], -1)


def _piece(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Of `[rows, in_features]`, with zeros below as far as code is kept for more rows only."""
    rows = len(input)
    if missing := _filled_up(rows) - rows:
        input = functional.pad(input, (0, 0, 0, missing))
    return multiply(input, weight, bias)[:rows]


def _filled_up(rows: int) -> int:
    """The number of rows for which code is kept, an eighth more at most above 64."""
    if rows <= _STEPS:
        return rows
    step = max(_STEPS, 2 ** rows.bit_length() // 2 // _STEPS)
    return -(-rows // step) * step


def take_layers(model: nn.Module) -> None:
    """Let the linear layers of a model be multiplied faster in `multiplied_faster`, where this machine can."""
    if not is_faster():
        return
    for each in model.modules():
        if type(each) in _ORIGINALS or (type(each) in _TAKEN and _is_to_be_taken(each)):
            with _lock:
                _models_of.setdefault(each, WeakSet()).add(model)
                each.__class__ = _TAKEN.get(type(each), type(each))


def _is_to_be_taken(layer: nn.Module) -> bool:
    return "forward" not in vars(layer) and bool(_ways(layer))


def _ways(layer: nn.Module) -> list[str]:
    """Who may multiply faster by a layer's weights, as they are now."""
    weight, kernel, ways = layer._parameters.get("weight"), native_linear(), []
    if not _is_plain(weight) or weight.dim() != 2:
        return ways
    is_linear = isinstance(layer, nn.Linear)
    if is_linear and kernel and weight.numel() >= LEAST_WEIGHTS and kernel.takes(weight.dtype, weight.shape[1]):
        ways.append("native kernel")
    if weight.dtype is torch.float32 and weight.numel() >= LEAST[0][1] and has_onednn():
        ways.append("oneDNN")
    return ways


def give_layers_back(model: nn.Module) -> None:
    """Undo `take_layers`, also of layers that have left the model; not where another model has taken them, too."""
    with _lock:
        for layer, models in list(_models_of.items()):
            models.discard(model)
            if not models:
                del _models_of[layer]
                layer.__class__ = _ORIGINALS.get(type(layer), type(layer))


@contextmanager
def multiplied_faster() -> Iterator[None]:
    """Within `one_pass`: layers are multiplied by who is fastest, where nobody has replaced what they call."""
    before = _scope.is_open
    _scope.is_open = is_faster() and not _is_replaced()
    try:
        yield
    finally:
        _scope.is_open = before


def _is_replaced() -> bool:
    """Whether torch's functions are not what they are from the start, or not to be called."""
    return not torch_compat.calls_own_linear() or (nn.Linear.forward, Conv1D.forward) != _FORWARDS


def describe(model: nn.Module) -> str:
    """Who multiplies in a patched model's passes, for people."""
    ways = {way for each in model.modules() if type(each) in _ORIGINALS for way in _ways(each)}
    if torch_compat.OBSTACLE is not None or _is_replaced() or not ways:
        return "torch's choice"
    return ", ".join(sorted(ways))


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
