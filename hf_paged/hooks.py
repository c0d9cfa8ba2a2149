"""Forward hooks of others: which may change what a model computes, and which must see a pass in stock's shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.nn.modules import module as torch_module

from hf_paged.weights import Tree

Hooks = Mapping[int, Any]

# Hooks that leave K and V alone: they record outputs, or ask for gradients. Earlier calls and training leave them.
HARMLESS_HOOKS = {
    ("transformers.utils.output_capturing", "output_capturing_hook"),
    ("transformers.modeling_utils", "make_inputs_require_grads"),
    ("peft.peft_model", "make_inputs_require_grad"),
    ("peft.mixed_model", "make_inputs_require_grad"),
}
# Packages whose hooks gather weights, move tensors or cut layers, whatever rows and columns pass.
SHAPE_BLIND_PACKAGES = {"torch", "transformers", "accelerate", "deepspeed"}


def meddle(hooks: Hooks) -> bool:
    """Whether one of the hooks may change what a module computes."""
    names = [(getattr(hook, "__module__", None), getattr(hook, "__name__", None)) for hook in hooks.values()]
    return not HARMLESS_HOOKS.issuperset(names)


def see_shapes(hooks: Hooks) -> bool:
    """Whether one of the hooks may tell rows or columns apart, as one that steers the last token does."""
    packages = {str(getattr(hook, "__module__", None)).partition(".")[0] for hook in hooks.values()}
    return not packages <= SHAPE_BLIND_PACKAGES and meddle(hooks)


def hooked(tree: Tree, matters: Callable[[Hooks], bool]) -> str | None:
    """Where there are hooks that `matters` holds for, in words; or `None`."""
    if any(map(matters, (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks))):
        return "global forward hooks of torch.nn"
    for kind, each in (("hook", tree.hooks), ("pre-hook", tree.pre_hooks)):
        if any(each):
            for module, hooks in zip(tree.modules, each, strict=True):
                if hooks and matters(hooks):
                    return f"{type(module).__name__} with a forward {kind}"
    return None
