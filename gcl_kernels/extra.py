"""Candidates beyond the batch: a rectangle of all views' embeddings against extra ones.

    neg_lse(a,j) <- logaddexp(neg_lse(a,j), log sum_k exp s <z_a^j, y_k>)        y_k = e_k / |e_k|

A queue, mined or hard negatives. The rectangle serves its rows' anchors alone: ``2 M K D``
operations forward, as many again for its logits and for either side's gradient in the backward
pass. By score fusion the views are formed here, in the compute dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gcl_kernels.blocks import Block, plan_extra
from gcl_kernels.problem import (
    Extra,
    Lines,
    Problem,
    Workspace,
    empty_stats,
    known_scale,
    subtractable,
)
from gcl_kernels.roads.base import Road, multiply_
from gcl_kernels.spec import NegativesSpec


class Rectangle:
    """The embeddings of a road against extra ones.

    Args:
        extra: with embeddings.
        scale: 0-d, in the accumulation dtype.
    """

    def __init__(self, road: Road, extra: Extra, scale: Tensor) -> None:
        spec, embeddings = road.spec, extra.embeddings
        assert embeddings is not None
        self.road, self.embeddings = road, embeddings
        self._spec = NegativesSpec(
            ((False,),), (), None, spec.normalize, spec.compute_dtype, spec.max_scale, spec.backend
        )
        self._embedded, _ = road.backend.embed([embeddings], None, scale, self._spec)
        ids, views = extra.ids, len(spec.candidates)
        if ids is not None:
            of_samples = road.data.sample_ids if extra.anchor_ids is None else extra.anchor_ids
            assert of_samples is not None
            ids_rows: Tensor | None = of_samples.repeat(views)
        else:
            ids_rows = None
        z_rows, z_cols = road.all_views(), self._embedded.z[0]
        max_scale = known_scale(scale, spec.max_scale)
        self.problem = Problem(z_rows, z_cols, ids_rows, ids, scale, max_scale, spec.normalize)
        for name, neutral in (("log_weights", 0.0), ("limits", torch.inf)):
            of_rows = getattr(road.data, name)
            if of_rows is not None:
                setattr(self.problem, f"{name}_rows", of_rows.flatten())
                setattr(self.problem, f"{name}_cols", scale.new_full((len(z_cols),), neutral))

    def _plan(self, stats: bool, per_view: bool = False) -> tuple[Block, ...]:
        z_rows, z_cols, spec = self.problem.z_rows, self.problem.z_cols, self.road.spec
        num_samples = len(z_rows) // len(spec.candidates)
        backend = self.road.backend
        block_rows = (backend.stats_block_rows if stats else backend.block_rows)(z_rows)
        return plan_extra(num_samples, spec.extra_anchors, len(z_cols), block_rows, per_view)

    def lse(self) -> Tensor:
        """Of every anchor's logits against the extra ones, [V, N]."""
        problem, plan = self.problem, self._plan(stats=True)
        rows, cols = (empty_stats(problem, z) for z in (problem.z_rows, problem.z_cols))
        workspace = Workspace(problem.z_rows.device, plan)
        for block in plan:
            self.road.backend.block_stats(problem, block, rows, cols, workspace)
        return rows.sum.log_().add_(rows.max).view(len(self.road.spec.candidates), -1)

    def gradient(
        self, neg_lse: Tensor, grad: Tensor, sums: Tensor, inner: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Add to ``sums`` [B, N, D] and ``inner`` what the extra ones contribute.

        Args:
            neg_lse, grad: of all candidates, and its gradient, [V, N].

        Returns:
            The extra ones' gradient, empty where none is needed; and the share of ``dL/ds`` that
            the rows' half of ``<z, H z>`` leaves out.
        """
        road, problem = self.road, self.problem
        backend, spec, scale = road.backend, road.spec, problem.scale
        # Of views, whatever the road makes of them: weights meet no coefficients here.
        unit = Road.weight_unit(road, problem, grad)
        weighed = grad.flatten() if unit is None else grad.flatten() / unit
        of_rows, of_cols = (
            torch.zeros_like(z, dtype=scale.dtype) for z in (problem.z_rows, problem.z_cols)
        )
        nothing, num_extra = scale.new_empty(0), len(problem.z_cols)
        rows = Lines(subtractable(neg_lse).flatten(), weighed, of_rows, nothing)
        none = scale.new_full((num_extra,), torch.inf), scale.new_zeros(num_extra)
        cols = Lines(*none, of_cols, nothing)
        needs_views = road.needs_views
        plan = self._plan(False, per_view=not all(needs_views))
        workspace = Workspace(problem.z_rows.device, plan)
        num_samples = neg_lse.shape[1]
        for block in plan:
            needs_rows = needs_views[block.row_start // num_samples] or road.needs_scale
            if not (needs_rows or spec.extra_grad):
                continue
            weights = backend.block_weights(problem, block, rows, cols, workspace)
            if needs_rows:
                backend.add_product(of_rows[block.rows], weights, problem.z_cols[block.cols])
            if spec.extra_grad:
                z_rows = problem.z_rows[block.rows]
                backend.add_product(of_cols[block.cols], weights.t(), z_rows)
        multiply_(unit, of_rows, of_cols)
        share = None
        if road.needs_scale:
            along = (of_rows * problem.z_rows).view(len(needs_views), -1).sum(1)
            share = sum(
                along[v] * (0.5 if reads else 1.0) for v, reads in enumerate(road.reads_views)
            )
        road.add_views(of_rows.view(len(needs_views), num_samples, -1), sums, inner)
        if not spec.extra_grad:
            return nothing, share
        own = scale.new_zeros(1, 1, num_extra)
        of_extra, *_ = backend.gradients(
            [self.embeddings], scale, self._embedded, of_cols.unsqueeze(0), nothing, own,
            self._spec, [True, False, False],
        )  # fmt: skip
        return of_extra, share
