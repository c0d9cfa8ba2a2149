"""Linear layers that the native kernel or oneDNN may multiply, for tests."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from hf_paged import faster_layers, linear, matmul
from hf_paged.watched import one_pass

TOLERANCE = 1e-5  # of two ways to add up some dozens of numbers around 1


@contextmanager
def faster_pass() -> Iterator[None]:
    """What a patched model's passes are in."""
    with one_pass(), matmul.multiplied_faster():
        yield


def layer(inputs: int = 24, outputs: int = 40, **kwargs) -> nn.Linear:
    """One that has been taken, alone in its model."""
    made = nn.Sequential(nn.Linear(inputs, outputs, **kwargs)).requires_grad_(False)
    faster_layers.take_layers(made)
    assert type(made[0]) is linear._TakenLinear
    return made[0]


def conv1d(inputs: int = 24, outputs: int = 40) -> nn.Module:
    """The linear layer of gpt2, taken."""
    made = nn.Sequential(Conv1D(outputs, inputs)).requires_grad_(False)
    nn.init.normal_(made[0].bias)
    faster_layers.take_layers(made)
    assert type(made[0]) is linear._TakenConv1D
    return made[0]


def same(one: nn.Module, *inputs: torch.Tensor) -> bool:
    """Whether a layer gives what `nn.Linear.forward` gives."""
    return all(torch.allclose(one(each), type(one).__base__.forward(one, each), atol=TOLERANCE) for each in inputs)


class Recording(torch.Tensor):
    """Notes what is done with it."""

    names = ()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.names += (function.__name__,)
        return super().__torch_function__(function, types, args, kwargs)


class Functions(TorchFunctionMode):
    """Sees what is asked of torch."""

    def __init__(self):
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


WATCHERS = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch mode": lambda: FlopCounterMode(display=False),
    "function mode": Functions,
}
