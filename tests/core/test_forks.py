"""Locks in forked processes: open where another thread held them, and whoever guards something with them is told."""

import threading
from contextlib import ExitStack

import pytest
from forking import in_fork, needs_fork

from hf_paged.core import forks
from hf_paged.core.manager import BlockManager

pytestmark = needs_fork


class Holding:
    """Another thread that holds locks."""

    def __init__(self, *locks):
        self._locks, self._held, self._go_on = locks, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold)

    def _hold(self):
        with ExitStack() as stack:
            for lock in self._locks:
                stack.enter_context(lock)
            self._held.set()
            self._go_on.wait()

    def __enter__(self):
        self._thread.start()
        self._held.wait()

    def __exit__(self, *error):
        self._go_on.set()
        self._thread.join()


@pytest.mark.parametrize("make", [forks.new_lock, forks.new_rlock])
def test_a_lock_of_another_thread_is_open(make):
    lock = make()
    with Holding(lock):
        assert in_fork(lambda: lock.acquire(timeout=1)) == 1
        assert not lock.acquire(blocking=False), "in this process it is still held"


def test_a_lock_of_the_thread_that_forks_stays_its_own():
    lock = forks.new_rlock()
    with lock:
        assert in_fork(lambda: lock._is_owned()) == 1


def test_a_manager_in_the_midst_of_an_operation_is_torn():
    managers = [BlockManager(20, 4) for _ in range(2)]
    with Holding(managers[0].lock):
        assert in_fork(lambda: managers[0].is_torn and not managers[1].is_torn) == 1
    assert not managers[0].is_torn
