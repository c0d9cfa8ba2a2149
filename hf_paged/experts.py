"""Experts of mixtures, multiplied by who is fastest where transformers multiplies them in groups (`matmul.py`).

transformers has several ways to compute experts; on the CPU it takes `grouped_mm`, torch's product of groups of rows,
each with the weights of one expert. That goes from expert to expert, also of those that no row has chosen, and
multiplies by torch's choice. What is different here is who multiplies; rows are sorted and summed up in the same way.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.nn import functional
from transformers.integrations import moe

from hf_paged import matmul
from hf_paged.copied import can_stand_for, copied_as_original
from hf_paged.matmul import Product, is_plain
from hf_paged.watched import is_unwatched

# As they are from the start, whoever has replaced them.
_grouped_experts = moe.grouped_mm_experts_forward
_grouped_product = getattr(functional, "grouped_mm", None)

# Weights `[experts, features_out, features_in]`, and biases `[experts, features_out]`.
Projection = tuple[torch.Tensor, torch.Tensor | None]

_classes: WeakValueDictionary[type[nn.Module], type[nn.Module]] = WeakValueDictionary()


def are_experts(layer: nn.Module) -> bool:
    """Whether transformers chooses how these are computed, from its own list of ways."""
    forward = vars(type(layer)).get("forward")
    variables = getattr(getattr(forward, "__code__", None), "co_freevars", ())
    if "experts_interface" not in variables or not can_stand_for(type(layer)):
        return False
    return forward.__closure__[variables.index("experts_interface")].cell_contents is moe.ALL_EXPERTS_FUNCTIONS


def taken_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class that experts of a patched model have instead.

    Outside of `multiplied_faster` they do what the originals do, also when somebody has replaced their `forward`.
    """
    if (made := _classes.get(original)) is None:
        made = _classes[original] = _make_class(original)
    return made


def _make_class(original: type[nn.Module]) -> type[nn.Module]:
    own_forward = original.forward

    class TakenExperts(original):
        __reduce_ex__ = copied_as_original

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if matmul.may_choose() and len(args) == 3 and not kwargs and original.forward is own_forward:
                answer = _answer(self, *args)
                if answer is not None:
                    return answer
            return original.forward(self, *args, **kwargs)

    return TakenExperts


def ways(experts: nn.Module) -> list[str]:
    """Who may multiply faster by the weights of experts, as they are now."""
    projections = _projections(experts)
    if projections is None:
        return []
    return sorted({way for weights, _ in projections for way in matmul.ways(weights[0])})


def _projections(experts: nn.Module) -> tuple[Projection, Projection] | None:
    """Up and down, as they are now; `None` where they are not what transformers' experts have, or are transposed."""
    if getattr(experts, "is_transposed", True):
        return None
    up, down = (_projection(experts, name) for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"))
    if up is None or down is None:
        return None
    halves = 2 if experts.has_gate else 1
    count, features, hidden = down[0].shape
    fits = count == experts.num_experts > 0 and up[0].shape == (count, halves * hidden, features)
    return (up, down) if fits and up[0].dtype is down[0].dtype else None


def _projection(experts: nn.Module, name: str) -> Projection | None:
    weights = experts._parameters.get(name)
    if not is_plain(weights) or weights.dim() != 3:
        return None
    if not experts.has_bias:
        return weights, None
    biases = experts._parameters.get(f"{name}_bias")
    fits = is_plain(biases) and biases.dtype is weights.dtype and biases.shape == weights.shape[:2]
    return (weights, biases) if fits else None


def _answer(experts: nn.Module, *args: torch.Tensor) -> torch.Tensor | None:
    """What experts answer to `[tokens, features]`, for each of which `[tokens, chosen]` number and weigh some.

    `None` where that is left to transformers: where torch would not multiply in groups, or is as fast as anybody, where
    somebody sees that it is not asked, and where numbers are none of these experts', as others are on other machines.
    """
    if not all(type(each) is torch.Tensor and each.is_cpu and each.dim() == 2 and each.numel() for each in args):
        return None
    (hidden_states, numbers, weights), projections = args, _projections(experts)
    if projections is None or not _is_to_take(experts, hidden_states, projections[0][0]):
        return None
    if numbers.dtype is not torch.int64 or len(hidden_states) != len(numbers) or numbers.shape != weights.shape:
        return None
    chosen, (up, down) = numbers.shape[1], projections
    numbers, order = numbers.reshape(-1).sort()
    if numbers[0] < 0 or numbers[-1] >= experts.num_experts:
        return None
    rows = numbers.bincount(minlength=experts.num_experts).tolist()
    up_ways, down_ways = (
        {count: matmul.fastest(count, each[0]) for count in set(rows) - {0}} for each, _ in projections
    )
    if not any((*up_ways.values(), *down_ways.values())):
        return None
    hidden = _by_expert(hidden_states[order // chosen], up, rows, up_ways)
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    answers = _by_expert(hidden, down, rows, down_ways)
    if getattr(experts, "has_post_expert_norm", False):  # of newer transformers
        answers = experts.post_expert_norm(answers)
    answers = answers * weights.reshape(-1)[order].unsqueeze(-1)
    in_order = torch.empty_like(answers).index_copy_(0, order, answers)
    return in_order.view(*weights.shape, hidden_states.shape[1]).sum(dim=1).to(hidden_states.dtype)


def _is_to_take(experts: nn.Module, hidden_states: torch.Tensor, weights: torch.Tensor) -> bool:
    return (
        hidden_states.dtype is weights.dtype
        and hidden_states.shape[1] == weights.shape[2]
        and moe.ALL_EXPERTS_FUNCTIONS.get(experts.config._experts_implementation) is _grouped_experts
        and getattr(functional, "grouped_mm", None) is _grouped_product
        and is_unwatched()
    )


def _by_expert(
    input: torch.Tensor, projection: Projection, rows: list[int], ways: dict[int, Product | None]
) -> torch.Tensor:
    """`[rows, features_in]` to `[rows, features_out]`: as many rows by each expert as `rows` says, in these ways."""
    weights, biases = projection
    input = input.to(weights.dtype)
    is_known = type(input) is torch.Tensor and input.shape[-1] == weights.shape[2]
    answers, end = [], 0
    for expert, count in enumerate(rows):
        if count:
            begin, end = end, end + count
            multiply = (ways[count] if is_known else None) or functional.linear
            answers.append(multiply(input[begin:end], weights[expert], None if biases is None else biases[expert]))
    return torch.cat(answers)
