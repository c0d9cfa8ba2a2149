"""Attention backends: how the queries of a step plan read the blocks."""

from __future__ import annotations

import torch

from hf_paged.backends.base import AttentionBackend, AttentionCall
from hf_paged.backends.cpu import CPUBackend, attend_rows
from hf_paged.backends.latent import Expansion, LatentBackend
from hf_paged.backends.prepared import PREPARED, PreparedDecode
from hf_paged.backends.reference import ReferenceBackend
from hf_paged_kernels.launch import triton_obstacle

__all__ = [
    "PREPARED",
    "AttentionBackend",
    "AttentionCall",
    "Expansion",
    "LatentBackend",
    "PreparedDecode",
    "attend_rows",
    "backend_for",
    "backend_obstacle",
    "plain_torch_reason",
]

_BACKENDS: dict[str, AttentionBackend] = {backend.name: backend for backend in (CPUBackend(), ReferenceBackend())}


def backend_for(name: str, device: torch.device) -> AttentionBackend:
    """The backend of that name; `"auto"` is the fastest one for `device`.

    Raises `ValueError` where it does not run there, saying why.
    """
    obstacle = backend_obstacle(name, device)
    if obstacle is not None:
        raise ValueError(f"attention_backend={name!r} is not available: {obstacle}")
    if name == "auto":
        if device.type == "cpu":
            return _BACKENDS["cpu"]
        name = "triton" if triton_obstacle(device) is None else "reference"
    if name not in _BACKENDS:
        from hf_paged.backends.triton import TritonBackend  # imports triton, which other platforms do not have

        _BACKENDS[name] = TritonBackend()
    return _BACKENDS[name]


def backend_obstacle(name: str, device: torch.device) -> str | None:
    """Why the backend of that name does not run on a device, and what to do; `None` where it does."""
    if name == "triton":
        return triton_obstacle(device)
    if name == "cpu" and device.type != "cpu":
        return f"it is for models on the CPU, this one is on {device}; 'auto' takes the fastest one there"
    return None


def plain_torch_reason(name: str, device: torch.device) -> str | None:
    """Why `"auto"` takes plain torch operations on a GPU, which are right and not fast; else `None`."""
    if name != "auto" or device.type == "cpu":
        return None
    obstacle = triton_obstacle(device)
    return None if obstacle is None else f"attention in plain torch: {obstacle}"
