"""The statistics of ``stats`` by programs that compute tiles below each other, a strip: less is
issued beside the products. Where the row of the table of tiles asks for it.

Operands arrive by TMA. One number, the maximum of the first tile, is subtracted from all logits of
a strip: a thread then adds its own entries of a column tile after tile, and threads talk to each
other about columns once a strip and not once a tile.

    l_i = sum_j exp(x_ij - m)       l_j = sum_i exp(x_ij - m)       m the strip's shift

A tile whose logits are not all between 80 below the shift and 40 above it is left out, and noted;
``left_out_kernel`` makes its statistics as ``stats`` does. Slots of rows are those of ``stats``, of
columns too where a tile is left out; the others of a strip share one beyond those. A slot that
nobody fills holds zeros.

A diagonal block has no tiles below its diagonal: strips end there.
"""

# Device code builds its tuples one entry at a time.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcl_kernels.backends.triton.launching import start
from gcl_kernels.backends.triton.primitives import (
    FINITE_MIN,
    MAX_RANGE,
    exponential,
    halves,
    operands_by_tma,
    tile_logits,
    tile_of,
)
from gcl_kernels.backends.triton.slots import write_slot, write_tile
from gcl_kernels.backends.triton.tiles import Tile
from gcl_kernels.blocks import Block
from gcl_kernels.problem import Problem

NOT_BY_STRIPS = (
    "kept", "log_weights_rows", "log_weights_cols", "limits_rows", "limits_cols", "ONE_SIDED",
    "EVEN_K",
)  # fmt: skip
"""Arguments of ``stats_kernel`` alone."""

LEFT_OUT_STRIPS = 32
"""A program looks after so many strips: a vector of notes, of which nearly always all are empty."""

MAX_ABOVE = tl.constexpr(40.0)
"""How far logits may lie above the shift: 1024 of e^40 are a float32."""


@triton.jit
def strips_of(num_rows, num_cols, DIAGONAL: tl.constexpr, TILE: tl.constexpr, STRIP: tl.constexpr):
    """Tiles of a block's rows, of its columns, strips of the rows', and slots of a row and of a
    column: on the diagonal they are the same lines."""
    num_row_tiles = tl.cdiv(num_rows, TILE)
    num_col_tiles = tl.cdiv(num_cols, TILE)
    num_strips = tl.cdiv(num_row_tiles, STRIP)
    row_slots = num_col_tiles
    if DIAGONAL:
        row_slots += num_strips
    return num_row_tiles, num_col_tiles, num_strips, (row_slots, num_row_tiles + num_strips)


