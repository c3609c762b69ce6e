"""Device functions that every kernel here shares: geometry, product, mask, logits.

    x_ij = s * <z_row_i, z_col_j>,   -inf where (i, j) is no negative

with ``i, j`` counted from the block's corner. Products, ``x``, statistics and weights are float32,
logarithms natural. (Logits in base 2 would save one multiplication for each exponential, but round
``s`` once more, for negatives only: a loss of them and of exact positives would see two scales.)

Which embeddings are of one sample: given ids are compared; under the default ids the equal pairs
are the diagonals ``j - i = id_offset (mod id_period)``, that is, row ``i`` carries the number
``(i + id_offset) mod id_period`` and column ``j`` carries ``j mod id_period``. A tile that no such
diagonal crosses, and that lies inside the block, is not masked at all.

Tuples that go together: ``block`` (row_start, col_start, num_rows, num_cols), ``ids`` (ids_rows,
ids_cols, id_offset, id_period; the first two None under the default ids), ``samples`` (of the
rows' embeddings, of the columns'), ``side`` (start, lines, length, samples: some rows or columns),
``options`` (limits of anchors, log weights of candidates, each None where there are none).
"""

# Device code builds its tuples one entry at a time.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gcl_kernels.backends.triton.tiles import CHIPS, Tile, device_chip, num_tiles, pick_tile
from gcl_kernels.blocks import Block
from gcl_kernels.problem import FusedProblem, Problem, Workspace, allows_tf32

FINITE_MIN = tl.constexpr(-3.4028234663852886e38)

# With 8 rows, the 132 tiles that an H100 holds at once read 8 + 17 strips of operands; row by row
# of a block they would read 3 + 64.
GROUP_ROWS = tl.constexpr(8)

# How far logits may lie below what is subtracted from all of a tile: e^-80 is a normal float32.
MAX_RANGE = tl.constexpr(80.0)
SMALLEST_SUM = tl.constexpr(math.exp(-80.0))

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exponential(x):
    """``e^x`` in one multiplication and one ``ex2.approx.ftz``: zero below 2^-126.

    ``tl.exp`` rounds the same product, and keeps what is below 2^-126 by a comparison and two more
    multiplications of each number.
    """
    return tl.exp2(x * LOG2_E)


@triton.jit
def tile_of(program, num_row_tiles, num_col_tiles, DIAGONAL: tl.constexpr):
    """Tile (row, column) of a program; on a diagonal block the tiles with row <= column.

    Programs that run at the same time share operands: consecutive ones go down GROUP_ROWS rows of
    tiles before they turn to the next column.
    """
    # The triangle as a rectangle: its rows r and T-1-r hold T+1 tiles together (r and T-r hold T
    # where T is odd).
    odd = num_row_tiles % 2
    height = (num_row_tiles + 1) // 2 if DIAGONAL else num_row_tiles
    width = num_row_tiles + 1 - odd if DIAGONAL else num_col_tiles
    group = program // (GROUP_ROWS * width)
    within = program % (GROUP_ROWS * width)
    group_rows = tl.minimum(height - group * GROUP_ROWS, GROUP_ROWS)
    row = group * GROUP_ROWS + within % group_rows
    col = within // group_rows
    if DIAGONAL:
        upper = col < num_row_tiles - row
        row, col = (
            tl.where(upper, row, num_row_tiles - 1 + odd - row),
            tl.where(upper, row + col, col - 1 + odd),
        )
    return row, col


