"""Shared set-up of every test: seeds, threads, poisoned memory, and the import path of the test helpers."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_PAGED_POISON", "1")  # memory that no block owns reads as NaN, so that a stray read shows
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the Hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():  # without a GPU, Triton's kernels run under its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "hf")]  # importlib mode leaves these to us: tolerances, families, modes, ...
sys.path.append(str(HERE.parent))  # benchmarks, for the loader of the real model

# After the variables above, which torch and triton read once.
import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "real: runs SmolLM2-135M with its real weights")


try:
    from hypothesis import settings

    settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("default")
except ImportError:  # the property tests say so themselves
    pass


@pytest.fixture(scope="session", autouse=True)
def _threads():
    """One thread: results do not depend on the machine, and tiny models gain nothing from more."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers():
    import transformers

    transformers.logging.set_verbosity_error()
