"""Score fusion: views that are linear combinations of two embeddings, 4/9 of the work for GCL.

CLIP-SF and TinyCLIP fuse by adding, ``e_v = mixing[v,0] e_0 + mixing[v,1] e_1``. With unit vectors
``z_b = e_b / |e_b|`` of the two bases,

    z_v^j = e_v^j / |e_v^j| = sum_b k_vb^j z_b^j           k_vb = mixing[v,b] |e_b| / |e_v|

so that the products ``y_bc = <z_b^j, z_c^k>`` of the bases carry all V x V pairs of views:

    x_vw = s <z_v^j, z_w^k> = s sum_bc k_vb^j k_wc^k y_bc

Backward, with ``H`` as in ``views`` for each pair of views, the block functions return

    F_bc = sum_vw k_vb^j k_wc^k H_vw          R_b = sum_c F_bc z_c = sum_v k_vb (H z)_v
    U_vb = <(H z)_v, z_b>                     (row sums of H times logits; never formed from H z)

and everything else is O(N D): see ``backends.base``. 16 N^2 D floating-point operations for GCL's
three views where three separate ones take 36 N^2 D. A fused vector shorter than 1e-12 is a zero
vector: its logits are 0, and nothing flows through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from gcl_kernels.blocks import Block
from gcl_kernels.problem import (
    FusedProblem,
    Problem,
    RowStats,
    Workspace,
    known_scale,
)
from gcl_kernels.roads.base import Road, Sides
from gcl_kernels.spec import NORM_EPS, BoolTable, NegativesSpec, recordable


class Fused(Road):
    """Blocks are over samples, and a block's four products serve all pairs of views."""

    tiles = (2, 2)

    def _geometry(self) -> tuple[int, BoolTable, bool]:
        return self.embedded.z.shape[1], ((True,),), False

    def _block_rows(self, stats: bool) -> int:
        backend = self.backend
        block_rows = backend.fused_stats_block_rows if stats else backend.fused_block_rows
        return block_rows(self.embedded.z, len(self.spec.candidates))

    def problem(self, scale: Tensor) -> Problem:
        z, k, spec = self.embedded.z, self.embedded.coefficients, self.spec
        ids = self.data.sample_ids
        given = (z, z, ids, ids, scale, known_scale(scale, spec.max_scale), spec.normalize)
        problem = FusedProblem(*given, k, k, spec.bases, spec.candidates)
        self._add_lines(problem, self.data, "rows", "cols")
        return problem

    def against(self, problem: Problem, given: Sequence[Tensor]) -> Problem:
        z, coefficients, *of_samples = given
        data = self.data.like(of_samples)
        cols = {"z_cols": z, "coefficients_cols": coefficients, "ids_cols": data.sample_ids}
        rectangle = replace(cast(FusedProblem, problem), **cols)
        self._add_lines(rectangle, data, "cols")
        return rectangle

    def _lines(self, of_views: Tensor | None) -> Tensor | None:
        return None if of_views is None else of_views.contiguous()

    def new_sums(self, z: Tensor, once: bool = False) -> tuple[Tensor, Tensor]:
        sums = torch.zeros_like(z, dtype=self.spec.accum_dtype)
        return sums, sums.new_zeros(len(self.spec.candidates), 2, z.shape[1])

    @property
    def needs_views(self) -> Sequence[bool]:
        *needs, _ = self.needs_grad
        return [any(needs)] * len(self.spec.candidates)

    @property
    def reads_views(self) -> Sequence[bool]:
        return [True] * len(self.spec.candidates)

    def all_views(self) -> Tensor:
        z, k = self.embedded.z, self.embedded.coefficients.unsqueeze(-1)
        views = [
            z[base] if base is not None else (z[0] * k[v, 0] + z[1] * k[v, 1]).to(z.dtype)
            for v, base in enumerate(self.spec.bases)
        ]
        return torch.cat(views)

    def add_views(self, part: Tensor, sums: Tensor, inner: Tensor) -> None:
        z, k = self.embedded.z, self.embedded.coefficients
        for v, of_view in enumerate(part):
            for b in range(2):
                sums[b].addcmul_(of_view, k[v, b].unsqueeze(-1))
                inner[v, b] += (of_view * z[b]).sum(-1)

    def add_stats(
        self, problem: Problem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
    ) -> None:
        fused = cast(FusedProblem, problem)
        self.backend.fused_block_stats(fused, block, rows, cols, workspace)

    def add_block(
        self, problem: Problem, block: Block, sides: Sides, workspace: Workspace, once: bool
    ) -> Tensor | None:
        rows, cols = sides
        fused = cast(FusedProblem, problem)
        f = self.backend.fused_block_weights(fused, block, rows, cols, workspace)
        if self.backend.joins_bases:
            self._add_joined(problem, block, f, sides, workspace)
            return None
        for b in range(2):
            if not self.needs_bases[b]:
                continue
            for c in range(2):
                z_cols = problem.z_cols[c, block.cols]
                self.backend.add_product(rows.sums[b, block.rows], f[b, c], z_cols)
                if not block.diagonal:
                    z_rows = problem.z_rows[c, block.rows]
                    self.backend.add_product(cols.sums[b, block.cols], f[c, b].t(), z_rows)
        return None

    def _add_joined(
        self, problem: Problem, block: Block, f: Tensor, sides: Sides, workspace: Workspace
    ) -> None:
        """The same of ``F`` as one matrix [2 P, 2 Q], a batch of two products a side."""
        rows, cols = sides
        (num_rows, num_cols), pitch = block.shape, f.stride(2)
        needed = slice(0 if self.needs_bases[0] else 1, 2 if self.needs_bases[1] else 1)
        count = needed.stop - needed.start
        if count < 1:
            return

        def add(sums: Tensor, weights: Tensor, z: Tensor, of: slice, padded: int) -> None:
            by = workspace.both_bases(z, of, padded).expand(count, -1, -1)
            self.backend.add_product(sums, weights[needed], by)

        width = pitch // 2
        by_rows = f.as_strided((2, num_rows, pitch), (num_rows * pitch, pitch, 1))
        add(rows.sums[needed, block.rows], by_rows, problem.z_cols, block.cols, width)
        if not block.diagonal:
            by_cols = f.as_strided((2, num_cols, 2 * num_rows), (width, 1, pitch))
            add(cols.sums[needed, block.cols], by_cols, problem.z_rows, block.rows, num_rows)

    def weight_unit(self, problem: Problem, grad: Tensor) -> Tensor | None:
        unit = super().weight_unit(problem, grad)
        if unit is None:
            return None
        # F sums V^2 weights times coefficients, which are large where bases nearly cancel.
        fused = cast(FusedProblem, problem)
        sides = fused.coefficients_rows, fused.coefficients_cols
        rows, cols = (k.abs().sum(0).amax() for k in sides)
        return unit * (rows * cols).clamp_min(1)


def formed(bases: Sequence[Tensor], mixing: Tensor, spec: NegativesSpec) -> list[Tensor]:
    """The views of score fusion one by one, for a backend without its block functions: sums in the
    accumulation dtype, and a zero vector where one is normalised and too short."""
    # The bases too: autograd then rounds the gradients of both their roads once, added.
    e_0, e_1 = (recordable(base.to(spec.accum_dtype)) for base in bases)
    views = []
    for weights, base in zip(mixing, spec.bases, strict=True):
        view = weights[0] * e_0 + weights[1] * e_1 if base is None else (e_0, e_1)[base]
        if base is None and spec.normalize:
            too_short = torch.linalg.vector_norm(view.detach(), dim=-1, keepdim=True) <= NORM_EPS
            view = view.masked_fill(too_short, 0)
        views.append(view)
    return views
