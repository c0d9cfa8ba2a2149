"""A CPU that is taken for a GPU: its pool is that of device 0, `max_memory["cpu"]` is a tier, copies are made late."""

import threading
import time
import weakref
from collections import deque

import torch
from disk import Always
from pair import Pair
from test_sharing import BLOCK_BYTES

from hf_paged import layout, limits, pool


class LateSide:
    """A side stream that does everything as late as it may, when somebody waits for it.

    What computes is always done at once: there is never anything to wait for on its side.

    Attributes:
        may_pin: whether memory is pinned when it is asked for.
        pinned_now: the memory that was, as far as somebody holds it.
        given_back: how often it was asked to let the system have the rest.
    """

    def __init__(self, may_pin=True):
        self.may_pin = may_pin
        self.pinned_now: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.given_back = 0
        self._queue: deque = deque()
        self._given = self._done = 0
        self._lock = threading.RLock()

    def run(self, copies):
        with self._lock:
            self._queue.append(copies)
            self._given += 1

    def after_current(self):
        pass

    def mark(self):
        return LateMark(self, self._given)

    def start_lap(self):
        return LateLap()

    def pinned(self, num_bytes):
        if not self.may_pin:
            raise RuntimeError("the system does not pin")
        memory = torch.full((num_bytes,), 255, dtype=torch.uint8)  # reads as NaN
        self.pinned_now.add(memory.untyped_storage())
        return memory

    def share(self, memory):
        pass

    def give_back(self):
        self.given_back += 1

    def reach(self, place):
        """Do everything that was given before this place."""
        with self._lock, torch.no_grad():
            while self._done < place:
                copies = self._queue.popleft()
                try:
                    copies()
                finally:
                    self._done += 1  # not before: others ask without the lock


class LateMark:
    def __init__(self, side, place):
        self._side, self._place = side, place

    def done(self):
        return self._side._done >= self._place

    def result(self):
        self._side.reach(self._place)

    def hold_current(self):
        self._side.reach(self._place)


class LateLap:
    """Nobody knows how long it took when it has just stopped."""

    def __init__(self):
        self._begin, self._asked = time.perf_counter(), 0

    def stop(self):
        self._seconds = time.perf_counter() - self._begin

    def seconds(self):
        self._asked += 1
        return None if self._asked == 1 else self._seconds


def as_gpu(monkeypatch, make_side=LateSide, has_kernels=False):
    """From now on the CPU is a GPU; `make_side` returns the side stream of each pool, or `None`.

    Triton's interpreter takes a second for what a launch does, and runs in one thread only: without it by default.
    """
    if not has_kernels:
        monkeypatch.setattr(layout, "triton_obstacle", lambda device: "it is interpreted")
    monkeypatch.setattr(limits, "budget_key", lambda device: 0)
    monkeypatch.setattr(pool, "side_stream", lambda device: make_side())


def hosted(name="llama", blocks=12, host="10MiB", disk=None, policy=Always, make=Pair, **overrides) -> Pair:
    """A pair with device memory for so many blocks, and the null blocks, and a host tier of so many bytes below."""
    memory = {0: (blocks + 1) * BLOCK_BYTES, "cpu": host} | ({} if disk is None else {"disk": disk})
    pair = make(name, max_memory=memory, **overrides)
    if policy is not None:
        pair.paged._current_pool(pair.model).tiers.policy = policy()
    return pair


def tiers(pair: Pair):
    return pair.paged._pool.tiers


def side(pair: Pair) -> LateSide:
    return tiers(pair)._side
