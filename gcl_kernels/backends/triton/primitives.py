"""Device functions that every kernel here shares: geometry, product, mask, logits.

    x_ij = s * <z_row_i, z_col_j>,   -inf where (i, j) is no negative

with ``i, j`` counted from the block's corner. Products accumulate in float32; ``x``, statistics and
weights are float32, logarithms natural. (Logits in base 2 would save one multiplication for each
exponential, but round ``s`` once more, for negatives only: a loss of them and of positives whose
own logits are exact would see two scales.)

Which embeddings are of one sample: given ids are compared; under the default ids the equal pairs
are the diagonals ``j - i = id_offset (mod id_period)``, that is, row ``i`` carries the number
``(i + id_offset) mod id_period`` and column ``j`` carries ``j mod id_period``. A tile that no such
diagonal crosses, and that lies inside the block, is not masked at all.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gcl_kernels.backends.triton.tiles import (
    CHIPS,
    Tile,
    device_chip,
    num_tiles,
    pick_tile,
)
from gcl_kernels.blocks import Block
from gcl_kernels.problem import Problem

FINITE_MIN = tl.constexpr(-3.4028234663852886e38)

# |x| <= s <= 40: exp(x - s) >= e^-80 is a normal float32, and exp(s - lse) <= e^80 is finite.
MAX_BOUNDED_SCALE = tl.constexpr(40.0)


@triton.jit
def tile_of(program, num_row_tiles, num_col_tiles, DIAGONAL: tl.constexpr):
    """Tile (row, column) of a program; on a diagonal block the tiles with row <= column."""
    if DIAGONAL:
        # Rows r and T-1-r of the triangle hold T+1 tiles together: the triangle as a rectangle.
        row = program // (num_row_tiles + 1)
        col = program % (num_row_tiles + 1)
        upper = col < num_row_tiles - row
        return tl.where(upper, row, num_row_tiles - 1 - row), tl.where(upper, row + col, col - 1)
    return program // num_col_tiles, program % num_col_tiles


@triton.jit
def tile_product(
    z_rows, z_cols, rows, cols, dim,
    TILE: tl.constexpr, TILE_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<z_row, z_col> [TILE, TILE] in float32 of the rows and columns with these numbers."""
    ks = tl.arange(0, TILE_K)
    # A row's number times dim may exceed 2^31.
    row_pointers = z_rows + rows.to(tl.int64)[:, None] * dim + ks[None, :]
    col_pointers = z_cols + cols.to(tl.int64)[None, :] * dim + ks[:, None]
    product = tl.zeros((TILE, TILE), dtype=tl.float32)
    for k in range(0, dim, TILE_K):
        if EVEN_K:
            a = tl.load(row_pointers)
            b = tl.load(col_pointers)
        else:
            a = tl.load(row_pointers, mask=ks[None, :] < dim - k, other=0.0)
            b = tl.load(col_pointers, mask=ks[:, None] < dim - k, other=0.0)
        product = tl.dot(a, b, product, input_precision=PRECISION)
        row_pointers += TILE_K
        col_pointers += TILE_K
    return product


@triton.jit
def is_negative(rows, cols, num_rows, num_cols, row_ids, col_ids):
    """The mask rule: inside the block, and not of one sample. [TILE, TILE]."""
    inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    return inside & (row_ids[:, None] != col_ids[None, :])


@triton.jit
def may_hold_same_sample(first_row, first_col, id_offset, id_period, TILE: tl.constexpr):
    """Whether a diagonal of equal default ids crosses the tile.

    Its largest difference j - i lies ``past`` such a diagonal; its 2 TILE - 1 differences are
    consecutive.
    """
    first_id = (first_row + id_offset) % id_period
    past = (first_col + TILE - 1 + id_period - first_id) % id_period
    return past <= 2 * TILE - 2


