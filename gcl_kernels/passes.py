"""The two passes over a batch, whatever its road: embed, statistics, others; weights, products,
others, gradients.

Of many processes (``distributed``) each treats its own embeddings so, and then, as rows, meets some
of the others' as columns: together 4 M^2 D for the M embeddings of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gcl_kernels.dispatch import BACKENDS
from gcl_kernels.distributed import (
    Exchange,
    Meeting,
    PerSample,
    agree,
    empty_agreement,
    lines_for_others,
    lines_that_meet,
)
from gcl_kernels.extra import Rectangle
from gcl_kernels.problem import (
    Embedded,
    Problem,
    SampleData,
    finite_scale,
    split_data,
    subtractable,
)
from gcl_kernels.roads.base import Road, add_share, multiply_
from gcl_kernels.roads.fused import Fused
from gcl_kernels.roads.views import Views
from gcl_kernels.spec import NegativesSpec

Data = Sequence[Tensor | None]
"""A :class:`SampleData` and an :class:`Extra`, as an operator has them: see ``split_data``."""


def make_road(
    spec: NegativesSpec, needs_grad: Sequence[bool], embedded: Embedded, data: SampleData
) -> Road:
    """The road of a call."""
    road = Views if spec.mixed is None else Fused
    return road(spec, needs_grad, embedded, data)


def forward(
    bases: Sequence[Tensor],
    mixing: Tensor | None,
    scale: Tensor,
    data: Data,
    spec: NegativesSpec,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    """``neg_lse`` [V, N], ``own_logits`` [V, V, N], and what :func:`backward` takes as ``saved``
    but for ``neg_lse``: an :class:`Embedded`, kept tiles, and the processes' agreement."""
    scale = finite_scale(scale, spec.max_scale)
    embedded, own_logits = BACKENDS[spec.backend].embed(bases, mixing, scale, spec)
    of_samples, extra = split_data(data)
    road = make_road(spec, needs_grad, embedded, of_samples)
    problem, plan = road.problem(scale), road.plan(stats=True)
    kept, agreement, others = road.empty_kept(scale), empty_agreement(scale), None
    if spec.group:
        agreement = agree(spec, problem, road.data, needs_grad)
        others = Exchange(spec.group, spec.exchange, agreement, road.shard())
    neg_lse = road.backend.statistics(problem, plan, kept)
    if neg_lse is None:
        neg_lse, _ = road.statistics(problem, plan, kept)
    neg_lse = neg_lse.view(*own_logits.shape[1:])  # a torch.Size is parsed more slowly
    if others is not None:
        neg_lse = _with_others(road, others, problem, neg_lse)
    if spec.extra_anchors:
        neg_lse = torch.logaddexp(neg_lse, Rectangle(road, extra, scale).lse())
    return neg_lse, own_logits, *embedded, kept, agreement


def _with_others(road: Road, others: Exchange, problem: Problem, neg_lse: Tensor) -> Tensor:
    """``neg_lse`` with all other processes' samples among the candidates."""

    def meet(meeting: Meeting, given: list[Tensor]) -> list[PerSample]:
        nonlocal neg_lse
        rectangle, plan = road.rectangle(problem, meeting, given, stats=True)
        of_rows, of_cols = road.statistics(rectangle, plan, None)
        neg_lse = torch.logaddexp(neg_lse, of_rows.view(neg_lse.shape))
        return [PerSample(of_cols.view(len(neg_lse), -1), 1)]

    for (returned,) in others.meet(meet):
        neg_lse = torch.logaddexp(neg_lse, returned)
    return neg_lse


