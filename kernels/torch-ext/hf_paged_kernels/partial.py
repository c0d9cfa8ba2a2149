"""Attention over a part of the KV, and the merge of such parts by log-sum-exp.

A softmax over the union of disjoint parts is the average of the parts' results weighted by the exponentials of
their log-sum-exps (FlashAttention, https://arxiv.org/abs/2205.14135; Flash-Decoding; Hydragen).
"""

import torch

# torch's own CPU flash attention; unlike `scaled_dot_product_attention` it returns the log-sum-exp.
_FLASH_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Queries per step of the plain path, which holds `[..., queries, kv]` scores in float32.
_PLAIN_QUERIES = 256


def attend_partial(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool = False,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `query [batch, heads, q, key_dim]` over `key`, `value [batch, heads, kv, dim]`, any strides.

    Args:
        scale: factor on the scores.
        causal: query `i` sees tokens up to `i` (`q == kv`).
        softcap: scores become `softcap * tanh(scores / softcap)`.
        mask: `[q, kv]`, True where a query sees a token; every query sees at least one.

    Returns:
        The result `[batch, heads, q, value_dim]` in the query's dtype and its log-sum-exp `[batch, heads, q]` in
        float32.
    """
    if (
        softcap is None
        and query.device.type == "cpu"
        and query.dtype in _FLASH_DTYPES
        and key.shape[-1] == value.shape[-1]
    ):
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        return _FLASH_CPU(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    parts = [
        _attend_plain(part, key, value, scale, softcap, None if mask is None else mask[i : i + part.shape[2]])
        for i, part in zip(
            range(0, query.shape[2], _PLAIN_QUERIES), query.split(_PLAIN_QUERIES, dim=2), strict=True
        )
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def _attend_plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.exp(scores - lse.unsqueeze(-1)) @ value.float()
    return out.to(query.dtype), lse


def merge_partial(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two parts: results `[..., dim]` in float32 and log-sum-exps `[...]`."""
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    return torch.lerp(out, other, weight), torch.logaddexp(lse, other_lse)
