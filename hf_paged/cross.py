"""Attention of many rows over K and V that several of them share: read once for all of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch

from hf_paged.lazy import SharedRows

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class _Group(NamedTuple):
    """Rows `[row, row + distinct * copies)`: `copies` adjacent ones for each K and V `[first, first + distinct)`."""

    row: int
    first: int
    distinct: int
    copies: int


def attend_shared(
    attention: Attention,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: SharedRows,
    value: SharedRows,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention`, with the queries of all rows that have the same K and V as if they were further tokens of one row.

    Args:
        query: `[rows, heads, tokens, dim]`.
        mask: `None` or `[rows or 1, heads or 1, tokens, kv_tokens]`, as is `position_bias` among the other arguments.

    Returns:
        `[rows, tokens, heads, value_dim]`, and the weights `[rows, heads, tokens, kv_tokens]` where there are any.
    """
    if len(key.distinct) == len(key.owners) or not _is_separable(module, query, mask, kwargs):
        return attention(module, query, key.to_dense(), value.to_dense(), mask, **kwargs)
    outputs, weights = [], []
    for group in _groups(key.owners):
        given = dict(kwargs)
        if given.get("position_bias") is not None:
            given["position_bias"] = _join(given["position_bias"], group)
        if mask is None:
            given["is_causal"] = False
        stored = slice(group.first, group.first + group.distinct)
        out, seen = attention(
            module,
            _join(query, group),
            key.distinct[stored],
            value.distinct[stored],
            None if mask is None else _join(mask, group),
            **given,
        )
        outputs.append(_part(out.transpose(1, 2), group).transpose(1, 2))
        weights.append(None if seen is None else _part(seen, group))
    return torch.cat(outputs), None if weights[0] is None else torch.cat(weights)


def _is_separable(
    module: torch.nn.Module, query: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Whether what a query sees does not depend on which token of its row it is, but for masks."""
    if kwargs.get("dropout"):  # random numbers are drawn in the order of the rows
        return False
    causal = kwargs.get("is_causal")
    if mask is None and query.shape[2] > 1 and (getattr(module, "is_causal", True) if causal is None else causal):
        return False
    return not any(isinstance(each, torch.Tensor) for name, each in kwargs.items() if name != "position_bias")


def _groups(owners: list[int]) -> Iterator[_Group]:
    """The rows in order, as few groups as there can be where each K and V has equally many adjacent rows."""
    runs, row = [], 0
    for owner, same in groupby(owners):
        runs.append(_Group(row, owner, 1, len(list(same))))
        row += runs[-1].copies
    if [run.first for run in runs] == list(range(len(runs))) and len({run.copies for run in runs}) == 1:
        yield _Group(0, 0, len(runs), runs[0].copies)
    else:
        yield from runs


def _join(tensor: torch.Tensor, group: _Group) -> torch.Tensor:
    """`[rows or 1, heads, tokens, any]` to `[distinct or 1, heads, copies * tokens, any]`."""
    if tensor.shape[0] == 1:
        return tensor.repeat(1, 1, group.copies, 1)
    rows = tensor[group.row : group.row + group.distinct * group.copies]
    return rows.unflatten(0, (group.distinct, group.copies)).transpose(1, 2).flatten(2, 3)


def _part(tensor: torch.Tensor, group: _Group) -> torch.Tensor:
    """`[distinct, heads, copies * tokens, any]` to `[rows, heads, tokens, any]`."""
    return tensor.unflatten(2, (group.copies, -1)).transpose(1, 2).flatten(0, 1)
