"""A model to try: loaded from a folder or the hub, or built from a config with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_paged import compat
from hf_paged.commands.arguments import UsageError
from hf_paged.commands.subject import find_config

ARGUMENT = "MODEL"


def load_model(source: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model, in evaluation mode, on the CPU. `UsageError` where there is none that generates."""
    config = find_config(source, ARGUMENT)
    kind = compat.generating_class(config)
    if kind is None:
        raise UsageError(ARGUMENT, f"{source} does not generate; name a model with a language-model head")
    dtype = dtype or compat.config_dtype(config) or torch.float32
    path = Path(source).expanduser()
    if path.suffix == ".json" and path.is_file():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return kind(config).eval().to(dtype)
    try:
        return compat.load_weights(kind, str(path) if path.exists() else source, dtype).eval()
    except Exception as error:  # transformers, safetensors and the hub raise many kinds
        said = next(iter(str(error).splitlines()), "")
        raise UsageError(
            ARGUMENT,
            f"{source}: its weights cannot be loaded ({type(error).__name__}: {said}); name its config.json to try the "
            "model with random ones",
        ) from None
