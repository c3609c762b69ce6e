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
from gcl_kernels.problem import Problem, RowStats, Workspace, product

MAX_BOUNDED_SCALE = 40.0
"""exp(-2 s) and exp(2 s) stay normal float32 numbers (e^-87 to e^88) with room for the sums."""

BLOCK_ROWS = {"cpu": 384, "default": 4096}
"""Largest rows of a block. 384: the block's 0.6 MB stay in a core's L2 cache (1 MiB here), and the
products already run at full rate, measured; 4096: fills a large GPU, workspace below 256 MiB."""

KEPT_ELEMENTS = 1024 * 1024
"""4 MiB of float32: at N <= 341 of three views the second product is a quarter to a third of all
floating-point operations, and nothing of size M x M is held beyond this constant."""


def why_unavailable() -> str | None:
    """None: PyTorch is all it needs."""
    return None


def why_not(device: torch.device, compute_dtype: torch.dtype) -> str | None:
    """None: it serves every device and dtype."""
    return None


def block_rows(problem: Problem) -> int:
    """The largest number of rows of a block for this problem."""
    return BLOCK_ROWS.get(problem.z_rows.device.type, BLOCK_ROWS["default"])


def keeps_tiles(num_rows: int, num_cols: int) -> bool:
    """Whether tiles of a problem of this size stay in memory between the passes."""
    return num_rows * num_cols <= KEPT_ELEMENTS


def bounded(problem: Problem) -> bool:
    """Whether ``|x| <= s`` is known on the host, and ``exp(+-2 s)`` is harmless."""
    scale = problem.max_scale
    return problem.unit_rows and scale is not None and 0 <= scale <= MAX_BOUNDED_SCALE


def _tile(problem: Problem, block: Block, workspace: Workspace) -> Tensor:
    if problem.kept is not None:
        return problem.kept[block.rows, block.cols]
    return workspace.tile(0, block.shape, problem.accum_dtype)


def _mask_(
    tile: Tensor, problem: Problem, block: Block, value: float, workspace: Workspace
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
    tile = _tile(problem, block, workspace)
    product(problem.z_rows[block.rows], problem.z_cols[block.cols].t(), out=tile)
    tile.mul_(problem.scale)
    if bounded(problem):
        tile.sub_(problem.scale).exp_()
        _mask_(tile, problem, block, 0.0, workspace)
    else:
        _mask_(tile, problem, block, -torch.inf, workspace)
    return tile


def start_stats(problem: Problem) -> RowStats:
    """The statistics of empty sets of logits, one for each row."""
    num_rows = problem.z_rows.shape[0]
    sums = problem.scale.new_zeros(num_rows)
    if bounded(problem):
        return RowStats(max=problem.scale.expand(num_rows), sum=sums)
    # Finite, so that a row without any logit subtracts no infinities.
    return RowStats(max=torch.full_like(sums, torch.finfo(sums.dtype).min), sum=sums)


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

    ``lse_*`` hold +inf for rows without a negative: every weight in them is then zero. Where the
    problem keeps tiles, they are those that ``block_stats`` left, and stay as they are.
    """
    lse_p, grad_p = lse_rows[block.rows], grad_rows[block.rows]
    lse_q, grad_q = lse_cols[block.cols], grad_cols[block.cols]
    if problem.kept is None:
        tile = _compute_tile(problem, block, workspace)
    else:
        tile = _tile(problem, block, workspace)
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
        second = tile if problem.kept is None else workspace.tile(2, block.shape, out.dtype)
        torch.sub(tile, lse_q.unsqueeze(0), out=second).exp_()
        out.addcmul_(second, grad_q.unsqueeze(0))
    elif block.serves_rows:
        torch.sub(tile, lse_p.unsqueeze(1), out=out).exp_().mul_(grad_p.unsqueeze(1))
    else:
        torch.sub(tile, lse_q.unsqueeze(0), out=out).exp_().mul_(grad_q.unsqueeze(0))
    if problem.compute_dtype == problem.accum_dtype:
        return out
    return workspace.tile(3, block.shape, problem.compute_dtype).copy_(out)
