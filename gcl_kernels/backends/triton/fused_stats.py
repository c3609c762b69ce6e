"""``fused_block_stats``: statistics of all V x V pairs of views from four products a tile.

Views are combinations of two bases (see :class:`FusedProblem`), so a tile of samples ``J x K``
multiplies the bases and expands the products in registers:

    y_bc = <z_b^j, z_c^k>                                        b, c = 0, 1
    x_vw = s * sum_bc coef[v,b,j] coef[w,c,k] y_bc               -inf where (j, k) is no negative

    m_vj = max over w, k of x_vw      l_vj = sum over w, k of exp(x_vw - m_vj)     C[v][w] only
    m_wk = max over v, j of x_vw      l_wk = sum over v, j of exp(x_vw - m_wk)     C[w][v] only

Where the logits of all pairs of views differ by at most 80, by bounds that the products and the
coefficients give, ``m`` is the upper one: one exponential a pair of views serves both sides.
Slots, folding and the triangle of a diagonal block are those of ``stats.py``, once for each view.

Tables: float32 [V, 2 (m, l), slots, rows or columns of the block]. Statistics: float32 [V, N].
"""

# Device code builds its tuples one entry at a time.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from gcl_kernels.backends.triton.primitives import (
    FINITE_MIN,
    MAX_RANGE,
    combine,
    exponential,
    fused_tile,
    half_columns,
    load_coefficients,
    masked,
    store_tile,
    terms,
    tile_of,
)
from gcl_kernels.backends.triton.slots import write_slot
from gcl_kernels.backends.triton.stats import run_stats
from gcl_kernels.blocks import Block
from gcl_kernels.problem import FusedProblem, RowStats, Workspace


