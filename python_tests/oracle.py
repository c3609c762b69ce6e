"""The loss written from its definition, independently of the package: one masked log-softmax per
pair of views over a dense matrix, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unit(e: Tensor) -> Tensor:
    return e / e.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def dense_loss(
    views: Sequence[Tensor],
    scale: Tensor,
    *,
    pair_weights: Sequence[Sequence[float]] | None = None,
    candidates: Sequence[Sequence[bool]] | None = None,
    sample_ids: Tensor | None = None,
    self_similarity: str = "mask",
    other_positives: str = "compete",
    reduction: str = "mean",
    normalize: bool = True,
) -> Tensor:
    num_views, num_samples = len(views), views[0].shape[0]
    device = views[0].device
    z = torch.cat([unit(e) if normalize else e for e in views])
    x = scale * (z @ z.T)
    if pair_weights is None:
        pair_weights = [[float(a != b) for b in range(num_views)] for a in range(num_views)]
    total = sum(map(sum, pair_weights))
    if candidates is None:
        candidates = [[True] * num_views] * num_views
    ids = torch.arange(num_samples, device=device) if sample_ids is None else sample_ids
    sample = torch.arange(num_samples, device=device)
    losses = torch.zeros(num_samples, dtype=x.dtype, device=device)
    for a in range(num_views):
        for b in range(num_views):
            if pair_weights[a][b] == 0:
                continue
            denominator = []
            for m in range(num_views):
                allowed = ids[:, None] != ids[None, :]
                own = sample[:, None] == sample[None, :]
                if m == a:
                    in_own = self_similarity == "keep"
                else:
                    in_own = m == b or other_positives == "compete"
                allowed = (allowed & ~own) | (own & in_own)
                denominator.append(allowed & bool(candidates[a][m]))
            mask = torch.cat(denominator, 1)
            rows = x[a * num_samples : (a + 1) * num_samples]
            positive = rows[sample, b * num_samples + sample]
            log_den = rows.masked_fill(~mask, -torch.inf).logsumexp(1)
            losses = losses + pair_weights[a][b] / total * (log_den - positive)
    return {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[reduction]


def dense_gcl(
    e: Sequence[Tensor], scale: Tensor, weights: Sequence[float | Tensor] = (1.0, 1.0), **options
) -> Tensor:
    """``gcl_loss`` of three views, or of two and their weighted sum."""
    if len(e) == 2:
        e = [*e, weights[0] * e[0] + weights[1] * e[1]]
    return dense_loss(e, scale, **options)


def dense_neg_lse(
    views: Sequence[Tensor],
    scale: Tensor,
    candidates: Sequence[Sequence[bool]],
    sample_ids: Tensor | None = None,
) -> Tensor:
    num_samples = views[0].shape[0]
    ids = torch.arange(num_samples, device=views[0].device) if sample_ids is None else sample_ids
    z = [unit(e) for e in views]
    rows = []
    for a, row in enumerate(candidates):
        blocks = [
            (scale * z[a] @ z[m].T).masked_fill((ids[:, None] == ids[None, :]), -torch.inf)
            for m, used in enumerate(row)
            if used
        ]
        rows.append(torch.cat(blocks, 1).logsumexp(1))
    return torch.stack(rows)
