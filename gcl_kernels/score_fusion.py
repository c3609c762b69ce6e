"""``neg_lse`` of views that are linear combinations of two embeddings: 4/9 of the work for GCL.

CLIP-SF and TinyCLIP fuse by adding, ``e_v = mixing[v,0] e_0 + mixing[v,1] e_1``. With unit vectors
``z_b = e_b / |e_b|`` of the two bases,

    z_v^j = e_v^j / |e_v^j| = sum_b k_vb^j z_b^j           k_vb = mixing[v,b] |e_b| / |e_v|

so that the products ``y_bc = <z_b^j, z_c^k>`` of the bases carry all V x V pairs of views:

    x_vw = s <z_v^j, z_w^k> = s sum_bc k_vb^j k_wc^k y_bc

Backward, with ``H`` as in ``negatives`` for each pair of views, the block functions return

    F_bc = sum_vw k_vb^j k_wc^k H_vw          R_b = sum_c F_bc z_c = sum_v k_vb (H z)_v
    U_vb = <(H z)_v, z_b>                     (row sums of H times logits; never formed from H z)

and everything else is O(N D). With ``K_vw = dL/d own_vw + dL/d own_wv`` of the own-sample
similarities, ``G_v = dL/dz_v = s (H z)_v + sum_w K_vw z_w`` and ``g_v = <G_v, z_v>``:

    dL/de_b      = 1/|e_b| (s R_b + sum_c Q_bc z_c)
    Q_bc         = sum_v k_vb (sum_w K_vw k_wc - g_v k_vc)
    dL/dmixing_vb = sum_j |e_b| / |e_v| (<G_v, z_b> - g_v <z_v, z_b>)
    dL/ds        = 1/2 sum_vj sum_b k_vb U_vb + sum of dL/d own_logits * own

16 N^2 D floating-point operations for GCL's three views where three separate ones take 36 N^2 D.
A fused vector shorter than 1e-12 is a zero vector: its logits are 0, and nothing flows through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gcl_kernels.blocks import Block, most_elements, plan_blocks, plan_rectangle
from gcl_kernels.dispatch import BACKENDS, Backend
from gcl_kernels.distributed import (
    Exchange,
    Meeting,
    PerSample,
    agree,
    empty_agreement,
    lines_for_others,
    lines_that_meet,
    neg_lse_with_others,
)
from gcl_kernels.operators import (
    LIBRARY,
    NO_DOUBLE_BACKWARD,
    NO_OWN_GRADIENT,
    OwnPairs,
    distinct,
    finite_scale,
    known_scale,
    needed_views,
    needing_grad,
    operator,
    refuse_backward,
    refuse_transforms,
    subtractable,
    unflatten,
    weight_unit,
)
from gcl_kernels.problem import FusedProblem, Workspace, empty_kept, neg_lse_by_blocks
from gcl_kernels.spec import NegativesSpec, recordable

Bases = tuple[int | None, ...]
"""For each view the base that it is, or None for a combination."""

_ONE_SEGMENT = ((True,),)


def _make_problem(
    z: Tensor,
    coefficients: Tensor,
    bases: Sequence[int],
    candidates: Sequence[bool],
    scale: Tensor,
    sample_ids: Tensor | None,
    max_scale: float | None,
    normalize: bool,
) -> FusedProblem:
    ids = None if sample_ids is None else sample_ids.contiguous()
    return FusedProblem(
        z_rows=z,
        z_cols=z,
        coefficients_rows=coefficients,
        coefficients_cols=coefficients,
        bases=tuple(None if base < 0 else base for base in bases),
        candidates=unflatten(candidates, len(bases)),
        ids_rows=ids,
        ids_cols=ids,
        scale=scale,
        max_scale=known_scale(scale, max_scale),
        unit_rows=normalize,
    )


def _plan(backend: str, z: Tensor, num_views: int) -> tuple[Block, ...]:
    row = BACKENDS[backend]
    block_rows = row.module.fused_block_rows(z, num_views)
    return plan_blocks(z.shape[1], _ONE_SEGMENT, block_rows, halve_diagonal=row.halves_diagonal)


def _empty_kept(
    backend: str, z: Tensor, scale: Tensor, num_views: int, needs_grad: list[bool]
) -> Tensor:
    if not (BACKENDS[backend].keeps_tiles and any(needs_grad)):
        return scale.new_empty(0)
    block_rows = BACKENDS[backend].module.fused_block_rows(z, num_views)
    return empty_kept(4 * most_elements(z.shape[1], _ONE_SEGMENT, block_rows), scale)


def _forward(
    e_0: Tensor,
    e_1: Tensor,
    mixing: Tensor,
    scale: Tensor,
    sample_ids: Tensor | None,
    candidates: list[bool],
    own_pairs: list[int],
    bases: list[int],
    normalize: bool,
    max_scale: float | None,
    compute_dtype: torch.dtype,
    backend: str,
    group: str,
    exchange: str,
    needs_grad: list[bool],
) -> tuple[Tensor, ...]:
    pairs = unflatten(own_pairs, 2)
    scale = finite_scale(scale, max_scale)
    z, inverse, lengths, coefficients, dots, own_logits = BACKENDS[backend].embed_fused(
        (e_0, e_1), mixing, bases, pairs, normalize, compute_dtype, scale
    )
    problem = _make_problem(
        z, coefficients, bases, candidates, scale, sample_ids, max_scale, normalize
    )
    plan = _plan(backend, z, len(bases))
    kept = _empty_kept(backend, z, scale, len(bases), needs_grad)
    agreement, others = empty_agreement(scale), None
    if group:
        agreement = agree(
            group,
            problem,
            z.shape[1],
            views=f"{len(bases)} made of two by {problem.bases}",
            candidates=problem.candidates,
            gradients="of e_i {}, of e_t {}, of fusion_weights {}, of logit_scale {}".format(
                *needs_grad
            ),
            exchange=exchange,
        )
        others = Exchange(group, exchange, agreement, _shard(problem))
    block_stats = BACKENDS[backend].module.fused_block_stats
    neg_lse = BACKENDS[backend].fused_statistics(problem, plan, kept)
    if neg_lse is None:
        neg_lse, _ = neg_lse_by_blocks(block_stats, problem, plan, kept, (2, 2))
    if others is not None:
        rectangle = partial(_rectangle, backend, problem)
        neg_lse = neg_lse_with_others(others, neg_lse, block_stats, rectangle)
    return neg_lse, own_logits, z, inverse, lengths, coefficients, dots, kept, agreement


def _shard(problem: FusedProblem) -> list[PerSample]:
    """What other processes need of these embeddings."""
    ids = problem.ids_rows
    return [
        PerSample(problem.z_rows, 1),
        PerSample(problem.coefficients_rows, 2),
        *([] if ids is None else [PerSample(ids.to(torch.int64).contiguous(), 0)]),
    ]


def _rectangle(
    backend: str, problem: FusedProblem, meeting: Meeting, given: Sequence[Tensor]
) -> tuple[FusedProblem, tuple[Block, ...]]:
    """The problem's rows against what other processes gave of theirs, and its blocks."""
    z, coefficients, *ids = given
    block_rows = BACKENDS[backend].module.fused_block_rows(problem.z_rows, len(problem.bases))
    return (
        replace(
            problem, z_cols=z, coefficients_cols=coefficients, ids_cols=ids[0] if ids else None
        ),
        plan_rectangle(meeting.rows, meeting.cols, _ONE_SEGMENT, block_rows),
    )


