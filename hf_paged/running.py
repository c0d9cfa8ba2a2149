"""The calls that run on a patched model, in whatever threads, and what waits for the end of the last one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hf_paged.core.forks import new_rlock


class RunningCalls:
    """Of one model, whatever its settings become.

    Attributes:
        lock: calls begin and end under it, and what waits for them is done under it.
    """

    def __init__(self) -> None:
        self.lock = new_rlock()
        self._threads: dict[object, int] = {}
        self._then: Callable[[], object] | None = None

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """A call, from its begin to its end."""
        call = object()
        try:
            with self.lock:
                self._threads[call] = threading.get_ident()
            yield
        finally:
            with self.lock:
                self._threads.pop(call, None)
                self._go_on()

    def when_idle(self, then: Callable[[], object] | None) -> None:
        """Do `then` at once where no call runs, else at the end of the last one, in its thread. `None`: nothing."""
        with self.lock:
            self._then = then
            self._go_on()

    def _go_on(self) -> None:
        if self._then is not None and not self._threads:
            then, self._then = self._then, None
            then()

    def in_other_threads(self) -> bool:
        """Whether there are calls in other threads than this one."""
        return any(ident != threading.get_ident() for ident in list(self._threads.values()))

    def forget_other_threads(self) -> bool:
        """Whether there were calls in other threads, which are not there any more."""
        mine = {call: ident for call, ident in self._threads.items() if ident == threading.get_ident()}
        others, self._threads = len(self._threads) > len(mine), mine
        return others
