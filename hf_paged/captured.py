"""One captured decode step: a forward pass of the model over buffers, and how they are filled."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils import ModelOutput

from hf_paged.attention import paged_mask
from hf_paged.backends import AttentionBackend
from hf_paged.backends.fixed import FixedStep, UncapturableError
from hf_paged.cache import PagedCache
from hf_paged.compat import CACHE_NAME
from hf_paged.core.plan import StepPlan
from hf_paged.forward import ModelCall
from hf_paged.graphs import GraphDriver


class CapturedStep:
    """A graph of one decode step, for any step of the same signature.

    Making one computes the step: K and V are in their slots then, as a replay would have put them there.

    Args:
        driver: captures; only used in its `turn`.
        request: the call.
        tensors, constants: its arguments, as `inputs_of` gives them.
        cache: of the call. The graph keeps nothing of it but where its pool's K and V lie.
        backend: reads the blocks.
        step: the numbers of the step.
        rows: of the pass; at least as many as the step has queries.

    Raises:
        UncapturableError: for a model that cannot be captured, or whose captured pass would be wrong.
    """

    def __init__(
        self,
        driver: GraphDriver,
        request: ModelCall,
        tensors: dict[str, torch.Tensor],
        constants: dict[str, Any],
        cache: PagedCache,
        backend: AttentionBackend,
        step: FixedStep,
        rows: int,
    ):
        self._driver, self._pool = driver, weakref.ref(cache.pool)
        self._sent: FixedStep | None = None  # whose numbers are in the buffer, ahead of its inputs
        with torch.inference_mode(False):  # tensors made there could not be filled elsewhere
            self._numbers = step.buffer()
            self._inputs = {
                name: torch.zeros((*value.shape[:-2], rows, 1), dtype=value.dtype, device=value.device)
                for name, value in tensors.items()
            }
        self._active = step.active(self._numbers)
        self._fill(step, tensors)
        self._capture(request, constants, cache, backend, step, rows)

    def belongs_to(self, cache: PagedCache) -> bool:
        """Whether it reads the K and V that the cache's rows are in."""
        return self._pool() is cache.pool

    def replay(self, tensors: dict[str, torch.Tensor], step: FixedStep) -> None:
        """Compute a step."""
        self._fill(step, tensors)
        self._run()

    def send(self, step: FixedStep) -> None:
        """Have the numbers of the next step behind the last one, which may still be computed."""
        self._driver.send(step.numbers(), self._numbers)
        self._sent = step

    def outputs(self, request: ModelCall, queries: int) -> ModelOutput:
        """Those of the last step, over the first `queries` rows of the pass; logits of the call's other rows are zero.

        They belong to the caller.
        """
        logits = self._logits[:queries]
        if queries < request.rows:
            everyone = logits.new_zeros(request.rows, *logits.shape[1:])
            logits = everyone.index_copy_(0, self._active[:queries].long(), logits)
        else:
            logits = logits.clone()  # the next step writes where these are
        return self._kind(logits=logits, **{CACHE_NAME: request.kwargs[CACHE_NAME]})

    def _fill(self, step: FixedStep, tensors: dict[str, torch.Tensor]) -> None:
        if self._sent is not step:
            self.send(step)
        self._sent = None
        for name, value in tensors.items():
            if value.shape[-2] == 1:
                self._inputs[name].copy_(value.expand_as(self._inputs[name]))
            else:
                torch.index_select(value, -2, self._active, out=self._inputs[name])

    def _capture(
        self,
        request: ModelCall,
        constants: dict[str, Any],
        cache: PagedCache,
        backend: AttentionBackend,
        step: FixedStep,
        rows: int,
    ) -> None:
        plans = step.fixed_plans(self._numbers)
        stand_in = PagedCache(cache.model_config, pool=cache.pool, settings=cache.settings, layout=cache.layout)
        mask = paged_mask(request.inputs.device)
        kwargs = {**constants, **self._inputs, request.names.mask: mask, CACHE_NAME: stand_in}

        def forward_at(length: int) -> ModelOutput:
            _begin(stand_in, plans, length, backend)
            return request.call(**kwargs)

        expected = self._driver.warm_up(lambda: forward_at(cache.dense_len)).logits
        # Captured at a length that is not the sequences': who computes with it, in Python, comes out different.
        outputs, self._run = self._driver.capture(lambda: forward_at(cache.dense_len - 1))
        if not isinstance(outputs, ModelOutput) or outputs.get(CACHE_NAME) is not stand_in:
            raise UncapturableError("outputs of another kind")
        others = outputs.keys() - {"logits", CACHE_NAME}
        if others:
            raise UncapturableError(f"outputs {', '.join(sorted(others))}")
        self._kind, self._logits = type(outputs), outputs.logits
        self._run()
        if not torch.equal(expected, self._logits):
            raise UncapturableError("the model computes with the length of the cache")


def _begin(cache: PagedCache, plans: Sequence[StepPlan], length: int, backend: AttentionBackend) -> None:
    """Have an empty cache say that it holds `length` columns and begin a pass over the next one."""
    cache.dense_len = length
    for layer in cache.paged_layers:
        layer.seen = layer.kept = 0
        layer.move_to(length)
    cache.begin(plans, length + 1, 1, None, None, backend)
