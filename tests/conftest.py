"""Shared set-up of every test: seeds, threads, poisoned memory, and the import path of the test helpers."""

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_PAGED_POISON", "1")  # memory that no block owns reads as NaN, so that a stray read shows
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the Hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():  # without a GPU, Triton's kernels run under its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

HERE = Path(__file__).parent
# importlib mode leaves these to us: tolerances, families, modes, ...
sys.path[:0] = [str(HERE), str(HERE / "hf"), str(HERE / "kernels_ops")]
sys.path.append(str(HERE.parent))  # benchmarks, for the loader of the real model

# torch is imported where it is used: after the variables above, and not by xdist's controller, which runs no test.
import pytest  # noqa: E402

# Their assertions then say which values differ, as those of the test files do.
pytest.register_assert_rewrite("cache_pairs", "mishaps", "pair", "patched_copies")


def pytest_addoption(parser):
    parser.addoption("--pairs", metavar="N/M", help="of the pairs of a family and a mode, each Mth, from the Nth on")


def pytest_collection_modifyitems(config, items):
    """Leave out the pairs that another run tests; along a diagonal, so that each family and each mode is met."""
    if (part := config.getoption("pairs")) is None:
        return
    from families import FAMILIES
    from modes import MODES

    first, step = map(int, part.split("/"))
    families, modes = list(FAMILIES), list(MODES)

    def is_chosen(item) -> bool:
        given = getattr(item, "callspec", None)
        if given is None or not {"family", "mode"} <= given.params.keys():
            return True
        family, mode = given.params["family"].name, given.params["mode"].name
        return (families.index(family) + modes.index(mode)) % step == first - 1

    config.hook.pytest_deselected(items=[item for item in items if not is_chosen(item)])
    items[:] = filter(is_chosen, items)


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
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def native_library():
    """What the tests of the native library need. Where there is a compiler, there must be a library: a source that does
    not compile is left out by the installation, and would otherwise only leave out its tests."""
    from hf_paged_kernels.native_library import LIBRARY, SWITCH, library

    if os.environ.get(SWITCH) == "off":  # whoever says so wants the tests of what runs without it
        pytest.skip(f"{SWITCH}=off")
    if library() is None:
        assert shutil.which("c++") is None, f"{LIBRARY.name} was not built, or cannot be loaded: pip install -v -e ."
        # The package is to work without a compiler, too.
        pytest.skip("there is no C++ compiler, so that the package has no native library")


@pytest.fixture
def all_variants(native_library, monkeypatch):
    """Has the native kernel run whatever it can, whoever has made the CPU; what `native_kernels()` then says."""
    from hf_paged_kernels.native import Availability, kernel_for, variants

    available = Availability(tuple(reversed(variants().values())), "all variants", True)
    for module in ("hf_paged_kernels.native", "hf_paged.backends.native"):
        monkeypatch.setattr(f"{module}.native_kernels", lambda: available)
    kernel_for.cache_clear()
    yield available
    kernel_for.cache_clear()


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers():
    import transformers

    transformers.logging.set_verbosity_error()
