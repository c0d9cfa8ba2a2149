"""CUDA graphs for tests without a GPU, what reads the sample of weights, memory without poison, layers by oneDNN."""

import math

import pytest


@pytest.fixture
def driver(monkeypatch):
    """Graphs on the CPU, captured often: parts of about 11 tokens, and rooms without reserve."""
    import tape
    import torch

    from hf_paged import replay
    from hf_paged_kernels import room, work
    from hf_paged_kernels.launch import triton_obstacle

    if obstacle := triton_obstacle(torch.device("cpu")):
        pytest.skip(obstacle)  # triton is not there for every platform, and the steps are its backend's
    made = tape.TapeDriver()
    monkeypatch.setattr(replay, "driver_for", lambda device: made)
    monkeypatch.setattr(work, "part_tokens", lambda *_: 11)
    monkeypatch.setattr(room, "_MIN_ITEMS", 1)
    monkeypatch.setattr(room, "_MIN_PAGES", 4)
    return made


@pytest.fixture
def quick(driver, monkeypatch):
    """The same with kernels in plain torch."""
    import tape

    from hf_paged_kernels.copy import copy_slots_reference  # these modules import triton
    from hf_paged_kernels.store import store_tokens_reference

    for name, function in {
        "attend": tape.attend_plainly,
        "store_tokens": store_tokens_reference,
        "copy_slots": copy_slots_reference,
    }.items():
        monkeypatch.setattr(f"hf_paged.backends.triton.{name}", tape.launch(function))
    return driver


def no_entries(*args):
    """In place of `ModuleEntries` where there is no native library."""
    raise ValueError("none for this test")


@pytest.fixture(params=["native", "torch"])
def reader(request, monkeypatch) -> str:
    """What looks at models: the native library whatever it can, or torch and Python everything."""
    import hf_paged.sample
    import hf_paged.standstill

    if request.param == "torch":
        monkeypatch.setattr(hf_paged.sample, "can_sample", lambda tensor: False)
        monkeypatch.setattr(hf_paged.standstill, "ModuleEntries", no_entries)
    else:
        request.getfixturevalue("native_library")
    return request.param


@pytest.fixture
def no_poison(monkeypatch):
    """Poison touches every page, so memory is looked at without it."""
    from hf_paged import pool, store

    monkeypatch.setattr(store, "POISON", False)
    monkeypatch.setattr(pool, "POISON", False)


@pytest.fixture
def products(monkeypatch):
    """Rows of each product that goes to oneDNN, which all layers do that may."""
    from hf_paged import matmul, onednn, torch_compat

    if not torch_compat.can_multiply():
        # torch is also built without oneDNN (USE_MKLDNN=0); linear layers are its own there, and nothing is to be seen
        pytest.skip("this torch has no linear layers of oneDNN's")
    monkeypatch.setattr(matmul, "has_onednn", lambda: True)
    monkeypatch.setattr(matmul, "native_linear", lambda: None)
    monkeypatch.setattr(matmul, "LEAST", ((math.inf, 1, 1),))
    rows, multiply = [], onednn.multiply

    def counted(input, weight, bias):
        rows.append(input.numel() // weight.shape[1])
        return multiply(input, weight, bias)

    monkeypatch.setattr(onednn, "multiply", counted)
    _look_anew(matmul, monkeypatch)
    return rows


@pytest.fixture
def native_products(native_library, monkeypatch):
    """Rows of each product that goes to the native kernel, as all layers do that may; oneDNN is there, but slower."""
    from hf_paged import matmul
    from hf_paged_kernels.native import variants

    kernel, rows = next(iter(variants().values())).linear, []

    class Counted:
        takes = kernel.takes

        @staticmethod
        def run(input, weight, bias):
            rows.append(input.numel() // weight.shape[1])
            return kernel.multiply(input, weight, bias)

    monkeypatch.setattr(matmul, "has_onednn", lambda: True)
    monkeypatch.setattr(matmul, "LEAST", ((math.inf, 1, math.inf),))
    monkeypatch.setattr(matmul, "native_linear", lambda: Counted)
    monkeypatch.setattr(matmul, "NATIVE_ROWS", dict.fromkeys(matmul.NATIVE_ROWS, (1, math.inf, math.inf)))
    monkeypatch.setattr(matmul, "LEAST_WEIGHTS", 1)
    _look_anew(matmul, monkeypatch)
    return rows


def _look_anew(matmul, monkeypatch):
    monkeypatch.setattr(matmul, "is_faster", matmul.is_faster.__wrapped__)


@pytest.fixture(params=["oneDNN", "native kernel"])
def multiplied(request) -> list[int]:
    """Rows of each product that does not go to torch, by the one or by the other."""
    return request.getfixturevalue("products" if request.param == "oneDNN" else "native_products")
