"""Locks in a process that was forked: no thread is there to open those that others held at that moment.

All locks of hf_paged are made here, so that one function opens them in the new process, and then tells who guards with
them what threads that are gone may have left half done.
"""

from __future__ import annotations

import os
import threading
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet


class Heir(Protocol):
    """Who needs to know that it is in a new process now."""

    def after_fork(self, was_locked: bool) -> None:
        """Only the thread that has forked is there. `was_locked`: whether another one held the lock in question."""


_locks: WeakSet[Any] = WeakSet()
_heirs: WeakKeyDictionary[Heir, Any] = WeakKeyDictionary()


def new_lock() -> threading.Lock:
    """A `threading.Lock` that is open in a forked process."""
    lock = threading.Lock()
    _locks.add(lock)
    return lock


def new_rlock() -> threading.RLock:
    """A `threading.RLock` that nobody but the thread that has forked may hold in the new process."""
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def tell_forks(heir: Heir, lock: Any) -> None:
    """Have `heir` told in forked processes, as long as somebody else keeps it alive; `lock` is one of those above."""
    _heirs[heir] = lock


def _after_fork() -> None:
    held = {id(lock): lock for lock in _locks if _is_held_by_another(lock)}
    for lock in held.values():
        lock._at_fork_reinit()
    for heir, lock in list(_heirs.items()):
        heir.after_fork(id(lock) in held)


def _is_held_by_another(lock: Any) -> bool:
    if lock.acquire(blocking=False):  # as who forks may where it holds an `RLock` itself
        lock.release()
        return False
    return True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
