"""The process's own memory, and a model whose KV stands out of it."""

import ctypes
import gc

import psutil
import torch
from families import VOCAB
from prompts import batch, tokens
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

from hf_paged import patch_model

MIB = 2**20
# What the process's memory moves by without us: at most 0.5 MiB in 20 calls of this kind, once glibc has given back
# what it keeps of the heap that torch has freed (up to 64 MiB, more after larger tensors).
NOISE = MIB


def wide_model() -> LlamaForCausalLM:
    """A model of wide heads, 64 KiB of KV a token, so that KV stands out of the process's memory."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=256,
        max_position_embeddings=4096,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


TOKEN_BYTES = 4 * 2 * 8 * 256 * 4


def patched(**overrides):
    """A patched model that has answered once, so that what only the first call takes is there."""
    model = patch_model(wide_model(), **overrides)
    ask(model, 600)
    model.paged.clear()
    return model


def ask(model, num_tokens: int, seed: int = 1, new: int = 4, **kwargs):
    return model.generate(**batch([tokens(num_tokens, seed=seed)]), do_sample=False, max_new_tokens=new, **kwargs)


_trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", lambda padding: None)


def resident_now() -> int:
    """The process's memory, in bytes, without what the heap keeps for itself."""
    _trim_heap(0)
    return psutil.Process().memory_info().rss


def resident() -> int:
    """The same, without garbage."""
    gc.collect()
    return resident_now()


class Watch(StoppingCriteria):
    """Notes the process's memory and the runtime's figures after each step, and never stops anything."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((resident_now(), self.model.paged.stats()))
        return torch.zeros(len(input_ids), dtype=torch.bool)
