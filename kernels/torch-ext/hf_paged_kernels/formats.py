"""How K and V are stored in fewer bytes: what a format's bytes are, and the arithmetic in plain torch on any device.

A token of one KV head is a record of its own, codes and scales side by side, so that whatever moves slots or blocks
moves records and knows nothing of formats:

    int8, fp8   [dim] codes, a byte each; [4] scale, float32

    int4        [dim / 2] codes: byte `j` holds that of channel `j` in its low four bits, that of channel `j + dim / 2`
                in its high ones; [4] for each group of adjacent channels: step, float16, and minimum, float16

Keys of int8 and int4 are rotated before they are rounded (`rotation`), values are not. What reads codes of keys as they
are has to rotate its queries instead. SmolLM2, 4,096 tokens, mean KL from full precision, without and with: int8 0.0008
and 0.0003, int4 0.063 and 0.046; of int4's, V alone are 0.005. So its keys have smaller groups. fp8 would go from 0.011
to 0.006, but is for models whose keys have channels of outliers: its codes are as exact for the small channels beside
these, until a rotation spreads the large ones over all.

The dim of a record cannot be told from its bytes (48 and 64 channels of V both take 36 in int4).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from .rotation import rotated

SCALE_BYTES = 4
GROUP_BYTES = 4
# Smaller scales are taken for 0: dividing by them would not be exact.
_LEAST_SCALE = torch.finfo(torch.float32).tiny
_LARGEST_INT4 = 15


@dataclass(frozen=True)
class TokenFormat(ABC):
    """Numbers `[..., dim]` of one token and head as records `[..., record_bytes(dim)]` of bytes, and back.

    Zeros stay zeros. A record of anything that is not finite is NaN as a whole.

    Attributes:
        is_rotated: whether codes are those of rotated numbers.
        codes_per_byte: how many there are.
    """

    is_rotated: bool
    codes_per_byte: ClassVar[int] = 1

    @abstractmethod
    def record_bytes(self, dim: int) -> int:
        """Of one token and head."""

    def takes(self, dim: int) -> bool:
        """Whether the format is there for numbers of this dim."""
        return True

    def group_channels(self, dim: int) -> int:
        """Adjacent channels that have scales of their own; 0: a record has one."""
        return 0

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """Records `[..., record_bytes]` uint8 of `numbers [..., dim]`."""
        if not numbers.shape[-1]:
            return numbers.to(torch.uint8)
        numbers = numbers.float()
        return self._encode(rotated(numbers) if self.is_rotated else numbers)

    def decode(self, records: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
        """Numbers `[..., dim]` of `records [..., record_bytes]`."""
        numbers = self.decode_codes(records, dim)
        return (rotated(numbers) if self.is_rotated else numbers).to(dtype)

    def decode_codes(self, records: torch.Tensor, dim: int) -> torch.Tensor:
        """The same in float32, and still rotated where codes are."""
        return self._decode(records, dim) if dim else records.float()

    @abstractmethod
    def _encode(self, numbers: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _decode(self, records: torch.Tensor, dim: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class ScaledCodes(TokenFormat):
    """A byte a number, in units of a scale that maps the largest magnitude to the largest code.

    Attributes:
        codes: dtype of a code.
        largest: the code of the largest magnitude.
    """

    codes: torch.dtype
    largest: float

    def record_bytes(self, dim: int) -> int:
        return dim + SCALE_BYTES if dim else 0

    def _encode(self, numbers: torch.Tensor) -> torch.Tensor:
        most = numbers.abs().amax(dim=-1, keepdim=True)
        # By a tensor: on a GPU a number would be divided by as a product with its reciprocal, one bit off.
        largest = torch.full((), self.largest, device=most.device)
        scales = most / largest + (most - most)  # NaN where the largest is infinite
        scales = torch.where(scales < _LEAST_SCALE, 0.0, scales)
        scaled = (numbers / torch.where(scales == 0, 1.0, scales)).nan_to_num_(0.0)
        if not self.codes.is_floating_point:
            scaled.round_()
        return torch.cat([scaled.to(self.codes).view(torch.uint8), scales.view(torch.uint8)], dim=-1)

    def _decode(self, records: torch.Tensor, dim: int) -> torch.Tensor:
        scales = records[..., dim:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        return records[..., :dim].view(self.codes).to(torch.float32) * scales


@dataclass(frozen=True)
class GroupedNibbles(TokenFormat):
    """Four bits a number: steps from the minimum of its group of channels.

    What does not fit float16 is NaN as a whole.

    Attributes:
        most_channels: of a group.
    """

    most_channels: int
    codes_per_byte: ClassVar[int] = 2

    def takes(self, dim: int) -> bool:
        return dim % 16 == 0

    def group_channels(self, dim: int) -> int:
        """Channels of a group: the largest power of two that divides `dim`, `most_channels` at most."""
        return min(dim & -dim, self.most_channels)

    def record_bytes(self, dim: int) -> int:
        return dim // 2 + dim // self.group_channels(dim) * GROUP_BYTES if dim else 0

    def _encode(self, numbers: torch.Tensor) -> torch.Tensor:
        grouped = numbers.unflatten(-1, (-1, self.group_channels(numbers.shape[-1])))
        least, most = torch.aminmax(grouped, dim=-1, keepdim=True)
        largest = torch.full((), _LARGEST_INT4, dtype=torch.float32, device=most.device)  # as in `ScaledCodes`
        scales = torch.cat([(most - least) / largest, least], dim=-1).half()
        is_finite = scales.isfinite().flatten(-2).all(dim=-1)[..., None, None]
        scales = torch.where(is_finite, scales, torch.nan) + 0.0  # no negative zeros
        steps, minima = scales.float().split(1, dim=-1)
        counted = ((grouped - minima) / steps).clamp(0, _LARGEST_INT4).round()
        codes = torch.where(steps > 0, counted, 0.0).flatten(-2).to(torch.uint8)
        low, high = codes.chunk(2, dim=-1)
        return torch.cat([low | high << 4, scales.view(torch.uint8).flatten(-2)], dim=-1)

    def _decode(self, records: torch.Tensor, dim: int) -> torch.Tensor:
        group = self.group_channels(dim)
        packed = records[..., : dim // 2]
        scales = records[..., dim // 2 :].clone(memory_format=torch.contiguous_format).view(torch.float16)
        steps, minima = scales.float().unflatten(-1, (-1, 2)).split(1, dim=-1)
        codes = torch.cat([packed & 15, packed >> 4], dim=-1).float().unflatten(-1, (-1, group))
        return (codes * steps + minima).flatten(-2)


@dataclass(frozen=True)
class KVFormat:
    """A way to store K and V.

    Attributes:
        name: as in `kv_cache_dtype`.
        keys, values: what records of K and of V are.
        storage: the format's number in the native library.
    """

    name: str
    keys: TokenFormat
    values: TokenFormat
    storage: int

    def check(self, key_dim: int, value_dim: int) -> None:
        """Raises `ValueError` where K and V of these dims cannot be stored."""
        if not (self.keys.takes(key_dim) and self.values.takes(value_dim)):
            raise ValueError(
                f"kv_cache_dtype={self.name!r}: head dims must be multiples of 16, "
                f"but K has {key_dim} and V {value_dim}"
            )


@dataclass(frozen=True)
class KVRecords:
    """What the memory of a layer holds where it is records.

    Attributes:
        kv_format: of the records.
        key_dim, value_dim: numbers in a record of K and of V.
    """

    kv_format: KVFormat
    key_dim: int
    value_dim: int

    @property
    def key_bytes(self) -> int:
        """Of a record of K."""
        return self.kv_format.keys.record_bytes(self.key_dim)

    @property
    def value_bytes(self) -> int:
        """Of a record of V."""
        return self.kv_format.values.record_bytes(self.value_dim)

    @property
    def sides(self) -> tuple[TokenFormat, TokenFormat]:
        """What records of K and of V are."""
        return self.kv_format.keys, self.kv_format.values

    def encode_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """Records `[..., key_bytes]` of K `[..., key_dim]`."""
        return self.kv_format.keys.encode(keys)

    def encode_values(self, values: torch.Tensor) -> torch.Tensor:
        """Records `[..., value_bytes]` of V `[..., value_dim]`."""
        return self.kv_format.values.encode(values)

    def decode_keys(self, records: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """K `[..., key_dim]` of `records [..., key_bytes]`."""
        return self.kv_format.keys.decode(records, self.key_dim, dtype)

    def decode_met_keys(self, records: torch.Tensor) -> torch.Tensor:
        """The same in float32, for queries that went through `meet`; less work where there are fewer of these."""
        return self.kv_format.keys.decode_codes(records, self.key_dim)

    def meet(self, query: torch.Tensor) -> torch.Tensor:
        """`query [..., key_dim]` float32, rotated where codes of keys are."""
        return rotated(query) if self.kv_format.keys.is_rotated else query

    def decode_values(self, records: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """V `[..., value_dim]` of `records [..., value_bytes]`."""
        return self.kv_format.values.decode(records, self.value_dim, dtype)


FORMATS = {
    each.name: each
    for each in (
        KVFormat("int8", ScaledCodes(True, torch.int8, 127.0), ScaledCodes(False, torch.int8, 127.0), storage=3),
        KVFormat("fp8", *[ScaledCodes(False, torch.float8_e4m3fn, 448.0)] * 2, storage=4),
        # 0.297 of bfloat16's bytes at dims of 64 and 128.
        KVFormat("int4", GroupedNibbles(True, 32), GroupedNibbles(False, 64), storage=5),
    )
}
