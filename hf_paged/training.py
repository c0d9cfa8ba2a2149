"""A pass of a training step takes the memory back that is kept for later calls of `generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from hf_paged.runtime import PagedRuntime


def make_way(module: nn.Module, runtime: PagedRuntime | None) -> None:
    """Release the pool where `module`, a patched model or one of its layers, computes for a backward pass.

    The step needs the memory, and its end leaves no prefix that still holds. Scoring in eval mode is no training, even
    where nobody has switched gradients off. Compiled passes cannot tell: only computation belongs into a graph.
    """
    if module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling() and runtime is not None:
        runtime.release()
