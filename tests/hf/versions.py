"""Which transformers runs: the one that the project is tested with, or an older one that may lack something."""

import re
from pathlib import Path
from typing import NoReturn

import pytest
import transformers

PINNED = re.search(r"^transformers==(.+)$", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.M)[1]
IS_PINNED = transformers.__version__ == PINNED


def skip_if_older(reason: str) -> NoReturn:
    """Skip the test; on the version that the project is tested with nothing may be missing, so there it fails."""
    if IS_PINNED:
        pytest.fail(reason)
    pytest.skip(reason)