@triton.jit
def tile_logits(
    z_rows, z_cols, ids_rows, ids_cols, scale, first_row, first_col,
    row_start, col_start, num_rows, num_cols, dim, id_offset, id_period,
    TILE: tl.constexpr, TILE_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``x`` [TILE, TILE] in float32 of the tile with this corner, counted from the block's."""
    rows = first_row + tl.arange(0, TILE)
    cols = first_col + tl.arange(0, TILE)
    # Padding repeats the last row and is masked below: the product's loads need no row mask.
    global_rows = row_start + tl.minimum(rows, num_rows - 1)
    global_cols = col_start + tl.minimum(cols, num_cols - 1)
    product = tile_product(
        z_rows, z_cols, global_rows, global_cols, dim, TILE, TILE_K, EVEN_K, PRECISION
    )
    x = product * scale
    if ids_rows is not None:
        row_ids = tl.load(ids_rows + global_rows)
        col_ids = tl.load(ids_cols + global_cols)
        negative = is_negative(rows, cols, num_rows, num_cols, row_ids, col_ids)
        x = tl.where(negative, x, -float("inf"))
    else:
        padded = (first_row + TILE > num_rows) | (first_col + TILE > num_cols)
        if padded | may_hold_same_sample(first_row, first_col, id_offset, id_period, TILE):
            row_ids = (rows + id_offset) % id_period
            col_ids = cols % id_period
            negative = is_negative(rows, cols, num_rows, num_cols, row_ids, col_ids)
            x = tl.where(negative, x, -float("inf"))
    return x


@triton.jit
def is_bounded(scale, UNIT_ROWS: tl.constexpr):
    """Whether |x| <= s is known and so small that s may replace every maximum. False for NaN."""
    return UNIT_ROWS & (scale >= 0) & (scale <= MAX_BOUNDED_SCALE)


def id_diagonals(block: Block) -> tuple[int, int]:
    """``(id_offset, id_period)`` such that ``j - i = id_offset (mod id_period)`` holds in the block
    exactly on its ``same_sample_offsets``."""
    rows, cols = block.shape
    offsets = block.same_sample_offsets
    if not offsets:
        # j - i is at most cols - 1 and at least 1 - rows = cols + 1 - id_period.
        return cols, rows + cols
    period = offsets[1] - offsets[0] if len(offsets) > 1 else rows + cols
    return offsets[0] % period, period


def launch(problem: Problem, block: Block) -> tuple[int, Tile, dict[str, Any]]:
    """Programs, tile, and the arguments that all kernels over the tiles of a block share."""
    z_rows = problem.z_rows
    rows, cols = block.shape
    # The interpreter, on the CPU, has no chip of its own.
    chip = device_chip(z_rows.get_device()) if z_rows.is_cuda else CHIPS["sm_80"]
    assert chip is not None  # why_unavailable would have said so
    # gfx950 multiplies no TF32; IEEE runs on the matrix cores of either AMD chip.
    ieee = chip.fast_float32 or torch.get_float32_matmul_precision() == "highest"
    is_float32 = z_rows.dtype == torch.float32
    dim = z_rows.shape[1]
    tile = pick_tile(chip, ieee and is_float32, dim, rows, cols, block.diagonal)
    tile_k = tile.slice_elements(z_rows.dtype)
    id_offset, id_period = id_diagonals(block)
    arguments = {
        "z_rows": z_rows,
        "z_cols": problem.z_cols,
        "ids_rows": problem.ids_rows,
        "ids_cols": problem.ids_cols,
        "scale": problem.scale,
        "row_start": block.row_start,
        "col_start": block.col_start,
        "num_rows": rows,
        "num_cols": cols,
        "dim": dim,
        "id_offset": id_offset,
        "id_period": id_period,
        "UNIT_ROWS": problem.unit_rows,
        "DIAGONAL": block.diagonal,
        "SERVES_ROWS": block.serves_rows,
        "SERVES_COLS": block.serves_cols,
        "TILE": tile.size,
        "TILE_K": tile_k,
        "EVEN_K": dim % tile_k == 0,
        "PRECISION": "ieee" if ieee or not is_float32 else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    return num_tiles(rows, cols, block.diagonal, tile.size), tile, arguments
