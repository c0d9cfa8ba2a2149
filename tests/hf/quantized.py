"""The yardstick of quantized KV: stock's cache of what a second implementation of the formats leaves of K and V.

It shares no line with the package: numbers in float64, codes looked up in tables that are built from what the formats
are said to be.
"""

import functools

import torch
from transformers import DynamicCache


def e4m3_numbers() -> torch.Tensor:
    """All finite numbers of e4m3: a sign, 4 bits of exponent with a bias of 7, 3 bits behind the point."""
    normal = [2.0 ** (exponent - 7) * (1 + m / 8) for exponent in range(1, 16) for m in range(8)]
    numbers = [2.0**-6 * m / 8 for m in range(8)] + normal[:-1]  # the last one stands for NaN
    return torch.tensor([-x for x in numbers[:0:-1]] + numbers, dtype=torch.float64)


NUMBERS = {"int8": torch.arange(-127, 128, dtype=torch.float64), "fp8": e4m3_numbers()}


def rounded(x: torch.Tensor, name: str) -> torch.Tensor:
    """`x [..., dim]` as the format keeps it: the nearest of its numbers, times the scale of the last dim."""
    numbers = NUMBERS[name]
    # The format's scale is a float32.
    scale = (x.double().abs().amax(-1, keepdim=True) / numbers[-1]).float().double()
    wanted = torch.where(scale > 0, x.double() / scale, 0.0).contiguous()
    above = torch.searchsorted(numbers, wanted).clamp(1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    return (torch.where(wanted - low <= high - wanted, low, high) * scale).to(x.dtype)


class RoundingCache(DynamicCache):
    """Stock's cache, of what a format leaves of K and V."""

    def __init__(self, config, name: str):
        super().__init__(config=config.get_text_config(decoder=True))
        self.rounded = functools.partial(rounded, name=name)

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(self.rounded(key_states), self.rounded(value_states), *args, **kwargs)
