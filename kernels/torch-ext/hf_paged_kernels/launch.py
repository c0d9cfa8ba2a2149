"""What the launchers have in common: whether Triton runs here, and the device that a launch goes to."""

from __future__ import annotations

import functools
import importlib.util

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU (`TRITON_INTERPRET=1`, set before torch is imported)."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def triton_obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels do not run on a device, `None` where they do; found out by trying, once."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if is_interpreted():
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 is for models on the CPU"
    if device.type != "cuda":
        return f"triton kernels run on CUDA devices, this is {device}; TRITON_INTERPRET=1 runs them on the CPU, slowly"
    if torch.version.hip is not None:
        return "nobody has tried the kernels on AMD's GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    try:
        _trial(device)
    except Exception as error:  # no C compiler for the launcher, a driver too old, ...: attention runs without
        return f"a trial has failed: {type(error).__name__}: {error}"
    return None


def _trial(device: torch.device) -> None:
    from .store import store_tokens

    new = torch.ones(1, 1, 1, 16, device=device)
    memory = torch.zeros(1, 16, 16, device=device)
    slots = torch.zeros(1, dtype=torch.int32, device=device)
    store_tokens(new, new, memory, memory.clone(), slots)
    torch.cuda.synchronize(device)
