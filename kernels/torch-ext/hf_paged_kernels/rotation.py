"""The rotation that spreads a key's large channels over all others before it is rounded: Walsh and Hadamard's.

It is symmetric and its own inverse, so that a rotated query times a rotated key is query times key.
"""

from __future__ import annotations

import torch


def rotated_channels(dim: int) -> int:
    """Channels that are rotated together: the largest power of two that divides `dim`."""
    return dim & -dim


def rotated(numbers: torch.Tensor) -> torch.Tensor:
    """`numbers [..., dim]` float32, rotated in blocks of `rotated_channels(dim)`.

    Sums and differences of channels 1, 2, 4, ... apart in this order, then one multiplication: the native library does
    the same, to the bit.
    """
    dim = numbers.shape[-1]
    size, apart = rotated_channels(dim), 1
    # Channels first, so that each operation goes through long rows.
    now = numbers.detach().reshape(-1, dim).t().clone(memory_format=torch.contiguous_format)
    after = torch.empty_like(now)
    while apart < size:
        first, second = now.unflatten(0, (dim // (2 * apart), 2, apart)).unbind(1)
        total, difference = after.unflatten(0, (dim // (2 * apart), 2, apart)).unbind(1)
        torch.add(first, second, out=total)
        torch.sub(first, second, out=difference)
        now, after = after, now
        apart *= 2
    return now.mul_(size**-0.5).t().reshape(numbers.shape).contiguous()
