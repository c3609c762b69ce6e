"""The O(M*D) side of the primitive: unit vectors and own-sample similarities, and their gradients.

``gcl_kernels.embeddings`` holds the formulas, and in PyTorch's calls what these two kernels do in a
launch each. A program takes LINES samples, all views of each, and walks along D twice: the second
time what it reads is still in the cache.

    embed           lengths; then z, and dots of the unrounded unit vectors
    embed_backward  of each view <(H z)_a, z_a>; then its gradient, in the view's own dtype

Views [N, D] of any strides and dtypes. Every sum has one order: a thread adds its columns' terms,
then the threads of a sample add theirs.
"""

# Device code builds its tuples one entry at a time.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcl_kernels import embeddings, spec
from gcl_kernels.embeddings import ABSENT as ABSENT_LOGIT
from gcl_kernels.embeddings import empty_embedded

LINES = 4
WARPS = 4
PART_BYTES = 512
"""A warp takes a sample, 16 bytes a thread at a time: sums along D need no other warp."""

NORM_EPS = tl.constexpr(spec.NORM_EPS)
ABSENT = tl.constexpr(ABSENT_LOGIT)


@triton.jit
def part_of(first, num_samples, dim, LINES: tl.constexpr, COLS: tl.constexpr):
    """Samples of this program, columns from ``first`` on (int64: times a stride they may exceed
    2^31), and which of them there are."""
    lines = tl.program_id(0) * LINES + tl.arange(0, LINES)
    cols = first + tl.arange(0, COLS)
    inside = (lines < num_samples)[:, None] & (cols < dim)[None, :]
    return lines.to(tl.int64)[:, None], cols.to(tl.int64)[None, :], inside


