"""Models whose prompts are never packed: encoder-decoders, and such as keep a state. Decode steps may read blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import PreTrainedModel

from hf_paged.cache import PagedCache
from hf_paged.capabilities import Capabilities
from hf_paged.config import PagedConfig
from hf_paged.forward import ModelCall, fast_path_obstacle, run_decode, run_padded
from hf_paged.noted import fast_or_padded, note_unkept
from hf_paged.probe import circumstances
from hf_paged.resume import StockShaped
from hf_paged.stats import Counters
from hf_paged.trial import MIN_TRIAL_TOKENS, try_decode


class Stepwise:
    """Runs the passes of one such model; whether its decode steps may be fast is tried once, on one of a real call.

    Args:
        config: settings of the model.
        capabilities: told of what was found out.
        stock_shaped: runs its prompts.
        counters: told of passes that are padded.
    """

    def __init__(self, config: PagedConfig, capabilities: Capabilities, stock_shaped: StockShaped, counters: Counters):
        self._config = config
        self._capabilities = capabilities
        self._stock_shaped = stock_shaped
        self._counters = counters
        self._trials: dict[tuple[Any, ...], str | None] = {}  # why decode steps of such a model must not be fast

    def run(
        self, model: PreTrainedModel, request: ModelCall, cache: PagedCache, lengths: list[int], prompt_obstacle: str
    ) -> tuple[Any, int, int]:
        """The outputs, and the numbers of tokens that were computed and that earlier calls had computed.

        Args:
            model: the patched one.
            request: its call.
            cache: that of the call.
            lengths: tokens that each row holds.
            prompt_obstacle: why prompts are not packed.
        """
        circumstances = self._circumstances(model, cache)
        known = self._capabilities.unpacked(model, circumstances, prompt_obstacle)
        cache.keeps_rows |= known.whole_batches
        note_unkept(self._capabilities, self._counters, model, request, cache, known)
        if cache.dense_len == 0 and request.tokens == 1 and cache.chunk_tokens is None:
            return run_padded(request, cache), request.real_tokens, 0  # models may take another way where nothing is
        obstacle = prompt_obstacle if request.tokens > 1 else fast_path_obstacle(request, cache)
        backend = known.backend(self._config.attention_backend, request.inputs.device)
        if obstacle is None:
            key = (*circumstances, cache.columns is None)
            if key not in self._trials and cache.dense_len >= MIN_TRIAL_TOKENS:
                outputs, self._trials[key] = try_decode(model, request, cache, backend)
                return outputs, request.real_tokens, 0
            obstacle = self._trials.get(key, "decode steps before the first trial")
        cache.reads_blocks = False

        def fast() -> tuple[Any, int, int]:
            outputs = run_decode(request, cache, backend)
            cache.reads_blocks = True
            return outputs, request.rows, 0

        padded = partial(self._stock_shaped.run, model, request, cache, known)
        return fast_or_padded(fast, padded, self._counters, cache, lengths, obstacle)

    def obstacle(self, model: PreTrainedModel, cache: PagedCache) -> str | None:
        """Why decode steps on `cache` will not be fast, as far as that is known."""
        return self._trials.get((*self._circumstances(model, cache), cache.columns is None))

    def _circumstances(self, model: PreTrainedModel, cache: PagedCache) -> tuple[Any, ...]:
        """Found out once a loop of `generate`."""
        if cache.circumstances is None or not cache.generating:
            cache.circumstances = circumstances(model, self._config)
        return cache.circumstances
