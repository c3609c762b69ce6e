"""The O(M D) side of the losses: unit vectors and own-sample similarities, and their gradients.

``backends.base`` holds the formulas, and in PyTorch's calls what these two kernels do in a launch
each. A program takes LINES samples, all bases of each, and walks along D twice: the second time
what it reads is still in the cache.

    embed_kernel      lengths, of combinations too, which are formed in registers; then z of the
                      bases, and dots of the unrounded unit vectors
    gradients_kernel  where views are given <(H z)_b, z_b>; each sample's Q_bc and shares; then
                      1/|e_b| (s R_b + sum_c Q_bc u_c), in the bases' own dtypes

Bases [N, D] of any strides and dtypes. Numbers of a sample are tuples, tables row by row. Static
are ``BASES``, for each view the base that it is, or None for a combination; ``DOTS`` [B, B], which
pairs of bases have a similarity; and ``OWN`` [V, V], which pairs of views have own-sample logits:
what is one or zero by these is left out. Every sum has one order: a thread adds its columns' terms,
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

from gcl_kernels import spec as host
from gcl_kernels.backends.base import Backend, sum_shares
from gcl_kernels.backends.triton.launching import start
from gcl_kernels.problem import Embedded, empty_gradients
from gcl_kernels.spec import NegativesSpec, Pairs

LINES = 4
WARPS = 4
PART_BYTES = 512
"""A warp takes a sample, 16 bytes a thread at a time: sums along D need no other warp."""

NORM_EPS = tl.constexpr(host.NORM_EPS)
ABSENT = tl.constexpr(host.ABSENT)


@triton.jit
def load_parts(tables, strides, factors, first, shape, LINES: tl.constexpr, COLS: tl.constexpr):
    """Of this program's samples the columns from ``first`` on: of every table in float32, rows
    times a factor, zero outside; where they lie in a contiguous one (int64: times a stride they may
    exceed 2^31); and which of them there are.

    inf + 0 * inf is NaN: its logits of -inf would pass for candidates of weight zero.
    """
    lines = (tl.program_id(0) * LINES + tl.arange(0, LINES)).to(tl.int64)[:, None]
    cols = (first + tl.arange(0, COLS)).to(tl.int64)[None, :]
    inside = (lines < shape[0]) & (cols < shape[1])
    parts = ()
    for b in tl.static_range(len(tables)):
        place = tables[b] + lines * strides[b][0] + cols * strides[b][1]
        part = tl.load(place, mask=inside, other=0.0).to(tl.float32) * factors[b][:, None]
        parts = parts + (part + part * 0.0,)
    return parts, lines * shape[1] + cols, inside


@triton.jit
def load_table(table, COUNT: tl.constexpr, num_samples, samples):
    """These samples' numbers in each row of a table [COUNT, N]; what is not used is not loaded."""
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
def of_view(numbers, first: tl.constexpr, k, v: tl.constexpr, BASES: tl.constexpr):
    """sum_b k_vb number_b, of the bases' numbers from ``first`` on."""
    if BASES[v] is None:
        number = k[2 * v] * numbers[first] + k[2 * v + 1] * numbers[first + 1]
    else:
        number = numbers[first + BASES[v]]
    return number


@triton.jit
def add_share(total, number, k, v: tl.constexpr, b: tl.constexpr, BASES: tl.constexpr):
    """``total`` + k_vb ``number``."""
    if BASES[v] is None:
        total += k[2 * v + b] * number
    elif BASES[v] == b:
        total += number
    return total


