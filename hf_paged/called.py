"""Functions that models call by their global names, as `apply_rotary_pos_emb`: who replaces one changes K and V."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from operator import is_
from types import CodeType, FunctionType
from typing import Any


class CalledFunctions:
    """What the `forward`s of some classes call by name, and what that calls by name in the same file.

    Seen are functions under names of the files' own, wherever they come from; not what is reached by attributes, of
    modules or of `self`. A look at those of llama takes 1 us.

    Args:
        kinds: classes of modules.
    """

    def __init__(self, kinds: Iterable[type]):
        self._names: dict[int, tuple[dict[str, Any], dict[str, None]]] = {}
        seen: set[int] = set()
        functions = [inspect.unwrap(kind.forward) for kind in kinds]
        while functions:
            function = functions.pop()
            if id(function) in seen or not isinstance(function, FunctionType):
                continue
            seen.add(id(function))
            file = function.__globals__
            for name in _names_in(function.__code__):
                if isinstance(called := file.get(name), FunctionType):
                    self._names.setdefault(id(file), (file, {}))[1][name] = None
                    called = inspect.unwrap(called)
                    functions += [called] if getattr(called, "__globals__", None) is file else []
        self._functions = self._current()

    def same(self) -> bool:
        """Whether each name stands for the function that it stood for when this was made."""
        return all(map(is_, self._current(), self._functions))

    def _current(self) -> list[Any]:
        return [function for file, names in self._names.values() for function in map(file.get, names)]


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function inside, a comprehension
            yield from _names_in(constant)
