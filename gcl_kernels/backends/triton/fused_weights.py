"""``fused_block_weights``: the folded weights ``F`` of a block, and what its embeddings project.

One program computes the four products of a tile (see primitives) and, for every pair of views,

    t_vw = <z_v^j, z_w^k> = sum_bc coef[v,b,j] coef[w,c,k] y_bc          x_vw = s * t_vw
    H_vw = C[v][w] g_vj exp(x_vw - lse_vj) + C[w][v] g_wk exp(x_vw - lse_wk)

in registers, and writes what the gradient products need:

    F_bc = sum_vw coef[v,b,j] coef[w,c,k] H_vw                           in the compute dtype
    inner_v,b,j = sum_wk H_vw <z_b^j, z_w^k>        inner_w,c,k = sum_vj H_vw <z_v^j, z_c^k>

``inner`` of one tile goes to a slot of a table, and a second kernel adds the slots in their order.
A view that is a base needs its inner product with that base only, where ``<z_b^j, z_w^k> = t_vw``.

Views of the columns come one after the other, the combinations first: their two sums over the rows'
views, ``G_b = sum_v coef[v,b,j] H_vw``, then cost no registers beside those of ``F``. A view that
is base ``c`` adds its ``G_b`` to ``F_bc`` in place; ``F_0c`` and ``F_1c`` are written before the
views of the other base begin, which can then have their registers.

Exponentials, ``lse = +inf`` and diagonal blocks as in ``weights``: ``F_bc[k, j] = F_cb[j, k]``.
Inputs: lse, g float32 [V, N]. Output: [2, 2, rows, columns], rows padded to an aligned pitch;
``inner`` float32 [V, 2, N], added to.
"""

# Device code builds its tuples one entry at a time.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcl_kernels.backends.triton.launching import start
from gcl_kernels.backends.triton.primitives import (
    combine,
    fused_tile,
    half_columns,
    is_plain,
    launch,
    load_lines,
    masked,
    store_tile,
    terms,
    tile_of,
)
from gcl_kernels.backends.triton.slots import FOLD_NUMBERS, fold, new_tables
from gcl_kernels.backends.triton.weights import weights_of
from gcl_kernels.blocks import Block
from gcl_kernels.problem import FusedProblem, Lines, Workspace


@triton.jit
def load_view(lse, grad, side, VIEW: tl.constexpr):
    """lse and g of one view's embeddings."""
    return load_lines(lse, side, VIEW), load_lines(grad, side, VIEW)


@triton.jit
def write_inner(table, line, slot, num_slots, side, values):
    """Store one tile's sums of one (view, base), which is ``line``."""
    _, lines, length, _ = side
    place = table + (line * num_slots + slot.to(tl.int64)) * length + lines
    tl.store(place, values, mask=lines < length)


