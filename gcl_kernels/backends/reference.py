"""The definition, dense and differentiable any number of times: the oracle of every test.

Holds all M x M logits. Half compute types round the embeddings; logits and everything after them
are in the accumulation dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gcl_kernels.backends.base import Backend
from gcl_kernels.problem import Extra, SampleData
from gcl_kernels.spec import ABSENT, NORM_EPS, BoolTable, NegativesSpec


class _Product(torch.autograd.Function):
    """``a @ b`` in its operands' dtype, whatever autocast is in force around the forward pass or a
    backward pass of any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return _product(grad, b.mT), _product(a.mT, grad)


class _ForwardProduct(_Product):
    """With forward-mode gradients, which Dynamo takes of no Function."""

    @staticmethod
    def jvp(ctx: Any, of_a: Tensor, of_b: Tensor) -> Tensor:
        a, b = ctx.saved_tensors
        return _product(of_a, b) + _product(a, of_b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (_Product if torch.compiler.is_compiling() else _ForwardProduct).apply(a, b)


def dense_mask(candidates: BoolTable, sample_ids: Tensor) -> Tensor:
    """True where column ``q`` is a negative of anchor ``p``: the mask rule, dense, [M, M]."""
    num_views, num_samples = len(candidates), sample_ids.shape[0]
    table = torch.tensor(candidates, device=sample_ids.device)
    table = table.repeat_interleave(num_samples, 0).repeat_interleave(num_samples, 1)
    ids = sample_ids.repeat(num_views)
    return table & (ids[:, None] != ids[None, :])


def unit_vectors(e: Tensor, spec: NegativesSpec) -> Tensor:
    """Embeddings [..., D] as the logits take them, unrounded."""
    if not spec.normalize:
        return e
    norm = torch.linalg.vector_norm(e, dim=-1, keepdim=True)
    # 0 * norm: a length that overflowed makes NaN, where e / inf would silently make zero.
    return e / norm.clamp_min(NORM_EPS) + 0 * norm.detach()


def _extra_mask(data: SampleData, extra: Extra, spec: NegativesSpec, rows: Tensor) -> Tensor:
    """True where an extra one is a negative of anchor ``p``, [M, K]."""
    if extra.embeddings is None:
        return torch.empty(len(rows), 0, dtype=torch.bool, device=rows.device)
    num_samples = len(rows) // len(spec.candidates)
    meets = torch.tensor(spec.extra_anchors, device=rows.device).repeat_interleave(num_samples)
    mask = meets[:, None].expand(-1, len(extra.embeddings))
    if extra.ids is None:
        return mask
    ids = data.sample_ids if extra.anchor_ids is None else extra.anchor_ids
    assert ids is not None
    return mask & (ids.repeat(len(spec.candidates))[:, None] != extra.ids[None, :])


class Reference(Backend):
    """The backend ``reference``: all at once, and so without any of the others' parts."""

    fuses_scores = False


def negatives(
    views: Sequence[Tensor], scale: Tensor, data: SampleData, extra: Extra, spec: NegativesSpec
) -> tuple[Tensor, Tensor]:
    """``neg_lse`` [V, N] and own-sample logits [V, V, N], ``ABSENT`` where not asked for."""
    num_views, num_samples = len(views), views[0].shape[0]
    scale = scale + 0 * scale  # NaN for an infinite one
    e = torch.stack([view.to(spec.accum_dtype) for view in views])
    z = unit_vectors(e, spec)
    own = (z.unsqueeze(0) * z.unsqueeze(1)).sum(-1)
    ids = data.sample_ids
    if ids is None:
        ids = torch.arange(num_samples, device=e.device)
    flat = z.to(spec.compute_dtype).to(spec.accum_dtype).flatten(0, 1)
    # Extra candidates are more columns.
    others = flat.new_empty(0, flat.shape[1])
    if extra.embeddings is not None:
        others = unit_vectors(extra.embeddings.to(spec.accum_dtype), spec)
        others = others.to(spec.compute_dtype).to(spec.accum_dtype)
    x = scale * _product(flat, torch.cat([flat, others]).T)
    mask = torch.cat([dense_mask(spec.candidates, ids), _extra_mask(data, extra, spec, flat)], 1)
    if data.limits is not None:
        mask = mask & ~(x > data.limits.view(-1, 1))
    if data.log_weights is not None:
        log_weights = F.pad(data.log_weights.flatten(), (0, len(others)))
        mask = mask & (log_weights > -torch.inf)
        x = x + log_weights
    # A row without negatives must not reach logsumexp, whose gradient would be NaN there.
    empty = ~mask.any(1)
    x = x.masked_fill(~mask, -torch.inf).masked_fill(empty[:, None], 0)
    neg_lse = x.logsumexp(1).masked_fill(empty, -torch.inf)
    # An infinite embedding gives -inf logits; x - x = NaN keeps them from weight
    # zero.
    neg_lse = neg_lse + (flat - flat).detach().sum() + (others - others).detach().sum()
    views_of = range(num_views)
    absent = [[(min(a, b), max(a, b)) not in spec.own_pairs for b in views_of] for a in views_of]
    mask = torch.tensor(absent, device=own.device).unsqueeze(-1)
    own_logits = (scale * own).masked_fill(mask, ABSENT)
    return neg_lse.view(num_views, num_samples), own_logits
