"""What depends on torch's private names only to be faster: with a torch that drops one, a model computes as stock's.

By them one can tell whether anybody looks on, and whether torch's functions are still torch's own. What nothing goes
without is not here: tensors' `_version`, the fields and global hooks of modules, what wraps tensors.
"""

from __future__ import annotations

import pkgutil
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn import functional

_unknown: list[str] = []


def _find(name: str, is_asked: bool = False) -> Any:
    """What torch has by this name, or `None`. `is_asked`: which is a function that answers without arguments."""
    try:
        found = pkgutil.resolve_name(name)
        if is_asked:
            found()
        return found
    except Exception:  # whatever a torch does that nobody knows, this one has no use for it
        _unknown.append(name.replace(":", "."))
        return None


# The innermost of torch's transforms, and how many modes see what is dispatched or torch's functions.
transform = _find("torch:_C._functorch.peek_interpreter_stack", is_asked=True)
dispatch_modes = _find("torch:_C._len_torch_dispatch_stack", is_asked=True)
function_modes = _find("torch:_C._len_torch_function_stack", is_asked=True)
# The latter themselves, and of which class those are that do nothing to what has a device.
function_mode_stack = _find("torch.overrides:_get_current_function_mode_stack", is_asked=True)
DeviceMode = _find("torch.utils._device:DeviceContext")
# As they are from the start, whoever has replaced them.
_linear, _addmm = _find("torch:_C._nn.linear"), _find("torch:_C._VariableFunctions.addmm")
_attention = _find("torch:_C._nn.scaled_dot_product_attention")
_schemas_of = _find("torch:_C._jit_get_schemas_for_operator")

# Why nothing is computed in another way than by calling torch's functions; or `None`.
OBSTACLE = f"torch {torch.__version__} has no usable {', '.join(_unknown)}" if _unknown else None
_LINEAR_ARGUMENTS = ["X", "W", "B", "attr", "scalars", "algorithm"]

# Inside, tensors of other classes are read as plain ones.
plain_reads = getattr(torch._C, "DisableTorchFunctionSubclass", nullcontext)


def calls_own_linear() -> bool:
    """Whether linear layers call torch's own functions."""
    return functional.linear is _linear and torch.addmm is _addmm


def may_take_onednn() -> bool:
    """Whether these functions may, and nobody is writing down which are called."""
    return torch.backends.mkldnn.enabled and not torch.jit.is_tracing()


def calls_own_attention() -> bool:
    """Whether torch's attention is its own, and free to choose how it computes."""
    return (
        functional.scaled_dot_product_attention is _attention
        and torch.backends.cuda.flash_sdp_enabled()  # of the CPU, too
        and torch.backends.cuda.math_sdp_enabled()
        and not torch.jit.is_tracing()
    )


def can_multiply() -> bool:
    """Whether this torch has the operator of `multiply`, with the arguments that those of 2.11 to 2.13 have."""
    schemas = [] if _schemas_of is None else _schemas_of("mkldnn::_linear_pointwise")
    return any([each.name for each in schema.arguments] == _LINEAR_ARGUMENTS for schema in schemas)


def multiply(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear layer by oneDNN, which has no gradients."""
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
