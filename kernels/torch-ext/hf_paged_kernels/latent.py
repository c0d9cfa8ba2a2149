"""Attention whose queries meet latents (multi-head latent attention, DeepSeek-V2, https://arxiv.org/abs/2405.04434).

All heads read the same: one latent a token, which is both the larger part of K and all of V, and a rotated part of K.
"""

import torch

from .partial import attend_partial

# Scores in float32 that are held at a time.
_MAX_SCORES = 2**24


def attend_latents(
    query: torch.Tensor,
    latents: torch.Tensor,
    rotated: torch.Tensor,
    scale: float,
    causal: bool = False,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend_partial`, over K `[latents, rotated]` and V `latents`, any strides.

    Args:
        query: `[batch, heads, q, latent_dim + rotated_dim]`.
        latents: `[batch, 1, kv, latent_dim]`.
        rotated: `[batch, 1, kv, rotated_dim]`.
        scale, causal, softcap, mask: as there.

    Returns:
        Sums of latents `[batch, heads, q, latent_dim]` in the query's dtype, and log-sum-exps in float32.
    """
    if query.dtype.itemsize < 4:  # sums of products in lower precision are rounded, but for those within attention
        both = torch.cat((latents, rotated), dim=-1)
        out, lse = attend_partial(query, both, both, scale, causal, softcap, mask)
        return out[..., : latents.shape[-1]], lse
    batch, heads, queries, _ = query.shape
    tokens, latent_dim = latents.shape[2:]
    if causal:
        mask = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).tril()
    at_once = max(1, _MAX_SCORES // max(1, batch * heads * tokens))
    latents, rotated = latents.squeeze(1), rotated.squeeze(1)
    outs, lses = [], []
    for start in range(0, queries, at_once):
        part = query[:, :, start : start + at_once]
        rows = part.reshape(batch, -1, query.shape[-1])
        scores = torch.bmm(rows[..., :latent_dim], latents.transpose(1, 2))
        scores.baddbmm_(rows[..., latent_dim:], rotated.transpose(1, 2)).mul_(scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            hidden = ~mask[start : start + at_once]
            scores.view(batch, heads, *hidden.shape).masked_fill_(hidden, -torch.inf)
        lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        outs.append(torch.bmm(scores.sub_(lse).exp_(), latents).view(batch, heads, -1, latent_dim))
        lses.append(lse.view(batch, heads, -1).float())
    if len(outs) == 1:
        return outs[0], lses[0]
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
