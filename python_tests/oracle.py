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
    same_id: str = "ignore",
    present: Tensor | None = None,
    extra_negatives: Tensor | None = None,
    extra_ids: Tensor | None = None,
    extra_anchors: Sequence[bool] | None = None,
    candidate_weights: Tensor | None = None,
    false_negative_margin: float | None = None,
    self_similarity: str = "mask",
    other_positives: str = "compete",
    reduction: str = "mean",
    normalize: bool = True,
) -> Tensor:
    num_views, n = len(views), views[0].shape[0]
    device = views[0].device
    there = torch.ones(num_views, n, dtype=torch.bool, device=device)
    if present is not None:
        there = present.clone()
    e = torch.stack(
        [torch.where(of[:, None], view, 0) for of, view in zip(there, views, strict=True)]
    )
    z = (unit(e) if normalize else e).flatten(0, 1)
    x = scale * (z @ z.T)
    if pair_weights is None:
        pair_weights = [[float(a != b) for b in range(num_views)] for a in range(num_views)]
    total = sum(map(sum, pair_weights))
    if candidates is None:
        candidates = [[True] * num_views] * num_views
    ids = torch.arange(n, device=device) if sample_ids is None else sample_ids
    sample, same = torch.arange(n, device=device), ids[:, None] == ids[None, :]
    own = sample[:, None] == sample[None, :]
    log_weights = torch.zeros_like(there, dtype=x.dtype)
    if candidate_weights is not None:
        log_weights = candidate_weights.to(x.dtype).log()

    def log_den(a: int, rows: Tensor, limit: Tensor, chosen: set[int]) -> Tensor:
        """Of view ``a``'s anchors, with those own-sample embeddings of ``chosen`` that compete."""
        columns = []
        for m in range(num_views):
            negative = ~own & ~(rows[:, m] > limit[:, None])
            if same_id == "ignore":
                negative &= ~same
            terms = rows[:, m] + torch.where(own, 0, log_weights[m])
            allowed = (negative | (own & (m in chosen))) & there[m] & bool(candidates[a][m])
            columns.append(terms.masked_fill(~allowed, -torch.inf))
        if extra_negatives is not None and (extra_anchors is None or extra_anchors[a]):
            y = extra_negatives.to(x.dtype)
            y = unit(y) if normalize else y
            terms = scale * z.view(num_views, n, -1)[a] @ y.T
            out = terms > limit[:, None]
            if extra_ids is not None:
                out = out | (ids[:, None] == extra_ids[None, :])
            columns.append(terms.masked_fill(out, -torch.inf))
        return torch.cat(columns, 1).logsumexp(1)

    losses, pairs, count = [], [], 0.0
    for a in range(num_views):
        rows = x.view(num_views, n, num_views, n)[a]  # [N, V, N]
        positives = [rows[sample, b, sample] for b in range(num_views)]
        weighted = [b for b in range(num_views) if pair_weights[a][b] > 0]
        limit = x.new_full((n,), torch.inf)
        if false_negative_margin is not None and weighted:
            of = [positives[b].detach().masked_fill(~there[b], -torch.inf) for b in weighted]
            limit = torch.stack(of).amax(0) + scale.detach() * false_negative_margin

        kept = {a} if self_similarity == "keep" else set()
        everyone = set(range(num_views)) - {a} | kept
        if same_id == "positive":
            # The mean over all positives, those of the own view as an average other view's.
            weight = [pair_weights[a][b] / total for b in range(num_views)]
            used = [w for w in weight if w > 0]
            own_weight = sum(used) / len(used) if used and candidates[a][a] else 0.0
            number, summed, omega = x.new_zeros(n), x.new_zeros(n), x.new_zeros(n)
            for b in range(num_views):
                of = same & there[b]
                if b == a:
                    of = of & ~own
                share = own_weight if b == a else weight[b]
                number = number + share * of.sum(1)
                summed = summed + share * torch.where(of, rows[:, b], 0).sum(1)
                omega = omega + (0.0 if b == a else share) * of.any(1)
            omega = torch.where((omega == 0) & (number > 0), own_weight, omega)
            omega = omega * there[a] * (number > 0)
            mean = summed / torch.where(number > 0, number, 1)
            loss = torch.where(omega > 0, log_den(a, rows, limit, everyone) - mean, 0)
            losses.append(omega * loss)
            count = count + omega.sum()
            continue
        for b in range(num_views):
            if pair_weights[a][b] == 0:
                pairs.append(x.new_zeros(n))
                continue
            chosen = everyone if other_positives == "compete" else {b} | kept
            exists = there[a] & there[b]
            loss = torch.where(exists, log_den(a, rows, limit, chosen) - positives[b], 0)
            pairs.append(loss)
            losses.append(pair_weights[a][b] / total * loss)
            count = count + pair_weights[a][b] / total * exists.to(x.dtype).sum()
    of_samples = torch.stack(losses).sum(0)
    if reduction == "pairs":
        return torch.stack(pairs).sum(1).view(num_views, num_views) / count
    none = of_samples * (n / count)
    return {"mean": none.mean(), "sum": of_samples.sum(), "none": none}[reduction]


def dense_gcl(
    e: Sequence[Tensor], scale: Tensor, weights: Sequence[float | Tensor] = (1.0, 1.0), **options
) -> Tensor:
    """``gcl_loss`` of three views, or of two and their weighted sum."""
    if len(e) == 2:
        present = options.get("present")
        if present is not None:
            e = [torch.where(of[:, None], view, 0) for of, view in zip(present, e, strict=True)]
            options["present"] = torch.cat([present, present.all(0, keepdim=True)])
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