@triton.jit
def lane_sums(e, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Row sums [TILE, 4]: what the four threads that share a row of HGMMA have of it."""
    return tl.sum(tl.sum(tl.reshape(e, (TILE, WIDTH // 8, 4, 2)), 3), 1)


@triton.jit
def warp_sums(e, TILE: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr):
    """Column sums [WARPS, 8, WIDTH]: what a thread has of its columns with HGMMA, which gives a
    warp's eight groups of four threads rows r, r + 8 and, with four warps, r + 64, r + 72."""
    return tl.sum(tl.sum(tl.reshape(e, (TILE // (16 * WARPS), WARPS, 2, 8, WIDTH)), 2), 0)


@triton.jit(do_not_specialize=["row_start", "col_start", "num_rows", "num_cols", "id_offset",
                               "id_period"])  # fmt: skip
def strips_kernel(
    z_rows, z_cols, ids_rows, ids_cols, scale, row_table, col_table, left_out,
    row_start, col_start, num_rows, num_cols, dim, id_offset, id_period,
    DIAGONAL: tl.constexpr, SERVES_ROWS: tl.constexpr, SERVES_COLS: tl.constexpr,
    TILE: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr,
    STRIP: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """All tiles but those ``left_out``, one bit each of the strip's number."""
    block = row_start, col_start, num_rows, num_cols
    ids = ids_rows, ids_cols, id_offset, id_period
    QUARTER: tl.constexpr = TILE // 4
    num_row_tiles, num_col_tiles, num_strips, slots = strips_of(
        num_rows, num_cols, DIAGONAL, TILE, STRIP
    )
    program = tl.program_id(0)
    strip, tile_col = tile_of(program, num_strips, num_col_tiles, False)
    first = strip * STRIP
    last = tl.minimum(first + STRIP, num_row_tiles)
    if DIAGONAL:
        last = tl.minimum(last, tile_col + 1)
    s = tl.load(scale)
    zero = tl.zeros((WARPS, 8, QUARTER), tl.float32)
    kept_0, kept_1, kept_2, kept_3 = zero, zero, zero, zero
    shift = tl.full((), FINITE_MIN, tl.float32)
    wide = 0
    for tile_row in range(first, last):
        x, low = tile_logits(
            z_rows, z_cols, s, tile_row * TILE, tile_col * TILE, block, ids, dim,
            TILE, TILE_K, True, PRECISION, True,
        )  # fmt: skip
        top = tl.maximum(tl.max(x), FINITE_MIN)
        new = tl.where(shift == FINITE_MIN, top, shift)
        if (top - new <= MAX_ABOVE) & (new - low <= MAX_RANGE):
            shift = new
            left, right = halves(x)
            quarters = halves(left) + halves(right)
            row_sums = tl.zeros((TILE, 4), tl.float32)
            kept = kept_0, kept_1, kept_2, kept_3
            added = ()
            for quarter in tl.static_range(4):
                e = exponential(quarters[quarter] - shift)
                row_sums += lane_sums(e, TILE, QUARTER)
                of_cols = warp_sums(e, TILE, QUARTER, WARPS)
                if DIAGONAL:
                    of_cols = tl.where(tile_row != tile_col, of_cols, 0.0)
                added = added + (kept[quarter] + of_cols,)
            kept_0, kept_1, kept_2, kept_3 = added
            if SERVES_ROWS:
                rows = tile_row * TILE + tl.arange(0, TILE)
                row_max = tl.zeros((TILE,), tl.float32) + shift
                row_sum = tl.sum(row_sums, 1)
                write_slot(row_table, tile_col, slots[0], rows, num_rows, row_max, row_sum)
        else:
            wide |= 1 << (tile_row - first)
    tl.store(left_out + program, wide)
    if SERVES_COLS:
        # [TILE], in order: one address a thread, which the loop need not hold for four quarters.
        of_left = tl.join(tl.sum(tl.sum(kept_0, 1), 0), tl.sum(tl.sum(kept_1, 1), 0))
        of_right = tl.join(tl.sum(tl.sum(kept_2, 1), 0), tl.sum(tl.sum(kept_3, 1), 0))
        col_sum = tl.reshape(tl.permute(tl.join(of_left, of_right), (2, 1, 0)), (TILE,))
        col_max = tl.zeros((TILE,), tl.float32) + shift
        cols = tile_col * TILE + tl.arange(0, TILE)
        write_slot(col_table, num_row_tiles + strip, slots[1], cols, num_cols, col_max, col_sum)


@triton.jit(do_not_specialize=["row_start", "col_start", "num_rows", "num_cols", "id_offset",
                               "id_period"])  # fmt: skip
def left_out_kernel(
    z_rows, z_cols, ids_rows, ids_cols, scale, row_table, col_table, left_out,
    row_start, col_start, num_rows, num_cols, dim, id_offset, id_period,
    DIAGONAL: tl.constexpr, SERVES_ROWS: tl.constexpr, SERVES_COLS: tl.constexpr,
    TILE: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr,
    STRIP: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """What STRIPS programs left out, if anything: nearly always there is nothing to do."""
    block = row_start, col_start, num_rows, num_cols
    ids = ids_rows, ids_cols, id_offset, id_period
    _, num_col_tiles, num_strips, slots = strips_of(num_rows, num_cols, DIAGONAL, TILE, STRIP)
    first = tl.program_id(0) * STRIPS
    num_programs = num_strips * num_col_tiles
    programs = first + tl.arange(0, STRIPS)
    if tl.max(tl.load(left_out + programs, mask=programs < num_programs, other=0)) > 0:
        s = tl.load(scale)
        for at in tl.range(0, STRIPS, disable_licm=True):
            program = first + at
            strip, tile_col = tile_of(program, num_strips, num_col_tiles, False)
            tiles = tl.load(left_out + program, mask=program < num_programs, other=0)
            for place in tl.range(0, STRIP, disable_licm=True):
                if (tiles >> place) & 1:
                    tile_row = strip * STRIP + place
                    x, low = tile_logits(
                        z_rows, z_cols, s, tile_row * TILE, tile_col * TILE, block, ids, dim,
                        TILE, TILE_K, True, PRECISION, True,
                    )  # fmt: skip
                    write_tile(
                        x, low, tile_row, tile_col, row_table, col_table, slots, (None, None),
                        (None, None), block, True, DIAGONAL, SERVES_ROWS, SERVES_COLS, TILE,
                    )  # fmt: skip


def run_strips(
    problem: Problem, block: Block, tile: Tile, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Two launches, with these arguments of ``stats_kernel``; returns the tables to fold."""
    num_rows, num_cols = block.shape
    row_tiles, col_tiles = -(-num_rows // tile.size), -(-num_cols // tile.size)
    num_strips = -(-row_tiles // tile.strip)
    programs, scale = num_strips * col_tiles, problem.scale
    if block.diagonal:
        row_table = col_table = scale.new_zeros(1, 2, col_tiles + num_strips, num_rows)
    else:
        row_table = scale.new_zeros(1, 2, col_tiles, num_rows)
        col_table = scale.new_zeros(1, 2, row_tiles + num_strips, num_cols)
    warps = tile.warps_of("stats")
    named = {
        **arguments,
        **operands_by_tma(problem, tile),
        "row_table": row_table,
        "col_table": col_table,
        "left_out": scale.new_empty(programs, dtype=torch.int32),
        "STRIP": tile.strip,
        "num_warps": warps,
    }
    for name in NOT_BY_STRIPS:
        del named[name]
    start(strips_kernel, (programs,), {**named, "WARPS": warps})
    notes = (-(-programs // LEFT_OUT_STRIPS),)
    start(left_out_kernel, notes, {**named, "STRIPS": LEFT_OUT_STRIPS})
    return row_table, col_table
