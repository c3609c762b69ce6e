"""``block_stats``: row and column statistics of a block of logits that never reaches memory.

One program computes one tile ``x`` (see primitives) and reduces it along both axes:

    m_i = max_j x_ij                l_i = sum_j exp(x_ij - m_i)           (and the same over i)

Where the tile's logits differ by at most 80, as nearly always, ``m`` is their maximum for all rows
and columns: one exponential an entry. See ``slots`` for what becomes of ``(m, l)``, and ``strips``
for programs that compute several tiles.

Where there are log weights or limits, rows are reduced of other terms than columns, with a maximum
and an exponential each.

A diagonal block computes the tiles on and above its diagonal. Tile (a, b) fills slot ``b`` of the
rows of ``a`` and, since x is symmetric, slot ``a`` of the rows of ``b``: each slot once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gcl_kernels.backends.triton.launching import start
from gcl_kernels.backends.triton.primitives import (
    is_plain,
    launch,
    store_tile,
    tile_logits,
    tile_of,
)
from gcl_kernels.backends.triton.slots import fold, fold_kernel, new_tables, write_tile
from gcl_kernels.backends.triton.strips import run_strips
from gcl_kernels.blocks import Block
from gcl_kernels.problem import Problem, RowStats, Workspace


@triton.jit(do_not_specialize=["row_start", "col_start", "num_rows", "num_cols", "id_offset",
                               "id_period"])  # fmt: skip
def stats_kernel(
    z_rows, z_cols, ids_rows, ids_cols, scale, row_table, col_table,
    kept, log_weights_rows, log_weights_cols, limits_rows, limits_cols,
    row_start, col_start, num_rows, num_cols, dim, id_offset, id_period,
    ONE_SIDED: tl.constexpr, DIAGONAL: tl.constexpr,
    SERVES_ROWS: tl.constexpr, SERVES_COLS: tl.constexpr,
    TILE: tl.constexpr, TILE_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = row_start, col_start, num_rows, num_cols
    ids = ids_rows, ids_cols, id_offset, id_period
    num_row_tiles = tl.cdiv(num_rows, TILE)
    num_col_tiles = tl.cdiv(num_cols, TILE)
    tile_row, tile_col = tile_of(tl.program_id(0), num_row_tiles, num_col_tiles, DIAGONAL)
    x, low = tile_logits(
        z_rows, z_cols, tl.load(scale), tile_row * TILE, tile_col * TILE, block, ids, dim,
        TILE, TILE_K, EVEN_K, PRECISION, False,
    )  # fmt: skip
    if kept is not None:
        rows = tile_row * TILE + tl.arange(0, TILE)
        cols = tile_col * TILE + tl.arange(0, TILE)
        store_tile(kept, x, rows, cols, num_rows, num_cols, num_cols)
    write_tile(
        x, low, tile_row, tile_col, row_table, col_table, (num_col_tiles, num_row_tiles),
        (limits_rows, log_weights_cols), (limits_cols, log_weights_rows), block,
        ONE_SIDED, DIAGONAL, SERVES_ROWS, SERVES_COLS, TILE,
    )  # fmt: skip


def run_stats(
    kernel: Any,
    problem: Problem,
    block: Block,
    rows: RowStats,
    cols: RowStats,
    workspace: Workspace,
    num_views: int,
) -> None:
    """Two launches: every tile's statistics to the tables, the tables into the running ones."""
    programs, tile, arguments = launch(problem, block, workspace)
    plain = is_plain(problem, block, workspace)
    with torch.cuda.device_of(problem.z_rows):
        if tile.strip and plain:
            tables = run_strips(problem, block, tile, arguments)
        else:
            arguments["num_warps"] = tile.warps_of("stats") if plain else tile.warps
            row_table, col_table = tables = new_tables(problem.scale, block, tile, num_views, 2)
            start(
                kernel, (programs,), {"row_table": row_table, "col_table": col_table, **arguments}
            )
        fold(fold_kernel, tables, (rows.max, rows.sum), (cols.max, cols.sum), block)


def block_stats(
    problem: Problem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
) -> None:
    """As :meth:`Backend.block_stats`."""
    run_stats(stats_kernel, problem, block, rows, cols, workspace, 1)
