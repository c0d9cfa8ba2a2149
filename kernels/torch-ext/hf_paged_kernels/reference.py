"""The yardstick of every other backend: gather, mask, softmax, in float32 and plain torch, on any device."""

from collections.abc import Iterable

import torch

from .formats import KVRecords


def paged_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    segments: Iterable[tuple[int, torch.Tensor]],
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    records: KVRecords | None = None,
) -> torch.Tensor:
    """Causal attention of ragged queries over paged KV.

    Args:
        query: `[tokens, heads, key_dim]`, the segments' queries one after the other.
        keys, values: `[kv_heads, slots, key_dim]` and `[kv_heads, slots, value_dim]`.
        segments: per segment the number of its queries and the slots `[kv_tokens]` of all tokens up to its last
            query, in order.
        scale: factor on the scores.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        window: a query sees itself and the `window - 1` tokens before it.
        sinks: `[heads]` logits that take part in the softmax and carry no value.
        records: what `keys` and `values` hold, where they hold records.

    Returns:
        `[tokens, heads, value_dim]` in the query's dtype.
    """
    outputs, start = [], 0
    group = query.shape[1] // keys.shape[0]
    for length, slots in segments:
        # [kv_heads, group, q, dim] x [kv_heads, 1, dim, kv]
        q = query[start : start + length].float().unflatten(1, (keys.shape[0], group)).permute(1, 2, 0, 3)
        k, v = keys.index_select(1, slots), values.index_select(1, slots)
        if records is not None:
            q, k, v = records.meet(q), records.decode_met_keys(k), records.decode_values(v, torch.float32)
        k, v = k.float().unsqueeze(1), v.float().unsqueeze(1)
        scores = q @ k.transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        kv_len = slots.shape[0]
        query_at = torch.arange(kv_len - length, kv_len, device=query.device).unsqueeze(1)
        key_at = torch.arange(kv_len, device=query.device)
        visible = key_at <= query_at
        if window is not None:
            visible &= key_at > query_at - window
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            sink = sinks.float().view(keys.shape[0], group, 1, 1).expand(*scores.shape[:-1], 1)
            weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = scores.softmax(dim=-1)
        outputs.append((weights @ v).permute(2, 0, 1, 3).flatten(1, 2))
        start += length
    return torch.cat(outputs).to(query.dtype)
