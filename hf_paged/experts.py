"""Experts of mixtures, multiplied by who is fastest where transformers multiplies them in groups (`matmul.py`).

transformers has several ways to compute experts; on the CPU it takes `grouped_mm`, torch's product of groups of rows,
each with the weights of one expert. That goes from expert to expert, also of those that no row has chosen, and
multiplies by torch's choice. What is different here is who multiplies; rows are sorted and summed up in the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.integrations import moe

from hf_paged import matmul
from hf_paged.matmul import is_plain
from hf_paged.watched import is_unwatched

# As they are from the start, whoever has replaced them.
_grouped_experts = moe.grouped_mm_experts_forward
_grouped_product = getattr(functional, "grouped_mm", None)

# Weights `[experts, features_out, features_in]`, and biases `[experts, features_out]`.
Projection = tuple[torch.Tensor, torch.Tensor | None]

_taken: dict[type[nn.Module], type[nn.Module]] = {}


def taken_class(original: type[nn.Module]) -> type[nn.Module] | None:
    """The class that experts of a patched model have instead; `None` of what are no experts.

    Outside of `multiplied_faster` they do what the originals do.
    """
    if not _are_experts(original):
        return None
    if original not in _taken:
        _taken[original] = _make_class(original)
    return _taken[original]


def _are_experts(original: type[nn.Module]) -> bool:
    """Whether transformers chooses how these are computed, from its own list of ways."""
    forward = vars(original).get("forward")
    names = getattr(getattr(forward, "__code__", None), "co_freevars", ())
    if "experts_interface" not in names:
        return False
    return forward.__closure__[names.index("experts_interface")].cell_contents is moe.ALL_EXPERTS_FUNCTIONS


def _make_class(original: type[nn.Module]) -> type[nn.Module]:
    class Taken(original):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if matmul.may_choose() and len(args) == 3 and not kwargs and _is_to_take(self, args[0]):
                answer = _answers(self, *args)
                if answer is not None:
                    return answer
            return original.forward(self, *args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            """Copies and files have the original class, and need no hf_paged."""
            if type(self) is not Taken:
                return super().__reduce_ex__(protocol)
            return object.__new__, (original,), vars(self)

    return Taken


def _projections(experts: nn.Module) -> list[Projection] | None:
    """Both, as they are now; `None` where only torch can read them."""
    found = []
    for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
        weight = experts._parameters.get(name)
        bias = experts._parameters.get(f"{name}_bias") if experts.has_bias else None
        if not (is_plain(weight) and weight.dim() == 3) or experts.is_transposed:
            return None
        if experts.has_bias and not (is_plain(bias) and bias.shape == weight.shape[:2] and bias.dtype is weight.dtype):
            return None
        found.append((weight, bias))
    return found


def ways(experts: nn.Module) -> list[str]:
    """Who may multiply faster by the weights of experts, as they are now."""
    return sorted({way for weight, _ in _projections(experts) or () if len(weight) for way in matmul.ways(weight[0])})


def _is_to_take(experts: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether torch would multiply `[tokens, features]` in groups, and nobody sees that it is not asked."""
    projections = _projections(experts)
    return (
        projections is not None
        and type(hidden_states) is torch.Tensor
        and hidden_states.dtype is projections[0][0].dtype
        and hidden_states.is_cpu
        and hidden_states.dim() == 2
        and len(hidden_states) > 0
        and moe.ALL_EXPERTS_FUNCTIONS.get(experts.config._experts_implementation) is _grouped_experts
        and getattr(functional, "grouped_mm", None) is _grouped_product
        and is_unwatched()
    )


def _answers(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor | None:
    """What experts answer to `[tokens, features]`, for each of which `[tokens, chosen]` name and weigh some.

    `None` where more than these experts are named, which are on other machines.
    """
    (up, down), chosen = _projections(experts), top_k_index.shape[-1]
    names, order = top_k_index.reshape(-1).sort()
    rows = names.bincount(minlength=len(down[0])).tolist()
    if len(rows) > len(down[0]):
        return None
    hidden = _by_expert(hidden_states[order // chosen], up, rows)
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    answers = _by_expert(hidden, down, rows)
    if getattr(experts, "has_post_expert_norm", False):  # of newer transformers
        answers = experts.post_expert_norm(answers)
    answers = answers * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    in_order = torch.empty_like(answers).index_copy_(0, order, answers)
    return in_order.view(len(hidden_states), chosen, -1).sum(dim=1).to(hidden_states.dtype)


def _by_expert(input: torch.Tensor, projection: Projection, rows: list[int]) -> torch.Tensor:
    """`[rows, features_in]` to `[rows, features_out]`: as many rows by each expert as `rows` says."""
    weights, biases = projection
    input = input.to(weights.dtype)
    fits = type(input) is torch.Tensor and input.shape[-1] == weights.shape[2]
    answers, end = [], 0
    for expert, count in enumerate(rows):
        if count:
            begin, end, weight = end, end + count, weights[expert]
            multiply = (matmul.fastest(count, weight) if fits else None) or functional.linear
            answers.append(multiply(input[begin:end], weight, None if biases is None else biases[expert]))
    return torch.cat(answers)
