"""``embed_fused`` and ``fused_gradients``: the O(N*D) side of views that are made of two bases.

``gcl_kernels.embeddings`` holds the formulas, and in PyTorch's calls what these two kernels do in a
launch each; programs and sums are those of ``embeddings``.

    embed_fused      lengths of the bases and of the combinations, which are formed in registers;
                     then z of the bases, their dots, and the own-sample logits of all views
    fused_gradients  each sample's Q_bc and its shares of the gradients of mixing and scale; then
                     1/|e_b| (s R_b + sum_c Q_bc z_c), in the bases' own dtypes
"""

# Device code builds its tuples one entry at a time.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcl_kernels import embeddings
from gcl_kernels.backends.triton.embeddings import (
    ABSENT,
    NORM_EPS,
    as_tuples,
    empty_sums,
    exact_units,
    full,
    inverse_norm,
    load_parts,
    load_table,
    new_grads,
    over_samples,
    part_of,
    store_table,
    store_unit,
)
from gcl_kernels.embeddings import empty_fused, pairs_itself, sum_shares


@triton.jit
def lengths(
    views, strides, mixing, num_samples, dim,
    BASES: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Of both bases the lengths of these samples, and of all views: of a combination from the sum
    itself, since its length by the law of cosines would cancel."""
    ones = full(2, LINES, 1.0)
    squares = empty_sums(2, LINES, COLS)
    mixed_squares = empty_sums(len(BASES), LINES, COLS)
    for first in range(0, dim, COLS):
        lines, cols, inside = part_of(first, num_samples, dim, LINES, COLS)
        e_0, e_1 = load_parts(views, strides, ones, lines, cols, inside)
        squares = (squares[0] + e_0 * e_0, squares[1] + e_1 * e_1)
        added = ()
        for v in tl.static_range(len(BASES)):
            total = mixed_squares[v]
            if BASES[v] < 0:
                mixed = e_0 * tl.load(mixing + 2 * v) + e_1 * tl.load(mixing + 2 * v + 1)
                total += mixed * mixed
            added = added + (total,)
        mixed_squares = added
    norms = (tl.sqrt_rn(tl.sum(squares[0], 1)), tl.sqrt_rn(tl.sum(squares[1], 1)))
    of_views = ()
    for v in tl.static_range(len(BASES)):
        if BASES[v] < 0:
            of_views = of_views + (tl.sqrt_rn(tl.sum(mixed_squares[v], 1)),)
        else:
            of_views = of_views + (norms[BASES[v]],)
    return norms, of_views


@triton.jit
def similarities(
    k, dots, of_views, BASES: tl.constexpr, SELF: tl.constexpr, NORMALIZE: tl.constexpr
):  # fmt: skip
    """<z_v, z_b> [V, 2] and <z_v, z_w> [V, V] of these samples. With SELF a view is paired with
    itself: exactly one, where it has a length, since a sum of products rounds."""
    toward, own = (), ()
    for v in tl.static_range(len(BASES)):
        for b in tl.static_range(2):
            toward = toward + (k[2 * v] * dots[b] + k[2 * v + 1] * dots[2 + b],)
    for v in tl.static_range(len(BASES)):
        for w in tl.static_range(len(BASES)):
            dot = toward[2 * v] * k[2 * w] + toward[2 * v + 1] * k[2 * w + 1]
            if SELF and NORMALIZE and v == w:
                dot = tl.where(of_views[v] > NORM_EPS, 1.0, dot)
            own = own + (dot,)
    return toward, own


@triton.jit(do_not_specialize=["num_samples"])
def embed_fused_kernel(
    views, strides, mixing, scale, z, inverse, view_lengths, coefficients, dots, own_logits,
    num_samples, dim, BASES: tl.constexpr, PAIRS: tl.constexpr, SELF: tl.constexpr,
    NORMALIZE: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``mixing`` [V, 2]. ``BASES``: for each view the base that it is, or -1. ``PAIRS``: of views,
    whose own-sample logits are asked for; ``SELF``: some of a view with itself."""
    NUM_VIEWS: tl.constexpr = len(BASES)
    samples = tl.program_id(0) * LINES + tl.arange(0, LINES)
    factors = full(2, LINES, 1.0)
    of_views = full(NUM_VIEWS, LINES, 1.0)
    if NORMALIZE:
        norms, of_views = lengths(views, strides, mixing, num_samples, dim, BASES, LINES, COLS)
        factors = (inverse_norm(norms[0]), inverse_norm(norms[1]))
        store_table(inverse, factors, num_samples, samples)
        store_table(view_lengths, of_views, num_samples, samples)
    k = ()
    for v in tl.static_range(NUM_VIEWS):
        for b in tl.static_range(2):
            coefficient = tl.zeros((LINES,), tl.float32) + tl.load(mixing + 2 * v + b)
            if NORMALIZE and BASES[v] < 0:
                ratio = tl.div_rn(coefficient, factors[b] * of_views[v])
                # A zero vector's are zero; a length of NaN is none, nor is one that overflowed.
                coefficient = tl.where(of_views[v] <= NORM_EPS, 0.0, ratio) + of_views[v] * 0.0
            k = k + (coefficient,)
    store_table(coefficients, k, num_samples, samples)
    sums = empty_sums(3, LINES, COLS)
    for first in range(0, dim, COLS):
        lines, cols, inside = part_of(first, num_samples, dim, LINES, COLS)
        z_0, z_1 = load_parts(views, strides, factors, lines, cols, inside)
        store_unit(z, z_0, 0, num_samples, dim, lines, cols, inside)
        store_unit(z, z_1, 1, num_samples, dim, lines, cols, inside)
        sums = (sums[0] + z_0 * z_0, sums[1] + z_0 * z_1, sums[2] + z_1 * z_1)
    between = tl.sum(sums[1], 1)
    of_bases = (tl.sum(sums[0], 1), between, between, tl.sum(sums[2], 1))
    store_table(dots, of_bases, num_samples, samples)
    _, own = similarities(k, of_bases, of_views, BASES, SELF, NORMALIZE)
    s = tl.load(scale)
    logits = ()
    for v in tl.static_range(NUM_VIEWS):
        for w in tl.static_range(NUM_VIEWS):
            logit = tl.zeros((LINES,), tl.float32) + ABSENT
            for p in tl.static_range(len(PAIRS)):
                if PAIRS[p] == (v, w) or PAIRS[p] == (w, v):
                    logit = own[v * NUM_VIEWS + w] * s
            logits = logits + (logit,)
    store_table(own_logits, logits, num_samples, samples)


@triton.jit
def pulls(
    k, dots, of_views, inverses, u, g, s,
    BASES: tl.constexpr, SELF: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Of these samples Q_00, Q_01, Q_10, Q_11; and their shares of the gradients of mixing [V, 2]
    and of the scale."""
    NUM_VIEWS: tl.constexpr = len(BASES)
    toward, own = similarities(k, dots, of_views, BASES, SELF, NORMALIZE)
    share = tl.zeros_like(s + k[0])
    q_00 = share
    q_01 = share
    q_10 = share
    q_11 = share
    shares = ()
    for v in tl.static_range(NUM_VIEWS):
        k_0 = k[2 * v]
        k_1 = k[2 * v + 1]
        share += 0.5 * (k_0 * u[2 * v] + k_1 * u[2 * v + 1])
        # <G_v, z_b>; of a view that is a base only its own entry is used, and only that is filled.
        along_0 = u[2 * v] * s
        along_1 = u[2 * v + 1] * s
        mixed_0 = tl.zeros_like(k_0)
        mixed_1 = mixed_0
        for w in tl.static_range(NUM_VIEWS):
            share += g[v * NUM_VIEWS + w] * own[v * NUM_VIEWS + w]
            pull = (g[v * NUM_VIEWS + w] + g[w * NUM_VIEWS + v]) * s
            if SELF and NORMALIZE and v == w:
                pull = tl.where(of_views[v] > NORM_EPS, 0.0, pull)  # a constant
            along_0 += pull * toward[2 * w]
            along_1 += pull * toward[2 * w + 1]
            mixed_0 += pull * k[2 * w]
            mixed_1 += pull * k[2 * w + 1]
        if NORMALIZE:
            longer = of_views[v] > NORM_EPS
            along = (k_0 * along_0 + k_1 * along_1) * tl.where(longer, 1.0, 0.0)
            mixed_0 -= along * k_0
            mixed_1 -= along * k_1
            length_0 = of_views[v] * inverses[0]
            length_1 = of_views[v] * inverses[1]
            along_0 -= along * toward[2 * v]
            along_1 -= along * toward[2 * v + 1]
            along_0 *= tl.where(longer, tl.div_rn(1.0, length_0), 0.0)
            along_1 *= tl.where(longer, tl.div_rn(1.0, length_1), 0.0)
        if BASES[v] < 0:
            shares = shares + (along_0, along_1)
        else:
            nothing = tl.zeros_like(k_0)  # a constant
            shares = shares + (nothing, nothing)
        q_00 += k_0 * mixed_0
        q_01 += k_0 * mixed_1
        q_10 += k_1 * mixed_0
        q_11 += k_1 * mixed_1
    return q_00, q_01, q_10, q_11, shares, share


@triton.jit(do_not_specialize=["num_samples"])
def fused_gradients_kernel(
    views, strides, inverse, view_lengths, coefficients, dots, r, inner, grad_own_logits, scale,
    grads, shares, num_samples, dim, BASES: tl.constexpr, SELF: tl.constexpr,
    NORMALIZE: tl.constexpr, ROUNDED: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``views`` and ``grads`` as in ``embed_backward_kernel``. ``shares`` [2 V + 1, N]: each
    sample's of the gradients of mixing and of the scale."""
    NUM_VIEWS: tl.constexpr = len(BASES)
    samples = tl.program_id(0) * LINES + tl.arange(0, LINES)
    inverses = full(2, LINES, 1.0)
    of_views = full(NUM_VIEWS, LINES, 1.0)
    if NORMALIZE:
        inverses = load_table(inverse, 2, num_samples, samples)
        of_views = load_table(view_lengths, NUM_VIEWS, num_samples, samples)
    factors = inverses if ROUNDED else full(2, LINES, 1.0)
    s = tl.load(scale)
    q_00, q_01, q_10, q_11, of_mixing, of_scale = pulls(
        load_table(coefficients, 2 * NUM_VIEWS, num_samples, samples),
        load_table(dots, 4, num_samples, samples),
        of_views, inverses,
        load_table(inner, 2 * NUM_VIEWS, num_samples, samples),
        load_table(grad_own_logits, NUM_VIEWS * NUM_VIEWS, num_samples, samples),
        s, BASES, SELF, NORMALIZE,
    )  # fmt: skip
    store_table(shares, of_mixing + (of_scale,), num_samples, samples)
    # Of R_b, z_0 and z_1 in the gradient of base b.
    weights = (
        (inverses[0] * s, inverses[0] * q_00, inverses[0] * q_01),
        (inverses[1] * s, inverses[1] * q_10, inverses[1] * q_11),
    )
    for first in range(0, dim, COLS):
        lines, cols, inside = part_of(first, num_samples, dim, LINES, COLS)
        z_0, z_1 = load_parts(views, strides, factors, lines, cols, inside)
        for b in tl.static_range(2):
            if grads[b] is not None:
                place = r + (b * num_samples.to(tl.int64) + lines) * dim + cols
                grad = tl.load(place, mask=inside, other=0.0) * weights[b][0][:, None]
                grad += weights[b][1][:, None] * z_0
                grad += weights[b][2][:, None] * z_1
                place = grads[b] + lines * dim + cols
                tl.store(place, grad.to(grads[b].dtype.element_ty), mask=inside)


def embed_fused(
    views: Sequence[Tensor],
    mixing: Tensor,
    bases: Sequence[int],
    own_pairs: Sequence[tuple[int, int]],
    normalize: bool,
    compute_dtype: torch.dtype,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`gcl_kernels.embeddings.embed_fused`, in one launch."""
    if views[0].shape[1] == 1:  # as in embeddings.embed
        return embeddings.embed_fused(
            views, mixing, bases, own_pairs, normalize, compute_dtype, scale
        )
    results = empty_fused(views, len(bases), normalize, compute_dtype, scale)
    grid, shape = over_samples(views)
    with torch.cuda.device_of(scale):
        embed_fused_kernel[grid](
            *as_tuples(views), mixing.contiguous(), scale, *results, *views[0].shape,
            BASES=tuple(bases), PAIRS=tuple(map(tuple, own_pairs)),
            SELF=pairs_itself(own_pairs), NORMALIZE=normalize, **shape,
        )  # fmt: skip
    return results


def fused_gradients(
    views: Sequence[Tensor],
    bases: Sequence[int],
    own_pairs: Sequence[tuple[int, int]],
    normalize: bool,
    z: Tensor,
    inverse: Tensor,
    lengths: Tensor,
    coefficients: Tensor,
    dots: Tensor,
    r: Tensor,
    inner: Tensor,
    grad_own_logits: Tensor,
    scale: Tensor,
    needs_grad: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """As :func:`gcl_kernels.embeddings.fused_gradients`, in one launch and sums; ``r`` stays."""
    _, num_samples, dim = z.shape
    grads, given = new_grads(views, needs_grad[:2])
    shares = r.new_empty(2 * len(bases) + 1, num_samples)
    grid, shape = over_samples(views)
    with torch.cuda.device_of(z):
        fused_gradients_kernel[grid](
            inverse=inverse, view_lengths=lengths, coefficients=coefficients, dots=dots, r=r,
            inner=inner, grad_own_logits=grad_own_logits.contiguous(), scale=scale, grads=given,
            shares=shares, num_samples=num_samples, dim=dim, BASES=tuple(bases),
            SELF=pairs_itself(own_pairs), NORMALIZE=normalize,
            **exact_units(views, z, r.dtype), **shape,
        )  # fmt: skip
    return grads, *sum_shares(shares, needs_grad[2])
