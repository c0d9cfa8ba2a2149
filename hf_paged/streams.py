"""Copies between a GPU and the host on a stream of their own: the little that needs CUDA, behind what does not.

*Current* is the stream on which the calling thread computes. A device whose memory is the host's has no side stream:
copies are made at once there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import torch

TIERED_DEVICES = ("cpu", "cuda")


class Mark(Protocol):
    """A place in the side stream: it is *done* when everything before it is."""

    def done(self) -> bool:
        """Whether the side stream has passed it."""

    def result(self) -> None:
        """Let the calling thread wait for it."""

    def hold_current(self) -> None:
        """Let the current stream wait for it; the calling thread goes on."""


class Lap(Protocol):
    """Measures what is computed between its beginning and `stop`."""

    def stop(self) -> None:
        """That was all; no one waits."""

    def seconds(self) -> float | None:
        """How long it took; `None` while it is still going on."""


class SideStream(Protocol):
    """Carries out what it is given in order, later, beside the current stream."""

    def run(self, copies: Callable[[], object]) -> None:
        """Do these copies behind all that was given before."""

    def after_current(self) -> None:
        """What follows begins when everything that is on the current stream now is done."""

    def mark(self) -> Mark:
        """The end of what was given so far."""

    def start_lap(self) -> Lap:
        """Begin to measure the current stream."""

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Host memory `[num_bytes]` uint8 that copies need not wait for. Raises `RuntimeError` where it is refused."""

    def share(self, memory: torch.Tensor) -> None:
        """Copies go to or from device memory that somebody else may own before they are made."""

    def give_back(self) -> None:
        """Let the system have the pinned memory that nobody holds any more."""


def side_stream(device: torch.device) -> SideStream | None:
    """That of a device; `None` where copies are made at once."""
    return CUDASideStream(device) if device.type == "cuda" else None


def start_lap(side: SideStream | None) -> Lap:
    """Begin to measure what is computed."""
    return WallLap() if side is None else side.start_lap()


def send_numbers(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """Numbers as int64 on a device, sent on the current stream; nobody waits for them."""
    here = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    if device.type == "cpu":
        return here
    with suppress(RuntimeError):  # where the system pins no more; so few are read at once
        here = here.pin_memory()
    return here.to(device, non_blocking=True)


class WallLap:
    """Of computing that is done when the call returns."""

    def __init__(self) -> None:
        self._begin, self._seconds = time.perf_counter(), 0.0

    def stop(self) -> None:
        self._seconds = time.perf_counter() - self._begin

    def seconds(self) -> float | None:
        return self._seconds


class CUDASideStream:
    """A CUDA stream."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, copies: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):
            copies()

    def after_current(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def mark(self) -> Mark:
        return CUDAMark(self._device, self._stream)

    def start_lap(self) -> Lap:
        return CUDALap(self._device)

    def pinned(self, num_bytes: int) -> torch.Tensor:
        with torch.cuda.device(self._device):
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True, device="cpu")

    def share(self, memory: torch.Tensor) -> None:
        memory.record_stream(self._stream)

    def give_back(self) -> None:
        empty = getattr(torch.accelerator, "empty_host_cache", None)  # older torch keeps it for whoever pins next
        if empty is not None:
            empty()


class CUDAMark:
    """An event in the side stream. Waiting for it leaves the processor to others."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream):
        self._device = device
        self._event = torch.cuda.Event(blocking=True)
        self._event.record(stream)

    def done(self) -> bool:
        return self._event.query()

    def result(self) -> None:
        self._event.synchronize()

    def hold_current(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


class CUDALap:
    """Two events in the current stream."""

    def __init__(self, device: torch.device):
        self._device = device
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._begin.record(torch.cuda.current_stream(device))

    def stop(self) -> None:
        self._end.record(torch.cuda.current_stream(self._device))

    def seconds(self) -> float | None:
        return self._begin.elapsed_time(self._end) / 1000 if self._end.query() else None
