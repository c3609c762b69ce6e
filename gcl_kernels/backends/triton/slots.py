"""Slots: where each tile leaves the statistics of its rows and columns, and how they are folded.

Every tile writes its ``(m, l)`` to its own slot of a table; a second kernel folds the slots, in
their order, into the running statistics. No atomics: every sum has one order.

    M' = max(M, max_t m_t + log l_t)          L' = L exp(M - M') + sum_t l_t exp(m_t - M')

``m`` may lie 80 above all of a row's logits, and those of other tiles just below them still count:
``m_t + log l_t`` does not. A slot whose sum is zero is passed over, whatever its ``m``.

Tables: float32 [2 (m, l), slots, rows or columns of the block]. Running statistics: float32 [M].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gcl_kernels.backends.triton.launching import start
from gcl_kernels.backends.triton.primitives import (
    FINITE_MIN,
    MAX_RANGE,
    SMALLEST_SUM,
    exponential,
    terms,
)
from gcl_kernels.backends.triton.tiles import Tile
from gcl_kernels.blocks import Block

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


@triton.jit
def write_tile(
    x, low, tile_row, tile_col, row_table, col_table, slots, for_rows, for_cols, block,
    ONE_SIDED: tl.constexpr, DIAGONAL: tl.constexpr,
    SERVES_ROWS: tl.constexpr, SERVES_COLS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Reduce one tile along both axes, and store it in its slots.

    Args:
        x, low: as ``tile_logits`` returns them.
        slots: how many rows have, and how many columns.
        for_rows, for_cols: ``options`` of either.
    """
    row_start, col_start, num_rows, num_cols = block
    rows = tile_row * TILE + tl.arange(0, TILE)
    cols = tile_col * TILE + tl.arange(0, TILE)
    if ONE_SIDED:
        of_rows = row_start, rows, num_rows, num_rows
        of_cols = col_start, cols, num_cols, num_cols
        x_p = terms(x, for_rows, of_rows, of_cols, 0, 0, 0)
        row_max = finite_max(x_p, 1)
        row_sum = tl.sum(exponential(x_p - row_max[:, None]), 1)
        x_q = terms(x, for_cols, of_cols, of_rows, 0, 0, 1)
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
        write_slot(row_table, tile_col, slots[0], rows, num_rows, row_max, row_sum)
    if SERVES_COLS:
        if not DIAGONAL or tile_row != tile_col:
            write_slot(col_table, tile_row, slots[1], cols, num_cols, col_max, col_sum)


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