@triton.jit
def column_view(
    t_0, t_1, g_0, g_1, of_rows, row_terms, col_terms, row_inner, s, mask,
    for_rows, for_cols, row_side, col_side,
    VIEW: tl.constexpr, BASES: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """All pairs of the rows' views with one view of the columns, ``t_b = <z_b^j, z_w^k>``.

    Returns ``g_0`` and ``g_1`` with ``G_0`` and ``G_1`` added, the sum over v of ``H_vw t_vw``, and
    ``row_inner`` with its share.
    """
    lse_q, g_q = col_terms
    ht = tl.zeros(t_0.shape, tl.float32)
    new_row_inner = ()
    for v in tl.static_range(len(BASES)):
        inner_0 = row_inner[2 * v]
        inner_1 = row_inner[2 * v + 1]
        if CANDIDATES[v][VIEW] or CANDIDATES[VIEW][v]:
            t = combine(t_0, t_1, of_rows[v], BASES[v], 0)
            x = masked(s * t, mask)
            lse_p, g_p = row_terms[v]
            h = weights_of(
                terms(x, for_rows, row_side, col_side, v, VIEW, 0),
                terms(x, for_cols, col_side, row_side, VIEW, v, 1),
                lse_p, lse_q, g_p, g_q, CANDIDATES[v][VIEW], CANDIDATES[VIEW][v],
            )  # fmt: skip
            ht += h * t
            if BASES[v] is None:
                inner_0 += tl.sum(h * t_0, 1)
                inner_1 += tl.sum(h * t_1, 1)
                g_0 += of_rows[v][0][:, None] * h
                g_1 += of_rows[v][1][:, None] * h
            elif BASES[v] == 0:
                inner_0 += tl.sum(h * t, 1)
                g_0 += h
            else:
                inner_1 += tl.sum(h * t, 1)
                g_1 += h
        new_row_inner = new_row_inner + (inner_0, inner_1)
    return g_0, g_1, ht, new_row_inner


@triton.jit(do_not_specialize=["row_start", "col_start", "num_rows", "num_cols", "id_offset",
                               "id_period", "row_samples", "col_samples"])  # fmt: skip
def fused_weights_kernel(
    z_rows, z_cols, coefficients_rows, coefficients_cols, ids_rows, ids_cols, scale,
    lse_rows, lse_cols, grad_rows, grad_cols, out, row_table, col_table, kept,
    log_weights_rows, log_weights_cols, limits_rows, limits_cols,
    pitch, width, of_base, of_other_base,
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
        z_rows, z_cols, kept, coefficients_rows, tile_row, tile_col, block, samples, ids, dim,
        BASES, TILE, TILE_K, EVEN_K, PRECISION, DEALT,
    )  # fmt: skip
    for_rows = limits_rows, log_weights_cols
    for_cols = limits_cols, log_weights_rows
    rows, mirrored = row_side[1], False
    if DIAGONAL:
        mirrored = tile_row != tile_col
    row_terms = ()
    row_inner = ()
    for v in tl.static_range(len(BASES)):
        row_terms = row_terms + (load_view(lse_rows, grad_rows, row_side, v),)
        row_inner = row_inner + (tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32))
    of_base = of_base.to(tl.int64)
    # Half of the columns at a time: F of all would not fit the registers beside the products.
    for half in tl.static_range(2):
        col_side, of_cols, mask = half_columns(
            half, rows, needs, coefficients_cols, tile_col, block, samples, ids, BASES, TILE
        )
        cols = col_side[1]
        y_00, y_01, y_10, y_11 = products[half]
        zeros = tl.zeros(y_00.shape, tl.float32)
        f_00, f_01, f_10, f_11 = zeros, zeros, zeros, zeros
        for w in tl.static_range(len(BASES)):
            if BASES[w] is None:
                col_terms = load_view(lse_cols, grad_cols, col_side, w)
                g_0, g_1, _, row_inner = column_view(
                    combine(y_00, y_01, of_cols[w], None, 1),
                    combine(y_10, y_11, of_cols[w], None, 1),
                    zeros, zeros, of_rows, row_terms, col_terms, row_inner, s, mask,
                    for_rows, for_cols, row_side, col_side, w, BASES, CANDIDATES,
                )  # fmt: skip
                f_00 += of_cols[w][0][None, :] * g_0
                f_01 += of_cols[w][1][None, :] * g_0
                f_10 += of_cols[w][0][None, :] * g_1
                f_11 += of_cols[w][1][None, :] * g_1
                col_0 = tl.sum(g_0 * y_00 + g_1 * y_10, 0)
                col_1 = tl.sum(g_0 * y_01 + g_1 * y_11, 0)
                if not DIAGONAL or mirrored:
                    write_inner(col_table, 2 * w, tile_row, num_row_tiles, col_side, col_0)
                    write_inner(col_table, 2 * w + 1, tile_row, num_row_tiles, col_side, col_1)
        folded = ((f_00, f_10), (f_01, f_11))
        towards = ((y_00, y_10), (y_01, y_11))
        for c in tl.static_range(2):
            f_0, f_1 = folded[c]
            for w in tl.static_range(len(BASES)):
                if BASES[w] == c:
                    col_terms = load_view(lse_cols, grad_cols, col_side, w)
                    f_0, f_1, ht, row_inner = column_view(
                        towards[c][0], towards[c][1], f_0, f_1, of_rows, row_terms,
                        col_terms, row_inner, s, mask, for_rows, for_cols, row_side, col_side, w,
                        BASES, CANDIDATES,
                    )  # fmt: skip
                    col_c = tl.sum(ht, 0)
                    if not DIAGONAL or mirrored:
                        write_inner(col_table, 2 * w + c, tile_row, num_row_tiles, col_side, col_c)
            f_0 = f_0.to(out.dtype.element_ty)
            f_1 = f_1.to(out.dtype.element_ty)
            part = out + c * of_other_base
            store_tile(part, f_0, rows, cols, num_rows, pitch, width)
            store_tile(part + of_base, f_1, rows, cols, num_rows, pitch, width)
            if DIAGONAL:
                if mirrored:
                    part = out + c * of_base
                    store_tile(part, tl.trans(f_0), cols, rows, num_rows, pitch, width)
                    part += of_other_base
                    store_tile(part, tl.trans(f_1), cols, rows, num_rows, pitch, width)
    for v in tl.static_range(len(BASES)):
        for b in tl.static_range(2):
            if BASES[v] is None or BASES[v] == b:
                of_base = row_inner[2 * v + b]
                write_inner(row_table, 2 * v + b, tile_col, num_col_tiles, row_side, of_base)


