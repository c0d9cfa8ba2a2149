"""Finds out by trying whether the fast path reproduces a model's logits, instead of keeping a list of names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_paged import compat
from hf_paged.backends import backend_for
from hf_paged.cache import PagedCache
from hf_paged.config import PagedConfig
from hf_paged.forward import ModelCall, run_decode
from hf_paged.packed import run_packed
from hf_paged.pool import KVPool

# Two prompts with a common beginning that ends inside a block, of unequal length, and one token more for each.
_SHARED_TOKENS, _ROW_TOKENS = 5, (12, 9)
PROBE_SLOTS = 512
# Largest difference of logits, relative to the largest logit. Stock itself differs by about a tenth of these
# figures between batch shapes; a model that the fast path gets wrong differs by 0.1 to 1.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


@dataclass(frozen=True, slots=True)
class Capability:
    """What the fast path does for a model.

    Attributes:
        obstacle: why it cannot be used, or `None`.
        keeps_logits: whether the model can be told whose logits are wanted.
        window_limit: longest sequence, in tokens, for which the model's attention calls say all that matters;
            `None`: any.
    """

    obstacle: str | None
    keeps_logits: bool = False
    window_limit: int | None = None


@torch.no_grad()
def probe(model: PreTrainedModel, call: Callable[..., Any], pool: KVPool, settings: PagedConfig) -> Capability:
    """Compare a packed pass and a decode step with stock forwards of the same tokens, on the model's own weights."""
    if not compat.takes_position_ids(model):
        return Capability("model takes no position ids")
    try:
        return _compare(model, call, pool, settings)
    except Exception as error:  # whatever a model does with what it did not expect, the padded path is right
        return Capability(f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")


def _compare(model: PreTrainedModel, call: Callable[..., Any], pool: KVPool, settings: PagedConfig) -> Capability:
    rows = _prompts(_plain_tokens(model), compat.compute_device(model))
    expected = [call(input_ids=row.unsqueeze(0), use_cache=False).logits[0, -2:].float() for row in rows]

    backend = backend_for(settings.attention_backend, compat.compute_device(model))
    cache = PagedCache(model.config, pool=pool, settings=settings)
    cache.ensure_rows(len(rows))
    cache.prefilling = True
    longest = max(_ROW_TOKENS)
    inputs = torch.stack([torch.cat([row.new_zeros(longest + 1 - len(row)), row]) for row in rows])
    real = torch.stack([torch.arange(longest) >= longest - tokens for tokens in _ROW_TOKENS])
    positions = (real.cumsum(dim=1) - 1).clamp(min=0).to(inputs.device)
    keeps_logits = compat.takes_logits_to_keep(model)
    prompt = {"input_ids": inputs[:, :-1], "position_ids": positions, "past_key_values": cache, "use_cache": True}
    windows: dict[int, int | None] = {}
    outputs, *_ = run_packed(ModelCall(call, prompt, inputs[:, :-1], real, True), cache, backend, keeps_logits, windows)
    decode = {
        "input_ids": inputs[:, -1:],
        "position_ids": positions[:, -1:] + 1,
        "past_key_values": cache,
        "use_cache": True,
    }
    decoded = run_decode(ModelCall(call, decode, inputs[:, -1:], None, False), cache, backend)
    for row, reference in enumerate(expected):
        actual = torch.stack([outputs.logits[row, -1], decoded.logits[row, -1]]).float()
        error = float((actual - reference).abs().max() / reference.abs().max().clamp(min=1e-6))
        if not error <= TOLERANCES.get(model.dtype, 8e-2):
            return Capability(f"packed logits differ from stock by {error:.1g} of the largest")
    untold = [
        window for layer, window in enumerate(cache.windows) if window is not None and windows.get(layer) != window
    ]
    cache.release()
    return Capability(None, keeps_logits, min(untold, default=None))


def _plain_tokens(model: PreTrainedModel) -> Callable[[int], int]:
    """Maps any number to a token id that the config has no name for: a name may stand for an image."""
    vocabulary, named = compat.vocabulary_size(model.config), compat.named_tokens(model.config)

    def plain(number: int) -> int:
        return next((token for i in range(vocabulary) if (token := (number + i) % vocabulary) not in named), 0)

    return plain


def _prompts(plain: Callable[[int], int], device: torch.device) -> list[torch.Tensor]:
    """Fixed token ids that spread over the vocabulary; no random state is touched."""
    shared = [plain(3 + 7 * i * i) for i in range(_SHARED_TOKENS)]
    return [
        torch.tensor(
            shared + [plain(11 + 13 * i + 5 * i * i + row) for i in range(tokens + 1 - _SHARED_TOKENS)], device=device
        )
        for row, tokens in enumerate(_ROW_TOKENS)
    ]
