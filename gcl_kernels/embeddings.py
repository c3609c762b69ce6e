"""The O(M*D) side of the primitive: unit vectors, own-sample similarities, and their gradients.

Forward: ``z = e / max(|e|, eps)`` in the compute dtype, the lengths, and for the pairs of views
that a loss asks for ``own[a, b, j] = <z_a^j, z_b^j>`` in the accumulation dtype from the unrounded
vectors. Backward, from ``hz = H z`` and ``d own = dL/d own``, with ``K_ab = d own_ab + d own_ba``:

    dL/dz_a = s * (H z)_a + sum_b K_ab z_b
    dL/de_a = (dL/dz_a - <dL/dz_a, z_a> z_a) / |e_a|            (no projection where |e| < eps)

``<dL/dz_a, z_a> = s q_a + sum_b K_ab own_ab`` needs no pass of its own beyond
``q_a = <(H z)_a, z_a>``, which gives the scale's gradient too: ``dL/ds = 1/2 sum q`` and the own
logits' share.
Rows pass in chunks, so that no second float32 copy of all embeddings exists.

``embed_fused`` and ``fused_gradients`` are the same for score fusion; its formulas are in
``score_fusion``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gcl_kernels.spec import NORM_EPS

ABSENT = -1e38
"""The own-sample logit of a pair that was not asked for: exp is zero, and unlike -inf it may be
multiplied by a zero weight and leaves every logsumexp a finite term."""

_CHUNK_ELEMENTS = {"cpu": 1 << 18, "default": 1 << 22}
"""Elements per view and chunk: 1 MiB of float32 stays in a CPU's cache; 16 MiB fill a GPU, and the
few chunks that exist at once stay far below the accumulator."""


def mark_absent_(own_logits: Tensor, own_pairs: Sequence[tuple[int, ...]]) -> Tensor:
    """``own_logits`` [V, V, N] with ``ABSENT`` where the pair was not asked for."""
    views = range(own_logits.shape[0])
    absent = [(a, b) for a in views for b in views if (min(a, b), max(a, b)) not in own_pairs]
    if absent == [(a, a) for a in views]:
        own_logits.diagonal().fill_(ABSENT)  # the default: one call, where calls are the cost
    else:
        for a, b in absent:
            own_logits[a, b].fill_(ABSENT)
    return own_logits


def _chunks(num_samples: int, dim: int, device: torch.device) -> list[slice]:
    elements = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["default"])
    rows = max(1, elements // dim)
    return [slice(at, min(at + rows, num_samples)) for at in range(0, num_samples, rows)]


def _inverse_norm(norm: Tensor) -> Tensor:
    # 0 * norm turns a length that overflowed to inf into NaN; 1 / inf would silently give zero.
    return norm.clamp_min(NORM_EPS).reciprocal_().add_(norm * 0)


def _unrounded(
    views: Sequence[Tensor],
    z: Tensor,
    inverse: Tensor,
    normalize: bool,
    rows: slice,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of all z in ``dtype``: ``z`` itself where it holds them exactly, else from ``views``."""
    if z.dtype == dtype:
        return z[:, rows]
    exact = torch.stack([view[rows].to(dtype) for view in views])
    # Like z itself, NaN where the embedding is infinite.
    return exact.mul_(inverse[:, rows].unsqueeze(-1)) if normalize else exact.add_(exact, alpha=0)


