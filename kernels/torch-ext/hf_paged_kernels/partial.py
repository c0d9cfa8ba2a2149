"""Attention over a part of the KV, and the merge of such parts by log-sum-exp.

A softmax over the union of disjoint parts is the average of the parts' results weighted by the exponentials of
their log-sum-exps (FlashAttention, https://arxiv.org/abs/2205.14135; Flash-Decoding; Hydragen).
"""

import torch

# torch's own CPU flash attention; unlike `scaled_dot_product_attention` it returns the log-sum-exp. It takes fewer KV
# heads than query heads as they are.
_FLASH_CPU = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FLASH_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The query heads of a KV head go into one matrix, so that K and V are read once for all of them, unless the matrix
# gets this large. One query in float32 over few tokens is quicker unpacked (2 cores of Zen 4: 100 tokens 14 us against
# 20 us, 8 rows of 2,000 tokens 2.4 ms against 2.1 ms); in bfloat16 packing is worth a factor of 4.
_MAX_PACKED_ROWS = 256
_FLOAT32_PACKED_TOKENS = 512
# From so many queries on K and V of different dims are filled up with zeros for the flash kernel, which wants them
# equal: 2,000 tokens of 16 heads with dims of 192 and 128 take 168 instead of 504 ms (2 cores of Zen 4). For fewer the
# copies cost more than they save.
_FILLED_QUERIES = 16
# Queries per step of the plain path, which holds `[..., queries, kv]` scores in float32.
_PLAIN_QUERIES = 256


def flash_takes(dtype: torch.dtype, key_dim: int, value_dim: int, softcap: float | None = None) -> bool:
    """Whether torch's flash attention on the CPU does it."""
    return _FLASH_CPU is not None and dtype in _FLASH_DTYPES and key_dim == value_dim and softcap is None


def attend_partial(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool = False,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `query [batch, heads, q, key_dim]` over `key`, `value [batch, kv_heads, kv, dim]`, any strides.

    Args:
        scale: factor on the scores.
        causal: query `i` sees tokens up to `i` (`q == kv`).
        softcap: scores become `softcap * tanh(scores / softcap)`.
        mask: `[q, kv]`, True where a query sees a token; every query sees at least one.

    Returns:
        The result `[batch, heads, q, value_dim]` in the query's dtype and its log-sum-exp `[batch, heads, q]` in
        float32.
    """
    batch, heads, queries, dim = query.shape
    value_dim = value.shape[-1]
    if not causal and mask is None:
        query = _pack(query, key)
    wide, pays = max(dim, value_dim), dim == value_dim or query.shape[2] >= _FILLED_QUERIES
    if query.device.type == "cpu" and pays and flash_takes(query.dtype, wide, wide, softcap):
        query, key, value = (_filled(each, wide) for each in (query, key, value))
        bias = None
        if mask is not None:
            bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        out, lse = _FLASH_CPU.default(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
        out = out[..., :value_dim]
    else:
        out, lse = _attend_plain(query, key, value, scale, causal, softcap, mask)
    if query.shape[1] != heads:
        return out.reshape(batch, heads, queries, -1), lse.reshape(batch, heads, queries)
    return out, lse


def _filled(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """`[..., dim]`, with zeros in the channels that are not there."""
    missing = dim - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def attend_all(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """As `attend_partial` where nothing is masked and nobody asks for the log-sum-exp: a microsecond or two less."""
    packed = _pack(query, key)
    is_grouped = packed.shape[1] != key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(packed, key, value, scale=scale, enable_gqa=is_grouped)
    return out if packed is query else out.reshape(*query.shape[:3], -1)


def _pack(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """`[batch, heads, q, dim]` to `[batch, kv_heads, q * group, dim]` where that pays, else unchanged."""
    batch, heads, queries, dim = query.shape
    packed_rows = queries * heads // key.shape[1]
    pays = queries > 1 or query.dtype != torch.float32 or key.shape[2] >= _FLOAT32_PACKED_TOKENS
    if pays and queries < packed_rows <= _MAX_PACKED_ROWS:
        return query.reshape(batch, key.shape[1], packed_rows, dim)
    return query


def _attend_plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool,
    softcap: float | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for what the flash kernel does not do: softcaps, V of another dim than K, other devices."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    outs, lses = [], []
    for start in range(0, query.shape[2], _PLAIN_QUERIES):
        rows = slice(start, start + _PLAIN_QUERIES)
        scores = query[:, :, rows].float() @ key.float().transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask[rows], -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        outs.append((torch.exp(scores - lse.unsqueeze(-1)) @ value.float()).to(query.dtype))
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def merge_partial(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two parts: results `[..., dim]` in float32 and log-sum-exps `[...]`."""
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    return torch.lerp(out, other, weight), torch.logaddexp(lse, other_lse)
