"""Everything about a model that patching must leave, and undoing must restore."""

import copy

import torch

HOOKS = [name for name in vars(torch.nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs"))]


def snapshot(model: torch.nn.Module) -> dict:
    """What is reachable from a model, in a form that compares with `==`: identities, plain values, key orders."""
    state = {
        "config": copy.deepcopy(model.config.to_dict()),
        "config attributes": sorted(vars(model.config)),
        "attention": _attention_of_every_config(model),
        "generation config": model.generation_config.to_dict(),
        "parameters": [(name, id(tensor), tensor._version) for name, tensor in model.named_parameters()],
        "buffers": [(name, id(tensor)) for name, tensor in model.named_buffers()],
        "training": [module.training for module in model.modules()],
    }
    for name, module in model.named_modules():
        state[f"module {name}"] = (id(module), type(module), id(type(module)))
        state[f"attributes {name}"] = [(key, _identity(value)) for key, value in vars(module).items()]
        state[f"hooks {name}"] = {hook: list(getattr(module, hook)) for hook in HOOKS}
    return state


def _identity(value):
    """Plain values compare by value, everything else by being the same object."""
    plain = (bool, int, float, str, bytes, type(None))
    return value if isinstance(value, plain) else id(value)


def _attention_of_every_config(model) -> list:
    modules = [(name, module) for name, module in model.named_modules() if hasattr(module, "config")]
    return [(name, getattr(module.config, "_attn_implementation", None)) for name, module in modules]


def differences(before: dict, after: dict) -> list[str]:
    """The names of what changed."""
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
