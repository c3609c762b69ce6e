"""``block_stats``: row and column statistics of a block of logits that never reaches memory.

One program computes one tile ``x`` (see primitives) and reduces it along both axes:

    m_i = max_j x_ij                l_i = sum_j exp(x_ij - m_i)           (and the same over i)

Where the tile's logits differ by at most 80, as nearly always, ``m`` is their maximum for all rows
and columns: one exponential an entry. Every tile writes its ``(m, l)`` to its own slot of a table;
a second kernel folds the slots, in their order, into the running statistics. No atomics: every sum
has one order.

    M' = max(M, max_t m_t + log l_t)          L' = L exp(M - M') + sum_t l_t exp(m_t - M')

Where there are log weights or limits, rows are reduced of other terms than columns, with a maximum
and an exponential each.

``m`` may lie 80 above all of a row's logits, and those of other tiles just below them still count:
``m_t + log l_t`` does not.

A diagonal block computes the tiles on and above its diagonal. Tile (a, b) fills slot ``b`` of the
rows of ``a`` and, since x is symmetric, slot ``a`` of the rows of ``b``: each slot once.

Tables: float32 [2 (m, l), slots, rows or columns of the block]. Running statistics: float32 [M].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcl_kernels.backends.triton.launching import start
from gcl_kernels.backends.triton.primitives import (
    FINITE_MIN,
    MAX_RANGE,
    SMALLEST_SUM,
    exponential,
    launch,
    terms,
    tile_logits,
    tile_of,
)
from gcl_kernels.backends.triton.tiles import Tile
from gcl_kernels.blocks import Block
from gcl_kernels.problem import Problem, RowStats, Workspace

FOLD_LINES = 32
FOLD_SLOTS = 64
"""A program folds 32 rows (one cache line of each slot), 64 slots at a time: all 64 that a block of
8192 rows has with tiles of 128, in one pass."""

FOLD_NUMBERS = [
    "row_slots", "col_slots", "row_start", "col_start", "num_rows", "num_cols", "row_samples",
    "col_samples", "row_programs",
]  # fmt: skip
"""Arguments of the kernels that fold slots: any number, one compilation."""


@triton.jit
def finite_max(x, AXIS: tl.constexpr):
    """Largest entries along an axis, finite: where all is masked, -inf must not become -inf - -inf.

    tl.max skips NaN; a NaN in ``x`` is one in the sum of ``exp(x - max)``.
    """
    return tl.maximum(tl.max(x, AXIS), FINITE_MIN)


@triton.jit
def write_slot(table, slot, num_slots, lines, length, maxima, sums):
    """Store the statistics of one tile's rows or columns."""
    place = table + slot.to(tl.int64) * length + lines
    tl.store(place, maxima, mask=lines < length)
    tl.store(place + num_slots.to(tl.int64) * length, sums, mask=lines < length)


@triton.jit(do_not_specialize=["row_start", "col_start", "num_rows", "num_cols", "id_offset",
                               "id_period"])  # fmt: skip
def stats_kernel(
    z_rows, z_cols, ids_rows, ids_cols, scale, row_table, col_table,
    log_weights_rows, log_weights_cols, limits_rows, limits_cols,
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
        TILE, TILE_K, EVEN_K, PRECISION,
    )  # fmt: skip
    rows = tile_row * TILE + tl.arange(0, TILE)
    cols = tile_col * TILE + tl.arange(0, TILE)
    if ONE_SIDED:
        of_rows = row_start, rows, num_rows, num_rows
        of_cols = col_start, cols, num_cols, num_cols
        x_p = terms(x, (limits_rows, log_weights_cols), of_rows, of_cols, 0, 0, 0)
        row_max = finite_max(x_p, 1)
        row_sum = tl.sum(exponential(x_p - row_max[:, None]), 1)
        x_q = terms(x, (limits_cols, log_weights_rows), of_cols, of_rows, 0, 0, 1)
        col_max = finite_max(x_q, 0)
        col_sum = tl.sum(exponential(x_q - col_max[None, :]), 0)
    else:
        top = tl.maximum(tl.max(x), FINITE_MIN)
        if top - low <= MAX_RANGE:
            e = exponential(x - top)
            row_max = tl.zeros((TILE,), tl.float32) + top
            col_max = row_max
            row_sum = tl.sum(e, 1)
            col_sum = tl.sum(e, 0)
        else:
            # Both maxima before both sums take 50 registers fewer with Triton 3.6, on sm_90.
            row_max = finite_max(x, 1)
            col_max = finite_max(x, 0)
            row_sum = tl.sum(exponential(x - row_max[:, None]), 1)
            col_sum = tl.sum(exponential(x - col_max[None, :]), 0)
    if SERVES_ROWS:
        write_slot(row_table, tile_col, num_col_tiles, rows, num_rows, row_max, row_sum)
    if SERVES_COLS:
        if not DIAGONAL or tile_row != tile_col:
            write_slot(col_table, tile_row, num_row_tiles, cols, num_cols, col_max, col_sum)