@triton.jit
def add_slots(
    table, line, num_slots, length, program, inner, start, samples,
    LINES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Add all slots of LINES embeddings of one (view, base) to ``inner``."""
    lines = program * LINES + tl.arange(0, LINES)
    inside = lines < length
    place = inner + line * samples.to(tl.int64) + start + lines
    total = tl.load(place, mask=inside, other=0.0)
    for first in range(0, num_slots, SLOTS):
        slots = first + tl.arange(0, SLOTS)
        entries = table + (line * num_slots.to(tl.int64) + slots)[:, None] * length + lines[None, :]
        filled = (slots < num_slots)[:, None] & inside[None, :]
        total += tl.sum(tl.load(entries, mask=filled, other=0.0), 0)
    tl.store(place, total, mask=inside)


@triton.jit(do_not_specialize=FOLD_NUMBERS)
def inner_kernel(
    row_table, col_table, inner_rows, inner_cols,
    row_slots, col_slots, row_start, col_start, num_rows, num_cols, row_samples, col_samples,
    row_programs, BASES: tl.constexpr, LINES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The first ``row_programs`` programs add rows, the others columns; 2 view + base on axis 1."""
    program = tl.program_id(0)
    line = tl.program_id(1)
    wanted = False
    for v in tl.static_range(len(BASES)):
        for b in tl.static_range(2):
            if BASES[v] is None or BASES[v] == b:
                wanted = wanted | (line == 2 * v + b)
    if wanted:
        if program < row_programs:
            add_slots(row_table, line, row_slots, num_rows, program, inner_rows, row_start,
                      row_samples, LINES, SLOTS)  # fmt: skip
        else:
            add_slots(col_table, line, col_slots, num_cols, program - row_programs, inner_cols,
                      col_start, col_samples, LINES, SLOTS)  # fmt: skip


def fused_block_weights(
    problem: FusedProblem, block: Block, rows: Lines, cols: Lines, workspace: Workspace
) -> Tensor:
    """Two launches; the result is valid until the next call with this workspace."""
    out = workspace.tile(0, (2, 2, *block.shape), problem.compute_dtype)
    # Others than plain blocks would spill with the large tile.
    small = not is_plain(problem, block, workspace)
    programs, tile, arguments = launch(problem, block, workspace, small)
    tables = new_tables(problem.scale, block, tile, 2 * len(problem.bases))
    arguments |= {
        "lse_rows": rows.lse, "lse_cols": cols.lse, "grad_rows": rows.grad, "grad_cols": cols.grad,
        "out": out, "row_table": tables[0], "col_table": tables[1], "pitch": out.stride(2),
        "width": min(out.stride(1), out.stride(2)),
        "of_base": out.stride(0), "of_other_base": out.stride(1),
    }  # fmt: skip
    with torch.cuda.device_of(out):
        start(fused_weights_kernel, (programs,), arguments)
        fold(inner_kernel, tables, (rows.inner,), (cols.inner,), block, BASES=problem.bases)
    return out
