"""What tests of the native library share."""

import pytest
import torch

from hf_paged_kernels import NativeKernel
from hf_paged_kernels.native import variants

NAMES = ("portable", "avx2", "avx512", "avx512_bf16", "neon")


@pytest.fixture(params=NAMES)
def kernel(request) -> NativeKernel:
    if request.param not in variants():
        pytest.skip("this CPU or build does not have the variant")
    return variants()[request.param]


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