@triton.jit
def load_part(view, strides, factor, lines, cols, inside):
    """A part of a view in float32, its rows times a factor; zero outside.

    inf + 0 * inf is NaN: its logits of -inf would pass for candidates of weight zero.
    """
    place = view + lines * strides[0] + cols * strides[1]
    part = tl.load(place, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
    return part + part * 0.0


@triton.jit
def load_parts(views, strides, factors, lines, cols, inside):
    """The same part of every view."""
    parts = ()
    for v in tl.static_range(len(views)):
        parts = parts + (load_part(views[v], strides[v], factors[v], lines, cols, inside),)
    return parts


@triton.jit
def full(COUNT: tl.constexpr, LINES: tl.constexpr, value):
    """COUNT numbers for each sample."""
    numbers = ()
    for _ in tl.static_range(COUNT):
        numbers = numbers + (tl.zeros((LINES,), tl.float32) + value,)
    return numbers


@triton.jit
def empty_sums(COUNT: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr):
    """COUNT sums along D, of which a thread holds its columns' shares."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((LINES, COLS), tl.float32),)
    return sums


@triton.jit
def load_table(table, COUNT: tl.constexpr, num_samples, samples):
    """Numbers of these samples in each row of a table [COUNT, N]."""
    numbers = ()
    for row in tl.static_range(COUNT):
        place = table + row * num_samples.to(tl.int64) + samples
        numbers = numbers + (tl.load(place, mask=samples < num_samples, other=0.0),)
    return numbers


@triton.jit
def store_table(table, numbers, num_samples, samples):
    """Write a number of each of these samples to each row of a table [len(numbers), N]."""
    for row in tl.static_range(len(numbers)):
        place = table + row * num_samples.to(tl.int64) + samples
        tl.store(place, numbers[row], mask=samples < num_samples)


@triton.jit
def inverse_norm(norm):
    """1 / max(norm, eps), NaN where the length overflowed: 1 / inf would silently give zero."""
    return tl.div_rn(1.0, tl.maximum(norm, NORM_EPS)) + norm * 0.0


@triton.jit
def lengths(views, strides, num_samples, dim, LINES: tl.constexpr, COLS: tl.constexpr):
    """Of every view the lengths of these samples."""
    ones = full(len(views), LINES, 1.0)
    squares = empty_sums(len(views), LINES, COLS)
    for first in range(0, dim, COLS):
        lines, cols, inside = part_of(first, num_samples, dim, LINES, COLS)
        parts = load_parts(views, strides, ones, lines, cols, inside)
        added = ()
        for v in tl.static_range(len(views)):
            added = added + (squares[v] + parts[v] * parts[v],)
        squares = added
    norms = ()
    for v in tl.static_range(len(views)):
        norms = norms + (tl.sqrt_rn(tl.sum(squares[v], 1)),)
    return norms


@triton.jit
def store_unit(z, unit, view, num_samples, dim, lines, cols, inside):
    """Write a part of z [views, N, D], rounded to its dtype."""
    place = z + (view * num_samples.to(tl.int64) + lines) * dim + cols
    tl.store(place, unit.to(z.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_samples"])
def embed_kernel(
    views, strides, scale, z, norm, inverse, own, own_logits, num_samples, dim,
    NORMALIZE: tl.constexpr, PAIRS: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``strides``: (row, column) of each view. ``PAIRS``: of views, whose dots are asked for."""
    samples = tl.program_id(0) * LINES + tl.arange(0, LINES)
    factors = full(len(views), LINES, 1.0)
    if NORMALIZE:
        norms = lengths(views, strides, num_samples, dim, LINES, COLS)
        factors = ()
        for v in tl.static_range(len(views)):
            factors = factors + (inverse_norm(norms[v]),)
        store_table(norm, norms, num_samples, samples)
        store_table(inverse, factors, num_samples, samples)
    dots = empty_sums(len(PAIRS), LINES, COLS)
    for first in range(0, dim, COLS):
        lines, cols, inside = part_of(first, num_samples, dim, LINES, COLS)
        units = load_parts(views, strides, factors, lines, cols, inside)
        for v in tl.static_range(len(views)):
            store_unit(z, units[v], v, num_samples, dim, lines, cols, inside)
        added = ()
        for p in tl.static_range(len(PAIRS)):
            added = added + (dots[p] + units[PAIRS[p][0]] * units[PAIRS[p][1]],)
        dots = added
    s = tl.load(scale)
    table, logits = (), ()
    for a in tl.static_range(len(views)):
        for b in tl.static_range(len(views)):
            dot = tl.zeros((LINES,), tl.float32)
            logit = dot + ABSENT
            for p in tl.static_range(len(PAIRS)):
                if PAIRS[p] == (a, b) or PAIRS[p] == (b, a):
                    dot = tl.sum(dots[p], 1)
                    logit = dot * s
            table = table + (dot,)
            logits = logits + (logit,)
    store_table(own, table, num_samples, samples)
    store_table(own_logits, logits, num_samples, samples)


@triton.jit(do_not_specialize=["num_samples"])
def embed_backward_kernel(
    views, strides, norm, inverse, own, hz, grad_own_logits, scale, grads, shares,
    num_samples, dim,
    NORMALIZE: tl.constexpr, ROUNDED: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``views``: z, or where that is ROUNDED the embeddings. ``grads``: of each view [N, D], None
    where none is needed. ``shares`` [N]: each sample's of dL/ds."""
    NUM_VIEWS: tl.constexpr = len(views)
    samples = tl.program_id(0) * LINES + tl.arange(0, LINES)
    s = tl.load(scale)
    owns = load_table(own, NUM_VIEWS * NUM_VIEWS, num_samples, samples)
    grad_owns = load_table(grad_own_logits, NUM_VIEWS * NUM_VIEWS, num_samples, samples)
    factors = full(NUM_VIEWS, LINES, 1.0)
    if NORMALIZE:
        norms = load_table(norm, NUM_VIEWS, num_samples, samples)
        inverses = load_table(inverse, NUM_VIEWS, num_samples, samples)
        if ROUNDED:
            factors = inverses
    share = tl.zeros((LINES,), tl.float32)
    for a in tl.static_range(NUM_VIEWS):
        along = tl.zeros((LINES,), tl.float32)
        pulls = ()
        for b in tl.static_range(NUM_VIEWS):
            own_ab = owns[a * NUM_VIEWS + b]
            grad_ab = grad_owns[a * NUM_VIEWS + b]
            pull = (grad_ab + grad_owns[b * NUM_VIEWS + a]) * s
            along += pull * own_ab
            share += grad_ab * own_ab
            pulls = pulls + (pull,)
        if grads[a] is not None:
            hz_a = hz + a * num_samples.to(tl.int64) * dim
            inner = tl.zeros((LINES, COLS), tl.float32)
            for first in range(0, dim, COLS):
                lines, cols, inside = part_of(first, num_samples, dim, LINES, COLS)
                unit = load_part(views[a], strides[a], factors[a], lines, cols, inside)
                inner += tl.load(hz_a + lines * dim + cols, mask=inside, other=0.0) * unit
            q = tl.sum(inner, 1)
            share += 0.5 * q
            if NORMALIZE:
                along += q * s
                # Times zero, so that NaN stays.
                along *= tl.where(norms[a] > NORM_EPS, 1.0, 0.0)
            for first in range(0, dim, COLS):
                lines, cols, inside = part_of(first, num_samples, dim, LINES, COLS)
                units = load_parts(views, strides, factors, lines, cols, inside)
                grad = tl.load(hz_a + lines * dim + cols, mask=inside, other=0.0) * s
                for b in tl.static_range(NUM_VIEWS):
                    grad += pulls[b][:, None] * units[b]
                if NORMALIZE:
                    grad = (grad - along[:, None] * units[a]) * inverses[a][:, None]
                place = grads[a] + lines * dim + cols
                tl.store(place, grad.to(grads[a].dtype.element_ty), mask=inside)
    tl.store(shares + samples, share, mask=samples < num_samples)


def part_shape(widest: torch.dtype) -> dict[str, int]:
    """What a program takes at a time, of views of which this is the widest dtype."""
    return {"LINES": LINES, "COLS": PART_BYTES // widest.itemsize, "num_warps": WARPS}


def over_samples(views: Sequence[Tensor]) -> tuple[tuple[int], dict[str, int]]:
    """Grid and shape of a launch over all samples."""
    widest = max((view.dtype for view in views), key=lambda dtype: dtype.itemsize)
    return (triton.cdiv(views[0].shape[0], LINES),), part_shape(widest)


def as_tuples(views: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[tuple[int, ...], ...]]:
    """Views and their strides."""
    return tuple(views), tuple(view.stride() for view in views)


def exact_units(views: Sequence[Tensor], z: Tensor, accum_dtype: torch.dtype) -> dict[str, Any]:
    """What unrounded unit vectors are read from: z, or the embeddings where z is rounded."""
    rounded = z.dtype != accum_dtype
    views, strides = as_tuples(views if rounded else z.unbind(0))
    return {"views": views, "strides": strides, "ROUNDED": rounded}


def new_grads(
    views: Sequence[Tensor], needs_grad: Sequence[bool]
) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
    """Memory for the gradients that are needed, empty for others, of which a kernel gets None."""
    grads = [
        view.new_empty(view.shape if needs else 0)
        for view, needs in zip(views, needs_grad, strict=True)
    ]
    given = zip(grads, needs_grad, strict=True)
    return grads, tuple(grad if needs else None for grad, needs in given)


def embed(
    views: Sequence[Tensor],
    own_pairs: Sequence[tuple[int, int]],
    normalize: bool,
    compute_dtype: torch.dtype,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`gcl_kernels.embeddings.embed`, in one launch."""
    if views[0].shape[1] == 1:  # a length that is no root of a square, which might overflow
        return embeddings.embed(views, own_pairs, normalize, compute_dtype, scale)
    results = empty_embedded(views, normalize, compute_dtype, scale)
    grid, shape = over_samples(views)
    with torch.cuda.device_of(scale):
        embed_kernel[grid](
            *as_tuples(views), scale, *results, *views[0].shape,
            NORMALIZE=normalize, PAIRS=tuple(map(tuple, own_pairs)), **shape,
        )  # fmt: skip
    return results


def embed_backward(
    views: Sequence[Tensor],
    normalize: bool,
    z: Tensor,
    norm: Tensor,
    inverse: Tensor,
    own: Tensor,
    hz: Tensor,
    grad_own_logits: Tensor,
    scale: Tensor,
    needs_grad: Sequence[bool],
) -> tuple[list[Tensor], Tensor]:
    """As :func:`gcl_kernels.embeddings.embed_backward`, in one launch and a sum; ``hz`` stays."""
    _, num_samples, dim = z.shape
    grads, given = new_grads(views, needs_grad)
    shares = hz.new_empty(num_samples)
    grid, shape = over_samples(views)
    with torch.cuda.device_of(z):
        embed_backward_kernel[grid](
            norm=norm, inverse=inverse, own=own, hz=hz,
            grad_own_logits=grad_own_logits.contiguous(), scale=scale, grads=given, shares=shares,
            num_samples=num_samples, dim=dim, NORMALIZE=normalize,
            **exact_units(views, z, hz.dtype), **shape,
        )  # fmt: skip
    return grads, shares.sum()
