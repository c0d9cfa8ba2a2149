"""A sample of what a model's tensors hold, to notice edits that nothing else tells of."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from hf_paged.torch_compat import plain_reads
from hf_paged.weights import unreadable
from hf_paged_kernels import NativeSample, can_sample

# How many elements of a tensor are read at least, or all; of one without rows (vectors, the packed columns of
# bitsandbytes); and how far apart at most. These and not the bookkeeping are what a look at a model costs: 5 ns a read.
MIN_SAMPLES, MIN_VECTOR_SAMPLES, MAX_STEP = 256, 65536, 2048


class Sample:
    """The bytes of at least one element of every row (last dim) of each tensor, in a column that varies with the row.

    Holds none of the tensors. What the native library does not take (other devices, complex numbers, tensors that are
    not contiguous), or all where there is none, is read by torch: two to four times as slow.
    """

    def __init__(self, tensors: list[torch.Tensor]):
        # the first of several that are one, such as tied embeddings
        distinct = {
            id(each): i for i, each in reversed(list(enumerate(tensors))) if each.numel() and not unreadable(each)
        }
        groups: dict[tuple[torch.device, torch.dtype] | None, list[int]] = {}
        for index in sorted(distinct.values()):
            tensor = tensors[index]
            groups.setdefault(None if can_sample(tensor) else (tensor.device, tensor.dtype), []).append(index)
        self._groups = [
            (indices, (_native_sample if key is None else _TorchSample)([tensors[index] for index in indices]))
            for key, indices in groups.items()
        ]

    def differs(self, tensors: list[torch.Tensor]) -> bool:
        """Whether any byte is another than when this was made; `tensors` are in the same states as then."""
        return self.begin(tensors)()

    def begin(self, tensors: list[torch.Tensor]) -> Callable[[], bool]:
        """`differs(tensors)` when called; what the native library reads is read from now on, by other threads."""
        looks = [group.begin([tensors[index] for index in indices]) for indices, group in self._groups]
        return lambda: any(look() for look in looks)


class _TorchSample:
    """The tensors of one device and dtype: one strided view each, and one `cat`.

    `_foreach_copy_` into buffers is as fast, indices take half as long again.
    """

    def __init__(self, tensors: list[torch.Tensor]):
        with torch.inference_mode():
            self._reads = [(*_places(tensor), _indices(tensor)) for tensor in tensors]
            count = sum(read[0] for read in self._reads)
            # a multiple of 8 elements, compared as int64: twice as fast as in their own type, and exact with NaN
            self._padding = torch.zeros(-count % 8, dtype=tensors[0].dtype, device=tensors[0].device)
        self._before = self._read(tensors)

    def differs(self, tensors: list[torch.Tensor]) -> bool:
        """Whether any byte is another than when this was made."""
        return not torch.equal(self._read(tensors), self._before)

    def begin(self, tensors: list[torch.Tensor]) -> Callable[[], bool]:
        """`differs(tensors)` when called; nothing is read before."""
        return partial(self.differs, tensors)

    def _read(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode(), plain_reads():
            views = [
                tensor.as_strided((count,), (step,)) if indices is None else tensor[indices]
                for tensor, (count, step, indices) in zip(tensors, self._reads, strict=True)
            ]
            return torch.cat([*views, self._padding]).view(torch.int64)


def _native_sample(tensors: list[torch.Tensor]) -> NativeSample:
    return NativeSample(tensors, *zip(*map(_places, tensors), strict=True))


def _places(tensor: torch.Tensor) -> tuple[int, int]:
    """How many elements to read, and every how many, in the order of the tensor's indices."""
    columns, size = tensor.shape[-1] if tensor.dim() else 1, tensor.numel()
    if columns in (1, size):
        step = min(size // MIN_VECTOR_SAMPLES, MAX_STEP)
    else:
        step = min(columns - 1, size // MIN_SAMPLES, MAX_STEP)
    while step > 1 and math.gcd(step, columns) > 1:  # else the same columns come back
        step -= 1
    step = max(step, 1)
    return -(-size // step), step


def _indices(tensor: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """Where these elements are in a tensor that is not contiguous."""
    if tensor.is_contiguous():
        return None
    flat = torch.arange(0, tensor.numel(), _places(tensor)[1], device=tensor.device)
    return torch.unravel_index(flat, tensor.shape)
