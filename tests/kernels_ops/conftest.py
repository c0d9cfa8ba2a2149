"""What tests of the native library share."""

import pytest
import torch

from hf_paged_kernels import NativeKernel
from hf_paged_kernels.native import kernel_for, native_kernels, variants


@pytest.fixture(params=list(variants()))
def kernel(request) -> NativeKernel:
    """Each variant that this CPU can run."""
    return variants()[request.param]


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def backend(request, monkeypatch):
    """The backend of a test's parameter, the native kernel switched accordingly."""
    name, _, variant = request.param.partition(" ")
    if variant and variant not in variants():
        # An instruction that a CPU lacks cannot be run: its machine tests the others, and torch's own attention.
        pytest.skip("this CPU or build does not have the variant")
    monkeypatch.setenv("HF_PAGED_NATIVE", variant or "off")
    for cached in (native_kernels, kernel_for):
        cached.cache_clear()
    yield name
    for cached in (native_kernels, kernel_for):
        cached.cache_clear()
