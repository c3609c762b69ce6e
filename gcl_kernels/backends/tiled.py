"""The block functions in PyTorch calls, for every device that PyTorch has.

With ``x = s * z_A z_B^T`` for one block, equal samples masked to -inf:

    block_stats     m_p <- max(m_p, max_q x_pq),   l_p <- sum over all q so far of exp(x_pq - m_p)
                    for the rows, and the same over p for the columns
    block_weights   H_pq = g_p exp(x_pq - lse_p) + g_q exp(x_pq - lse_q)

each side with its candidates' log weights added to x, and -inf above its anchors' limits.
Natural logarithms; ``x``, statistics and ``H`` in the accumulation dtype (float32, float64 for
float64). ``H`` is rounded to the compute dtype last.

Where ``2 s |z||z'|`` is proved small enough (unit vectors, and a scale whose value the host knows),
``s`` itself replaces every maximum: one exponential then serves rows and columns in both passes,
and neither underflow nor overflow can occur.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gcl_kernels.backends.base import Backend
from gcl_kernels.blocks import Block
from gcl_kernels.problem import FusedProblem, Lines, Problem, RowStats, Workspace, bounded

BLOCK_ROWS = {"cpu": 384, "default": 4096}
"""Largest rows of a block. 384: the block's 0.6 MB stay in a core's L2 cache (1 MiB here), and the
products already run at full rate, measured; 4096: fills a large GPU, workspace below 256 MiB."""

FUSED_BLOCK_ROWS = {"cpu": 192, "default": 1536}
"""Largest samples of a block's side in score fusion, which holds some twenty tiles: its workspace
stays at 3 MB on a CPU and below 256 MiB elsewhere."""


class Tiled(Backend):
    """The backend ``tiled``."""

    keeps_tiles = True
    halves_diagonal = True

    def block_rows(self, z: Tensor) -> int:
        return BLOCK_ROWS.get(z.device.type, BLOCK_ROWS["default"])

    def fused_block_rows(self, z: Tensor, num_views: int) -> int:
        return FUSED_BLOCK_ROWS.get(z.device.type, FUSED_BLOCK_ROWS["default"])

    def _compute_tile(self, problem: Problem, block: Block, workspace: Workspace) -> Tensor:
        """exp(x - s), zero where masked, of a bounded problem; else x, -inf where masked."""
        tile = workspace.kept(block)
        if tile is None:
            tile = workspace.tile(0, block.shape, problem.accum_dtype)
        self.write_product(tile, problem.z_rows[block.rows], problem.z_cols[block.cols].t())
        return _finish_(tile.mul_(problem.scale), problem, block, workspace)

    def block_stats(
        self, problem: Problem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
    ) -> None:
        tile = self._compute_tile(problem, block, workspace)
        scratch = None
        if not bounded(problem):
            scratch = workspace.tile(1, block.shape, problem.accum_dtype)
        for_rows, for_cols = _terms(problem, tile, block.rows, block.cols, workspace)
        if block.serves_rows:
            _update(rows.max[block.rows], rows.sum[block.rows], for_rows(), 1, scratch)
        if block.serves_cols and not block.diagonal:
            _update(cols.max[block.cols], cols.sum[block.cols], for_cols(), 0, scratch)

    def block_weights(
        self, problem: Problem, block: Block, rows: Lines, cols: Lines, workspace: Workspace
    ) -> Tensor:
        lse_p, grad_p = rows.lse[block.rows], rows.grad[block.rows]
        lse_q, grad_q = cols.lse[block.cols], cols.grad[block.cols]
        kept = workspace.kept(block)
        tile = self._compute_tile(problem, block, workspace) if kept is None else kept
        out = workspace.tile(1, block.shape, problem.accum_dtype)
        for_rows, for_cols = _terms(problem, tile, block.rows, block.cols, workspace)
        if bounded(problem):
            factor_p = (problem.scale - lse_p).exp_().mul_(grad_p).unsqueeze_(1)
            factor_q = (problem.scale - lse_q).exp_().mul_(grad_q).unsqueeze_(0)
            if block.serves_rows and block.serves_cols:
                torch.add(factor_p, factor_q, out=out).mul_(tile)
            else:
                torch.mul(tile, factor_p if block.serves_rows else factor_q, out=out)
        elif block.serves_rows and block.serves_cols:
            torch.sub(for_rows(), lse_p.unsqueeze(1), out=out).exp_().mul_(grad_p.unsqueeze(1))
            second = tile if kept is None else workspace.tile(2, block.shape, out.dtype)
            torch.sub(for_cols(), lse_q.unsqueeze(0), out=second).exp_()
            out.addcmul_(second, grad_q.unsqueeze(0))
        elif block.serves_rows:
            torch.sub(for_rows(), lse_p.unsqueeze(1), out=out).exp_().mul_(grad_p.unsqueeze(1))
        else:
            torch.sub(for_cols(), lse_q.unsqueeze(0), out=out).exp_().mul_(grad_q.unsqueeze(0))
        if problem.compute_dtype == problem.accum_dtype:
            return out
        return workspace.tile(3, block.shape, problem.compute_dtype).copy_(out)

    def fused_block_stats(
        self,
        problem: FusedProblem,
        block: Block,
        rows: RowStats,
        cols: RowStats,
        workspace: Workspace,
    ) -> None:
        y = self.fused_products(problem, block, workspace)
        mixed = workspace.tile(3, (2, *block.shape), problem.accum_dtype)
        scratch = None
        if not bounded(problem):
            scratch = workspace.tile(4, block.shape, problem.accum_dtype)
        views = range(len(problem.bases))
        for w in views:
            k = problem.coefficients_cols[w, :, None, block.cols]
            toward = _mix(y, k, problem.bases[w], mixed)
            for v in views:
                for_row = problem.candidates[v][w]
                for_col = problem.candidates[w][v] and not block.diagonal
                if not (for_row or for_col):
                    continue
                tile = _fused_logits(problem, block, v, toward, workspace)
                at_rows, at_cols = (v, block.rows), (w, block.cols)
                for_rows, for_cols = _terms(problem, tile, at_rows, at_cols, workspace)
                if for_row:
                    _update(rows.max[at_rows], rows.sum[at_rows], for_rows(), 1, scratch)
                if for_col:
                    _update(cols.max[at_cols], cols.sum[at_cols], for_cols(), 0, scratch)

    def fused_block_weights(
        self, problem: FusedProblem, block: Block, rows: Lines, cols: Lines, workspace: Workspace
    ) -> Tensor:
        y = workspace.kept(block)
        if y is None:
            y = self.fused_products(problem, block, workspace)
        dtype, shape = problem.accum_dtype, block.shape
        views = range(len(problem.bases))
        k_rows = problem.coefficients_rows[:, :, block.rows, None]
        k_cols = problem.coefficients_cols[:, :, None, block.cols]
        towards = workspace.tile(3, (len(views), 2, *shape), dtype)
        aways = workspace.tile(6, (2, *shape), dtype)
        g = workspace.tile(7, (2, *shape), dtype)
        f = workspace.tile(8, (2, 2, *shape), dtype)
        f.zero_()
        toward = [_mix(y, k_cols[w], problem.bases[w], towards[w]) for w in views]
        for v in views:
            away = _mix(y.transpose(0, 1), k_rows[v], problem.bases[v], aways)
            own_bases_v = _own_bases(problem.bases[v])
            g.zero_()
            for w in views:
                if not (problem.candidates[v][w] or problem.candidates[w][v]):
                    continue
                tile = _fused_logits(problem, block, v, toward[w], workspace)
                h = _fused_pair_weights(problem, block, (v, w), tile, (rows, cols), workspace)
                for b in own_bases_v:
                    rows.inner[v, b, block.rows] += torch.mul(h, toward[w][b], out=tile).sum(1)
                for c in _own_bases(problem.bases[w]):
                    if not block.diagonal:
                        cols.inner[w, c, block.cols] += torch.mul(h, away[c], out=tile).sum(0)
                    if problem.bases[w] is None:
                        g[c].addcmul_(h, k_cols[w, c])
                    else:
                        g[c].add_(h)
            for b in own_bases_v:
                if problem.bases[v] is None:
                    f[b].addcmul_(g, k_rows[v, b])
                else:
                    f[b].add_(g)
        if problem.compute_dtype == dtype:
            return f
        return workspace.tile(9, (2, 2, *shape), problem.compute_dtype).copy_(f)


def _finish_(x: Tensor, problem: Problem, block: Block, workspace: Workspace) -> Tensor:
    """Logits in place: exp(x - s), zero where masked, of a bounded problem; else -inf there."""
    value = -torch.inf
    if bounded(problem):
        x.sub_(problem.scale).exp_()
        value = 0.0
    # The mask rule: both embeddings carry one id.
    if problem.ids_rows is None or problem.ids_cols is None:
        for offset in block.same_sample_offsets:
            x.diagonal(offset).fill_(value)
        return x
    same = workspace.tile(2, block.shape, torch.bool)
    torch.eq(problem.ids_rows[block.rows, None], problem.ids_cols[None, block.cols], out=same)
    return x.masked_fill_(same, value)


def _terms(
    problem: Problem, x: Tensor, rows: Any, cols: Any, workspace: Workspace
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """What makes of :func:`_finish_`'s logits those of the rows' anchors and of the columns': with
    the candidates' log weights, and -inf above the anchors' limits. In one place; without either
    they are ``x`` itself.

    Args:
        rows, cols: where in the problem's lines, which are [V, N] of score fusion.
    """

    def make(log_weights: Tensor | None, limits: Tensor | None) -> Tensor:
        out = workspace.tile(10, x.shape, x.dtype)
        out.copy_(x) if log_weights is None else torch.add(x, log_weights, out=out)
        return out if limits is None else out.masked_fill_(x > limits, -torch.inf)

    if not problem.one_sided:
        return lambda: x, lambda: x
    weights = problem.log_weights_rows, problem.log_weights_cols
    limits = problem.limits_rows, problem.limits_cols
    (weight_p, weight_q), (limit_p, limit_q) = (
        (None if p is None else p[rows].unsqueeze(1), None if q is None else q[cols].unsqueeze(0))
        for p, q in (weights, limits)
    )
    return lambda: make(weight_q, limit_p), lambda: make(weight_p, limit_q)


def _update(
    running_max: Tensor, running_sum: Tensor, tile: Tensor, dim: int, scratch: Tensor | None
) -> None:
    """Fold what :func:`_finish_` left into the statistics; of a bounded problem (no ``scratch``)
    their sums alone."""
    if scratch is None:
        running_sum.add_(tile.sum(dim))
        return
    new_max = torch.maximum(running_max, tile.amax(dim))
    running_sum.mul_(running_max.sub_(new_max).exp_())
    torch.sub(tile, new_max.unsqueeze(dim), out=scratch)
    running_sum.add_(scratch.exp_().sum(dim))
    running_max.copy_(new_max)


def _mix(y: Tensor, coefficients: Tensor, base: int | None, out: Tensor) -> tuple[Tensor, Tensor]:
    """``<z_b, z_v>`` for both bases ``b``: ``y[b, base]`` where view ``v`` is a base, else the
    combination. ``coefficients``: two that broadcast over a tile; ``y``: [2 (b), 2, P, Q]."""
    if base is not None:
        return y[0, base], y[1, base]
    for b in range(2):
        torch.mul(y[b, 0], coefficients[0], out=out[b]).addcmul_(y[b, 1], coefficients[1])
    return out[0], out[1]


def _own_bases(base: int | None) -> tuple[int, ...]:
    """The bases with a coefficient that is not zero by construction."""
    return (0, 1) if base is None else (base,)


def _fused_logits(
    problem: FusedProblem,
    block: Block,
    v: int,
    toward: tuple[Tensor, Tensor],
    workspace: Workspace,
) -> Tensor:
    """What :func:`_finish_` makes of ``x_vw``, ``toward`` being <z_b, z_w>."""
    out = workspace.tile(1, block.shape, problem.accum_dtype)
    base = problem.bases[v]
    if base is not None:
        torch.mul(toward[base], problem.scale, out=out)
    else:
        k = problem.coefficients_rows[v, :, block.rows, None] * problem.scale
        torch.mul(toward[0], k[0], out=out).addcmul_(toward[1], k[1])
    return _finish_(out, problem, block, workspace)


def _fused_pair_weights(
    problem: FusedProblem,
    block: Block,
    pair: tuple[int, int],
    tile: Tensor,
    lines: tuple[Lines, Lines],
    workspace: Workspace,
) -> Tensor:
    """``H_vw`` from what :func:`_fused_logits` left in ``tile``."""
    out = workspace.tile(4, block.shape, problem.accum_dtype)
    out.zero_()
    (v, w), (rows, cols) = pair, lines
    at_rows, at_cols = (v, block.rows), (w, block.cols)
    for_rows, for_cols = _terms(problem, tile, at_rows, at_cols, workspace)
    lse_p, grad_p = rows.lse[at_rows].unsqueeze(1), rows.grad[at_rows].unsqueeze(1)
    lse_q, grad_q = cols.lse[at_cols].unsqueeze(0), cols.grad[at_cols].unsqueeze(0)
    sides = (
        (problem.candidates[v][w], for_rows, lse_p, grad_p),
        (problem.candidates[w][v], for_cols, lse_q, grad_q),
    )
    for serves, terms, lse, grad in sides:
        if not serves:
            continue
        if bounded(problem):
            out.add_((problem.scale - lse).exp_().mul_(grad))
        else:
            part = workspace.tile(5, block.shape, problem.accum_dtype)
            torch.sub(terms(), lse, out=part).exp_()
            out.addcmul_(part, grad)
    return out.mul_(tile) if bounded(problem) else out