@dataclass(frozen=True)
class _Sides:
    """Of rows and of columns, which are the same tensors where the problem is square: ``neg_lse``,
    :func:`subtractable`, and its gradient; and ``R`` and ``U``, to which a pass adds."""

    lse: tuple[Tensor, Tensor]
    grad: tuple[Tensor, Tensor]
    r: tuple[Tensor, Tensor]
    inner: tuple[Tensor, Tensor]


def _add_matrix_gradient(
    row: Backend,
    problem: FusedProblem,
    plan: tuple[Block, ...],
    kept: Tensor | None,
    sides: _Sides,
    needs_base: Sequence[bool],
) -> None:
    """Add to ``R`` and ``U`` of both sides."""
    r_rows, r_cols = sides.r
    workspace = Workspace(problem.z_rows.device, plan, kept, (2, 2))
    for block in plan:
        f = row.module.fused_block_weights(
            problem, block, *sides.lse, *sides.grad, *sides.inner, workspace
        )
        for b in range(2):
            if not needs_base[b]:
                continue
            for c in range(2):
                row.add_product(r_rows[b, block.rows], f[b, c], problem.z_cols[c, block.cols])
                if not block.diagonal:
                    z_rows = problem.z_rows[c, block.rows]
                    row.add_product(r_cols[b, block.cols], f[c, b].t(), z_rows)


