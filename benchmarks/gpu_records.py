"""Quantized KV in the Triton kernels on a GPU: right against plain torch, and beside bfloat16 in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.gpu_kernels import (
    TOLERANCE,
    Clock,
    Layers,
    Sizes,
    attend_error,
    layer_bytes,
    outcome,
    store_error,
)
from hf_paged_kernels import FORMATS
from hf_paged_kernels.store import store_tokens
from hf_paged_kernels.tuning import PAGE_TOKENS


def check(device: torch.device, sizes: Sizes) -> Iterator[dict[str, object]]:
    """Every format, each with a dtype and shape of its turn: compiling them all would take minutes."""
    for name, kv_format in FORMATS.items():
        for i, dtype in enumerate(TOLERANCE):
            shape = sizes.shapes[i % len(sizes.shapes)]
            for kernel, error_of in ((f"attend {name}", attend_error), (f"store {name}", store_error)):
                yield outcome(
                    kernel, dtype, shape, lambda *a, e=error_of, f=kv_format: e(*a, kv_format=f), sizes, device
                )


def decode(device: torch.device, sizes: Sizes, bandwidth: float) -> Iterator[dict[str, object]]:
    """Attention of a decode step on random pages, and the launch that stores its tokens, in each format."""
    clock, context = Clock(device, sizes.seconds), sizes.records_context
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1e9
    for batch in sizes.batches:
        if layer_bytes(sizes, batch, context) > free * sizes.share_of_memory / 4:  # numbers in float32 beside it
            continue
        plain = None
        for name in ("bfloat16", *FORMATS):
            layers = Layers(sizes, batch, context, device, FORMATS.get(name))
            attend, store = partial(layers.attend, layers.work(is_random=True)), partial(_store, layers, *_new(layers))
            seconds, store_seconds = (_layer_seconds(clock, layers, call) for call in (attend, store))
            plain = plain or seconds
            yield {
                "batch": batch,
                "context": context,
                "kv": name,
                "microseconds": seconds * 1e6,
                "times_bfloat16": plain / seconds,
                "share_of_copy_bandwidth": layers.bytes / seconds / bandwidth,
                "store_microseconds": store_seconds * 1e6,
            }


def _layer_seconds(clock: Clock, layers: Layers, call: Callable[[], object]) -> float:
    """Of one layer, without the time that Python takes where a graph can be recorded."""
    return (clock.replay(call) or clock.run(call)) / len(layers.memories)


def _new(layers: Layers) -> tuple[torch.Tensor, torch.Tensor]:
    """K or V of one token a row, ``[batch, kv_heads, 1, dim]``, and where they go."""
    slots = PAGE_TOKENS + torch.arange(layers.batch, dtype=torch.int32, device=layers.device)
    return layers.query[:, : layers.sizes.kv_heads].unsqueeze(2), slots


def _store(layers: Layers, new: torch.Tensor, slots: torch.Tensor) -> None:
    """One call a layer."""
    for keys, values in layers.memories:
        store_tokens(new, new, keys, values, slots, layers.records)