def backward(
    bases: Sequence[Tensor],
    scale: Tensor,
    data: Data,
    saved: Sequence[Tensor],
    grad_neg_lse: Tensor,
    grad_own_logits: Tensor,
    spec: NegativesSpec,
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the bases, of ``mixing`` and of the scale, as :meth:`Backend.gradients`, and of
    extra negatives where there are any.

    Args:
        saved: what :func:`forward` gave, and ``neg_lse``.
    """
    *of_bases, kept, agreement, neg_lse = saved
    embedded, grad = Embedded(*of_bases), grad_neg_lse.contiguous()
    of_samples, extra = split_data(data)
    road = make_road(spec, needs_grad, embedded, of_samples)
    problem, lines, others = road.problem(scale), grad, None
    if spec.group:
        lines = lines_for_others(neg_lse, grad, agreement)
        shard = [PerSample(lines, 2), *road.shard()]
        others = Exchange(spec.group, spec.exchange, agreement, shard)
    (sums, inner), share = _gradient(road, problem, kept, neg_lse, grad)
    sums = sums.view(*embedded.z.shape)
    if others is not None:
        part = _add_gradient_of_others(road, others, problem, lines, sums, inner)
        share = add_share(share, part)
    of_extra: list[Tensor] = []
    if spec.extra_anchors:
        rectangle = Rectangle(road, extra, scale)
        grad_extra, part = rectangle.gradient(neg_lse, grad, sums, inner)
        of_extra, share = [grad_extra], add_share(share, part)
    grads = road.backend.gradients(
        bases, scale, embedded, sums, inner, grad_own_logits, spec, needs_grad
    )
    if share is not None:
        grads[-1] += share
    return grads + of_extra


def _gradient(
    road: Road, problem: Problem, kept: Tensor, neg_lse: Tensor, grad: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """``sums`` and ``inner`` of the square problem, and a share of the scale's gradient."""
    plan = road.plan()
    whole = road.backend.matrix_gradient(problem, plan, kept, neg_lse, grad, road.needs_grad)
    if whole is not None:
        return whole, None
    unit = road.weight_unit(problem, grad)
    once = road.once(plan)
    total = road.new_sums(problem.z_rows, once)
    lines = road.lines(subtractable(neg_lse), grad if unit is None else grad / unit, *total)
    share = road.gradient(problem, plan, kept, (lines, lines), once)
    multiply_(unit, *total, share)
    return total, share


def _add_gradient_of_others(
    road: Road, others: Exchange, problem: Problem, lines: Tensor, sums: Tensor, inner: Tensor
) -> Tensor | None:
    """Add to ``sums`` [B, N, D] and ``inner`` what the other processes' samples contribute.

    Args:
        lines: from :func:`lines_for_others`.
    """
    share = None
    needed = [b for b, needs in enumerate(road.needs_bases) if needs]
    total = sums.view(problem.z_rows.shape), inner

    def meet(meeting: Meeting, given: list[Tensor]) -> list[PerSample]:
        nonlocal share
        lines_other, *shard = given
        rectangle, plan = road.rectangle(problem, meeting, shard)
        lse, grad = lines_that_meet(lines, lines_other)
        of_rows, of_cols = total, road.new_sums(rectangle.z_cols)
        unit = road.weight_unit(rectangle, torch.cat(grad, 1))
        if unit is not None:
            grad = grad[0] / unit, grad[1] / unit
            of_rows = road.new_sums(rectangle.z_rows)
        sides = road.lines(lse[0], grad[0], *of_rows), road.lines(lse[1], grad[1], *of_cols)
        part = road.gradient(rectangle, plan, None, sides)
        if unit is not None:
            for to, of in zip(total, of_rows, strict=True):
                to.addcmul_(of, unit)
        multiply_(unit, *of_cols, part)
        share = add_share(share, part)
        of_bases = of_cols[0].view(shard[0].shape)
        back = [PerSample(of_bases[b], 0) for b in needed]
        return [PerSample(of_cols[1], 2), *back] if inner.numel() else back

    for returned in others.meet(meet):
        if inner.numel():
            inner.add_(returned.pop(0))
        for b in needed:
            sums[b] += returned.pop(0)
    return share
