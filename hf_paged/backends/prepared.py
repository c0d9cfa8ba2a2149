"""A decode step on the native kernel, prepared for all layers at once.

Between two layers a model's weights push everything else out of the processor's caches: what Python and torch do there
takes three times as long as it does many times in a row. So what layers have in common is done at the first one, for
all: the calls are checked and laid out, the tensors made. What is left to a layer is two calls of the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hf_paged.backends.base import AttentionCall
from hf_paged.backends.native import kernel_of_store, multiplies, parts_for
from hf_paged.core.plan import RowSpan, StepPlan
from hf_paged.lazy import PagedKV
from hf_paged.store import LayerStore, native_writes, span_view
from hf_paged_kernels import NativeKernel, place_at, place_from

if TYPE_CHECKING:
    from hf_paged.step import Step

# Under this name, K and V of a prepared layer say how they are attended to.
PREPARED = "_hf_paged_prepared"


class PreparedDecode:
    """The layers of one step, one token a row. Whatever does not look as the first layer did is left to others.

    Args:
        stores: of the layers; `None` where there is none yet.
        step: the pass.
    """

    def __init__(self, stores: Sequence[LayerStore | None], step: Step):
        self._stores, self._step = stores, step
        self._look: tuple[Any, ...] | None = None
        self._layers: list[_Layer | None] = []

    def update(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Store new K and V `[rows, kv_heads, 1, dim]` of a layer; returns those of all tokens.

        `None`, having done nothing, where the layer is not prepared.
        """
        look = (
            key.shape, key.stride(), key.dtype, key.device, key.requires_grad,
            value.shape, value.stride(), value.dtype, value.device, value.requires_grad,
        )  # fmt: skip
        if look != self._look:
            if self._look is not None:
                return None
            self._look = look
            self._prepare(key, value)
        layer, self._layers[index] = self._layers[index], None
        if layer is None:
            return None
        layer.write(layer.call, key, value)
        return layer.keys, layer.values

    def _prepare(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self._layers = [None] * len(self._stores)
        if key.requires_grad or value.requires_grad:
            return
        attention = _Attention(sum(store is not None for store in self._stores))
        for index, (store, plan) in enumerate(zip(self._stores, self._step.plans, strict=True)):
            if store is not None and key.shape[0] * key.shape[2] == plan.num_queries and store.accepts(key, value):
                self._layers[index] = self._layer(index, store, plan, key, value, attention)

    def _layer(
        self,
        index: int,
        store: LayerStore,
        plan: StepPlan,
        key: torch.Tensor,
        value: torch.Tensor,
        attention: _Attention,
    ) -> _Layer | None:
        kernel = kernel_of_store(store)
        call = None if kernel is None or plan.order is not None else store.native.call_for(key, value)
        if call is None:
            return None
        span = plan.span if self._step.reads_rows else None
        if span is not None:
            keys, values = span_view(store.keys, span), span_view(store.values, span)
            place = place_from(span.slot + span.tokens - 1, span.step or 1)
            at = keys.data_ptr(), values.data_ptr()
        else:
            keys = PagedKV(key, self._step, store, index, False)
            values = PagedKV(value, self._step, store, index, True)
            place = native_writes(plan).place
            at = store.keys.data_ptr(), store.values.data_ptr()
        seen = PreparedLayer(attention, kernel, plan, store, span, at)
        for each in (keys, values):
            setattr(each, PREPARED, seen)
        return _Layer(store.native.run, call + place, keys, values)


class _Layer(NamedTuple):
    """What `PreparedDecode.update` does in a layer, and what it returns."""

    write: Callable[[bytes, torch.Tensor, torch.Tensor], None]
    call: bytes
    keys: torch.Tensor
    values: torch.Tensor


class PreparedLayer:
    """How queries attend to K and V of one layer.

    Args:
        attention: what the layers have in common.
        kernel: reads K and V.
        plan: what each query sees.
        store: the layer's memory.
        span: where the rows lie, if they are read as tensors; else `None`.
        at: addresses of what is read of K and of V: the span, or all of the memory.
    """

    __slots__ = ("_at", "_attention", "_kernel", "_place", "_plan", "_span", "_store")

    def __init__(
        self,
        attention: _Attention,
        kernel: NativeKernel,
        plan: StepPlan,
        store: LayerStore,
        span: RowSpan | None,
        at: tuple[int, int],
    ):
        self._attention, self._kernel, self._plan, self._store = attention, kernel, plan, store
        self._span, self._at = span, at  # and not the tensors, which refer to this object
        self._place = place_at(*at)

    def attend(self, query: torch.Tensor, call: AttentionCall) -> torch.Tensor | None:
        """Attention of `query [rows, heads, 1, dim]`; `[rows, 1, heads, value_dim]`, contiguous.

        `None` where others are to see to it: the query looks otherwise than in the first layer, is too wide, or comes
        in another dtype, as autocast leaves it in some models.
        """
        attention = self._attention
        if query.dtype != self._store.dtype or not attention.takes(query, call, self._store.value_dim):
            return None
        key = (self._store.group, self._store.keys.shape[1], call.window)
        if key not in attention.calls:
            attention.calls[key] = self._lay_out(query, call)
        laid_out = attention.calls[key]
        if laid_out is None:
            return None
        out = attention.next_out(query, self._store.value_dim)
        if call.sinks is None:
            self._kernel.run_whole(laid_out + self._place, query, out)
        else:
            self._kernel.run(laid_out, query, *self._at, out, call.sinks)
        return out

    def _lay_out(self, query: torch.Tensor, call: AttentionCall) -> bytes | None:
        keys, values, span = self._store.keys, self._store.values, self._span
        if span is not None:
            if call.window is not None and span.tokens > call.window:
                return None
            rows = span_view(keys, span), span_view(values, span)
            return self._kernel.rows_call(query, *rows, call.scale, call.softcap)
        group = query.shape[1] // keys.shape[0]
        parts = parts_for(self._plan, call.window, group, multiplies(self._store, call))
        if parts is None:
            return None
        flat = query.squeeze(2)
        return self._kernel.parts_call(flat, keys, values, parts, call.scale, call.softcap, self._store.records)


class _Attention:
    """What the layers of a step have in common.

    Attributes:
        calls: laid out, by what layers may differ in.
    """

    __slots__ = ("_look", "_num_layers", "_outs", "calls")

    def __init__(self, num_layers: int):
        self._num_layers = num_layers
        self._look: tuple[Any, ...] | None = None
        self._outs: list[torch.Tensor] = []
        self.calls: dict[tuple[Any, ...], bytes | None] = {}

    def takes(self, query: torch.Tensor, call: AttentionCall, value_dim: int) -> bool:
        """Whether a query looks as that of the first layer did."""
        look = query.shape, query.stride(), query.dtype, query.device, call.scale, call.softcap, value_dim
        if self._look is None:
            self._look = look
        return look == self._look

    def next_out(self, query: torch.Tensor, value_dim: int) -> torch.Tensor:
        """An empty tensor for the result of a layer, `[rows, 1, heads, value_dim]`; no two layers get the same one."""
        if not self._outs:
            rows, heads, _, _ = query.shape
            self._outs += torch.empty(
                (self._num_layers, rows, 1, heads, value_dim), dtype=query.dtype, device="cpu"
            ).unbind()
        return self._outs.pop()
