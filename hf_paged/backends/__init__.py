"""Attention backends: how the queries of a step plan read the blocks."""

from __future__ import annotations

import torch

from hf_paged.backends.base import AttentionBackend, AttentionCall
from hf_paged.backends.cpu import CPUBackend, attend_rows
from hf_paged.backends.reference import ReferenceBackend

__all__ = ["AttentionBackend", "AttentionCall", "attend_rows", "backend_for"]

_BACKENDS: dict[str, AttentionBackend] = {backend.name: backend for backend in (CPUBackend(), ReferenceBackend())}


def backend_for(name: str, device: torch.device) -> AttentionBackend:
    """The backend of that name; `"auto"` is the fastest one for `device`."""
    if name == "auto":
        name = "cpu" if device.type == "cpu" else "reference"
    return _BACKENDS[name]
