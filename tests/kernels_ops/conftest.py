"""What tests of the native library share."""

import pytest
import torch

from hf_paged_kernels import NativeKernel
from hf_paged_kernels.native import variants


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