@triton.jit
def fold_lines(
    table, num_slots, length, program, maxima, sums, start,
    LINES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Fold all slots of LINES rows into their running statistics."""
    lines = program * LINES + tl.arange(0, LINES)
    inside = lines < length
    m = tl.load(maxima + start + lines, mask=inside, other=FINITE_MIN)
    total = tl.load(sums + start + lines, mask=inside, other=0.0)
    for first in range(0, num_slots, SLOTS):
        slots = first + tl.arange(0, SLOTS)
        place = table + slots.to(tl.int64)[:, None] * length + lines[None, :]
        filled = (slots < num_slots)[:, None] & inside[None, :]
        tile_m = tl.load(place, mask=filled, other=FINITE_MIN)
        tile_sum = tl.load(place + num_slots.to(tl.int64) * length, mask=filled, other=0.0)
        # Where all is masked, m is of other rows.
        tile_m = tl.where(tile_sum == 0, FINITE_MIN, tile_m)
        new_m = tl.maximum(m, tl.max(tile_m + tl.log(tl.maximum(tile_sum, SMALLEST_SUM)), 0))
        tile_sum *= exponential(tile_m - new_m[None, :])
        total = total * exponential(m - new_m) + tl.sum(tile_sum, 0)
        m = new_m
    tl.store(maxima + start + lines, m, mask=inside)
    tl.store(sums + start + lines, total, mask=inside)


@triton.jit(do_not_specialize=FOLD_NUMBERS)
def fold_kernel(
    row_table, col_table, row_max, row_sum, col_max, col_sum,
    row_slots, col_slots, row_start, col_start, num_rows, num_cols, row_samples, col_samples,
    row_programs, LINES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The first ``row_programs`` programs fold rows, the others columns; a view on axis 1."""
    program = tl.program_id(0)
    view = tl.program_id(1).to(tl.int64)
    if program < row_programs:
        at = view * row_samples
        fold_lines(row_table + 2 * view * row_slots * num_rows, row_slots, num_rows, program,
                   row_max + at, row_sum + at, row_start, LINES, SLOTS)  # fmt: skip
    else:
        at = view * col_samples
        fold_lines(col_table + 2 * view * col_slots * num_cols, col_slots, num_cols,
                   program - row_programs, col_max + at, col_sum + at, col_start,
                   LINES, SLOTS)  # fmt: skip


def new_tables(scale: Tensor, block: Block, tile: Tile, *leading: int) -> tuple[Tensor, Tensor]:
    """Uninitialised slots [..., slots, rows] and [..., slots, columns] of a block's tiles."""
    num_rows, num_cols = block.shape
    row_table = scale.new_empty(*leading, triton.cdiv(num_cols, tile.size), num_rows)
    if block.diagonal:
        # Its rows and columns are the same lines, and share their slots.
        return row_table, row_table
    return row_table, scale.new_empty(*leading, triton.cdiv(num_rows, tile.size), num_cols)


def fold(
    kernel: Any,
    tables: tuple[Tensor, Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor],
    block: Block,
    **constants: Any,
) -> None:
    """Fold tables [count, ..., slots, lines] of a block's rows and columns into what there is of
    them so far [..., samples]; ``count`` on the second axis of the launch."""
    num_rows, num_cols = block.shape
    row_programs = triton.cdiv(num_rows, FOLD_LINES) if block.serves_rows else 0
    folds_cols = block.serves_cols and not block.diagonal
    col_programs = triton.cdiv(num_cols, FOLD_LINES) if folds_cols else 0
    given = (
        *tables, *rows, *cols, tables[0].shape[-2], tables[1].shape[-2],
        block.row_start, block.col_start, num_rows, num_cols,
        rows[0].shape[-1], cols[0].shape[-1], row_programs,
    )  # fmt: skip
    named = dict(zip(kernel.arg_names, given, strict=False))
    named |= {"LINES": FOLD_LINES, "SLOTS": FOLD_SLOTS, "num_warps": 4, **constants}
    start(kernel, (row_programs + col_programs, len(tables[0])), named)


def run_stats(
    kernel: Any, problem: Problem, block: Block, rows: RowStats, cols: RowStats, num_views: int
) -> None:
    """Two launches: every tile's statistics to the tables, the tables into the running ones."""
    programs, tile, arguments = launch(problem, block)
    arguments["num_warps"] = tile.warps if problem.one_sided else tile.warps_of("stats")
    tables = new_tables(problem.scale, block, tile, num_views, 2)
    with torch.cuda.device_of(problem.z_rows):
        start(kernel, (programs,), {"row_table": tables[0], "col_table": tables[1], **arguments})
        fold(fold_kernel, tables, (rows.max, rows.sum), (cols.max, cols.sum), block)


def block_stats(
    problem: Problem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
) -> None:
    """As :meth:`Backend.block_stats`."""
    run_stats(stats_kernel, problem, block, rows, cols, 1)
