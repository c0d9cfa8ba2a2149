"""Classes of ours that stand for others for a while: for which they may, and how what has them is copied and saved."""

from __future__ import annotations

from typing import Any

from torch import nn

# Of a class of ours: that which it stands for.
STANDS_FOR = "_hf_paged_stands_for"


def can_stand_for(kind: type[nn.Module]) -> bool:
    """Whether a class can have a subclass without anybody of its own being asked."""
    return type(kind) is type and not hasattr(kind.__init_subclass__, "__func__")


def copied_as_original(layer: nn.Module, protocol: Any) -> str | tuple[Any, ...]:
    """`__reduce_ex__` of a class of ours: copies and files have the original class, and need no hf_paged."""
    original = vars(type(layer)).get(STANDS_FOR)
    if original is None:  # a class on top of ours
        return nn.Module.__reduce_ex__(layer, protocol)
    return object.__new__, (original,), layer.__getstate__()
