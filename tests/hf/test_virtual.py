"""Memory on demand: address space with holes, arenas in it, and how the CUDA driver is called."""

import ctypes
import gc

import pytest
import torch
from on_demand import HostDriver

from hf_paged import arena, cuda_driver
from hf_paged.arena import MIN_PAGES, Arena
from hf_paged.cuda_driver import CudaDriver, driver_for, works
from hf_paged.errors import RefusedMemoryError
from hf_paged.virtual import AddressSpace

PAGE = 4096


def test_a_driver_is_tried():
    driver = HostDriver(PAGE)
    assert works(driver)
    assert (driver.backed, driver.reserved) == ({}, {}), "all of it was given back"


class Shared(HostDriver):
    """New memory lies over old."""

    def back(self, address, num_bytes):
        handle = super().back(address, num_bytes)
        ctypes.memset(next(iter(self.reserved)), 9, 1)
        return handle


class Copied(HostDriver):
    """What is written to a tensor does not get where it belongs."""

    def tensor(self, space):
        return torch.zeros(space.num_bytes, dtype=torch.uint8)


@pytest.mark.parametrize("kind", [Shared, Copied])
def test_a_driver_that_does_not_work_is_found_out(kind):
    assert not works(kind(PAGE))


def test_pages_stay_as_long_as_a_piece_reaches_into_them():
    driver = HostDriver(PAGE)
    space = AddressSpace(driver, 10 * PAGE - 5)
    assert space.num_bytes == 10 * PAGE
    space.back("a", 100, PAGE + 1)
    memory = driver.tensor(space)
    memory[100 : PAGE + 1] = 1
    space.back("b", PAGE + 1, 4 * PAGE)
    space.back("c", 5 * PAGE, 6 * PAGE)
    assert space.backed_bytes == driver.backed_bytes == 5 * PAGE
    space.back("d", 3 * PAGE, 8 * PAGE)
    assert space.backed_bytes == 8 * PAGE
    space.give_back("a")
    assert memory[PAGE] == 1, "b begins in that page"
    space.give_back("b")
    assert space.backed_bytes == 6 * PAGE, "d reaches into the last two of its pages, which came together"
    space.give_back("d")
    assert space.backed_bytes == PAGE
    space.give_back("c")
    assert driver.backed == {}
    del space, memory
    gc.collect()
    assert driver.reserved == {}


def test_a_page_that_neighbours_share_does_not_hold_the_others():
    driver = HostDriver(PAGE)
    space = AddressSpace(driver, 12 * PAGE)
    space.back("left", 0, 4 * PAGE + 10)
    space.back("middle", 4 * PAGE + 10, 8 * PAGE + 20)
    space.back("right", 8 * PAGE + 20, 12 * PAGE)
    assert len(driver.backed) == 5, "three runs of whole pages, and the two between them"
    space.give_back("middle")
    assert space.backed_bytes == 9 * PAGE
    space.give_back("left", "right")
    assert driver.backed == {}


def test_what_is_refused_changes_nothing():
    driver = HostDriver(PAGE, limit_bytes=3 * PAGE)
    space = AddressSpace(driver, 10 * PAGE)
    space.back("a", 4 * PAGE, 5 * PAGE)
    with pytest.raises(RefusedMemoryError):
        space.back("b", 3 * PAGE, 8 * PAGE)
    assert space.backed_bytes == driver.backed_bytes == PAGE
    space.give_back("a")
    assert driver.backed == {}


def test_nothing_goes_while_the_device_cannot_be_waited_for():
    driver = HostDriver(PAGE)
    space = AddressSpace(driver, 4 * PAGE)
    space.back("a", 0, 2 * PAGE)
    driver.tensor(space)[: 2 * PAGE] = 7
    driver.can_wait = False
    space.give_back("a")
    assert driver.backed_bytes == 2 * PAGE
    space.back("b", PAGE, 3 * PAGE)
    assert driver.backed_bytes == 3 * PAGE, "pages that were left over are taken first"
    del space
    gc.collect()
    assert driver.backed_bytes == 3 * PAGE
    driver.can_wait = True
    other = AddressSpace(driver, PAGE)
    other.back("a", 0, 1)
    assert driver.backed_bytes == PAGE, "what could not go then goes as soon as anybody asks for memory"
    assert len(driver.reserved) == 1


