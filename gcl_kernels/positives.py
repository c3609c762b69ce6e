"""Positives beside the anchor's own sample, and the limits that positives set to negatives.

All of it is O(V^2 N D), on unit vectors outside the tiles.

Samples of one id as positives (``same_id="positive"``): with ``P_b(j)`` the embeddings of view
``b`` whose id is that of sample ``j``, the anchor itself left out, and weights ``u``,

    L = sum_aj omega_aj [ log den(a,j) - mean of x(a,j; b,k) over all P_b(j), weighted by u_ab ]

``u_ab = w_ab`` for another view; for the anchor's own, where it is a candidate, the mean of those
that are positive. With equal weights and classes of one size this is the supervised contrastive
loss (Khosla et al. 2020, L_out), of two views that meet across UniCL's (Yang et al. 2022). Sums
over an id are sums of embeddings: ``sum_k <z_a^j, z_b^k> = <z_a^j, sum_k z_b^k>``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcl_kernels.backends.reference import unit_vectors
from gcl_kernels.roads.fused import formed
from gcl_kernels.spec import ABSENT, LossSpec, NegativesSpec
from gcl_kernels.terms import Batch, make_table, reduce_samples


def unit_views(bases: Sequence[Tensor], mixing: Tensor | None, spec: NegativesSpec) -> Tensor:
    """What the logits are made of, unrounded: [V, N, D] in the accumulation dtype."""
    views = bases if mixing is None else formed(bases, mixing, spec)
    return unit_vectors(torch.stack([view.to(spec.accum_dtype) for view in views]), spec)


@torch.no_grad()
def margin_limits(z: Tensor, scale: Tensor, present: Tensor | None, terms: LossSpec) -> Tensor:
    """``false_negative_margin``: the largest logit of a negative of each anchor [V, N].

    ``s * margin`` above its largest positive, as Qwen3-Embedding masks false negatives (Zhang et
    al. 2025); an anchor without a positive has no limit.
    """
    limits = []
    for a, row in enumerate(terms.pair_weights):
        largest = scale.new_full(z.shape[1:2], -torch.inf)
        for b, weight in enumerate(row):
            if weight == 0:
                continue
            positive = (z[a] * z[b]).sum(-1) * scale
            if present is not None:
                positive = positive.masked_fill(~present[b], -torch.inf)
            largest = torch.maximum(largest, positive)
        limits.append(largest)
    found = torch.stack(limits)
    margin = terms.false_negative_margin or 0.0
    return torch.where(found == -torch.inf, torch.inf, found + scale * margin)


class Classes(NamedTuple):
    """Samples by id, without reading it on the host.

    Attributes:
        order: samples sorted by id [N].
        rank: of each sample's id among all [N].
        lengths: samples of each rank [N], zero beyond the last.
    """

    order: Tensor
    rank: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, ids: Tensor) -> Classes:
        by_id, order = torch.sort(ids, stable=True)
        changes = torch.zeros_like(ids)
        changes[1:] = (by_id[1:] != by_id[:-1]).to(ids.dtype)
        ranks = changes.cumsum(0)
        rank = torch.empty_like(ranks).scatter_(0, order, ranks)
        lengths = torch.zeros_like(ranks).scatter_add_(0, ranks, torch.ones_like(ranks))
        return cls(order, rank, lengths)


class _ClassSum(torch.autograd.Function):
    """(of [N, D], *classes) -> for each sample the sum over its id; the same is its own adjoint.

    In one order whatever the device and the threads, which ``index_add`` is not.
    """

    @staticmethod
    def forward(of: Tensor, order: Tensor, rank: Tensor, lengths: Tensor) -> Tensor:
        sums = torch.segment_reduce(of[order], "sum", lengths=lengths, axis=0, unsafe=True)
        return sums[rank]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ClassSum.apply(grad, *ctx.saved_tensors), None, None, None


def _class_sums(of_views: Tensor, classes: Classes) -> Tensor:
    """Of [V, N, D]."""
    return torch.stack([_ClassSum.apply(of, *classes) for of in of_views])


def same_id_loss(batch: Batch, z: Tensor, ids: Tensor, scale: Tensor, spec: LossSpec) -> Tensor:
    """The loss with samples of one id as positives; ``batch`` has all others as negatives.

    Args:
        z: of :func:`unit_views`.
        ids: int64 [N].
    """
    neg_lse, own_logits, present = batch.neg_lse, batch.own_logits, batch.present
    views, device = range(spec.num_views), z.device
    there = torch.ones_like(neg_lse, dtype=torch.bool) if present is None else present
    # A sum of which one part is absent is not zero.
    z = z.masked_fill(~there.unsqueeze(-1), 0)
    competes = [[spec.candidates[a][b] and (a, b) in _asked(spec) for b in views] for a in views]
    out = ~make_table(competes, torch.bool, device).unsqueeze(-1) | ~there.unsqueeze(0)
    own = own_logits.masked_fill(out, ABSENT)
    log_den = torch.cat([neg_lse.masked_fill(~there, 0).unsqueeze(1), own], 1).logsumexp(1)

    weights = [list(row) for row in spec.pair_weights]
    for a in views:
        used = [weight for weight in spec.pair_weights[a] if weight > 0]
        weights[a][a] = sum(used) / len(used) if used and spec.candidates[a][a] else 0.0
    u = make_table(weights, z.dtype, device)
    own_view = u.diagonal().unsqueeze(-1)
    w = make_table(spec.pair_weights, z.dtype, device)

    classes = Classes.of(ids)
    members = _class_sums(there.to(z.dtype).unsqueeze(-1), classes).squeeze(-1)
    number = u @ members - own_view * there
    total = torch.tensordot(u, _class_sums(z, classes), 1)
    positive = scale * ((z * total).sum(-1) - own_view * (z * z).sum(-1))
    omega = w @ (members > 0).to(z.dtype)
    omega = torch.where((omega == 0) & (number > 0), own_view, omega) * there
    # An anchor without a positive is none; neither it nor its gradient is divided by zero.
    omega = omega.masked_fill(number <= 0, 0)
    mean = positive / number.masked_fill(number <= 0, 1)
    losses = (log_den - mean).masked_fill(omega == 0, 0) * omega
    return reduce_samples(losses, (0,), batch, spec, None if present is None else omega.sum())


def _asked(spec: LossSpec) -> set[tuple[int, int]]:
    """The ordered pairs of views whose own-sample logits were asked for; of one with itself if it
    is kept."""
    return {pair for a, b in spec.own_pairs for pair in ((a, b), (b, a))}
