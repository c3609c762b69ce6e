"""The block functions in PyTorch calls, for every device that PyTorch has.

With ``x = s * z_A z_B^T`` for one block, equal samples masked to -inf:

    block_stats     m_p <- max(m_p, max_q x_pq),   l_p <- sum over all q so far of exp(x_pq - m_p)
                    for the rows, and the same over p for the columns
    block_weights   H_pq = g_p exp(x_pq - lse_p) + g_q exp(x_pq - lse_q)

Natural logarithms; ``x``, statistics and ``H`` in the accumulation dtype (float32, float64 for
float64). ``H`` is rounded to the compute dtype last.

Where ``2 s |z||z'|`` is proved small enough (unit vectors, and a scale whose value the host knows),
``s`` itself replaces every maximum: one exponential then serves rows and columns in both passes,
and neither underflow nor overflow can occur.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gcl_kernels.blocks import Block
from gcl_kernels.problem import (
    FusedProblem,
    Problem,
    RowStats,
    Workspace,
    bounded,
    fused_products,
    product,
)

BLOCK_ROWS = {"cpu": 384, "default": 4096}
"""Largest rows of a block. 384: the block's 0.6 MB stay in a core's L2 cache (1 MiB here), and the
products already run at full rate, measured; 4096: fills a large GPU, workspace below 256 MiB."""

FUSED_BLOCK_ROWS = {"cpu": 192, "default": 1536}
"""Largest samples of a block's side in score fusion, which holds some twenty tiles: its workspace
stays at 3 MB on a CPU and below 256 MiB elsewhere."""


def why_unavailable() -> str | None:
    """None: PyTorch is all it needs."""
    return None


def why_not(device: torch.device, compute_dtype: torch.dtype) -> str | None:
    """None: it serves every device and dtype."""
    return None


def block_rows(z: Tensor) -> int:
    """The largest number of rows of a block of these embeddings."""
    return BLOCK_ROWS.get(z.device.type, BLOCK_ROWS["default"])


def _mask_(
    tile: Tensor,
    problem: Problem | FusedProblem,
    block: Block,
    value: float,
    workspace: Workspace,
) -> None:
    """Write ``value`` where both embeddings carry one id: the mask rule."""
    if problem.ids_rows is None or problem.ids_cols is None:
        for offset in block.same_sample_offsets:
            tile.diagonal(offset).fill_(value)
        return
    same = workspace.tile(2, block.shape, torch.bool)
    torch.eq(problem.ids_rows[block.rows, None], problem.ids_cols[None, block.cols], out=same)
    tile.masked_fill_(same, value)


def _compute_tile(problem: Problem, block: Block, workspace: Workspace) -> Tensor:
    """exp(x - s), zero where masked, of a bounded problem; else x, -inf where masked."""
    tile = workspace.kept(block)
    if tile is None:
        tile = workspace.tile(0, block.shape, problem.accum_dtype)
    product(problem.z_rows[block.rows], problem.z_cols[block.cols].t(), out=tile)
    tile.mul_(problem.scale)
    if bounded(problem):
        tile.sub_(problem.scale).exp_()
        _mask_(tile, problem, block, 0.0, workspace)
    else:
        _mask_(tile, problem, block, -torch.inf, workspace)
    return tile


def _update(stats: RowStats, where: slice, x: Tensor, dim: int, scratch: Tensor) -> None:
    running_max, running_sum = stats.max[where], stats.sum[where]
    new_max = torch.maximum(running_max, x.amax(dim))
    running_sum.mul_(running_max.sub_(new_max).exp_())
    torch.sub(x, new_max.unsqueeze(dim), out=scratch)
    running_sum.add_(scratch.exp_().sum(dim))
    running_max.copy_(new_max)


def block_stats(
    problem: Problem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
) -> None:
    """Fold one block into the running statistics of its rows and columns (``cols`` is ``rows``'
    own object where the problem is square)."""
    serves_cols = block.serves_cols and not block.diagonal
    tile = _compute_tile(problem, block, workspace)
    if bounded(problem):
        if block.serves_rows:
            rows.sum[block.rows].add_(tile.sum(1))
        if serves_cols:
            cols.sum[block.cols].add_(tile.sum(0))
        return
    scratch = workspace.tile(1, block.shape, problem.accum_dtype)
    if block.serves_rows:
        _update(rows, block.rows, tile, 1, scratch)
    if serves_cols:
        _update(cols, block.cols, tile, 0, scratch)


def block_weights(
    problem: Problem,
    block: Block,
    lse_rows: Tensor,
    lse_cols: Tensor,
    grad_rows: Tensor,
    grad_cols: Tensor,
    workspace: Workspace,
) -> Tensor:
    """``H`` of one block, in the compute dtype, valid until the next call with this workspace.

    ``lse_*`` hold +inf for rows without a negative: every weight in them is then zero. A kept tile
    is what ``block_stats`` left, and stays as it is.
    """
    lse_p, grad_p = lse_rows[block.rows], grad_rows[block.rows]
    lse_q, grad_q = lse_cols[block.cols], grad_cols[block.cols]
    kept = workspace.kept(block)
    tile = _compute_tile(problem, block, workspace) if kept is None else kept
    out = workspace.tile(1, block.shape, problem.accum_dtype)
    if bounded(problem):
        factor_p = (problem.scale - lse_p).exp_().mul_(grad_p).unsqueeze_(1)
        factor_q = (problem.scale - lse_q).exp_().mul_(grad_q).unsqueeze_(0)
        if block.serves_rows and block.serves_cols:
            torch.add(factor_p, factor_q, out=out).mul_(tile)
        else:
            torch.mul(tile, factor_p if block.serves_rows else factor_q, out=out)
    elif block.serves_rows and block.serves_cols:
        torch.sub(tile, lse_p.unsqueeze(1), out=out).exp_().mul_(grad_p.unsqueeze(1))
        second = tile if kept is None else workspace.tile(2, block.shape, out.dtype)
        torch.sub(tile, lse_q.unsqueeze(0), out=second).exp_()
        out.addcmul_(second, grad_q.unsqueeze(0))
    elif block.serves_rows:
        torch.sub(tile, lse_p.unsqueeze(1), out=out).exp_().mul_(grad_p.unsqueeze(1))
    else:
        torch.sub(tile, lse_q.unsqueeze(0), out=out).exp_().mul_(grad_q.unsqueeze(0))
    if problem.compute_dtype == problem.accum_dtype:
        return out
    return workspace.tile(3, block.shape, problem.compute_dtype).copy_(out)


def fused_block_rows(z: Tensor, num_views: int) -> int:
    """The largest number of samples of a block's side, for views made of these bases."""
    return FUSED_BLOCK_ROWS.get(z.device.type, FUSED_BLOCK_ROWS["default"])


