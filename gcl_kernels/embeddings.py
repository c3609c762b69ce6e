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
    return exact.mul_(inverse[:, rows].unsqueeze(-1)) if normalize else exact


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
    normalize: bool,
    compute_dtype: torch.dtype,
    accum_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The two base embeddings of score fusion, and how the views are made of them.

    Args:
        views: the bases, [N, D] each.
        mixing: [V, 2], see ``score_fusion``.
        bases: for each view the base that it is, or -1.

    Returns:
        ``z`` [2, N, D]; the bases' ``1 / max(|e|, eps)`` [2, N] and the V views' lengths [V, N]
        (both empty without ``normalize``); ``coefficients`` [V, 2, N], zero for a combination
        of length zero; ``dots`` [2, 2, N], the bases' own-sample similarities.
    """
    num_samples, dim = views[0].shape
    device, num_views = views[0].device, len(bases)
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
    return z, inverse, lengths, _coefficients(mixing, bases, inverse, lengths, num_samples), dots


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


def fused_gradients(
    views: Sequence[Tensor],
    normalize: bool,
    z: Tensor,
    inverse: Tensor,
    r: Tensor,
    towards: Tensor,
    scale: Tensor,
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    """``1/|e_b| (s R_b + sum_c towards[b, c] z_c)`` for each base that needs it (others: empty).

    ``r`` [2, N, D] is in the accumulation dtype and is overwritten.
    """
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
    return [
        part.to(view.dtype, copy=True) if needs else part.new_empty(0)
        for part, view, needs in zip(r.unbind(0), views, needs_grad, strict=True)
    ]
