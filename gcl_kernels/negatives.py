"""``neg_lse``, the one primitive whose cost is O(M^2 D), and its gradient.

    x(a,j; m,k) = s * <z_a^j, z_m^k>
    neg_lse(a,j) = log sum over m with candidates[a][m], k with id_k != id_j of exp x(a,j; m,k)

Backward, with ``g = dL/d neg_lse`` and rows numbered ``p, q`` over all ``M = V * N`` embeddings:

    H_pq  = g_p exp(x_pq - neg_lse_p) + g_q exp(x_pq - neg_lse_q)     (each where it is a negative)
    dL/dz = s * H z                dL/ds = 1/2 * sum_p <z_p, (H z)_p>

Both passes visit each unordered pair of blocks once: 4 M^2 D floating-point operations where dense
autograd takes 6. The block functions belong to the backends; the loop, the operators that
``torch.compile`` sees, and the ``torch.autograd.Function`` are here. Own-sample similarities travel
along because they come from the same unrounded unit vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gcl_kernels.backends import reference
from gcl_kernels.blocks import Block, most_elements, plan_blocks
from gcl_kernels.dispatch import BACKENDS, Backend, resolve_backend
from gcl_kernels.embeddings import ABSENT
from gcl_kernels.operators import (
    LIBRARY,
    OwnPairs,
    known_scale,
    needing_grad,
    refuse_double_backward,
    subtractable,
    unflatten,
    unwatched,
    weight_unit,
)
from gcl_kernels.problem import Problem, Workspace, empty_kept, neg_lse_by_blocks
from gcl_kernels.spec import (
    BoolTable,
    NegativesSpec,
    bool_table,
    check_sample_ids,
    check_views,
    resolve_dtypes,
    resolve_scale,
)


def _make_problem(
    z: Tensor,
    scale: Tensor,
    sample_ids: Tensor | None,
    max_scale: float | None,
    normalize: bool,
) -> Problem:
    rows = z.flatten(0, 1)
    max_scale = known_scale(scale, max_scale)
    ids = None if sample_ids is None else sample_ids.repeat(z.shape[0])
    return Problem(rows, rows, ids, ids, scale, max_scale, normalize)


def _geometry(
    backend: str, z: Tensor, candidates: list[bool], needs_view: list[bool]
) -> tuple[int, BoolTable, int, bool]:
    """What :func:`plan_blocks` asks: both passes visit the same blocks, cut by views where some
    are frozen."""
    num_views, num_samples, _ = z.shape
    rows = BACKENDS[backend].module.block_rows(z)
    per_view = any(needs_view) and not all(needs_view)
    return num_samples, unflatten(candidates, num_views), rows, per_view


def _empty_kept(
    backend: str,
    geometry: tuple[int, BoolTable, int, bool],
    scale: Tensor,
    needs_grad: list[bool],
) -> Tensor:
    keeps = BACKENDS[backend].keeps_tiles and any(needs_grad)
    return empty_kept(most_elements(*geometry) if keeps else 0, scale)


def _forward(
    views: Sequence[Tensor],
    scale: Tensor,
    sample_ids: Tensor | None,
    candidates: list[bool],
    own_pairs: list[int],
    normalize: bool,
    max_scale: float | None,
    compute_dtype: torch.dtype,
    backend: str,
    needs_grad: list[bool],
) -> tuple[Tensor, ...]:
    pairs = unflatten(own_pairs, 2)
    z, norm, inverse, own, own_logits = BACKENDS[backend].embed(
        views, pairs, normalize, compute_dtype, scale
    )
    num_views, num_samples, _ = z.shape
    problem = _make_problem(z, scale, sample_ids, max_scale, normalize)
    geometry = _geometry(backend, z, candidates, needs_grad[:-1])
    plan = plan_blocks(*geometry, BACKENDS[backend].halves_diagonal)
    kept = _empty_kept(backend, geometry, scale, needs_grad)
    neg_lse = BACKENDS[backend].statistics(problem, plan, kept)
    if neg_lse is None:
        block_stats = BACKENDS[backend].module.block_stats
        neg_lse = neg_lse_by_blocks(block_stats, problem, plan, kept)
    neg_lse = neg_lse.view(num_views, num_samples)
    return neg_lse, own_logits, z, norm, inverse, own, kept


def _matrix_gradient(
    backend: Backend,
    problem: Problem,
    plan: tuple[Block, ...],
    kept: Tensor,
    neg_lse: Tensor,
    grad: Tensor,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor | None]:
    """``H z`` [M, D], and the share of ``dL/ds`` that half of ``<z, H z>`` leaves out, if any."""
    whole = backend.matrix_gradient(problem, plan, kept, neg_lse, grad, needs_grad)
    if whole is not None:
        return whole, None
    lse = subtractable(neg_lse)
    *needs_view, needs_scale = needs_grad
    needs_all, num_samples = all(needs_view), problem.z_rows.shape[0] // len(needs_view)
    unit = weight_unit(grad, problem.compute_dtype)
    if unit is not None:
        grad = grad / unit
    # One block of all rows writes every row once: nothing to start from and to add to.
    once = needs_all and len(plan) == 1 and plan[0].covers(problem.z_rows.shape[0])
    start = torch.empty_like if once else torch.zeros_like
    hz = start(problem.z_rows, dtype=problem.accum_dtype)

    def contribute(rows: slice, left: Tensor, right: Tensor) -> None:
        if once:
            backend.product(left, right, hz[rows])
        else:
            backend.add_product(hz[rows], left, right)

    grad_scale = problem.scale.new_zeros(())
    workspace = Workspace(hz.device, plan, kept)
    for block in plan:
        needs_rows = needs_all or needs_view[block.row_start // num_samples]
        needs_cols = needs_all or needs_view[block.col_start // num_samples]
        if not (needs_rows or needs_cols or needs_scale):
            continue
        weights = backend.module.block_weights(problem, block, lse, lse, grad, grad, workspace)
        z_a, z_b = problem.z_rows[block.rows], problem.z_cols[block.cols]
        if needs_scale and not (needs_rows and needs_cols):
            # A frozen side: <z_A, H_AB z_B> is not found again in that side's rows of hz.
            if needs_cols:
                rows, left, right = block.cols, weights.t(), z_a
            else:
                rows, left, right = block.rows, weights, z_b
            part = backend.product(left, right, torch.empty_like(hz[rows]))
            one_sided = needs_rows or needs_cols or block.diagonal
            grad_scale += (part * problem.z_rows[rows]).sum().mul_(0.5 if one_sided else 1.0)
            if needs_rows or needs_cols:
                hz[rows] += part
            continue
        if needs_rows:
            contribute(block.rows, weights, z_b)
        if needs_cols and not block.diagonal:
            contribute(block.cols, weights.t(), z_a)
    if unit is not None:
        hz.mul_(unit)
        grad_scale.mul_(unit)
    return hz, grad_scale


def _backward(
    views: Sequence[Tensor],
    scale: Tensor,
    sample_ids: Tensor | None,
    candidates: list[bool],
    normalize: bool,
    max_scale: float | None,
    backend: str,
    z: Tensor,
    norm: Tensor,
    inverse: Tensor,
    own: Tensor,
    kept: Tensor,
    neg_lse: Tensor,
    grad_neg_lse: Tensor,
    grad_own_logits: Tensor,
    needs_grad: list[bool],
) -> list[Tensor]:
    """``kept``: of a forward pass in which the same views needed a gradient, or empty."""
    problem = _make_problem(z, scale, sample_ids, max_scale, normalize)
    geometry = _geometry(backend, z, candidates, needs_grad[:-1])
    plan = plan_blocks(*geometry, BACKENDS[backend].halves_diagonal)
    grad = grad_neg_lse.flatten().contiguous()
    hz, grad_scale = _matrix_gradient(
        BACKENDS[backend], problem, plan, kept, neg_lse.flatten(), grad, needs_grad
    )
    grads, grad_scale_of_views = BACKENDS[backend].embed_backward(
        views,
        normalize,
        z,
        norm,
        inverse,
        own,
        hz.view(z.shape),
        grad_own_logits,
        scale,
        needs_grad[:-1],
    )
    if grad_scale is not None:
        grad_scale_of_views += grad_scale
    return [*grads, grad_scale_of_views]


LIBRARY.define(
    "neg_lse(Tensor[] views, Tensor scale, Tensor? sample_ids, bool[] candidates, int[] own_pairs, "
    "bool normalize, float? max_scale, ScalarType compute_dtype, str backend, bool[] needs_grad) "
    "-> (Tensor neg_lse, Tensor own_logits, Tensor z, Tensor norm, "
    "Tensor inverse, Tensor own, Tensor kept)"
)
LIBRARY.define(
    "neg_lse_backward(Tensor[] views, Tensor scale, Tensor? sample_ids, bool[] candidates, "
    "bool normalize, float? max_scale, str backend, Tensor z, Tensor norm, Tensor inverse, "
    "Tensor own, Tensor kept, Tensor neg_lse, Tensor grad_neg_lse, Tensor grad_own_logits, "
    "bool[] needs_grad) -> Tensor[]"
)
LIBRARY.impl("neg_lse", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("neg_lse_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("gcl_kernels::neg_lse", lib=LIBRARY)
def _forward_fake(
    views: Sequence[Tensor],
    scale: Tensor,
    sample_ids: Tensor | None,
    candidates: list[bool],
    own_pairs: list[int],
    normalize: bool,
    max_scale: float | None,
    compute_dtype: torch.dtype,
    backend: str,
    needs_grad: list[bool],
) -> tuple[Tensor, ...]:
    num_views, (num_samples, dim) = len(views), views[0].shape
    neg_lse = scale.new_empty(num_views, num_samples)
    own = scale.new_empty(num_views, num_views, num_samples)
    z = scale.new_empty(num_views, num_samples, dim, dtype=compute_dtype)
    geometry = _geometry(backend, z, candidates, needs_grad[:-1])
    kept = _empty_kept(backend, geometry, scale, needs_grad)
    norm = scale.new_empty((num_views, num_samples) if normalize else 0)
    return neg_lse, torch.empty_like(own), z, norm, torch.empty_like(norm), own, kept


@torch.library.register_fake("gcl_kernels::neg_lse_backward", lib=LIBRARY)
def _backward_fake(views: Sequence[Tensor], scale: Tensor, *others: Any) -> list[Tensor]:
    needs_grad = others[-1]
    grads = [
        view.new_empty(view.shape) if needs else scale.new_empty(0)
        for view, needs in zip(views, needs_grad[:-1], strict=True)
    ]
    return [*grads, scale.new_empty(())]


refuse_double_backward("neg_lse_backward")


class NegLSE(torch.autograd.Function):
    """(static arguments, sample_ids, scale, *views) -> (neg_lse [V, N], own_logits [V, V, N])."""

    @staticmethod
    def forward(
        ctx: Any,
        candidates: list[bool],
        own_pairs: list[int],
        normalize: bool,
        max_scale: float | None,
        compute_dtype: torch.dtype,
        backend: str,
        needs_grad: list[bool],
        sample_ids: Tensor | None,
        scale: Tensor,
        *views: Tensor,
    ) -> tuple[Tensor, Tensor]:
        operator = torch.ops.gcl_kernels.neg_lse
        if unwatched(scale, sample_ids, *views):
            operator = _forward
        neg_lse, own_logits, z, norm, inverse, own, kept = operator(
            views,
            scale,
            sample_ids,
            candidates,
            own_pairs,
            normalize,
            max_scale,
            compute_dtype,
            backend,
            needs_grad,
        )
        ctx.save_for_backward(sample_ids, scale, z, norm, inverse, own, kept, neg_lse, *views)
        ctx.static = (candidates, normalize, max_scale, backend)
        ctx.kept_for = needs_grad
        return neg_lse, own_logits

    @staticmethod
    def backward(
        ctx: Any, grad_neg_lse: Tensor, grad_own_logits: Tensor
    ) -> tuple[Tensor | None, ...]:
        sample_ids, scale, z, norm, inverse, own, kept, neg_lse, *views = ctx.saved_tensors
        needs_grad = [*ctx.needs_input_grad[9:], ctx.needs_input_grad[8]]
        if needs_grad[:-1] != ctx.kept_for[:-1]:
            kept = kept.new_empty(0)  # torch.autograd.grad of some inputs: other blocks
        operator = torch.ops.gcl_kernels.neg_lse_backward
        if unwatched(grad_neg_lse, grad_own_logits, scale, *views):
            operator = _backward
        *grads, grad_scale = operator(
            views,
            scale,
            sample_ids,
            *ctx.static,
            z,
            norm,
            inverse,
            own,
            kept,
            neg_lse,
            grad_neg_lse,
            grad_own_logits,
            needs_grad,
        )
        return (
            *(None,) * 8,
            grad_scale if needs_grad[-1] else None,
            *(grad if need else None for grad, need in zip(grads, needs_grad[:-1], strict=True)),
        )


def negatives(
    views: Sequence[Tensor],
    scale: Tensor,
    sample_ids: Tensor | None,
    own_pairs: OwnPairs,
    spec: NegativesSpec,
) -> tuple[Tensor, Tensor]:
    """``neg_lse`` [V, N] and ``own_logits`` [V, V, N]: ``s <z_a^j, z_b^j>``, ``ABSENT`` where the
    pair was not asked for."""
    if spec.backend == "reference":
        neg_lse, own_logits = reference.negatives(views, scale, sample_ids, spec)
        views_of = range(len(views))
        absent = [[(min(a, b), max(a, b)) not in own_pairs for b in views_of] for a in views_of]
        mask = torch.tensor(absent, device=own_logits.device).unsqueeze(-1)
        return neg_lse, own_logits.masked_fill(mask, ABSENT)
    return NegLSE.apply(
        [entry for row in spec.candidates for entry in row],
        [index for pair in own_pairs for index in pair],
        spec.normalize,
        spec.max_scale,
        spec.compute_dtype,
        spec.backend,
        needing_grad(*views, scale),
        sample_ids,
        scale,
        *views,
    )


def neg_lse(
    views: Sequence[Tensor],
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    normalize: bool = True,
    candidates: Any = None,
    sample_ids: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log of the summed exponentials of every anchor's logits against its negatives.

    The differentiable primitive on which the losses of this package stand; build others on it.

        neg_lse[a, j] = log sum_{m: candidates[a][m]} sum_{k: id_k != id_j} exp(s <z_a^j, z_m^k>)

    Args:
        views: one or more tensors [N, D], float64, float32, bfloat16 or float16, dtypes may differ.
        logit_scale, temperature: as for :func:`gcl_kernels.gcl_loss`.
        normalize: divide embeddings by their length (at least 1e-12) first.
        candidates: V x V booleans, row ``a`` for anchors of view ``a``; default all true. An anchor
            view without any candidate gets -inf.
        sample_ids: N integers; embeddings with equal ids are no negatives of each other. Default:
            all different.
        compute_dtype, backend: as for :func:`gcl_kernels.gcl_loss`.

    Returns:
        [V, N], float32 (float64 where the products are float64), natural logarithm; -inf for an
        anchor without negatives, with gradient 0.

    Raises:
        ValueError, TypeError: malformed arguments; the message names what was expected and given.
    """
    views = list(views)
    if not views:
        raise ValueError("views: expected at least 1, got 0")
    check_views(views, [f"views[{v}]" for v in range(len(views))])
    table: BoolTable
    if candidates is None:
        table = tuple(tuple(True for _ in views) for _ in views)
    else:
        table = bool_table("candidates", candidates, len(views))
    scale, spec = prepare(
        views, table, logit_scale, temperature, normalize, sample_ids, compute_dtype, backend
    )
    return negatives(views, scale, sample_ids, (), spec)[0]


def prepare(
    views: Sequence[Tensor],
    candidates: BoolTable,
    logit_scale: float | Tensor | None,
    temperature: float | Tensor | None,
    normalize: bool,
    sample_ids: Tensor | None,
    compute_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, NegativesSpec]:
    """Check the arguments that all losses share: the scale as a tensor, and the spec."""
    check_sample_ids(sample_ids, views[0])
    compute_dtype, accum_dtype = resolve_dtypes(compute_dtype, views)
    scale, max_scale = resolve_scale(logit_scale, temperature, views[0].device, accum_dtype)
    backend = resolve_backend(backend, views[0].device, compute_dtype)
    return scale, NegativesSpec(
        candidates, normalize, compute_dtype, accum_dtype, max_scale, backend
    )