@triton.jit
def tile_product(
    z_rows, z_cols, rows, more_rows, cols, dim,
    TILE_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<z_row, z_col> in float32 of the rows and columns with these numbers (int64: times dim they
    may exceed 2^31), and of ``more_rows`` with the same columns where they are not None."""
    ks = tl.arange(0, TILE_K)
    a_pointers = z_rows + rows[:, None] * dim + ks[None, :]
    b_pointers = z_cols + cols[None, :] * dim + ks[:, None]
    product = tl.zeros((rows.shape[0], cols.shape[0]), dtype=tl.float32)
    more = product
    if more_rows is not None:
        more_pointers = z_rows + more_rows[:, None] * dim + ks[None, :]
    for k in range(0, dim, TILE_K):
        b = load_slice(b_pointers, ks[:, None], dim - k, EVEN_K)
        a = load_slice(a_pointers, ks[None, :], dim - k, EVEN_K)
        product = tl.dot(a, b, product, input_precision=PRECISION)
        if more_rows is not None:
            a = load_slice(more_pointers, ks[None, :], dim - k, EVEN_K)
            more = tl.dot(a, b, more, input_precision=PRECISION)
            more_pointers += TILE_K
        a_pointers += TILE_K
        b_pointers += TILE_K
    return product, more


@triton.jit
def tma_product(
    z_rows, z_cols, first_row, first_col, dim,
    TILE: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same of descriptors of all embeddings, from these rows and columns on: zero beyond the
    last, other embeddings' beyond the block."""
    product = tl.zeros((TILE, TILE), dtype=tl.float32)
    for k in range(0, dim, TILE_K):
        a = z_rows.load([first_row, k])
        b = z_cols.load([first_col, k])
        product = tl.dot(a, b.T, product, input_precision=PRECISION)
    return product


@triton.jit
def load_slice(pointers, ks, remaining, EVEN_K: tl.constexpr):
    if EVEN_K:
        part = tl.load(pointers)
    else:
        part = tl.load(pointers, mask=ks < remaining, other=0.0)
    return part


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
def needs_mask(first_row, first_col, block, ids, TILE: tl.constexpr):
    """Whether a tile may hold anything but negatives."""
    _, _, num_rows, num_cols = block
    ids_rows, _, id_offset, id_period = ids
    if ids_rows is not None:
        needs = True
    else:
        padded = (first_row + TILE > num_rows) | (first_col + TILE > num_cols)
        needs = padded | may_hold_same_sample(first_row, first_col, id_offset, id_period, TILE)
    return needs


@triton.jit
def tile_ids(rows, cols, block, ids):
    """Numbers of a tile's rows and columns that are equal where both are of one sample; outside the
    block, where is_negative does not ask for them, any."""
    row_start, col_start, num_rows, num_cols = block
    ids_rows, ids_cols, id_offset, id_period = ids
    if ids_rows is not None:
        row_ids = tl.load(ids_rows + row_start + rows, mask=rows < num_rows)
        col_ids = tl.load(ids_cols + col_start + cols, mask=cols < num_cols)
    else:
        row_ids = (rows + id_offset) % id_period
        col_ids = cols % id_period
    return row_ids, col_ids


@triton.jit
def tile_logits(
    z_rows, z_cols, scale, first_row, first_col, block, ids, dim,
    TILE: tl.constexpr, TILE_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """``x`` [TILE, TILE] in float32 of the tile with this corner, counted from the block's; and the
    smallest of it and of what is masked."""
    row_start, col_start, num_rows, num_cols = block
    rows = first_row + tl.arange(0, TILE)
    cols = first_col + tl.arange(0, TILE)
    if TMA:
        product = tma_product(
            z_rows, z_cols, row_start + first_row, col_start + first_col, dim,
            TILE, TILE_K, PRECISION,
        )  # fmt: skip
    else:
        # Padding repeats the last row and is masked below: the product's loads need no row mask.
        global_rows = row_start + tl.minimum(rows, num_rows - 1).to(tl.int64)
        global_cols = col_start + tl.minimum(cols, num_cols - 1).to(tl.int64)
        product, _ = tile_product(
            z_rows, z_cols, global_rows, None, global_cols, dim, TILE_K, EVEN_K, PRECISION
        )
    x = product * scale
    low = tl.min(x)
    if needs_mask(first_row, first_col, block, ids, TILE):
        row_ids, col_ids = tile_ids(rows, cols, block, ids)
        negative = is_negative(rows, cols, num_rows, num_cols, row_ids, col_ids)
        x = tl.where(negative, x, -float("inf"))
    return x, low


@triton.jit
def fused_products(
    z_rows, z_cols, first_row, first_col, block, samples, dim,
    TILE: tl.constexpr, TILE_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    DEALT: tl.constexpr,
):  # fmt: skip
    """``y_bc = <z_b^j, z_c^k>``: for the left and the right half of the columns the four tiles
    y_00, y_01, y_10, y_11, each [TILE, TILE / 2] in float32. Embeddings [2, samples, dim].

    One product's columns are numbered (quarter in a half, half, place, c), the last fastest. A
    thread holds both c and both halves of its rows, so that splitting them moves nothing; only on
    which thread a quarter lies depends on the chip. DEALT, the two bases of eight samples are rows
    r and r + 8 of a warp, of which a thread holds both, and one product serves both bases.
    """
    QUARTER: tl.constexpr = TILE // 4
    row_start, col_start, num_rows, num_cols = block
    row_samples, col_samples = samples
    numbers = tl.arange(0, 2 * TILE)
    places = numbers // 2 % QUARTER
    halves = numbers // (2 * QUARTER) % 2
    quarters = numbers // (4 * QUARTER)
    cols = first_col + halves * (2 * QUARTER) + quarters * QUARTER + places
    cols_c = col_start + tl.minimum(cols, num_cols - 1).to(tl.int64) + numbers % 2 * col_samples
    if DEALT:
        rows = first_row + numbers // 16 * 8 + numbers % 8
        rows_b = row_start + tl.minimum(rows, num_rows - 1).to(tl.int64)
        rows_b += numbers // 8 % 2 * row_samples
        y, _ = tile_product(
            z_rows, z_cols, rows_b, None, cols_c, dim, TILE_K, EVEN_K, PRECISION
        )  # fmt: skip
        by_base = tl.permute(tl.reshape(y, (TILE // 8, 2, 8, 2 * TILE)), (0, 2, 3, 1))
        y_0, y_1 = tl.split(by_base)
        y_0, y_1 = tl.reshape(y_0, (TILE, 2 * TILE)), tl.reshape(y_1, (TILE, 2 * TILE))
    else:
        rows = first_row + tl.arange(0, TILE)
        rows_0 = row_start + tl.minimum(rows, num_rows - 1).to(tl.int64)
        y_0, y_1 = tile_product(
            z_rows, z_cols, rows_0, rows_0 + row_samples, cols_c, dim, TILE_K, EVEN_K, PRECISION
        )  # fmt: skip
    left_00, left_01, right_00, right_01 = split_columns(y_0, TILE)
    left_10, left_11, right_10, right_11 = split_columns(y_1, TILE)
    return (left_00, left_01, left_10, left_11), (right_00, right_01, right_10, right_11)


@triton.jit
def load_products(kept, rows, first_col, block, TILE: tl.constexpr):
    """The same of products [2, 2, rows, columns of the block] that stayed."""
    num_rows, num_cols = block[2], block[3]
    part = num_rows.to(tl.int64) * num_cols
    products = ()
    for half in tl.static_range(2):
        cols = first_col + half * (TILE // 2) + tl.arange(0, TILE // 2)
        of_half = ()
        for at in tl.static_range(4):
            y = load_kept(kept + at * part, rows, cols, num_rows, num_cols)
            of_half = of_half + (y,)
        products = products + (of_half,)
    return products


@triton.jit
def split_columns(y, TILE: tl.constexpr):
    """(left, c = 0), (left, c = 1), (right, 0), (right, 1) of a product [TILE, 2 TILE]."""
    left, right = tl.split(tl.permute(tl.reshape(y, (TILE, 2, 2, TILE // 2)), (0, 1, 3, 2)))
    left_0, left_1 = tl.split(tl.reshape(left, (TILE, TILE // 2, 2)))
    right_0, right_1 = tl.split(tl.reshape(right, (TILE, TILE // 2, 2)))
    return left_0, left_1, right_0, right_1


@triton.jit
def store_tile(out, tile, rows, cols, num_rows, pitch, width):
    """Rows lie ``pitch`` apart. What pads them to ``width``, a multiple of 16, is written too
    (zeros): such a limit leaves whole vectors to store."""
    place = out + rows.to(tl.int64)[:, None] * pitch + cols[None, :]
    tl.store(place, tile, mask=(rows < num_rows)[:, None] & (cols < width)[None, :])


@triton.jit
def load_kept(kept, rows, cols, num_rows, num_cols):
    """A tile that stayed since the forward pass; outside the block zeros, whose weights are zero
    since their gradients are."""
    place = kept + rows.to(tl.int64)[:, None] * num_cols + cols[None, :]
    inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def halves(x):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def masked(x, mask):
    """``x``, -inf where masked. ``mask``: the term to add, or whether any may be masked and what
    is_negative compares."""
    if len(mask) == 1:
        x += mask[0]
    elif mask[0]:
        negative = is_negative(mask[1], mask[2], mask[3], mask[4], mask[5], mask[6])
        x = tl.where(negative, x, -float("inf"))
    return x


@triton.jit
def load_lines(values, side, VIEW: tl.constexpr):
    """What a table [views, samples] has of some rows or columns of one view, zero outside."""
    start, lines, length, samples = side
    place = values + start + lines
    if VIEW > 0:
        place += VIEW * samples.to(tl.int64)
    return tl.load(place, mask=lines < length, other=0.0)


@triton.jit
def terms(
    x, options, anchors, candidates,
    ANCHOR: tl.constexpr, CANDIDATE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Logits as terms of the anchors along AXIS: with their candidates' log weights, -inf above
    their limits.

    Args:
        anchors, candidates: a ``side`` each; ANCHOR, CANDIDATE: their views.
    """
    limits, log_weights = options
    within = x
    if log_weights is not None:
        x += tl.expand_dims(load_lines(log_weights, candidates, CANDIDATE), AXIS)
    if limits is not None:
        limit = tl.expand_dims(load_lines(limits, anchors, ANCHOR), 1 - AXIS)
        x = tl.where(within > limit, -float("inf"), x)
    return x


@triton.jit
def load_coefficients(coefficients, side, BASES: tl.constexpr):
    """For each view its two coefficients [lines]; zeros, unread, for a view that is a base."""
    start, lines, length, samples = side
    views = ()
    for v in tl.static_range(len(BASES)):
        if BASES[v] is None:
            place = coefficients + 2 * v * samples.to(tl.int64) + start + lines
            of_0 = tl.load(place, mask=lines < length, other=0.0)
            of_1 = tl.load(place + samples, mask=lines < length, other=0.0)
            views = views + ((of_0, of_1),)
        else:
            views = views + ((0.0, 0.0),)
    return views


@triton.jit
def fused_tile(
    z_rows, z_cols, kept, coefficients_rows, tile_row, tile_col, block, samples, ids, dim,
    BASES: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, DEALT: tl.constexpr,
):  # fmt: skip
    """Of a tile: its rows, as a ``side``, and their coefficients, the products of either half of
    its columns, from ``kept`` if that is not None, and whether it needs a mask."""
    first_row, first_col = tile_row * TILE, tile_col * TILE
    rows = first_row + tl.arange(0, TILE)
    if kept is not None:
        products = load_products(kept, rows, first_col, block, TILE)
    else:
        products = fused_products(
            z_rows, z_cols, first_row, first_col, block, samples, dim,
            TILE, TILE_K, EVEN_K, PRECISION, DEALT,
        )  # fmt: skip
    side = block[0], rows, block[2], samples[0]
    of_rows = load_coefficients(coefficients_rows, side, BASES)
    return side, of_rows, products, needs_mask(first_row, first_col, block, ids, TILE)


@triton.jit
def half_columns(
    half, rows, needs, coefficients_cols, tile_col, block, samples, ids,
    BASES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of half of a tile's columns: these, as a ``side``, their coefficients, and what ``masked``
    takes."""
    _, col_start, num_rows, num_cols = block
    cols = tile_col * TILE + half * (TILE // 2) + tl.arange(0, TILE // 2)
    side = col_start, cols, num_cols, samples[1]
    of_cols = load_coefficients(coefficients_cols, side, BASES)
    row_ids, col_ids = tile_ids(rows, cols, block, ids)
    if ids[0] is not None:
        # Every tile is masked: as a term, which joins the multiplication by s. A select for each
        # pair of views, all from one comparison, spills on sm_90 with Triton 3.9.
        negative = is_negative(rows, cols, num_rows, num_cols, row_ids, col_ids)
        mask = (tl.where(negative, 0.0, -float("inf")),)
    else:
        mask = (needs, rows, cols, num_rows, num_cols, row_ids, col_ids)
    return side, of_cols, mask


@triton.jit
def combine(of_0, of_1, coefficients, BASE: tl.constexpr, AXIS: tl.constexpr):
    """A view's tile from those of its bases: coefficients run along AXIS."""
    if BASE == 0:
        combined = of_0
    elif BASE == 1:
        combined = of_1
    else:
        combined = (
            tl.expand_dims(coefficients[0], 1 - AXIS) * of_0
            + tl.expand_dims(coefficients[1], 1 - AXIS) * of_1
        )
    return combined


def is_plain(problem: Problem, block: Block, workspace: Workspace) -> bool:
    """Whether a block has neither log weights, nor limits, nor a kept tile, all of which take
    registers that some tiles do not have."""
    return not problem.one_sided and workspace.kept(block) is None


def operands_by_tma(problem: Problem, tile: Tile) -> dict[str, TensorDescriptor]:
    """``z_rows`` and ``z_cols`` as descriptors."""
    shape = [tile.size, tile.slice_elements(problem.compute_dtype)]
    rows = cols = TensorDescriptor.from_tensor(problem.z_rows, shape)
    if problem.z_cols is not problem.z_rows:
        cols = TensorDescriptor.from_tensor(problem.z_cols, shape)
    return {"z_rows": rows, "z_cols": cols}


def launch(
    problem: Problem, block: Block, workspace: Workspace, small: bool = False
) -> tuple[int, Tile, dict[str, Any]]:
    """Programs, tile, and the arguments that all kernels over the tiles of a block share.

    Args:
        small: take the small tile whatever the block's size.
    """
    z_rows = problem.z_rows
    # The interpreter, on the CPU, has no chip of its own.
    chip = device_chip(z_rows.get_device()) if z_rows.is_cuda else CHIPS["sm_80"]
    assert chip is not None  # why_not would have said so
    # gfx950 multiplies no TF32; IEEE runs on the matrix cores of either AMD chip.
    ieee = chip.fast_float32 or not allows_tf32()
    is_float32 = z_rows.dtype == torch.float32
    dim = z_rows.shape[-1]
    num_rows, num_cols = block.shape
    fused = isinstance(problem, FusedProblem)
    shape = (0, 0) if small else (num_rows, num_cols)
    tile = pick_tile(chip, ieee and is_float32, dim, *shape, block.diagonal, fused)
    tile_k = tile.slice_elements(z_rows.dtype)
    id_offset, id_period = block.id_diagonals
    arguments = {
        "z_rows": z_rows,
        "z_cols": problem.z_cols,
        "ids_rows": problem.ids_rows,
        "ids_cols": problem.ids_cols,
        "scale": problem.scale,
        "row_start": block.row_start,
        "col_start": block.col_start,
        "num_rows": num_rows,
        "num_cols": num_cols,
        "id_offset": id_offset,
        "id_period": id_period,
        "dim": dim,
        "log_weights_rows": problem.log_weights_rows,
        "log_weights_cols": problem.log_weights_cols,
        "limits_rows": problem.limits_rows,
        "limits_cols": problem.limits_cols,
        "kept": workspace.kept(block),
        "ONE_SIDED": problem.one_sided,
        "DIAGONAL": block.diagonal,
        "TILE": tile.size,
        "TILE_K": tile_k,
        "EVEN_K": dim % tile_k == 0,
        "PRECISION": "ieee" if ieee or not is_float32 else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    if isinstance(problem, FusedProblem):
        arguments |= {
            "coefficients_rows": problem.coefficients_rows,
            "coefficients_cols": problem.coefficients_cols,
            "row_samples": z_rows.shape[1],
            "col_samples": problem.z_cols.shape[1],
            "BASES": problem.bases,
            "CANDIDATES": problem.candidates,
            "DEALT": tile.dealt,
        }
    else:
        arguments |= {"SERVES_ROWS": block.serves_rows, "SERVES_COLS": block.serves_cols}
    return num_tiles(num_rows, num_cols, block.diagonal, tile.size), tile, arguments
