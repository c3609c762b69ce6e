"""``block_weights``: the weights ``H`` of a block, from logits that never reach memory.

One program computes one tile ``x`` (see primitives) and writes

    H_pq = g_p exp(x_pq - lse_p) + g_q exp(x_pq - lse_q)

in the compute dtype, each term where the block serves that side. ``lse = +inf`` (a row without a
negative) gives weight zero. A diagonal block computes the tiles on and above its diagonal and
writes the others as transposes.

Log weights and limits change ``x_pq`` for each side (see primitives).

Two exponentials an entry: one, of ``x`` less a number of the whole tile, times factors of rows and
columns takes as many instructions, since a thread holds 32 columns' factors for 64 entries.

Inputs: lse, g float32 [M]. Output: [rows, columns of the block], rounded once, from float32;
its rows are padded to an aligned pitch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gcl_kernels.backends.triton.launching import start
from gcl_kernels.backends.triton.primitives import (
    exponential,
    halves,
    is_plain,
    launch,
    load_kept,
    load_lines,
    operands_by_tma,
    store_tile,
    terms,
    tile_logits,
    tile_of,
)
from gcl_kernels.backends.triton.tiles import Tile
from gcl_kernels.blocks import Block
from gcl_kernels.problem import Lines, Problem, Workspace


@triton.jit
def sides(of_rows, of_cols, SERVES_ROWS: tl.constexpr, SERVES_COLS: tl.constexpr):
    """The sum of the sides that the block serves. (Adding a zero instead is not free.)"""
    if SERVES_ROWS and SERVES_COLS:
        served = of_rows + of_cols
    elif SERVES_ROWS:
        served = of_rows
    else:
        served = of_cols
    return served


@triton.jit
def weights_of(
    x_p, x_q, lse_p, lse_q, g_p, g_q, SERVES_ROWS: tl.constexpr, SERVES_COLS: tl.constexpr
):  # fmt: skip
    """``H`` in float32 of logits [P, Q], as terms of the rows and of the columns, and of lse and g
    of rows [P] and columns [Q]."""
    of_rows = g_p[:, None] * exponential(x_p - lse_p[:, None])
    of_cols = g_q[None, :] * exponential(x_q - lse_q[None, :])
    return sides(of_rows, of_cols, SERVES_ROWS, SERVES_COLS)


# num_cols stays: where it is a multiple of 16 lse and g arrive in vectors, and the large tile takes
# 128 registers on sm_90 in place of 238.
@triton.jit(do_not_specialize=["row_start", "col_start", "num_rows", "id_offset", "id_period"])
def weights_kernel(
    z_rows, z_cols, ids_rows, ids_cols, scale, lse_rows, lse_cols, grad_rows, grad_cols, out,
    mirror, kept, log_weights_rows, log_weights_cols, limits_rows, limits_cols,
    pitch, row_start, col_start, num_rows, num_cols, dim, id_offset, id_period,
    ONE_SIDED: tl.constexpr, DIAGONAL: tl.constexpr,
    SERVES_ROWS: tl.constexpr, SERVES_COLS: tl.constexpr,
    TILE: tl.constexpr, TILE_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    block = row_start, col_start, num_rows, num_cols
    ids = ids_rows, ids_cols, id_offset, id_period
    num_row_tiles = tl.cdiv(num_rows, TILE)
    num_col_tiles = tl.cdiv(num_cols, TILE)
    tile_row, tile_col = tile_of(tl.program_id(0), num_row_tiles, num_col_tiles, DIAGONAL)
    rows = tile_row * TILE + tl.arange(0, TILE)
    if kept is not None:
        all_cols = tile_col * TILE + tl.arange(0, TILE)
        x = load_kept(kept, rows, all_cols, num_rows, num_cols)
    else:
        x, _ = tile_logits(
            z_rows, z_cols, tl.load(scale), tile_row * TILE, tile_col * TILE, block, ids, dim,
            TILE, TILE_K, EVEN_K, PRECISION, TMA,
        )  # fmt: skip
    of_rows = row_start, rows, num_rows, num_rows
    lse_p = load_lines(lse_rows, of_rows, 0)
    g_p = load_lines(grad_rows, of_rows, 0)
    # A thread holds many columns. lse and g of all of them at once would cost more registers than
    # the logits; a quarter at a time spills nowhere.
    QUARTER: tl.constexpr = TILE // 4
    left, right = halves(x)
    quarters = halves(left) + halves(right)
    for quarter in tl.static_range(4):
        cols = tile_col * TILE + quarter * QUARTER + tl.arange(0, QUARTER)
        of_cols = col_start, cols, num_cols, num_cols
        lse_q = load_lines(lse_cols, of_cols, 0)
        g_q = load_lines(grad_cols, of_cols, 0)
        x = quarters[quarter]
        h = weights_of(
            terms(x, (limits_rows, log_weights_cols), of_rows, of_cols, 0, 0, 0),
            terms(x, (limits_cols, log_weights_rows), of_cols, of_rows, 0, 0, 1),
            lse_p, lse_q, g_p, g_q, SERVES_ROWS, SERVES_COLS,
        )  # fmt: skip
        if TMA:
            h = h.to(out.dtype)
            first_col = tile_col * TILE + quarter * QUARTER
            out.store([tile_row * TILE, first_col], h)
            if DIAGONAL:
                if tile_row != tile_col:
                    mirror.store([first_col, tile_row * TILE], tl.trans(h))
        else:
            h = h.to(out.dtype.element_ty)
            store_tile(out, h, rows, cols, num_rows, pitch, pitch)
            if DIAGONAL:
                if tile_row != tile_col:
                    store_tile(out, tl.trans(h), cols, rows, num_rows, pitch, pitch)


def _by_tma(problem: Problem, tile: Tile, out: Tensor, diagonal: bool) -> dict[str, Any]:
    """What of the arguments differs where embeddings arrive and weights leave by TMA."""
    num_rows, pitch = out.shape[0], out.stride(0)

    def stored(*shape: int) -> TensorDescriptor:
        # As wide as its pitch: what pads it is written too.
        return TensorDescriptor(out, [num_rows, pitch], [pitch, 1], list(shape))

    return {
        **operands_by_tma(problem, tile),
        "out": stored(tile.size, tile.size // 4),
        "mirror": stored(tile.size // 4, tile.size) if diagonal else None,
        "TMA": True,
        "num_warps": tile.tma_warps,
    }


def block_weights(
    problem: Problem, block: Block, rows: Lines, cols: Lines, workspace: Workspace
) -> Tensor:
    """One launch; the result is valid until the next call with this workspace."""
    out = workspace.tile(0, block.shape, problem.compute_dtype)
    programs, tile, arguments = launch(problem, block, workspace)
    arguments |= {
        "lse_rows": rows.lse, "lse_cols": cols.lse, "grad_rows": rows.grad, "grad_cols": cols.grad,
        "out": out, "mirror": None, "pitch": out.stride(0), "TMA": False,
    }  # fmt: skip
    if tile.tma_warps and is_plain(problem, block, workspace):
        arguments |= _by_tma(problem, tile, out, block.diagonal)
    with torch.cuda.device_of(out):
        start(weights_kernel, (programs,), arguments)
    return out
