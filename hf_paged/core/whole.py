"""Operations that are done whole or not at all, or say that they were not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar


class Tearable(Protocol):
    """A manager.

    Attributes:
        lock: every operation holds it, and may call others.
        is_torn: whether an operation has ended half way, so that nobody knows any more who holds what.
    """

    lock: threading.RLock
    is_torn: bool


M = TypeVar("M", bound=Tearable)
P = ParamSpec("P")
R = TypeVar("R")


def whole(operation: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """An operation on a manager, its first argument, under its lock; torn from when one has ended half way.

    Ctrl-C, or what the handler of another signal raises, may come between any two steps, and after the last one, when
    the caller does not get the result. Exceptions that have `changed_nothing` have come before the first one.
    """

    @wraps(operation)
    def run(manager: M, *args: P.args, **kwargs: P.kwargs) -> R:
        with manager.lock:
            try:
                return operation(manager, *args, **kwargs)
            except BaseException as error:
                manager.is_torn |= not getattr(error, "changed_nothing", False)
                raise

    return run


def changing_nothing(wait: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Do what takes its time in the midst of an operation, before anything has changed: it may be interrupted."""
    try:
        wait(*args, **kwargs)
    except BaseException as error:
        error.changed_nothing = True
        raise
