"""The CUDA driver of graphs, on a stand-in for `torch.cuda` that notes what is asked of it and in which order."""

from array import array
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
import torch

from hf_paged import graphs


class FakeCUDA:
    """Streams, events and graphs by name; `log` has what was done, and on which stream."""

    def __init__(self):
        self.log, self.streams, self.current, self.fails_at_end = [], [], "main", False
        fake = self

        class Stream(str):
            def wait_stream(self, other):
                fake.log.append(f"{self} waits for {other}")

            def wait_event(self, event):
                fake.log.append(f"{self} waits for event")

        class Event:
            def record(self, stream=None):
                fake.log.append(f"recorded on {stream or fake.current}")

            def synchronize(self):
                fake.log.append("host waits")

        class CUDAGraph:
            def capture_begin(self, pool, capture_error_mode):
                fake.log.append(f"begin {pool} {capture_error_mode} on {fake.current}")

            def capture_end(self):
                fake.log.append(f"end on {fake.current}")
                if fake.fails_at_end:
                    raise RuntimeError("capture is invalid")

            def replay(self):
                fake.log.append(f"replay on {fake.current}")

        def new_stream():
            self.streams.append(Stream(f"side {len(self.streams)}"))
            return self.streams[-1]

        self.main, self.pools = Stream("main"), 0
        self.current = self.main
        self.Stream, self.Event, self.CUDAGraph = new_stream, Event, CUDAGraph

    def current_stream(self):
        return self.current

    def graph_pool_handle(self):
        self.pools += 1
        return f"pool {self.pools}"

    def synchronize(self):
        self.log.append("synchronize")

    @contextmanager
    def device(self, device):
        yield

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCUDA()

    def empty(*args, pin_memory=False, **kwargs):
        return torch.empty(*args, **kwargs)

    stand_in = SimpleNamespace(cuda=fake, empty=empty, frombuffer=torch.frombuffer, int32=torch.int32)
    monkeypatch.setattr(graphs, "torch", stand_in)
    return fake


@pytest.fixture
def driver(cuda):
    return graphs.CUDAGraphDriver(torch.device("cuda", 0))


def test_only_cuda_has_graphs(cuda):
    assert isinstance(graphs.driver_for(torch.device("cuda", 0)), graphs.CUDAGraphDriver)
    assert graphs.driver_for(torch.device("cpu")) is None


def test_captures_share_a_pool_and_a_stream(cuda, driver):
    assert driver.warm_up(lambda: str(cuda.current)) == "side 0"
    assert cuda.log == ["side 0 waits for main", "main waits for side 0"]
    cuda.log.clear()
    captured, replay = driver.capture(lambda: str(cuda.current))
    assert captured == "side 0"
    assert cuda.log == ["synchronize", "begin pool 1 thread_local on side 0", "end on side 0"]
    driver.capture(lambda: None)
    assert cuda.log[-2:] == ["begin pool 1 thread_local on side 0", "end on side 0"]
    replay()
    assert cuda.log[-1] == "replay on main"
    driver.release()
    driver.capture(lambda: None)
    assert "begin pool 2 thread_local on side 0" in cuda.log


@pytest.mark.parametrize("fails_at_end", [False, True])
@pytest.mark.parametrize("error", [ValueError("odd model"), KeyboardInterrupt(), None], ids=type)
def test_a_failed_capture_leaves_no_trace(error, fails_at_end, cuda, driver):
    """The capture is ended, the stream is the one of before, and the next attempt shares nothing with this one."""
    cuda.fails_at_end = fails_at_end

    def forward():
        if error is not None:
            raise error

    if error is None and not fails_at_end:
        driver.capture(forward)
        return
    with pytest.raises(RuntimeError if error is None else type(error)):
        driver.capture(forward)
    assert cuda.log[-1] == "end on side 0"
    assert cuda.current == "main"
    cuda.fails_at_end = False
    driver.capture(lambda: None)
    assert cuda.log[-2:] == ["begin pool 2 thread_local on side 1", "end on side 1"]


def test_numbers_on_their_way_are_not_written_over(cuda, driver):
    """What the host writes next goes elsewhere until the copy of a few steps ago is known to be done."""
    target = torch.zeros(8, dtype=torch.int32)
    for step in range(6):
        driver.send(array("i", [step] * 5), target)
        assert target.tolist() == [step] * 5 + [0] * 3
    memories = [staging.data_ptr() for staging, _ in driver._on_their_way]
    assert len(set(memories)) == len(memories) == 4
    assert cuda.log.count("host waits") == 2
    assert [staging[0].item() for staging, _ in driver._on_their_way] == [2, 3, 4, 5]
    driver.send(array("i", range(8)), target)
    assert target.tolist() == list(range(8))
    driver.send(array("i", range(100)), torch.zeros(100, dtype=torch.int32))
    assert len(driver._on_their_way) == 4


def test_steps_on_other_streams_wait_for_each_other(cuda, driver):
    with driver.turn():
        pass
    assert cuda.log == ["recorded on main"]
    with cuda.stream(type(cuda.main)("theirs")), suppress(ValueError), driver.turn():
        raise ValueError
    assert cuda.log == ["recorded on main", "theirs waits for event", "recorded on theirs"]
    cuda.log.clear()
    driver.release()
    assert cuda.log == ["host waits"], "memory of a graph that still runs is given up"
