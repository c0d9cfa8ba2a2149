"""CUDA graphs of forward passes: the little that needs a GPU, behind an interface that does not.

What a pass reads besides weights must lie in tensors that live as long as its graph and are filled before it is
replayed: in the captured pass everything that Python has computed is a constant.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")

# Steps whose numbers may be on their way to the device while the next one's are written.
_MAX_ON_THEIR_WAY = 4


class GraphDriver(Protocol):
    """Captures and replays. One thread at a time."""

    def turn(self) -> AbstractContextManager[None]:
        """Around all work of one step: that of the step before is done when it begins, whatever streams they are on."""

    def send(self, numbers: array, target: torch.Tensor) -> None:
        """Copy int32 `numbers` to the beginning of `target` on the device, without waiting for it."""

    def warm_up(self, forward: Callable[[], T]) -> T:
        """Run `forward` where it will be captured, so that whatever is made at a first time is there."""

    def capture(self, forward: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """What `forward` returns, and a function that computes the tensors in it anew.

        Where `forward` raises, or does what cannot be captured, that error is raised, and nothing of the attempt stays
        behind.
        """

    def release(self) -> None:
        """Wait for the last step, whose graph may be given up then, and give up what is kept between captures."""


def driver_for(device: torch.device) -> GraphDriver | None:
    """The driver of a device; `None` where there are no graphs."""
    return CUDAGraphDriver(device) if device.type == "cuda" else None


class CUDAGraphDriver:
    """Graphs in one memory pool, captured on a stream of their own.

    They share the pool because they never run at the same time: what one leaves there is of no use to the next, but for
    the tensors that a captured pass has returned and that somebody holds.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._last_step: torch.cuda.Event | None = None
        self._on_their_way: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if self._last_step is None:
                self._last_step = torch.cuda.Event()
            else:
                stream.wait_event(self._last_step)
            try:
                yield
            finally:
                self._last_step.record(stream)

    def send(self, numbers: array, target: torch.Tensor) -> None:
        staging = self._staging(len(numbers))
        staging[: len(numbers)].copy_(torch.frombuffer(numbers, dtype=torch.int32))
        target[: len(numbers)].copy_(staging[: len(numbers)], non_blocking=True)
        sent = torch.cuda.Event()
        sent.record()
        self._on_their_way.append((staging, sent))

    def _staging(self, count: int) -> torch.Tensor:
        """Pinned memory for `count` numbers that no copy reads from any more."""
        if len(self._on_their_way) == _MAX_ON_THEIR_WAY:
            staging, sent = self._on_their_way.popleft()
            sent.synchronize()  # a copy of four steps ago
            if len(staging) >= count:
                return staging
        return torch.empty(1 << (count - 1).bit_length(), dtype=torch.int32, pin_memory=True, device="cpu")

    def warm_up(self, forward: Callable[[], T]) -> T:
        stream, current = self._side_stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                return forward()
        finally:
            current.wait_stream(stream)

    def capture(self, forward: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        stream, graph = self._side_stream(), torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        try:
            # `torch.cuda.graph` does not leave its stream where the end of a capture fails; this does.
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    captured = forward()
                except BaseException:
                    with suppress(Exception):  # says again that the capture is invalid
                        graph.capture_end()
                    raise
                graph.capture_end()
        except BaseException:
            self._stream = self._pool = None  # the next attempt shares nothing with this one
            raise
        return captured, graph.replay

    def _side_stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        return self._stream

    def release(self) -> None:
        if self._last_step is not None:
            self._last_step.synchronize()
        self._on_their_way.clear()
        self._pool = None