def _mix(y: Tensor, coefficients: Tensor, base: int | None, out: Tensor) -> tuple[Tensor, Tensor]:
    """``<z_b, z_v>`` for both bases ``b``: ``y[b, base]`` where view ``v`` is a base, else the
    combination. ``coefficients``: two that broadcast over a tile; ``y``: [2 (b), 2, P, Q]."""
    if base is not None:
        return y[0, base], y[1, base]
    for b in range(2):
        torch.mul(y[b, 0], coefficients[0], out=out[b]).addcmul_(y[b, 1], coefficients[1])
    return out[0], out[1]


def _fused_logits(
    problem: FusedProblem,
    block: Block,
    v: int,
    toward: tuple[Tensor, Tensor],
    workspace: Workspace,
) -> Tensor:
    """``exp(x_vw - s)`` of a bounded problem, zero where masked; else ``x_vw``, -inf there."""
    out = workspace.tile(1, block.shape, problem.accum_dtype)
    base = problem.bases[v]
    if base is not None:
        torch.mul(toward[base], problem.scale, out=out)
    else:
        k = problem.coefficients_rows[v, :, block.rows, None] * problem.scale
        torch.mul(toward[0], k[0], out=out).addcmul_(toward[1], k[1])
    if bounded(problem):
        out.sub_(problem.scale).exp_()
        _mask_(out, problem, block, 0.0, workspace)
    else:
        _mask_(out, problem, block, -torch.inf, workspace)
    return out


def fused_block_stats(
    problem: FusedProblem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
) -> None:
    """Fold one block over samples into the running statistics of its rows' and columns' views."""
    y = fused_products(problem, block, workspace, product)
    mixed = workspace.tile(3, (2, *block.shape), problem.accum_dtype)
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
            if bounded(problem):
                if for_row:
                    rows.sum[v, block.rows].add_(tile.sum(1))
                if for_col:
                    cols.sum[w, block.cols].add_(tile.sum(0))
                continue
            if for_row:
                _update(RowStats(rows.max[v], rows.sum[v]), block.rows, tile, 1, scratch)
            if for_col:
                _update(RowStats(cols.max[w], cols.sum[w]), block.cols, tile, 0, scratch)


def _fused_pair_weights(
    problem: FusedProblem,
    block: Block,
    v: int,
    w: int,
    tile: Tensor,
    lse: tuple[Tensor, Tensor],
    grad: tuple[Tensor, Tensor],
    workspace: Workspace,
) -> Tensor:
    """``H_vw`` from what :func:`_fused_logits` left in ``tile``."""
    out = workspace.tile(4, block.shape, problem.accum_dtype)
    out.zero_()
    sides = (
        (problem.candidates[v][w], lse[0][v, block.rows, None], grad[0][v, block.rows, None]),
        (problem.candidates[w][v], lse[1][w, None, block.cols], grad[1][w, None, block.cols]),
    )
    for serves, lse_side, grad_side in sides:
        if not serves:
            continue
        if bounded(problem):
            out.add_((problem.scale - lse_side).exp_().mul_(grad_side))
        else:
            part = workspace.tile(5, block.shape, problem.accum_dtype)
            torch.sub(tile, lse_side, out=part).exp_()
            out.addcmul_(part, grad_side)
    return out.mul_(tile) if bounded(problem) else out


def fused_block_weights(
    problem: FusedProblem,
    block: Block,
    lse_rows: Tensor,
    lse_cols: Tensor,
    grad_rows: Tensor,
    grad_cols: Tensor,
    inner_rows: Tensor,
    inner_cols: Tensor,
    workspace: Workspace,
) -> Tensor:
    """``F`` [2, 2, P, Q] of one block over samples, in the compute dtype, valid until the next
    call, and its share of ``U``: see ``score_fusion``. A kept tile is what ``fused_block_stats``
    left, and stays as it is."""
    y = workspace.kept(block)
    if y is None:
        y = fused_products(problem, block, workspace, product)
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
            h = _fused_pair_weights(
                problem, block, v, w, tile, (lse_rows, lse_cols), (grad_rows, grad_cols), workspace
            )
            for b in own_bases_v:
                inner_rows[v, b, block.rows] += torch.mul(h, toward[w][b], out=tile).sum(1)
            for c in _own_bases(problem.bases[w]):
                if not block.diagonal:
                    inner_cols[w, c, block.cols] += torch.mul(h, away[c], out=tile).sum(0)
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


def _own_bases(base: int | None) -> tuple[int, ...]:
    """The bases with a coefficient that is not zero by construction."""
    return (0, 1) if base is None else (base,)
