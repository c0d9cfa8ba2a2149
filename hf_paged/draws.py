"""Random numbers that what is only tried must not draw from those that follow: dropout does, and big_bird always."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from transformers import PreTrainedModel

from hf_paged import compat


def draws_kept(model: PreTrainedModel) -> AbstractContextManager[None]:
    """What is computed inside draws no random numbers from those that follow."""
    device = compat.compute_device(model)
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def way_back(model: PreTrainedModel) -> Callable[[], None]:
    """What has the random numbers that follow be those that follow now."""
    device = compat.compute_device(model)
    on_host = partial(torch.set_rng_state, torch.get_rng_state())
    if device.type != "cuda":
        return on_host
    on_device = partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device)

    def go_back() -> None:
        on_host()
        on_device()

    return go_back
