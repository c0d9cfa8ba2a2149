"""Which transformers runs: the one that the project is tested with, or an older one that may lack something."""

import re
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import transformers

PINNED = re.search(r"^transformers==(.+)$", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.M)[1]
IS_PINNED = transformers.__version__ == PINNED


def choose_attention(model: torch.nn.Module, attention: str) -> None:
    """Skip the test where stock refuses to compute the model so: sdpa has no softcap and no sinks (gemma2, gpt_oss)."""
    try:
        model.set_attn_implementation(attention)
    except ValueError as error:
        pytest.skip(f"this transformers refuses {attention} for {type(model).__name__}: {str(error)[:80]}")


def skip_if_older(reason: str) -> NoReturn:
    """Skip the test; on the version that the project is tested with nothing may be missing, so there it fails."""
    if IS_PINNED:
        pytest.fail(reason)
    pytest.skip(reason)