def _unit(problem: FusedProblem, grad: Tensor) -> Tensor | None:
    """The unit in which ``F`` is stored; None: 1."""
    unit = weight_unit(grad, problem.compute_dtype)
    if unit is None:
        return None
    # F sums V^2 weights times coefficients, which are large where bases nearly cancel.
    rows, cols = (
        k.abs().sum(0).amax() for k in (problem.coefficients_rows, problem.coefficients_cols)
    )
    return unit * (rows * cols).clamp_min(1)


def _matrix_gradient(
    row: Backend,
    problem: FusedProblem,
    plan: tuple[Block, ...],
    kept: Tensor,
    neg_lse: Tensor,
    grad: Tensor,
    needs_base: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """``R`` [2, N, D] and ``U`` [V, 2, N] in the accumulation dtype."""
    whole = row.fused_matrix_gradient(problem, plan, kept, neg_lse, grad, needs_base)
    if whole is not None:
        return whole
    lse = subtractable(neg_lse)
    unit = _unit(problem, grad)
    if unit is not None:
        grad = grad / unit
    r = torch.zeros_like(problem.z_rows, dtype=problem.accum_dtype)
    inner = torch.zeros_like(problem.coefficients_rows)
    sides = _Sides((lse, lse), (grad, grad), (r, r), (inner, inner))
    _add_matrix_gradient(row, problem, plan, kept, sides, needs_base)
    if unit is not None:
        r.mul_(unit)
        inner.mul_(unit)
    return r, inner


def _add_gradient_of_others(
    others: Exchange,
    backend: str,
    problem: FusedProblem,
    lines: Tensor,
    needs_base: Sequence[bool],
    r: Tensor,
    inner: Tensor,
) -> None:
    """Add to ``R`` and ``U`` what the other processes' samples contribute.

    Args:
        lines: from :func:`lines_for_others`.
    """

    needed = [b for b in range(2) if needs_base[b]]

    def meet(meeting: Meeting, given: list[Tensor]) -> list[PerSample]:
        lines_other, *shard = given
        rectangle, plan = _rectangle(backend, problem, meeting, shard)
        lse, grad = lines_that_meet(lines, lines_other)
        of_others = (
            torch.zeros_like(rectangle.z_cols, dtype=r.dtype),
            torch.zeros_like(rectangle.coefficients_cols),
        )
        of_own = r, inner
        unit = _unit(rectangle, torch.cat(grad, 1))
        if unit is not None:
            grad = tuple(of_side / unit for of_side in grad)
            of_own = torch.zeros_like(r), torch.zeros_like(inner)
        sides = _Sides(lse, grad, *zip(of_own, of_others, strict=True))
        _add_matrix_gradient(BACKENDS[backend], rectangle, plan, None, sides, needs_base)
        if unit is not None:
            r.addcmul_(of_own[0], unit)
            inner.addcmul_(of_own[1], unit)
            for part in of_others:
                part.mul_(unit)
        r_others = [PerSample(of_others[0][b], 0) for b in needed]
        return [PerSample(of_others[1], 2), *r_others]

    for returned_inner, *returned in others.meet(meet):
        inner.add_(returned_inner)
        for b in needed:
            r[b] += returned.pop(0)


def _backward(
    e_0: Tensor,
    e_1: Tensor,
    mixing: Tensor,
    scale: Tensor,
    sample_ids: Tensor | None,
    candidates: list[bool],
    own_pairs: list[int],
    bases: list[int],
    normalize: bool,
    max_scale: float | None,
    backend: str,
    group: str,
    exchange: str,
    z: Tensor,
    inverse: Tensor,
    lengths: Tensor,
    coefficients: Tensor,
    dots: Tensor,
    kept: Tensor,
    agreement: Tensor,
    neg_lse: Tensor,
    grad_neg_lse: Tensor,
    grad_own_logits: Tensor,
    needs_grad: list[bool],
) -> list[Tensor]:
    problem = _make_problem(
        z, coefficients, bases, candidates, scale, sample_ids, max_scale, normalize
    )
    neg_lse, grad, others = neg_lse.contiguous(), grad_neg_lse.contiguous(), None
    if group:
        lines = lines_for_others(neg_lse, grad, agreement)
        own_shard = [PerSample(lines, 2), *_shard(problem)]
        others = Exchange(group, exchange, agreement, own_shard)
    r, inner = _matrix_gradient(
        BACKENDS[backend],
        problem,
        _plan(backend, z, len(bases)),
        kept,
        neg_lse,
        grad,
        needs_grad[:2],
    )
    if others is not None:
        _add_gradient_of_others(others, backend, problem, lines, needs_grad[:2], r, inner)
    grads, grad_mixing, grad_scale = BACKENDS[backend].fused_gradients(
        (e_0, e_1),
        bases,
        unflatten(own_pairs, 2),
        normalize,
        z,
        inverse,
        lengths,
        coefficients,
        dots,
        r,
        inner,
        grad_own_logits,
        scale,
        needs_grad,
    )
    return [*grads, grad_mixing, grad_scale]


LIBRARY.define(
    "fused_neg_lse(Tensor e_0, Tensor e_1, Tensor mixing, Tensor scale, Tensor? sample_ids, "
    "bool[] candidates, int[] own_pairs, int[] bases, bool normalize, float? max_scale, "
    "ScalarType compute_dtype, str backend, str group, str exchange, bool[] needs_grad) -> "
    "(Tensor neg_lse, Tensor own_logits, Tensor z, Tensor inverse, Tensor lengths, "
    "Tensor coefficients, Tensor dots, Tensor kept, Tensor agreement)"
)
LIBRARY.define(
    "fused_neg_lse_backward(Tensor e_0, Tensor e_1, Tensor mixing, Tensor scale, "
    "Tensor? sample_ids, bool[] candidates, int[] own_pairs, int[] bases, bool normalize, "
    "float? max_scale, str backend, str group, str exchange, Tensor z, Tensor inverse, "
    "Tensor lengths, Tensor coefficients, Tensor dots, Tensor kept, Tensor agreement, "
    "Tensor neg_lse, Tensor grad_neg_lse, Tensor grad_own_logits, bool[] needs_grad) -> Tensor[]"
)
LIBRARY.impl("fused_neg_lse", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("fused_neg_lse_backward", _backward, "CompositeExplicitAutograd")
refuse_backward("fused_neg_lse", NO_OWN_GRADIENT)
refuse_backward("fused_neg_lse_backward", NO_DOUBLE_BACKWARD)


@torch.library.register_fake("gcl_kernels::fused_neg_lse", lib=LIBRARY)
def _forward_fake(
    e_0: Tensor,
    e_1: Tensor,
    mixing: Tensor,
    scale: Tensor,
    sample_ids: Tensor | None,
    candidates: list[bool],
    own_pairs: list[int],
    bases: list[int],
    normalize: bool,
    max_scale: float | None,
    compute_dtype: torch.dtype,
    backend: str,
    group: str,
    exchange: str,
    needs_grad: list[bool],
) -> tuple[Tensor, ...]:
    num_views, (num_samples, dim) = len(bases), e_0.shape
    z = scale.new_empty(2, num_samples, dim, dtype=compute_dtype)
    return (
        scale.new_empty(num_views, num_samples),
        scale.new_empty(num_views, num_views, num_samples),
        z,
        scale.new_empty((2, num_samples) if normalize else 0),
        scale.new_empty((num_views, num_samples) if normalize else 0),
        scale.new_empty(num_views, 2, num_samples),
        scale.new_empty(2, 2, num_samples),
        _empty_kept(backend, z, scale, num_views, needs_grad),
        empty_agreement(scale, group),
    )


@torch.library.register_fake("gcl_kernels::fused_neg_lse_backward", lib=LIBRARY)
def _backward_fake(
    e_0: Tensor, e_1: Tensor, mixing: Tensor, scale: Tensor, *rest: Any
) -> list[Tensor]:
    needs_grad = rest[-1]
    return [
        *(
            of.new_empty(of.shape) if needs else scale.new_empty(0)
            for of, needs in zip((e_0, e_1, mixing), needs_grad, strict=False)
        ),
        scale.new_empty(()),
    ]


class FusedNegLSE(torch.autograd.Function):
    """(static arguments, needs_grad, sample_ids, e_0, e_1, mixing, scale) -> as ``NegLSE``."""

    @staticmethod
    def forward(
        ctx: Any,
        static: tuple[Any, ...],
        needs_grad: list[bool],
        sample_ids: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        forward = operator("fused_neg_lse", _forward, sample_ids, *inputs)
        neg_lse, own_logits, z, *saved = forward(*inputs, sample_ids, *static, needs_grad)
        *bases, mixing, scale = inputs
        kept_bases = needed_views(bases, z, scale)
        ctx.save_for_backward(mixing, scale, sample_ids, neg_lse, z, *saved, *kept_bases)
        *of_both, compute_dtype, backend, group, exchange = static
        ctx.static = (*of_both, backend, group, exchange)
        # Without a group there are none, and an output costs some microseconds.
        return (neg_lse, own_logits, saved[-1]) if group else (neg_lse, own_logits)

    @staticmethod
    def backward(
        ctx: Any, grad_neg_lse: Tensor, grad_own_logits: Tensor, *grad_agreement: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_transforms(grad_neg_lse, grad_own_logits)
        # Read once: checkpointing unpacks what is saved no second time.
        mixing, scale, sample_ids, neg_lse, *saved = ctx.saved_tensors
        saved, agreement, bases = saved[:6], saved[6], saved[7:] or saved[0].unbind(0)
        inputs = (*bases, mixing, scale)
        # Backends read by address, and saved tensors may come back from a hook in another layout.
        z, inverse, lengths, coefficients, dots, kept = (tensor.contiguous() for tensor in saved)
        needs_grad = list(ctx.needs_input_grad[3:])
        backward = operator(
            "fused_neg_lse_backward", _backward, grad_neg_lse, grad_own_logits, *inputs
        )
        grads = backward(
            *inputs,
            sample_ids,
            *ctx.static,
            z,
            inverse,
            lengths,
            coefficients,
            dots,
            kept,
            agreement,
            neg_lse,
            grad_neg_lse,
            grad_own_logits,
            needs_grad,
        )
        return (
            *(None,) * 3,
            *(grad if needs else None for grad, needs in zip(grads, needs_grad, strict=True)),
        )


def fused_negatives(
    e_0: Tensor,
    e_1: Tensor,
    mixing: Tensor,
    bases: Bases,
    scale: Tensor,
    sample_ids: Tensor | None,
    own_pairs: OwnPairs,
    spec: NegativesSpec,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`gcl_kernels.negatives.negatives` of the views ``mixing[v] . (e_0, e_1)``.

    Args:
        e_0, e_1: the base embeddings [N, D].
        mixing: [V, 2] in the accumulation dtype, with gradient where it is no constant.
        bases: for each view the base that it is, its row of ``mixing`` being one and zero, or None.
    """
    refuse_transforms(e_0, e_1, mixing, scale)
    static = (
        [entry for row in spec.candidates for entry in row],
        [index for pair in own_pairs for index in pair],
        [-1 if base is None else base for base in bases],
        spec.normalize,
        spec.max_scale,
        spec.compute_dtype,
        spec.backend,
        spec.group,
        spec.exchange,
    )
    inputs = (*distinct((e_0, e_1)), mixing, scale)
    needs_grad = needing_grad(e_0, e_1, mixing, scale)
    if any(needs_grad):
        neg_lse, own_logits, *agreement = FusedNegLSE.apply(
            static, needs_grad, recordable(sample_ids), *inputs
        )
    else:
        with torch.no_grad():
            forward = operator("fused_neg_lse", _forward, sample_ids, *inputs)
            neg_lse, own_logits, *agreement = forward(*inputs, sample_ids, *static, needs_grad)
        agreement = agreement[-1:] if spec.group else []
    return neg_lse, own_logits, agreement[0][:-1] if agreement else None
