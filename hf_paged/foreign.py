"""Attention functions that are neither transformers' nor the model's: only they know what they compute."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable
from types import CodeType, ModuleType
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from hf_paged import compat

_TRANSFORMERS = os.path.dirname(transformers.__file__) + os.sep


def foreign_attention(config: PreTrainedConfig, kinds: Iterable[Any]) -> str | None:
    """Which function that a decoder attends with is somebody else's, in words; or `None`.

    Whoever has put it there wants it called: a few tokens do not show that it computes something else for many, or
    keeps what it is given.

    Args:
        kinds: the classes of the model's modules.
    """
    names = {getattr(kind, "__module__", None) for kind in kinds}
    files = [sys.modules[name] for name in names if name in sys.modules]
    for name in {str(compat.attention_name(each)) for each in (config, config.get_text_config(decoder=True))}:
        for function in compat.attention_functions(name, files):
            if _is_foreign(function, files):
                return f"attention function of somebody else: {getattr(function, '__name__', type(function).__name__)}"
    return None


def is_of_transformers(code: CodeType) -> bool:
    """Whether a function was written there, whatever name somebody has given it."""
    return code.co_filename.startswith(_TRANSFORMERS)


def is_foreign(function: Callable[..., Any], module: torch.nn.Module) -> bool:
    """Whether the function that `module` attends with is neither transformers' nor of the module's own file."""
    return _is_foreign(function, [sys.modules.get(type(module).__module__)])


def _is_foreign(function: Callable[..., Any], files: list[ModuleType | None]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    if code is None or is_of_transformers(code):  # there is none where it is made in C
        return False
    return all(code.co_filename != getattr(file, "__file__", None) for file in files)