def embed(
    views: Sequence[Tensor],
    own_pairs: Sequence[tuple[int, int]],
    normalize: bool,
    compute_dtype: torch.dtype,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns ``z`` [V, N, D], ``norm`` and ``1 / max(norm, eps)`` [V, N] (both empty without
    ``normalize``), ``own`` [V, V, N] (zero where not asked for), and the own-sample logits
    ``scale * own`` (``ABSENT`` there). ``scale`` is in the accumulation dtype.

    An infinite embedding gives NaN: as it is, its logits of -inf would pass for candidates of
    weight zero.
    """
    num_views, (num_samples, dim) = len(views), views[0].shape
    device, accum_dtype = views[0].device, scale.dtype
    if all(view.dtype == compute_dtype for view in views) and compute_dtype == accum_dtype:
        z = torch.stack(list(views))
        if normalize:
            norm = torch.linalg.vector_norm(z, dim=-1)
            inverse = _inverse_norm(norm)
            z.mul_(inverse.unsqueeze(-1))
        else:
            norm, inverse = z.new_empty(0), z.new_empty(0)
            z.add_(z, alpha=0)  # inf + 0 * inf
    else:
        z = torch.empty(num_views, num_samples, dim, dtype=compute_dtype, device=device)
        shape = (num_views, num_samples) if normalize else (0,)
        norm = torch.empty(shape, dtype=accum_dtype, device=device)
        inverse = torch.empty_like(norm)
        for rows in _chunks(num_samples, dim, device):
            part = torch.stack([view[rows].to(accum_dtype) for view in views])
            if normalize:
                norm[:, rows] = torch.linalg.vector_norm(part, dim=-1)
                inverse[:, rows] = _inverse_norm(norm[:, rows])
                part.mul_(inverse[:, rows].unsqueeze(-1))
            else:
                part.add_(part, alpha=0)
            z[:, rows] = part
    # Dots of views v and v + shift for all v at once; the pairs asked for say which shifts.
    dots = {b - a: norm.new_empty(num_views - (b - a), num_samples) for a, b in own_pairs}
    if own_pairs:
        for rows in _chunks(num_samples, dim, device):
            exact = _unrounded(views, z, inverse, normalize, rows, accum_dtype)
            for shift, dot in dots.items():
                torch.sum(exact[: num_views - shift] * exact[shift:], -1, out=dot[:, rows])
    zero = norm.new_zeros(num_samples)
    rows_of = {shift: dot.unbind(0) for shift, dot in dots.items()}
    asked = set(own_pairs)
    own = torch.stack(
        [
            rows_of[abs(a - b)][min(a, b)] if (min(a, b), max(a, b)) in asked else zero
            for a in range(num_views)
            for b in range(num_views)
        ]
    )
    own = own.view(num_views, num_views, num_samples)
    return z, norm, inverse, own, mark_absent_(own * scale, own_pairs)


def empty_embedded(
    views: Sequence[Tensor], normalize: bool, compute_dtype: torch.dtype, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory for what :func:`embed` returns."""
    num_views, (num_samples, dim) = len(views), views[0].shape
    z = scale.new_empty(num_views, num_samples, dim, dtype=compute_dtype)
    norm = scale.new_empty((num_views, num_samples) if normalize else 0)
    own = scale.new_empty(num_views, num_views, num_samples)
    return z, norm, torch.empty_like(norm), own, torch.empty_like(own)


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
    """Gradients of the views that need one (others: empty), and the scale's.

    ``hz`` [V, N, D] is in the accumulation dtype and is overwritten. Views whose gradient is not
    needed are not read from it: their ``<z_a, (H z)_a>`` is missing in the scale's gradient.
    """
    num_views, num_samples, dim = z.shape
    if all(needs_grad):
        groups = [slice(0, num_views)]
    else:
        groups = [slice(v, v + 1) for v in range(num_views) if needs_grad[v]]
    inner = hz.new_zeros(num_views, num_samples)
    grad_own = grad_own_logits * scale
    coefficients = grad_own + grad_own.transpose(0, 1)
    if normalize:
        along_own = (coefficients * own).sum(1)
    for rows in _chunks(num_samples, dim, z.device):
        exact = _unrounded(views, z, inverse, normalize, rows, hz.dtype)
        for group in groups:
            grad = hz[group, rows]
            torch.sum(grad * exact[group], -1, out=inner[group, rows])
            grad.mul_(scale)
            for b in range(num_views):
                grad.addcmul_(coefficients[group, b, rows].unsqueeze(-1), exact[b])
            if normalize:
                along = torch.addcmul(along_own[group, rows], inner[group, rows], scale)
                along.mul_(norm[group, rows] > NORM_EPS)
                grad.addcmul_(along.unsqueeze_(-1), exact[group], value=-1)
                grad.mul_(inverse[group, rows].unsqueeze(-1))
    grads = [
        part.to(view.dtype, copy=True) if needs else part.new_empty(0)
        for part, view, needs in zip(hz.unbind(0), views, needs_grad, strict=True)
    ]
    return grads, inner.sum().mul_(0.5).add_((grad_own_logits * own).sum())


def embed_fused(
    views: Sequence[Tensor],
    mixing: Tensor,
    bases: Sequence[int],
    own_pairs: Sequence[tuple[int, int]],
    normalize: bool,
    compute_dtype: torch.dtype,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The two base embeddings of score fusion, and how the views are made of them.

    Args:
        views: the bases, [N, D] each.
        mixing: [V, 2], see ``score_fusion``.
        bases: for each view the base that it is, or -1.

    Returns:
        ``z`` [2, N, D]; the bases' ``1 / max(|e|, eps)`` [2, N] and the V views' lengths [V, N]
        (both empty without ``normalize``); ``coefficients`` [V, 2, N], zero for a combination
        of length zero; ``dots`` [2, 2, N], the bases' own-sample similarities; the V views'
        own-sample logits [V, V, N], ``ABSENT`` where not asked for.
    """
    num_samples, dim = views[0].shape
    device, num_views, accum_dtype = views[0].device, len(bases), scale.dtype
    z = torch.empty(2, num_samples, dim, dtype=compute_dtype, device=device)
    dots = torch.empty(2, 2, num_samples, dtype=accum_dtype, device=device)
    inverse = dots.new_empty((2, num_samples) if normalize else 0)
    lengths = dots.new_empty((num_views, num_samples) if normalize else 0)
    for rows in _chunks(num_samples, dim, device):
        part = torch.stack([view[rows].to(accum_dtype) for view in views])
        if normalize:
            norm = torch.linalg.vector_norm(part, dim=-1)
            for v, base in enumerate(bases):
                if base < 0:
                    # From the sum itself: its length by the law of cosines would cancel.
                    mixed = part[0] * mixing[v, 0] + part[1] * mixing[v, 1]
                    lengths[v, rows] = torch.linalg.vector_norm(mixed, dim=-1)
                else:
                    lengths[v, rows] = norm[base]
            inverse[:, rows] = _inverse_norm(norm)
            part.mul_(inverse[:, rows].unsqueeze(-1))
        else:
            part.add_(part, alpha=0)
        z[:, rows] = part
        for b, c in ((0, 0), (0, 1), (1, 1)):
            torch.sum(part[b] * part[c], -1, out=dots[b, c, rows])
    dots[1, 0] = dots[0, 1]
    coefficients = _coefficients(mixing, bases, inverse, lengths, num_samples)
    own_logits = _fused_own_logits(coefficients, dots, lengths, own_pairs, scale)
    return z, inverse, lengths, coefficients, dots, own_logits


def empty_fused(
    views: Sequence[Tensor],
    num_views: int,
    normalize: bool,
    compute_dtype: torch.dtype,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory for what :func:`embed_fused` returns."""
    num_samples, dim = views[0].shape
    return (
        scale.new_empty(2, num_samples, dim, dtype=compute_dtype),
        scale.new_empty((2, num_samples) if normalize else 0),
        scale.new_empty((num_views, num_samples) if normalize else 0),
        scale.new_empty(num_views, 2, num_samples),
        scale.new_empty(2, 2, num_samples),
        scale.new_empty(num_views, num_views, num_samples),
    )


def _coefficients(
    mixing: Tensor, bases: Sequence[int], inverse: Tensor, lengths: Tensor, num_samples: int
) -> Tensor:
    """``k_vb = mixing[v,b] |e_b| / |e_v|``; of a base, one and zero."""
    coefficients = mixing.unsqueeze(-1).repeat(1, 1, num_samples)
    if lengths.numel():
        for v, base in enumerate(bases):
            if base < 0:
                coefficients[v] /= inverse * lengths[v]
                # A zero vector's are zero; a length of NaN is none, nor is one that overflowed.
                coefficients[v].masked_fill_(lengths[v] <= NORM_EPS, 0).add_(lengths[v] * 0)
    return coefficients


def pairs_itself(own_pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether some view is paired with itself."""
    return any(a == b for a, b in own_pairs)


def _similarities(
    coefficients: Tensor, dots: Tensor, lengths: Tensor, own_pairs: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``<z_v, z_b>`` [V, 2, N] and ``<z_v, z_w>`` [V, V, N] of one sample, from the bases' own;
    and, where a view is paired with itself, which vectors have unit length [N, V]."""
    toward_bases = (coefficients.unsqueeze(2) * dots).sum(1)
    own = (toward_bases.unsqueeze(1) * coefficients).sum(2)
    unit = None
    if lengths.numel() and pairs_itself(own_pairs):
        # Exactly one: as a sum of products its rounding grows with the square of the coefficients.
        unit = (lengths > NORM_EPS).t()
        own.diagonal().masked_fill_(unit, 1)
    return toward_bases, own, unit


def _fused_own_logits(
    coefficients: Tensor,
    dots: Tensor,
    lengths: Tensor,
    own_pairs: Sequence[tuple[int, int]],
    scale: Tensor,
) -> Tensor:
    """Own-sample logits [V, V, N] of the views of score fusion, see :func:`embed_fused`."""
    _, own, _ = _similarities(coefficients, dots, lengths, own_pairs)
    return mark_absent_(own * scale, own_pairs)


def _fused_pulls(
    bases: Sequence[int],
    own_pairs: Sequence[tuple[int, int]],
    normalize: bool,
    inverse: Tensor,
    lengths: Tensor,
    coefficients: Tensor,
    dots: Tensor,
    inner: Tensor,
    grad_own_logits: Tensor,
    scale: Tensor,
    needs_mixing: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The O(N) side of score fusion's gradient: ``Q_bc`` [2, 2, N], the gradients of ``mixing``
    [V, 2] (empty where not needed) and of the scale. ``inner``: ``U_vb`` of ``score_fusion``."""
    toward_bases, own, unit = _similarities(coefficients, dots, lengths, own_pairs)
    half_sum = (coefficients * inner).sum().mul_(0.5)
    grad_scale = half_sum.add_((grad_own_logits * own).sum())
    grad_own = grad_own_logits * scale
    pull = grad_own + grad_own.transpose(0, 1)
    if unit is not None:
        pull.diagonal().masked_fill_(unit, 0)  # a constant
    # <G_v, z_b>; of a view that is a base only its own entry is used, and only that is filled.
    along_bases = (pull.unsqueeze(2) * toward_bases).sum(1).addcmul_(inner, scale)
    mixed = (pull.unsqueeze(2) * coefficients).sum(1)
    if normalize:
        longer = lengths > NORM_EPS
        along = (coefficients * along_bases).sum(1).mul_(longer)
        mixed.addcmul_(along.unsqueeze(1), coefficients, value=-1)
    towards = (coefficients.unsqueeze(2) * mixed.unsqueeze(1)).sum(0)
    grad_mixing = inner.new_empty(0)
    if needs_mixing:
        if normalize:
            along_bases.addcmul_(along.unsqueeze(1), toward_bases, value=-1)
            ratio = (lengths.unsqueeze(1) * inverse).reciprocal_()
            along_bases.mul_(ratio.where(longer.unsqueeze(1), 0))
        grad_mixing = along_bases.sum(2)
        for v, base in enumerate(bases):
            if base >= 0:
                grad_mixing[v].zero_()  # a constant
    return towards, grad_mixing, grad_scale


def sum_shares(shares: Tensor, needs_mixing: bool) -> tuple[Tensor, Tensor]:
    """The gradients of ``mixing`` (empty where not needed) and of the scale from the samples'
    shares [2 V + 1, N]. Two sums: an operator's results share no memory."""
    of_scale = shares[-1].sum()
    if not needs_mixing:
        return shares.new_empty(0), of_scale
    return shares[:-1].sum(1).view(-1, 2), of_scale


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
    """``1/|e_b| (s R_b + sum_c Q_bc z_c)`` for each base that needs it (others: empty), and the
    gradients of ``mixing`` (empty where not needed) and of the scale.

    ``r`` [2, N, D] is in the accumulation dtype and is overwritten; ``inner`` [V, 2, N] is ``U`` of
    ``score_fusion``. ``needs_grad``: of the bases and of ``mixing``.
    """
    towards, grad_mixing, grad_scale = _fused_pulls(
        bases, own_pairs, normalize, inverse, lengths, coefficients, dots, inner, grad_own_logits,
        scale, needs_grad[2],
    )  # fmt: skip
    _, num_samples, dim = z.shape
    for rows in _chunks(num_samples, dim, z.device):
        exact = _unrounded(views, z, inverse, normalize, rows, r.dtype)
        for b in range(2):
            if not needs_grad[b]:
                continue
            grad = r[b, rows].mul_(scale)
            for c in range(2):
                grad.addcmul_(towards[b, c, rows].unsqueeze(-1), exact[c])
            if normalize:
                grad.mul_(inverse[b, rows].unsqueeze(-1))
    grads = [
        part.to(view.dtype, copy=True) if needs else part.new_empty(0)
        for part, view, needs in zip(r.unbind(0), views, needs_grad[:2], strict=True)
    ]
    return grads, grad_mixing, grad_scale
