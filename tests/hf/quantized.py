"""The yardstick of quantized KV: stock's cache of what a second implementation of the formats leaves of K and V.

It shares no line with the package: numbers in float64, codes looked up in tables that are built from what the formats
are said to be.
"""

import torch
from transformers import DynamicCache


def e4m3_numbers() -> torch.Tensor:
    """All finite numbers of e4m3: a sign, 4 bits of exponent with a bias of 7, 3 bits behind the point."""
    normal = [2.0 ** (exponent - 7) * (1 + m / 8) for exponent in range(1, 16) for m in range(8)]
    numbers = [2.0**-6 * m / 8 for m in range(8)] + normal[:-1]  # the last one stands for NaN
    return torch.tensor([-x for x in numbers[:0:-1]] + numbers, dtype=torch.float64)


NUMBERS = {"int8": torch.arange(-127, 128, dtype=torch.float64), "fp8": e4m3_numbers()}
KEY_GROUP, VALUE_GROUP = 32, 64  # of int4
ROTATED = ("int8", "int4")  # whose keys are rotated before they are rounded
NUDGE = 3e-7  # as far as K and V in float32 are off where sums are taken in another order


def hadamard(dim: int) -> torch.Tensor:
    """The rotation as a matrix `[dim, dim]`."""
    block = torch.ones(1, 1, dtype=torch.float64)
    while dim % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block / len(block) ** 0.5] * (dim // len(block)))


def nearest(x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """`x [..., dim]` as the nearest of `numbers` times a scale of the last dim."""
    # The format's scale is a float32.
    scale = (x.abs().amax(-1, keepdim=True) / numbers[-1]).float().double()
    wanted = torch.where(scale > 0, x / scale, 0.0).contiguous()
    above = torch.searchsorted(numbers, wanted).clamp(1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    return torch.where(wanted - low <= high - wanted, low, high) * scale


def on_steps(x: torch.Tensor, most_channels: int) -> torch.Tensor:
    """`x [..., dim]` with each group of channels on 16 equal steps from its smallest number on."""
    group = next(size for size in (64, 32, 16) if size <= most_channels and x.shape[-1] % size == 0)
    pieces = []
    for channels in x.split(group, dim=-1):
        low = channels.amin(-1, keepdim=True)
        step = ((channels.amax(-1, keepdim=True) - low) / 15).half().double()
        low = low.half().double()
        counted = torch.where(step > 0, (channels - low) / step, 0.0)
        pieces.append(counted.round().clamp(0, 15) * step + low)
    return torch.cat(pieces, dim=-1)


def turned(x: torch.Tensor) -> torch.Tensor:
    """`x [..., dim]` times that matrix, in float32 and in the order in which the format adds up.

    Any other order would put numbers that lie between two codes on the other side now and then.
    """
    dim = x.shape[-1]
    block = next(size for size in range(dim, 0, -1) if dim % size == 0 and size.bit_count() == 1)

    def summed(piece: torch.Tensor) -> torch.Tensor:
        if piece.shape[-1] == 1:
            return piece
        first, second = map(summed, piece.chunk(2, dim=-1))
        return torch.cat([first + second, first - second], dim=-1)

    return torch.cat([summed(piece.float()) for piece in x.split(block, dim=-1)], dim=-1) * block**-0.5


def rounded(x: torch.Tensor, name: str, is_key: bool) -> torch.Tensor:
    """K or V `[..., dim]` as the format keeps it."""
    is_turned = is_key and name in ROTATED
    given = (turned(x) if is_turned else x).double()
    if name == "int4":
        kept = on_steps(given, KEY_GROUP if is_key else VALUE_GROUP)
    else:
        kept = nearest(given, NUMBERS[name])
    return (kept @ hadamard(x.shape[-1]) if is_turned else kept).to(x.dtype)


def odd_numbers(dtype: torch.dtype, dim: int = 64) -> torch.Tensor:
    """`[2, 3, 40, dim]` of many sizes, with zeros, outliers, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(2, 3, 40, dim, generator=generator) * torch.randn(2, 3, 40, 1, generator=generator).exp()
    x[0, 0, 0], x[0, 0, 1, 5], x[0, 0, 2, 5] = 0, torch.nan, -torch.inf
    x[0, 0, 3] *= 1e-7
    x[0, 0, 4] *= 1e-42  # subnormal, or nothing
    x[1, :, :, 3] *= 100
    return x.to(dtype)


class RoundingCache(DynamicCache):
    """Stock's cache, of what a format leaves of K and V; of K and V that are a little off with a `nudge`, a seed."""

    def __init__(self, config, name: str, nudge: int | None = None):
        super().__init__(config=config.get_text_config(decoder=True))
        self.name = name
        self.generator = None if nudge is None else torch.Generator().manual_seed(nudge)

    def rounded(self, x: torch.Tensor, is_key: bool) -> torch.Tensor:
        if self.generator is not None:
            x = x * (1 + NUDGE * torch.randn(x.shape, generator=self.generator))
        return rounded(x, self.name, is_key)

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(
            self.rounded(key_states, is_key=True), self.rounded(value_states, is_key=False), *args, **kwargs
        )
