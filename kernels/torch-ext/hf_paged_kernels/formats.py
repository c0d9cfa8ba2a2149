"""How K and V are stored in fewer bytes: what a format's bytes are, and the arithmetic in plain torch on any device.

A token of one KV head is a record of its own, codes and scale side by side, so that whatever moves slots or blocks
moves records and knows nothing of formats:

    [dim] codes of one byte      [4] scale, float32
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCALE_BYTES = 4
# Smaller scales are taken for 0: dividing by them would not be exact.
_LEAST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class TokenFormat:
    """Numbers `[..., dim]` of one token and head as records `[..., dim + 4]` of bytes, by their largest magnitude.

    Zeros stay zeros. A record of anything that is not finite is NaN as a whole.

    Attributes:
        name: as in `kv_cache_dtype`.
        codes: dtype of a code.
        largest: the code of the largest magnitude.
        storage: the format's number in the native library.
    """

    name: str
    codes: torch.dtype
    largest: float
    storage: int

    @staticmethod
    def record_bytes(dim: int) -> int:
        """Of one token and head."""
        return dim + SCALE_BYTES if dim else 0

    @staticmethod
    def dim(record_bytes: int) -> int:
        """The numbers that a record holds."""
        return record_bytes - SCALE_BYTES if record_bytes else 0

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """Records `[..., record_bytes]` uint8 of `numbers [..., dim]`."""
        if not numbers.shape[-1]:
            return numbers.to(torch.uint8)
        numbers = numbers.float()
        most = numbers.abs().amax(dim=-1, keepdim=True)
        scales = most / self.largest + (most - most)  # NaN where the largest is infinite
        scales = torch.where(scales < _LEAST_SCALE, 0.0, scales)
        scaled = (numbers / torch.where(scales == 0, 1.0, scales)).nan_to_num_(0.0)
        if not self.codes.is_floating_point:
            scaled.round_()
        return torch.cat([scaled.to(self.codes).view(torch.uint8), scales.view(torch.uint8)], dim=-1)

    def decode(self, records: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Numbers `[..., dim]` of `records [..., record_bytes]`."""
        dim = self.dim(records.shape[-1])
        if not dim:
            return records.to(dtype)
        scales = records[..., dim:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        return (records[..., :dim].view(self.codes).to(torch.float32) * scales).to(dtype)


FORMATS = {
    each.name: each
    for each in (
        TokenFormat("int8", torch.int8, 127.0, storage=3),
        TokenFormat("fp8", torch.float8_e4m3fn, 448.0, storage=4),
    )
}