@pytest.mark.parametrize("dim", [8, 6, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_an_arena_has_memory_where_it_was_asked_for(dim, dtype, monkeypatch):
    driver = HostDriver(PAGE)
    monkeypatch.setattr(arena, "driver_for", lambda device: driver)
    made = Arena(12_000, torch.zeros(1, 3, 1, dim, dtype=dtype))
    assert made.tensor.shape == (3, 12_000, dim)
    assert driver.backed_bytes == PAGE, "no more than is needed to see what it is"
    assert (made.step_slots - 1) * dim * dtype.itemsize < PAGE <= made.step_slots * dim * dtype.itemsize
    parts = [(16, 700), (700, 701), (5_000, 9_000), (11_990, 12_016)]
    for number, (start, stop) in enumerate(parts):
        made.back(start, stop)
        made.tensor[:, start:stop] = number + 1
    for number, (start, stop) in enumerate(parts):
        assert bool((made.tensor[:, start:stop] == number + 1).all())
    made.give_back(5_000, 9_000)
    assert bool((made.tensor[:, 16:700] == 1).all())
    slots = sum(min(stop, 12_000) - start for start, stop in parts) - 4_000
    assert driver.backed_bytes <= 3 * slots * dim * dtype.itemsize + (3 * 6 + 1) * PAGE
    for start, stop in parts[:2] + parts[3:]:
        made.give_back(start, stop)
    assert driver.backed_bytes == PAGE
    del made
    gc.collect()
    assert (driver.backed, driver.reserved) == ({}, {})


def test_an_arena_of_a_few_pages_is_taken_at_once(monkeypatch):
    monkeypatch.setattr(arena, "driver_for", lambda device: HostDriver(PAGE))
    like = torch.zeros(1, 3, 1, 8)
    few = Arena(MIN_PAGES * PAGE // 32, like)
    assert few.step_slots is None
    assert bool((few.tensor == 0).all())
    assert Arena(MIN_PAGES * PAGE // 32 + 1, like).step_slots == PAGE // 32


def test_an_arena_gives_back_what_it_got_before_memory_was_refused(monkeypatch):
    driver = HostDriver(PAGE, limit_bytes=4 * PAGE)
    monkeypatch.setattr(arena, "driver_for", lambda device: driver)
    made = Arena(1024, torch.zeros(1, 3, 1, 8))
    with pytest.raises(RefusedMemoryError):
        made.back(0, 400)
    assert driver.backed_bytes == PAGE
    made.back(0, 100)
    made.tensor[:, :100] = 1


# The CUDA driver's library


class Library:
    """Stands in for libcuda: notes its calls, and fails where it is told to."""

    def __init__(self):
        self.calls, self.errors = [], {}

    def __getattr__(self, name):
        if not name.startswith("cuMem"):
            raise AttributeError(name)

        def call(*arguments):
            values = [getattr(each, "value", each) for each in arguments]
            self.calls.append((name, values))
            errors = self.errors.get(name)
            if errors:
                return errors.pop(0)
            if name in ("cuMemGetAllocationGranularity", "cuMemAddressReserve", "cuMemCreate"):
                arguments[0]._obj.value = {"cuMemGetAllocationGranularity": 2**21}.get(name, 77 * 2**21)
            return 0

        return call

    def names(self):
        return [name.removeprefix("cuMem") for name, _ in self.calls]


@pytest.fixture
def cuda(monkeypatch):
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: library.calls.append(("wait", [])))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: library.calls.append(("empty_cache", [])))
    return library


def test_structures_of_the_cuda_driver():
    """As cuda.h lays them out."""
    assert ctypes.sizeof(cuda_driver._Properties) == 32
    assert ctypes.sizeof(cuda_driver._Access) == 12
    assert cuda_driver._Properties.location.offset == 8
    assert cuda_driver._Properties.flags.offset == 24
    assert cuda_driver._Access.flags.offset == 8


def test_calls_of_the_cuda_driver(cuda):
    driver = CudaDriver(torch.device("cuda"))
    assert driver.page_bytes == 2**21
    assert (driver._properties.type, driver._properties.location.type, driver._properties.location.id) == (1, 1, 3)
    cuda.calls.clear()
    address = driver.reserve(2**22)
    handle = driver.back(address, 2**21)
    driver.unback(address, 2**21, handle)
    driver.free(address, 2**22)
    assert cuda.names() == ["AddressReserve", "Create", "Map", "SetAccess", "Unmap", "Release", "AddressFree"]
    given = dict(cuda.calls)
    assert given["cuMemMap"] == [address, 2**21, 0, handle, 0]
    assert given["cuMemUnmap"] == [address, 2**21]
    assert given["cuMemRelease"] == [handle]
    assert given["cuMemAddressFree"] == [address, 2**22]
    assert given["cuMemSetAccess"][:2] == [address, 2**21]


def test_torch_gives_back_what_it_keeps_before_memory_counts_as_refused(cuda):
    driver = CudaDriver(torch.device("cuda", 0))
    cuda.calls.clear()
    cuda.errors["cuMemCreate"] = [2]
    driver.back(2**21, 2**21)
    assert cuda.names() == ["Create", "empty_cache", "Create", "Map", "SetAccess"]
    cuda.errors["cuMemCreate"] = [2, 2]
    with pytest.raises(RefusedMemoryError, match=r"cuda:0 has no memory left for KV; lower max_memory"):
        driver.back(2**21, 2**21)


@pytest.mark.parametrize(
    ("name", "undone"), [("cuMemMap", ["Release"]), ("cuMemSetAccess", ["Unmap", "Release"])], ids=["map", "access"]
)
def test_what_fails_half_way_is_undone(name, undone, cuda):
    driver = CudaDriver(torch.device("cuda", 0))
    cuda.errors[name] = [719]
    with pytest.raises(RuntimeError, match=f"{name} of the CUDA driver has failed with error 719"):
        driver.back(2**21, 2**21)
    assert cuda.names()[-len(undone) :] == undone


def test_nothing_is_waited_for_in_a_capture(cuda, monkeypatch):
    driver = CudaDriver(torch.device("cuda", 0))
    cuda.calls.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not driver.wait()
    assert cuda.calls == []


def test_without_such_a_driver_there_is_none(cuda, monkeypatch):
    driver_for.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cuda.errors["cuMemGetAllocationGranularity"] = [801]  # not supported
    assert driver_for(torch.device("cuda", 1)) is None
    driver_for.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert driver_for(torch.device("cuda", 1)) is None
    assert driver_for(torch.device("cpu")) is None
    driver_for.cache_clear()
