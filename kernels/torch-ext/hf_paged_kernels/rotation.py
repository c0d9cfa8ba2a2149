"""The rotation that spreads a key's large channels over all others before it is rounded: Walsh and Hadamard's.

It is symmetric and its own inverse, so that a rotated query times a rotated key is query times key.
"""

from __future__ import annotations

import torch


def rotated(numbers: torch.Tensor) -> torch.Tensor:
    """`numbers [..., dim]` float32, rotated in blocks of the largest power of two that divides `dim`.

    Sums and differences of channels 1, 2, 4, ... apart in this order, then one multiplication: the native library does
    the same, to the bit.
    """
    dim = numbers.shape[-1]
    size, apart = dim & -dim, 1
    while apart < size:
        first, second = numbers.unflatten(-1, (dim // (2 * apart), 2, apart)).unbind(-2)
        numbers = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        apart *= 2
    return numbers * size**-0.5 if size > 1 else numbers
