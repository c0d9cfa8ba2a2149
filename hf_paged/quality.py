"""What a quantized format does to a model's answers, measured on the model itself: stock's cache and a rounded one.

`verify` asks this before the first `generate`, `hf-paged doctor` shows it, `benchmarks/quality.py` does it at length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, EncoderDecoderCache

from hf_paged import compat
from hf_paged.compat import CACHE_NAME
from hf_paged.footprint import formats_for
from hf_paged.probe import in_one_line
from hf_paged_kernels import KVFormat

# Mean KL divergence from the model's own distribution of the next token, in nats. SmolLM2-135M on 4,096 tokens of text
# is off by 0.0003 (int8), 0.011 (fp8) and 0.046 (int4), on the prompt below by 0.0002, 0.004 and 0.041. A short prompt
# tells no more than the order of magnitude, so that twice what int4 does to a model that bears it is allowed. A tiny
# model whose keys have two channels 30 times as large is off by 0.01, 0.01 and 0.7; 300 times: 0.5, 0.009 and 1.8.
MAX_MEAN_KL = 0.1
_PROMPT = (
    "In the spring the river rose above its banks, and the people of the lower town carried what they could uphill. "
    "Three days later the water fell again. Nobody had drowned, but the mill was gone, and with it the only clock for "
    "twelve miles around. The mayor wrote to the county: we need 40 beams of oak, two glaziers, and somebody who can "
    "tell the time. The answer came in June. It consisted of a single sentence, which was read aloud at the market and "
    "has been a proverb in the valley ever since."
)
_PROMPT_TOKENS = 96  # as many where there is no tokenizer


class NotMeasurableError(ValueError):
    """The model does not take a prompt of token ids."""


class Quality(NamedTuple):
    """Of one way to store KV: KL divergence from full precision, mean over the tokens, in nats; perplexity."""

    mean_kl: float
    perplexity: float


class RoundingCache(DynamicCache):
    """Stock's cache, of what a format leaves of K and V."""

    def __init__(self, config: Any, kv_format: KVFormat):
        super().__init__(config=config.get_text_config(decoder=True))
        self._format = kv_format

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As stock's, with K and V rounded."""
        rounded = (
            side.decode(side.encode(each), each.shape[-1], each.dtype)
            for side, each in ((self._format.keys, key_states), (self._format.values, value_states))
        )
        return super().update(*rounded, *args, **kwargs)


def rounding_cache(config: Any, kv_format: KVFormat | None) -> DynamicCache | EncoderDecoderCache:
    """The cache that stock would make, rounded as `kv_format` is."""

    def one() -> DynamicCache:
        return compat.stock_cache(config) if kv_format is None else RoundingCache(config, kv_format)

    return EncoderDecoderCache(one(), one()) if config.is_encoder_decoder else one()


@torch.no_grad()
def measure(
    model: Any, tokens: torch.Tensor, formats: Sequence[KVFormat], chunk_tokens: int = 512
) -> dict[str, Quality]:
    """Quality on `tokens [n]` by name of the format, "auto" among them, in passes of `chunk_tokens`.

    Every token attends to what a format leaves of those before it, and of itself.
    """
    names = ["auto", *(each.name for each in formats)]
    kl, surprise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for chunk, logits in _answers(model, tokens, (None, *formats), chunk_tokens):
        expected = logits[0].float().log_softmax(dim=-1)
        for name, each in zip(names, logits, strict=True):
            actual = each.float().log_softmax(dim=-1)
            kl[name] += float((expected.exp() * (expected - actual)).sum(dim=-1).double().sum())
            following = tokens[chunk.start + 1 : chunk.stop + 1].unsqueeze(1)
            surprise[name] -= float(actual[: len(following)].gather(1, following).double().sum())
    count = len(tokens)
    perplexity = {name: float(torch.tensor(surprise[name] / max(1, count - 1)).exp()) for name in names}
    return {name: Quality(kl[name] / count, perplexity[name]) for name in names}


def _answers(
    model: Any, tokens: torch.Tensor, formats: Sequence[KVFormat | None], chunk_tokens: int
) -> Iterator[tuple[range, list[torch.Tensor]]]:
    """Pass by pass, the logits `[tokens, vocabulary]` on each format's cache."""
    caches = [rounding_cache(model.config, each) for each in formats]
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    for start in range(0, len(tokens), chunk_tokens):
        chunk = range(start, min(start + chunk_tokens, len(tokens)))
        given = {name: tokens[chunk.start : chunk.stop].unsqueeze(0)}
        if model.config.is_encoder_decoder:
            given["input_ids"] = tokens[:chunk_tokens].unsqueeze(0)
        yield chunk, [model(**{**given, CACHE_NAME: cache}, use_cache=True).logits[0] for cache in caches]


def check_quality(model: Any, kv_format: KVFormat) -> Quality:
    """Quality of the format on a short prompt, of text where the model's tokenizer is at hand.

    Raises `ValueError` past `MAX_MEAN_KL`, naming a format that would pass; `NotMeasurableError` where the model takes
    no such prompt.
    """
    tokens = prompt_of(model)
    try:
        found = measure(model, tokens, (kv_format,))[kv_format.name]
    except (TypeError, ValueError, RuntimeError) as error:
        raise NotMeasurableError(f"the model does not take a prompt of token ids: {in_one_line(error)}") from error
    if found.mean_kl <= MAX_MEAN_KL:  # NaN is not
        return found
    others = [each for each in formats_for(model) if each is not kv_format]
    passing = [
        f"{name!r} (mean KL {quality.mean_kl:.2g})"
        for name, quality in measure(model, tokens, others).items()
        if name != "auto" and quality.mean_kl <= MAX_MEAN_KL
    ]
    raise ValueError(
        f"kv_cache_dtype={kv_format.name!r}: the answers of this model move away from those of full precision by a "
        f"mean KL of {found.mean_kl:.2g} on {len(tokens)} tokens, at most {MAX_MEAN_KL} is allowed; use "
        f"{' or '.join([*passing, repr('auto')])}, or verify=False to leave this check out"
    )


def prompt_of(model: Any) -> torch.Tensor:
    """Token ids `[n]`: a piece of text, or ids spread over the vocabulary where no tokenizer is at hand."""
    vocabulary = compat.vocabulary_size(model.config)
    listed = compat.local_tokens(model, _PROMPT) or [
        (5 + 11 * i + 7 * i * i) % vocabulary for i in range(_PROMPT_TOKENS)
    ]
    return torch.tensor(listed, device=compat.compute_device(model))
