"""Whether anybody looks on while a pass of a patched model is computed: only where nobody does, other ways are taken.

Gradients, autocast, transforms and modes of torch's see the functions that are called. Where such a function is not
called, as something else computes the same, they would miss it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from hf_paged import torch_compat


class _Pass(threading.local):
    """Of a thread: whether it is in a pass of a patched model, and how many modes of torch's that has begun with."""

    is_open = False
    modes = 0


_pass = _Pass()


@contextmanager
def one_pass() -> Iterator[None]:
    """Around a pass of a patched model in this thread, on paged KV."""
    before = _pass.is_open, _pass.modes
    if torch_compat.OBSTACLE is None:
        modes = torch_compat.function_mode_stack()
        _pass.is_open, _pass.modes = _only_set_devices(modes), len(modes)
    try:
        yield
    finally:
        _pass.is_open, _pass.modes = before


def modes_look_on() -> bool:
    """Whether a mode or a transform of torch's sees functions of this thread; also where that cannot be told."""
    return torch_compat.OBSTACLE is not None or not (
        torch_compat.transform() is None
        and torch_compat.dispatch_modes() == 0
        and _only_set_devices(torch_compat.function_mode_stack())
    )


def _only_set_devices(modes: Iterable[object]) -> bool:
    return all(type(each) is torch_compat.DeviceMode for each in modes)


def is_unwatched() -> bool:
    """Whether this thread is in such a pass, and nobody is to see what is computed."""
    return _pass.is_open and not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch_compat.transform() is not None
        or torch_compat.dispatch_modes() > 0
        or torch_compat.function_modes() != _pass.modes
    )