@triton.jit
def lengths_of(
    tables, strides, mixing, shape, BASES: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Lengths of the bases, and of the views: of a combination from the sum itself, since its
    length by the law of cosines would cancel."""
    B: tl.constexpr = len(tables)
    ones = (tl.full((LINES,), 1.0, tl.float32),) * B
    squares = (tl.zeros((LINES, COLS), tl.float32),) * (B + len(BASES))
    for first in range(0, shape[1], COLS):
        parts, _, _ = load_parts(tables, strides, ones, first, shape, LINES, COLS)
        added = ()
        for b in tl.static_range(B):
            added = added + (squares[b] + parts[b] * parts[b],)
        for v in tl.static_range(len(BASES)):
            total = squares[B + v]
            if BASES[v] is None:
                mixed = of_view(parts, 0, mixing, v, BASES)
                total += mixed * mixed
            added = added + (total,)
        squares = added
    norms = [tl.sqrt_rn(tl.sum(square, 1)) for square in squares]
    of_views = ()
    for v in tl.static_range(len(BASES)):
        of_views = of_views + (norms[B + v if BASES[v] is None else BASES[v]],)
    return norms[:B], of_views


@triton.jit
def similarities(
    k, dots, lengths, B: tl.constexpr, BASES: tl.constexpr, NORMALIZE: tl.constexpr
):  # fmt: skip
    """<z_v, u_b> [V, B] and <z_v, z_w> [V, V]. Of a view with itself it is exactly one, where it
    has a length, since a sum of products rounds."""
    V: tl.constexpr = len(BASES)
    toward, own = (), ()
    for at in tl.static_range(V * B):
        toward = toward + (of_view(dots, at % B * B, k, at // B, BASES),)
    for at in tl.static_range(V * V):
        dot = of_view(toward, at // V * B, k, at % V, BASES)
        if NORMALIZE and at // V == at % V:
            dot = tl.where(lengths[at % V] > NORM_EPS, 1.0, dot)
        own = own + (dot,)
    return toward, own


@triton.jit(do_not_specialize=["num_samples"])
def embed_kernel(
    mixing, scale, z, inverse, lengths, coefficients, dots, own_logits, tables, strides,
    num_samples, dim, BASES: tl.constexpr, DOTS: tl.constexpr, OWN: tl.constexpr,
    NORMALIZE: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``mixing`` [V, 2], None where views are given. ``tables``: the bases, with the (row, column)
    ``strides`` of each."""
    B: tl.constexpr = len(tables)
    shape = num_samples, dim
    samples = tl.program_id(0) * LINES + tl.arange(0, LINES)
    zero = tl.zeros((LINES,), tl.float32)
    factors = (zero + 1.0,) * B
    of_views, weights, k = factors, (), ()
    if mixing is not None:
        for at in tl.static_range(2 * len(BASES)):
            weights = weights + (tl.load(mixing + at),)
    if NORMALIZE:
        norms, of_views = lengths_of(tables, strides, weights, shape, BASES, LINES, COLS)
        # NaN where the length overflowed: 1 / inf would silently give zero.
        factors = [tl.div_rn(1.0, tl.maximum(norm, NORM_EPS)) + norm * 0.0 for norm in norms]
        store_table(inverse, factors, num_samples, samples)
        store_table(lengths, of_views, num_samples, samples)
    if mixing is not None:
        for at in tl.static_range(2 * len(BASES)):
            number = zero
            if BASES[at // 2] is None:
                number += weights[at]
                if NORMALIZE:
                    length = of_views[at // 2]
                    ratio = tl.div_rn(number, factors[at % 2] * length)
                    # A zero vector's are zero; a length of NaN is none, nor is one that overflowed.
                    number = tl.where(length <= NORM_EPS, 0.0, ratio) + length * 0.0
            elif BASES[at // 2] == at % 2:
                number += 1.0
            k = k + (number,)
        store_table(coefficients, k, num_samples, samples)
    sums = (tl.zeros((LINES, COLS), tl.float32),) * len(DOTS)
    for first in range(0, dim, COLS):
        units, place, inside = load_parts(tables, strides, factors, first, shape, LINES, COLS)
        for b in tl.static_range(B):
            of_base = z + b * num_samples.to(tl.int64) * dim
            tl.store(of_base + place, units[b].to(z.dtype.element_ty), mask=inside)
        added = ()
        for at in tl.static_range(len(DOTS)):
            total = sums[at]
            if DOTS[at] and at // B <= at % B:
                total += units[at // B] * units[at % B]
            added = added + (total,)
        sums = added
    of_bases = ()
    for at in tl.static_range(len(DOTS)):
        dot = zero
        if at // B > at % B:
            dot = of_bases[at % B * B + at // B]
        elif DOTS[at]:
            dot = tl.sum(sums[at], 1)
        of_bases = of_bases + (dot,)
    store_table(dots, of_bases, num_samples, samples)
    _, own = similarities(k, of_bases, of_views, B, BASES, NORMALIZE)
    s, logits = tl.load(scale), ()
    for at in tl.static_range(len(OWN)):
        logits = logits + (own[at] * s if OWN[at] else zero + ABSENT,)
    store_table(own_logits, logits, num_samples, samples)


@triton.jit
def pulls(
    k, dots, lengths, inverses, u, g, s,
    BASES: tl.constexpr, OWN: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Q_bc [B, B]; the shares of the gradients of mixing [V, 2], of bases zero, and of the scale.
    ``u`` [V, B]: of a given view its own entry is read."""
    V: tl.constexpr = len(BASES)
    B: tl.constexpr = len(inverses)
    toward, own = similarities(k, dots, lengths, B, BASES, NORMALIZE)
    zero = tl.zeros_like(inverses[0])
    share = zero
    a, of_mixing = (), ()
    for v in tl.static_range(V):  # a_vw = K_vw, less g_v where v = w
        along = of_view(u, v * B, k, v, BASES)
        share += 0.5 * along
        along *= s
        pull = ()
        for w in tl.static_range(V):
            number = zero
            if OWN[v * V + w]:
                share += g[v * V + w] * own[v * V + w]
                number = (g[v * V + w] + g[w * V + v]) * s
                if NORMALIZE and v == w:
                    number = tl.where(lengths[v] > NORM_EPS, 0.0, number)  # of a constant
                along += number * own[v * V + w]
            pull = pull + (number,)
        along *= tl.where(lengths[v] > NORM_EPS, 1.0, 0.0)  # times zero, so that NaN stays
        for w in tl.static_range(V):
            a = a + (pull[w] - along if NORMALIZE and v == w else pull[w],)
    q = ()
    if len(k):
        for at in tl.static_range(2 * V):
            number = zero
            if BASES[at // 2] is None:
                number += u[at] * s
                for w in tl.static_range(V):
                    number += a[at // 2 * V + w] * toward[2 * w + at % 2]
                if NORMALIZE:
                    ratio = tl.div_rn(1.0, lengths[at // 2] * inverses[at % 2])
                    number *= tl.where(lengths[at // 2] > NORM_EPS, ratio, 0.0)
            of_mixing = of_mixing + (number,)
        for at in tl.static_range(4):
            number = zero
            for v in tl.static_range(V):
                mixed = zero
                for w in tl.static_range(V):
                    mixed = add_share(mixed, a[v * V + w], k, w, at % 2, BASES)
                number = add_share(number, mixed, k, v, at // 2, BASES)
            q = q + (number,)
    return (q if len(k) else a), of_mixing, share


@triton.jit(do_not_specialize=["num_samples"])
def gradients_kernel(
    scale, inverse, lengths, coefficients, dots, sums, inner, grad_own_logits, grads, shares,
    tables, strides, num_samples, dim, BASES: tl.constexpr, DOTS: tl.constexpr, OWN: tl.constexpr,
    NORMALIZE: tl.constexpr, ROUNDED: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``inner``: None where views are given. ``grads``: of each base, None where none is needed.
    ``shares``: each sample's of the gradients of mixing, if any, and of the scale. ``tables``: z of
    each base, or where that is ROUNDED the bases."""
    B: tl.constexpr = len(tables)
    V: tl.constexpr = len(BASES)
    shape = num_samples, dim
    samples = tl.program_id(0) * LINES + tl.arange(0, LINES)
    s = tl.load(scale)
    ones = (tl.full((LINES,), 1.0, tl.float32),)
    inverses, of_views, k, u = ones * B, ones * V, (), ()
    if NORMALIZE:
        inverses = load_table(inverse, B, num_samples, samples)
        of_views = load_table(lengths, V, num_samples, samples)
    factors = inverses if ROUNDED else ones * B
    if inner is not None:
        k = load_table(coefficients, 2 * V, num_samples, samples)
        u = load_table(inner, 2 * V, num_samples, samples)
    else:
        totals = (tl.zeros((LINES, COLS), tl.float32),) * B
        for first in range(0, dim, COLS):
            units, place, inside = load_parts(tables, strides, factors, first, shape, LINES, COLS)
            added = ()
            for b in tl.static_range(B):
                total = totals[b]
                if grads[b] is not None:
                    of_base = sums + b * num_samples.to(tl.int64) * dim
                    total += tl.load(of_base + place, mask=inside, other=0.0) * units[b]
                added = added + (total,)
            totals = added
        u = [tl.sum(total, 1) for total in totals] * V
    q, of_mixing, of_scale = pulls(
        k, load_table(dots, B * B, num_samples, samples), of_views, inverses, u,
        load_table(grad_own_logits, V * V, num_samples, samples), s, BASES, OWN, NORMALIZE,
    )  # fmt: skip
    store_table(shares, of_mixing + (of_scale,), num_samples, samples)
    for first in range(0, dim, COLS):
        units, place, inside = load_parts(tables, strides, factors, first, shape, LINES, COLS)
        for b in tl.static_range(B):
            if grads[b] is not None:
                of_base = sums + b * num_samples.to(tl.int64) * dim
                grad = tl.load(of_base + place, mask=inside, other=0.0) * s
                for c in tl.static_range(B):
                    if DOTS[b * B + c] or b == c:
                        grad += q[b * B + c][:, None] * units[c]
                grad *= inverses[b][:, None]
                tl.store(grads[b] + place, grad.to(grads[b].dtype.element_ty), mask=inside)


def which(pairs: Pairs, size: int) -> tuple[bool, ...]:
    """Of all pairs (a, b), row by row, whether they are among these."""
    return tuple((min(a, b), max(a, b)) in pairs for a in range(size) for b in range(size))


def over_samples(tables: Sequence[Tensor], spec: NegativesSpec) -> tuple[Any, dict[str, Any]]:
    """Grid of a launch over all samples, and the arguments that both kernels share."""
    num_samples, dim = tables[0].shape
    arguments = {
        "tables": tuple(tables),
        "strides": tuple(table.stride() for table in tables),
        "num_samples": num_samples,
        "dim": dim,
        "BASES": spec.bases,
        "DOTS": which(spec.base_pairs, len(tables)),
        "OWN": which(spec.own_pairs, len(spec.bases)),
        "NORMALIZE": spec.normalize,
        "LINES": LINES,
        "COLS": PART_BYTES // max(table.dtype.itemsize for table in tables),
        "num_warps": WARPS,
    }
    return (triton.cdiv(num_samples, LINES),), arguments


def embed(
    bases: Sequence[Tensor], mixing: Tensor | None, scale: Tensor, spec: NegativesSpec
) -> tuple[Embedded, Tensor]:
    """As :meth:`Backend.embed`, in one launch."""
    if bases[0].shape[1] == 1:  # a length that is no root of a square, which might overflow
        return Backend().embed(bases, mixing, scale, spec)
    embedded, num_views = Embedded.empty(bases, scale, spec), len(spec.bases)
    own_logits = scale.new_empty(num_views, num_views, bases[0].shape[0])
    weights = None if mixing is None else mixing.contiguous()
    grid, arguments = over_samples(bases, spec)
    arguments |= {"mixing": weights, "scale": scale, **embedded._asdict(), "own_logits": own_logits}
    with torch.cuda.device_of(scale):
        start(embed_kernel, grid, arguments)
    return embedded, own_logits


def gradients(
    bases: Sequence[Tensor],
    scale: Tensor,
    embedded: Embedded,
    sums: Tensor,
    inner: Tensor,
    grad_own_logits: Tensor,
    spec: NegativesSpec,
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    """As :meth:`Backend.gradients`, in one launch and sums; ``sums`` stays."""
    given, rounded = spec.mixed is None, spec.compute_dtype != spec.accum_dtype
    grads = empty_gradients(bases, scale, needs_grad)
    shares = sums.new_empty(1 if given else 2 * len(spec.bases) + 1, bases[0].shape[0])
    grid, arguments = over_samples(bases if rounded else embedded.z.unbind(0), spec)
    arguments |= {
        "scale": scale, "inverse": embedded.inverse, "lengths": embedded.lengths,
        "coefficients": embedded.coefficients, "dots": embedded.dots, "sums": sums,
        "inner": None if given else inner, "grad_own_logits": grad_own_logits.contiguous(),
        "grads": tuple(grad if grad.numel() else None for grad in grads), "shares": shares,
        "ROUNDED": rounded,
    }  # fmt: skip
    with torch.cuda.device_of(scale):
        start(gradients_kernel, grid, arguments)
    return [*grads, *sum_shares(shares, needs_grad[-2])]
