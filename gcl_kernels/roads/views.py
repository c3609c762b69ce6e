"""The general road: every view is its own base.

    x(a,j; m,k) = s <z_a^j, z_m^k>
    neg_lse(a,j) = log sum over m with candidates[a][m], k with id_k != id_j of exp x(a,j; m,k)

Backward, with ``g = dL/d neg_lse`` and rows numbered ``p, q`` over all ``M = V * N`` embeddings:

    H_pq  = g_p exp(x_pq - neg_lse_p) + g_q exp(x_pq - neg_lse_q)     (each where it is a negative)
    dL/dz = s H z                   dL/ds = 1/2 sum_p <z_p, (H z)_p>

Both passes visit each unordered pair of blocks once: 4 M^2 D floating-point operations where dense
autograd takes 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gcl_kernels.blocks import Block
from gcl_kernels.problem import Lines, Problem, RowStats, SampleData, Workspace, known_scale
from gcl_kernels.roads.base import Plan, Road, Sides
from gcl_kernels.spec import BoolTable


class Views(Road):
    """Rows are all embeddings [M, D], view after view."""

    tiles = ()

    def _geometry(self) -> tuple[int, BoolTable, bool]:
        # Cut by views where some are frozen: their blocks are left out of the backward pass.
        per_view = any(self.needs_bases) and not all(self.needs_bases)
        return self.embedded.z.shape[1], self.spec.candidates, per_view

    def _block_rows(self, stats: bool) -> int:
        block_rows = self.backend.stats_block_rows if stats else self.backend.block_rows
        return block_rows(self.embedded.z)

    def _of_rows(self, z: Tensor, data: SampleData) -> tuple[Tensor, Tensor | None]:
        """Rows and their ids."""
        ids = data.sample_ids
        return z.flatten(0, 1), None if ids is None else ids.repeat(len(z))

    def problem(self, scale: Tensor) -> Problem:
        z, ids = self._of_rows(self.embedded.z, self.data)
        max_scale = known_scale(scale, self.spec.max_scale)
        problem = Problem(z, z, ids, ids, scale, max_scale, self.spec.normalize)
        self._add_lines(problem, self.data, "rows", "cols")
        return problem

    def against(self, problem: Problem, given: Sequence[Tensor]) -> Problem:
        z, *of_samples = given
        data = self.data.like(of_samples)
        z, ids = self._of_rows(z, data)
        rectangle = replace(problem, z_cols=z, ids_cols=ids)
        self._add_lines(rectangle, data, "cols")
        return rectangle

    def _lines(self, of_views: Tensor | None) -> Tensor | None:
        return None if of_views is None else of_views.flatten()

    def new_sums(self, z: Tensor, once: bool = False) -> tuple[Tensor, Tensor]:
        start = torch.empty_like if once else torch.zeros_like
        sums = start(z, dtype=self.spec.accum_dtype)
        return sums, sums.new_empty(0)

    def lines(self, lse: Tensor, grad: Tensor, sums: Tensor, inner: Tensor) -> Lines:
        return Lines(lse.flatten(), grad.flatten(), sums, inner)

    def all_views(self) -> Tensor:
        return self.embedded.z.flatten(0, 1)

    def add_views(self, part: Tensor, sums: Tensor, inner: Tensor) -> None:
        sums.add_(part)

    def once(self, plan: Plan) -> bool:
        num_rows = len(self.needs_bases) * self.geometry[0]
        return all(self.needs_bases) and len(plan) == 1 and plan[0].covers(num_rows)

    def add_stats(
        self, problem: Problem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
    ) -> None:
        self.backend.block_stats(problem, block, rows, cols, workspace)

    def _needs(self, start: int, lines: Lines) -> bool:
        num_views = len(self.needs_bases)
        return self.needs_bases[start * num_views // len(lines.lse)]

    def add_block(
        self, problem: Problem, block: Block, sides: Sides, workspace: Workspace, once: bool
    ) -> Tensor | None:
        rows, cols = sides
        needs_rows = needs_cols = True
        if not all(self.needs_bases):  # of one view each
            needs_rows = self._needs(block.row_start, rows)
            needs_cols = self._needs(block.col_start, cols)
        if not (needs_rows or needs_cols or self.needs_scale):
            return None
        weights = self.backend.block_weights(problem, block, rows, cols, workspace)
        z_a, z_b = problem.z_rows[block.rows], problem.z_cols[block.cols]
        to_rows, to_cols = rows.sums[block.rows], cols.sums[block.cols]
        if self.needs_scale and not (needs_rows and needs_cols):
            # A frozen side: <z_A, H_AB z_B> is not found again in that side's rows of H z.
            if needs_cols:
                to, left, right, along = to_cols, weights.t(), z_a, z_b
            else:
                to, left, right, along = to_rows, weights, z_b, z_a
            part = torch.empty_like(to)
            self.backend.write_product(part, left, right)
            one_sided = needs_rows or needs_cols or block.diagonal
            if needs_rows or needs_cols:
                to += part
            return (part * along).sum().mul_(0.5 if one_sided else 1.0)
        contribute = self.backend.write_product if once else self.backend.add_product
        if needs_rows:
            contribute(to_rows, weights, z_b)
        if needs_cols and not block.diagonal:
            contribute(to_cols, weights.t(), z_a)
        return None
