"""Linear layers of few rows on the native library, which reads the weights once, as fast as memory gives them."""

from __future__ import annotations

import ctypes
from struct import Struct

import torch

from .native_library import DTYPES, NativeError, error_of

# As `Linear` in native.h.
_CALL = Struct("=5q4Qq")


class NativeLinear:
    """What one variant of the library does of linear layers.

    Args:
        index: of the variant.
        lanes: of its vectors.
    """

    def __init__(self, library: ctypes.CDLL, index: int, lanes: int):
        self._index = index
        self._lanes = lanes
        self._multiply = library.hf_paged_linear

    def takes(self, dtype: torch.dtype, features_in: int) -> bool:
        """Whether it multiplies rows of so many numbers of this dtype."""
        lanes = self._lanes if dtype is torch.float32 else 2 * self._lanes  # pairs of bfloat16 in each lane
        return dtype in DTYPES and features_in % lanes == 0

    def multiply(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`torch.nn.functional.linear`, summed in float32, of what `takes` says is taken.

        Args:
            input: `[..., features_in]`.
            weight: `[features_out, features_in]`, contiguous.
            bias: `[features_out]`, contiguous. All of one dtype and on the CPU.

        Returns:
            `[..., features_out]`, contiguous, each row the same whatever other rows there are.

        Raises:
            NativeError: where the library does not do it, or the tensors do not fit.
            MemoryError: where it gets no memory.
        """
        outputs, inputs = weight.shape
        shape, dtype = input.shape, input.dtype
        fits = shape[-1] == inputs and _suits(weight, input) and weight.is_contiguous()
        if not (fits and self.takes(dtype, inputs)):
            raise NativeError(f"cannot multiply {tuple(shape)} in {dtype} by {tuple(weight.shape)} in {weight.dtype}")
        if bias is not None and not (_suits(bias, input) and bias.shape == (outputs,) and bias.is_contiguous()):
            raise NativeError(
                f"bias must be [{outputs}] in {dtype}, contiguous, got {tuple(bias.shape)} in {bias.dtype}"
            )
        return self.run(input, weight, bias)

    def run(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`multiply` of tensors that are known to fit: only sizes are checked."""
        outputs, inputs = weight.shape
        input = input.contiguous()
        out = input.new_empty((*input.shape[:-1], outputs))
        error = self._multiply(
            _CALL.pack(
                self._index, DTYPES[input.dtype], input.numel() // inputs, inputs, outputs,
                input.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(),
                torch.get_num_threads(),
            )
        )  # fmt: skip
        if error:
            raise error_of(error)
        return out


def _suits(tensor: torch.Tensor, input: torch.Tensor) -> bool:
    return tensor.dtype is input.dtype and tensor.dtype in DTYPES and tensor.is_cpu and input.is_cpu