@triton.jit
def view_maximum(
    of_0, of_1, coefficients, s, mask, options, anchors, candidates,
    VIEW: tl.constexpr, AXIS: tl.constexpr,
    BASES: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Finite largest term of one view's embeddings along AXIS.

    Args:
        of_0, of_1: their products with the two bases of the other side.
        coefficients: of the other side's views.
        options, anchors, candidates: as ``terms`` takes them.
    """
    top = tl.full(of_0.shape, FINITE_MIN, tl.float32)
    for other in tl.static_range(len(BASES)):
        if CANDIDATES[VIEW][other]:
            x = masked(s * combine(of_0, of_1, coefficients[other], BASES[other], AXIS), mask)
            x = terms(x, options, anchors, candidates, VIEW, other, 1 - AXIS)
            top = tl.maximum(top, x)
    # tl.max here is what Triton 3.6 cannot translate for AMD.
    return -tl.min(-top, AXIS)


@triton.jit
def view_stats(
    of_0, of_1, coefficients, s, mask, options, anchors, candidates,
    VIEW: tl.constexpr, AXIS: tl.constexpr, BASES: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Finite largest term of one view's embeddings along AXIS, and the sum; see view_maximum."""
    top = view_maximum(
        of_0, of_1, coefficients, s, mask, options, anchors, candidates,
        VIEW, AXIS, BASES, CANDIDATES,
    )  # fmt: skip
    total = tl.zeros(of_0.shape, tl.float32)
    for other in tl.static_range(len(BASES)):
        if CANDIDATES[VIEW][other]:
            x = masked(s * combine(of_0, of_1, coefficients[other], BASES[other], AXIS), mask)
            x = terms(x, options, anchors, candidates, VIEW, other, 1 - AXIS)
            total += exponential(x - tl.expand_dims(top, AXIS))
    return top, tl.sum(total, AXIS)


@triton.jit
def half_term_stats(
    y, of_rows, of_cols, row_stats, s, mask, for_rows, for_cols, row_side, col_side,
    BASES: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """As half_stats, of terms that differ for rows and columns: one view at a time, since no
    exponential serves both."""
    col_stats = ()
    for w in tl.static_range(len(BASES)):
        col_stats = col_stats + view_stats(
            combine(y[0], y[1], of_cols[w], BASES[w], 1),
            combine(y[2], y[3], of_cols[w], BASES[w], 1),
            of_rows, s, mask, for_cols, col_side, row_side, w, 0, BASES, CANDIDATES,
        )  # fmt: skip
    new_row_stats = ()
    for v in tl.static_range(len(BASES)):
        top, total = view_stats(
            combine(y[0], y[2], of_rows[v], BASES[v], 0),
            combine(y[1], y[3], of_rows[v], BASES[v], 0),
            of_cols, s, mask, for_rows, row_side, col_side, v, 1, BASES, CANDIDATES,
        )  # fmt: skip
        m = tl.maximum(row_stats[2 * v], top)
        total *= exponential(top - m)
        total += row_stats[2 * v + 1] * exponential(row_stats[2 * v] - m)
        new_row_stats = new_row_stats + (m, total)
    return new_row_stats, col_stats


@triton.jit
def view_bounds(low, high, coefficients, BASES: tl.constexpr, TILE: tl.constexpr):
    """Bounds of two bases' numbers and of all views' combinations of them."""
    lows = tl.zeros((TILE,), tl.float32) + low
    highs = tl.zeros((TILE,), tl.float32) + high
    for v in tl.static_range(len(BASES)):
        if BASES[v] is None:
            a, b = coefficients[v]
            lows = tl.minimum(lows, tl.minimum(a * low, a * high) + tl.minimum(b * low, b * high))
            highs = tl.maximum(highs, tl.maximum(a * low, a * high) + tl.maximum(b * low, b * high))
    return tl.min(lows), tl.max(highs)


@triton.jit
def tile_bounds(
    products, of_rows, coefficients_cols, s, tile_col, block, samples,
    BASES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A lower and a finite upper bound of a tile's logits, the masked among them."""
    low = products[0][0]
    high = low
    for half in tl.static_range(2):
        for at in tl.static_range(4):
            low = tl.minimum(low, products[half][at])
            high = tl.maximum(high, products[half][at])
    cols = tile_col * TILE + tl.arange(0, TILE)
    side = block[1], cols, block[3], samples[1]
    of_cols = load_coefficients(coefficients_cols, side, BASES)
    low, high = view_bounds(tl.min(low), tl.max(high), of_cols, BASES, TILE)
    low, high = view_bounds(low, high, of_rows, BASES, TILE)
    return tl.minimum(s * low, s * high), tl.maximum(tl.maximum(s * low, s * high), FINITE_MIN)


@triton.jit
def half_stats(
    y, of_rows, of_cols, row_stats, s, top, mask,
    NEAR: tl.constexpr, BASES: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """``row_stats`` (m and l of every view) with half a tile folded in, and the columns' own."""
    V: tl.constexpr = len(BASES)
    col_shifts = ()
    col_sums = ()
    for w in tl.static_range(V):
        shift = tl.zeros((y[0].shape[1],), tl.float32) + top
        if not NEAR:
            shift = view_maximum(
                combine(y[0], y[1], of_cols[w], BASES[w], 1),
                combine(y[2], y[3], of_cols[w], BASES[w], 1),
                of_rows, s, mask, (None, None), None, None, w, 0, BASES, CANDIDATES,
            )  # fmt: skip
        col_shifts = col_shifts + (shift,)
        col_sums = col_sums + (tl.zeros(y[0].shape, tl.float32),)
    new_row_stats = ()
    for v in tl.static_range(V):
        of_0 = combine(y[0], y[2], of_rows[v], BASES[v], 0)
        of_1 = combine(y[1], y[3], of_rows[v], BASES[v], 0)
        m, total = row_stats[2 * v], row_stats[2 * v + 1]
        shift = tl.zeros_like(m) + top
        if not NEAR:
            shift = view_maximum(
                of_0, of_1, of_cols, s, mask, (None, None), None, None, v, 1, BASES, CANDIDATES
            )
            shift = tl.maximum(m, shift)
            total *= exponential(m - shift)
        row_sum = tl.zeros(y[0].shape, tl.float32)
        new_col_sums = ()
        for w in tl.static_range(V):
            col_sum = col_sums[w]
            if CANDIDATES[v][w] or CANDIDATES[w][v]:
                x = masked(s * combine(of_0, of_1, of_cols[w], BASES[w], 1), mask)
                e_p = exponential(x - shift[:, None])
                if CANDIDATES[v][w]:
                    row_sum += e_p
                if CANDIDATES[w][v]:
                    e_q = e_p
                    if not NEAR:
                        e_q = exponential(x - col_shifts[w][None, :])
                    col_sum += e_q
            new_col_sums = new_col_sums + (col_sum,)
        col_sums = new_col_sums
        new_row_stats = new_row_stats + (shift, total + tl.sum(row_sum, 1))
    col_stats = ()
    for w in tl.static_range(V):
        col_stats = col_stats + (col_shifts[w], tl.sum(col_sums[w], 0))
    return new_row_stats, col_stats


@triton.jit
def tile_stats(
    products, row_side, of_rows, coefficients_cols, tables, tiles, s, top, needs, block,
    samples, ids, for_rows, for_cols, NEAR: tl.constexpr, BASES: tl.constexpr,
    CANDIDATES: tl.constexpr, ONE_SIDED: tl.constexpr, DIAGONAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the statistics of a tile. Two pieces of code, for NEAR and not, in which nothing
    branches, are shorter than one."""
    row_table, col_table = tables
    tile_row, num_row_tiles, tile_col, num_col_tiles = tiles
    _, rows, num_rows, _ = row_side
    num_cols = block[3]
    row_stats = ()
    for _ in tl.static_range(len(BASES)):
        row_stats = row_stats + (tl.full((TILE,), FINITE_MIN, tl.float32),)
        row_stats = row_stats + (tl.zeros((TILE,), tl.float32),)
    for half in tl.static_range(2):
        col_side, of_cols, mask = half_columns(
            half, rows, needs, coefficients_cols, tile_col, block, samples, ids, BASES, TILE
        )
        if ONE_SIDED:
            row_stats, col_stats = half_term_stats(
                products[half], of_rows, of_cols, row_stats, s, mask, for_rows, for_cols,
                row_side, col_side, BASES, CANDIDATES,
            )  # fmt: skip
        else:
            row_stats, col_stats = half_stats(
                products[half], of_rows, of_cols, row_stats, s, top, mask, NEAR, BASES, CANDIDATES
            )
        if not DIAGONAL or tile_row != tile_col:
            for w in tl.static_range(len(BASES)):
                write_slot(
                    col_table + 2 * w * num_row_tiles.to(tl.int64) * num_cols, tile_row,
                    num_row_tiles, col_side[1], num_cols, col_stats[2 * w], col_stats[2 * w + 1],
                )  # fmt: skip
    for v in tl.static_range(len(BASES)):
        write_slot(
            row_table + 2 * v * num_col_tiles.to(tl.int64) * num_rows, tile_col,
            num_col_tiles, rows, num_rows, row_stats[2 * v], row_stats[2 * v + 1],
        )  # fmt: skip


@triton.jit
def store_products(kept, products, rows, first_col, block, TILE: tl.constexpr):
    """To [2, 2, rows, columns of the block], for ``load_products``."""
    num_rows, num_cols = block[2], block[3]
    part = num_rows.to(tl.int64) * num_cols
    for half in tl.static_range(2):
        cols = first_col + half * (TILE // 2) + tl.arange(0, TILE // 2)
        for at in tl.static_range(4):
            y = products[half][at]
            store_tile(kept + at * part, y, rows, cols, num_rows, num_cols, num_cols)


@triton.jit(do_not_specialize=["row_start", "col_start", "num_rows", "num_cols", "id_offset",
                               "id_period", "row_samples", "col_samples"])  # fmt: skip
def fused_stats_kernel(
    z_rows, z_cols, coefficients_rows, coefficients_cols, ids_rows, ids_cols, scale,
    row_table, col_table, kept, log_weights_rows, log_weights_cols, limits_rows, limits_cols,
    row_start, col_start, num_rows, num_cols, row_samples, col_samples, dim, id_offset, id_period,
    BASES: tl.constexpr, CANDIDATES: tl.constexpr, ONE_SIDED: tl.constexpr, DIAGONAL: tl.constexpr,
    TILE: tl.constexpr, TILE_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    DEALT: tl.constexpr,
):  # fmt: skip
    block, samples = (row_start, col_start, num_rows, num_cols), (row_samples, col_samples)
    ids = ids_rows, ids_cols, id_offset, id_period
    num_row_tiles = tl.cdiv(num_rows, TILE)
    num_col_tiles = tl.cdiv(num_cols, TILE)
    tile_row, tile_col = tile_of(tl.program_id(0), num_row_tiles, num_col_tiles, DIAGONAL)
    s = tl.load(scale)
    row_side, of_rows, products, needs = fused_tile(
        z_rows, z_cols, None, coefficients_rows, tile_row, tile_col, block, samples, ids, dim,
        BASES, TILE, TILE_K, EVEN_K, PRECISION, DEALT,
    )  # fmt: skip
    if kept is not None:
        store_products(kept, products, row_side[1], tile_col * TILE, block, TILE)
    tables = row_table, col_table
    tiles = tile_row, num_row_tiles, tile_col, num_col_tiles
    for_rows = limits_rows, log_weights_cols
    for_cols = limits_cols, log_weights_rows
    if ONE_SIDED:
        tile_stats(
            products, row_side, of_rows, coefficients_cols, tables, tiles, s, 0.0, needs, block,
            samples, ids, for_rows, for_cols, False, BASES, CANDIDATES, ONE_SIDED,
            DIAGONAL, TILE,
        )  # fmt: skip
    else:
        low, top = tile_bounds(products, of_rows, coefficients_cols, s, tile_col, block, samples,
                               BASES, TILE)  # fmt: skip
        if top - low <= MAX_RANGE:
            tile_stats(
                products, row_side, of_rows, coefficients_cols, tables, tiles, s, top, needs, block,
                samples, ids, for_rows, for_cols, True, BASES, CANDIDATES, ONE_SIDED,
                DIAGONAL, TILE,
            )  # fmt: skip
        else:
            tile_stats(
                products, row_side, of_rows, coefficients_cols, tables, tiles, s, top, needs, block,
                samples, ids, for_rows, for_cols, False, BASES, CANDIDATES, ONE_SIDED,
                DIAGONAL, TILE,
            )  # fmt: skip


def fused_block_stats(
    problem: FusedProblem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
) -> None:
    """As :meth:`Backend.fused_block_stats`."""
    run_stats(fused_stats_kernel, problem, block, rows, cols, workspace, len(problem.bases))
