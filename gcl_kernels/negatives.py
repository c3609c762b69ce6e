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

Of many processes (``distributed``) each treats its own embeddings so, and then, as rows, meets some
of the others' as columns: together 4 M^2 D for the M embeddings of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcl_kernels.backends import reference
from gcl_kernels.blocks import Block, most_elements, plan_blocks, plan_rectangle
from gcl_kernels.dispatch import BACKENDS, Backend, resolve_backend
from gcl_kernels.distributed import (
    Exchange,
    Meeting,
    PerSample,
    agree,
    empty_agreement,
    lines_for_others,
    lines_that_meet,
    neg_lse_with_others,
    resolve_group,
)
from gcl_kernels.embeddings import ABSENT
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
from gcl_kernels.problem import Problem, Workspace, empty_kept, neg_lse_by_blocks
from gcl_kernels.spec import (
    BackendName,
    BoolTable,
    ExchangeName,
    Group,
    NegativesSpec,
    Table,
    bool_table,
    check_normalize,
    check_sample_ids,
    check_views,
    recordable,
    resolve_dtypes,
    resolve_scale,
    view_list,
    warn_of_temperature,
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
    group: str,
    exchange: str,
    needs_grad: list[bool],
) -> tuple[Tensor, ...]:
    pairs = unflatten(own_pairs, 2)
    scale = finite_scale(scale, max_scale)
    z, norm, inverse, own, own_logits = BACKENDS[backend].embed(
        views, pairs, normalize, compute_dtype, scale
    )
    num_views, num_samples, _ = z.shape
    problem = _make_problem(z, scale, sample_ids, max_scale, normalize)
    geometry = _geometry(backend, z, candidates, needs_grad[:-1])
    plan = plan_blocks(*geometry, BACKENDS[backend].halves_diagonal)
    kept = _empty_kept(backend, geometry, scale, needs_grad)
    agreement, others = empty_agreement(scale), None
    if group:
        agreement = agree(
            group,
            problem,
            num_samples,
            views=f"{num_views} as given",
            candidates=geometry[1],
            gradients=f"of views {needs_grad[:-1]}, of logit_scale {needs_grad[-1]}",
            exchange=exchange,
        )
        others = Exchange(group, exchange, agreement, _shard(z, sample_ids))
    block_stats = BACKENDS[backend].module.block_stats
    neg_lse = BACKENDS[backend].statistics(problem, plan, kept)
    if neg_lse is None:
        neg_lse, _ = neg_lse_by_blocks(block_stats, problem, plan, kept)
    neg_lse = neg_lse.view(num_views, num_samples)
    if others is not None:
        rectangle = partial(_rectangle, problem, geometry)
        neg_lse = neg_lse_with_others(others, neg_lse, block_stats, rectangle)
    return neg_lse, own_logits, z, norm, inverse, own, kept, agreement


def _shard(z: Tensor, sample_ids: Tensor | None) -> list[PerSample]:
    """What other processes need of these embeddings."""
    ids = [] if sample_ids is None else [PerSample(sample_ids.to(torch.int64).contiguous(), 0)]
    return [PerSample(z, 1), *ids]


def _rectangle(
    problem: Problem,
    geometry: tuple[int, BoolTable, int, bool],
    meeting: Meeting,
    given: Sequence[Tensor],
) -> tuple[Problem, tuple[Block, ...]]:
    """The problem's rows against what other processes gave of theirs, and its blocks."""
    z, *ids = given
    cols = ids[0].repeat(len(z)) if ids else None
    plan = plan_rectangle(meeting.rows, meeting.cols, *geometry[1:])
    return replace(problem, z_cols=z.flatten(0, 1), ids_cols=cols), plan


@dataclass(frozen=True)
class _Sides:
    """Of rows and of columns, which are the same tensors where the problem is square: ``neg_lse``,
    :func:`subtractable`, and its gradient; and ``H z``, to which a pass adds."""

    lse: tuple[Tensor, Tensor]
    grad: tuple[Tensor, Tensor]
    hz: tuple[Tensor, Tensor]


def _add_matrix_gradient(
    backend: Backend,
    problem: Problem,
    plan: tuple[Block, ...],
    kept: Tensor | None,
    sides: _Sides,
    needs_grad: list[bool],
    once: bool = False,
) -> Tensor | None:
    """Add ``H z`` to both sides, or write it where one block gives all of it (``once``).

    Returns:
        The share of ``dL/ds`` that half of ``<z, H z>`` leaves out: that of frozen views, if any.
    """
    *needs_view, needs_scale = needs_grad
    needs_all = all(needs_view)
    num_rows, num_cols = (len(of_side) // len(needs_view) for of_side in sides.lse)
    hz_rows, hz_cols = sides.hz

    def contribute(hz: Tensor, left: Tensor, right: Tensor) -> None:
        if once:
            backend.product(left, right, hz)
        else:
            backend.add_product(hz, left, right)

    grad_scale = None
    if needs_scale and not needs_all:
        grad_scale = problem.scale.new_zeros(())
    workspace = Workspace(hz_rows.device, plan, kept)
    for block in plan:
        needs_rows = needs_all or needs_view[block.row_start // num_rows]
        needs_cols = needs_all or needs_view[block.col_start // num_cols]
        if not (needs_rows or needs_cols or needs_scale):
            continue
        weights = backend.module.block_weights(problem, block, *sides.lse, *sides.grad, workspace)
        z_a, z_b = problem.z_rows[block.rows], problem.z_cols[block.cols]
        to_rows, to_cols = hz_rows[block.rows], hz_cols[block.cols]
        if grad_scale is not None and not (needs_rows and needs_cols):
            # A frozen side: <z_A, H_AB z_B> is not found again in that side's rows of hz.
            if needs_cols:
                to, left, right, along = to_cols, weights.t(), z_a, z_b
            else:
                to, left, right, along = to_rows, weights, z_b, z_a
            part = backend.product(left, right, torch.empty_like(to))
            one_sided = needs_rows or needs_cols or block.diagonal
            grad_scale += (part * along).sum().mul_(0.5 if one_sided else 1.0)
            if needs_rows or needs_cols:
                to += part
            continue
        if needs_rows:
            contribute(to_rows, weights, z_b)
        if needs_cols and not block.diagonal:
            contribute(to_cols, weights.t(), z_a)
    return grad_scale


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
    unit = weight_unit(grad, problem.compute_dtype)
    if unit is not None:
        grad = grad / unit
    # One block of all rows writes every row once: nothing to start from and to add to.
    once = all(needs_grad[:-1]) and len(plan) == 1 and plan[0].covers(len(lse))
    start = torch.empty_like if once else torch.zeros_like
    hz = start(problem.z_rows, dtype=problem.accum_dtype)
    sides = _Sides((lse, lse), (grad, grad), (hz, hz))
    grad_scale = _add_matrix_gradient(backend, problem, plan, kept, sides, needs_grad, once)
    if unit is not None:
        hz.mul_(unit)
        if grad_scale is not None:
            grad_scale.mul_(unit)
    return hz, grad_scale


def _add_gradient_of_others(
    others: Exchange,
    backend: Backend,
    problem: Problem,
    geometry: tuple[int, BoolTable, int, bool],
    lines: Tensor,
    needs_grad: list[bool],
    hz: Tensor,
) -> Tensor:
    """Add to ``hz`` [V, N, D] what the other processes' samples contribute.

    Args:
        lines: from :func:`lines_for_others`.

    Returns:
        The share of ``dL/ds`` that half of ``<z, H z>`` leaves out.
    """
    grad_scale = problem.scale.new_zeros(())
    needed = [v for v, needs in enumerate(needs_grad[:-1]) if needs]

    def meet(meeting: Meeting, given: list[Tensor]) -> list[PerSample]:
        lines_other, *shard = given
        rectangle, plan = _rectangle(problem, geometry, meeting, shard)
        lse, grad = lines_that_meet(lines.flatten(1), lines_other.flatten(1))
        hz_other = torch.zeros_like(shard[0], dtype=hz.dtype)
        hz_own = hz
        unit = weight_unit(torch.cat(grad), problem.compute_dtype)
        if unit is not None:
            grad, hz_own = tuple(of_side / unit for of_side in grad), torch.zeros_like(hz)
        sides = _Sides(lse, grad, (hz_own.flatten(0, 1), hz_other.flatten(0, 1)))
        part = _add_matrix_gradient(backend, rectangle, plan, None, sides, needs_grad)
        if unit is not None:
            hz.addcmul_(hz_own, unit)
            hz_other.mul_(unit)
        if part is not None:
            grad_scale.add_(part if unit is None else part * unit)
        if not needed:
            return []
        return [PerSample(hz_other if len(needed) == len(hz) else hz_other[needed], 1)]

    for (returned,) in others.meet(meet):
        for v, of_view in zip(needed, returned, strict=True):
            hz[v] += of_view
        del returned, of_view  # before the next one comes
    return grad_scale


def _backward(
    views: Sequence[Tensor],
    scale: Tensor,
    sample_ids: Tensor | None,
    candidates: list[bool],
    normalize: bool,
    max_scale: float | None,
    backend: str,
    group: str,
    exchange: str,
    z: Tensor,
    norm: Tensor,
    inverse: Tensor,
    own: Tensor,
    kept: Tensor,
    agreement: Tensor,
    neg_lse: Tensor,
    grad_neg_lse: Tensor,
    grad_own_logits: Tensor,
    needs_grad: list[bool],
) -> list[Tensor]:
    """``kept``: of a forward pass in which the same views needed a gradient, or empty."""
    problem = _make_problem(z, scale, sample_ids, max_scale, normalize)
    geometry = _geometry(backend, z, candidates, needs_grad[:-1])
    plan = plan_blocks(*geometry, BACKENDS[backend].halves_diagonal)
    grad, others = grad_neg_lse.contiguous(), None
    if group:
        lines = lines_for_others(neg_lse, grad, agreement)
        own_shard = [PerSample(lines, 2), *_shard(z, sample_ids)]
        others = Exchange(group, exchange, agreement, own_shard)
    hz, grad_scale = _matrix_gradient(
        BACKENDS[backend], problem, plan, kept, neg_lse.flatten(), grad.flatten(), needs_grad
    )
    if others is not None:
        part = _add_gradient_of_others(
            others, BACKENDS[backend], problem, geometry, lines, needs_grad, hz.view(z.shape)
        )
        grad_scale = part if grad_scale is None else grad_scale + part
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
    "bool normalize, float? max_scale, ScalarType compute_dtype, str backend, str group, "
    "str exchange, bool[] needs_grad) -> (Tensor neg_lse, Tensor own_logits, Tensor z, "
    "Tensor norm, Tensor inverse, Tensor own, Tensor kept, Tensor agreement)"
)
LIBRARY.define(
    "neg_lse_backward(Tensor[] views, Tensor scale, Tensor? sample_ids, bool[] candidates, "
    "bool normalize, float? max_scale, str backend, str group, str exchange, Tensor z, "
    "Tensor norm, Tensor inverse, Tensor own, Tensor kept, Tensor agreement, Tensor neg_lse, "
    "Tensor grad_neg_lse, Tensor grad_own_logits, bool[] needs_grad) -> Tensor[]"
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
    group: str,
    exchange: str,
    needs_grad: list[bool],
) -> tuple[Tensor, ...]:
    num_views, (num_samples, dim) = len(views), views[0].shape
    neg_lse = scale.new_empty(num_views, num_samples)
    own = scale.new_empty(num_views, num_views, num_samples)
    z = scale.new_empty(num_views, num_samples, dim, dtype=compute_dtype)
    geometry = _geometry(backend, z, candidates, needs_grad[:-1])
    kept = _empty_kept(backend, geometry, scale, needs_grad)
    norm = scale.new_empty((num_views, num_samples) if normalize else 0)
    agreement = empty_agreement(scale, group)
    return neg_lse, torch.empty_like(own), z, norm, torch.empty_like(norm), own, kept, agreement


@torch.library.register_fake("gcl_kernels::neg_lse_backward", lib=LIBRARY)
def _backward_fake(views: Sequence[Tensor], scale: Tensor, *rest: Any) -> list[Tensor]:
    needs_grad = rest[-1]
    grads = [
        view.new_empty(view.shape) if needs else scale.new_empty(0)
        for view, needs in zip(views, needs_grad[:-1], strict=True)
    ]
    return [*grads, scale.new_empty(())]


refuse_backward("neg_lse", NO_OWN_GRADIENT)
refuse_backward("neg_lse_backward", NO_DOUBLE_BACKWARD)


class NegLSE(torch.autograd.Function):
    """(static arguments, needs_grad, sample_ids, scale, *views) -> (neg_lse [V, N],
    own_logits [V, V, N]), and of a group agreement [W + 1]."""

    @staticmethod
    def forward(
        ctx: Any,
        static: tuple[Any, ...],
        needs_grad: list[bool],
        sample_ids: Tensor | None,
        scale: Tensor,
        *views: Tensor,
    ) -> tuple[Tensor, ...]:
        forward = operator("neg_lse", _forward, scale, sample_ids, *views)
        neg_lse, own_logits, z, *saved, agreement = forward(
            views, scale, sample_ids, *static, needs_grad
        )
        kept_views = needed_views(views, z, scale)
        ctx.save_for_backward(sample_ids, scale, z, *saved, neg_lse, agreement, *kept_views)
        candidates, _, normalize, max_scale, _, backend, group, exchange = static
        ctx.static = (candidates, normalize, max_scale, backend, group, exchange)
        ctx.kept_for = needs_grad
        # Without a group there are none, and an output costs some microseconds.
        return (neg_lse, own_logits, agreement) if group else (neg_lse, own_logits)

    @staticmethod
    def backward(
        ctx: Any, grad_neg_lse: Tensor, grad_own_logits: Tensor, *grad_agreement: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_transforms(grad_neg_lse, grad_own_logits)
        # Read once: checkpointing unpacks what is saved no second time.
        sample_ids, scale, *saved = ctx.saved_tensors
        saved, agreement, views = saved[:6], saved[6], saved[7:] or saved[0].unbind(0)
        # Backends read by address, and saved tensors may come back from a hook in another layout.
        z, norm, inverse, own, kept, neg_lse = (tensor.contiguous() for tensor in saved)
        needs_grad = [*ctx.needs_input_grad[4:], ctx.needs_input_grad[3]]
        if needs_grad[:-1] != ctx.kept_for[:-1]:
            kept = kept.new_empty(0)  # of other blocks
        backward = operator(
            "neg_lse_backward", _backward, grad_neg_lse, grad_own_logits, scale, *views
        )
        *grads, grad_scale = backward(
            views,
            scale,
            sample_ids,
            *ctx.static,
            z,
            norm,
            inverse,
            own,
            kept,
            agreement,
            neg_lse,
            grad_neg_lse,
            grad_own_logits,
            needs_grad,
        )
        return (
            *(None,) * 3,
            grad_scale if needs_grad[-1] else None,
            *(grad if need else None for grad, need in zip(grads, needs_grad[:-1], strict=True)),
        )


def negatives(
    views: Sequence[Tensor],
    scale: Tensor,
    sample_ids: Tensor | None,
    own_pairs: OwnPairs,
    spec: NegativesSpec,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``neg_lse`` [V, N]; ``own_logits`` [V, V, N]: ``s <z_a^j, z_b^j>``, ``ABSENT`` where the pair
    was not asked for; and the numbers of samples of all processes [W], None of one alone."""
    if spec.backend == "reference":
        neg_lse, own_logits = reference.negatives(views, scale, sample_ids, spec)
        views_of = range(len(views))
        absent = [[(min(a, b), max(a, b)) not in own_pairs for b in views_of] for a in views_of]
        mask = torch.tensor(absent, device=own_logits.device).unsqueeze(-1)
        return neg_lse, own_logits.masked_fill(mask, ABSENT), None
    refuse_transforms(*views, scale)
    static = (
        [entry for row in spec.candidates for entry in row],
        [index for pair in own_pairs for index in pair],
        spec.normalize,
        spec.max_scale,
        spec.compute_dtype,
        spec.backend,
        spec.group,
        spec.exchange,
    )
    needs_grad = needing_grad(*views, scale)
    if any(needs_grad):
        neg_lse, own_logits, *agreement = NegLSE.apply(
            static, needs_grad, recordable(sample_ids), scale, *distinct(views)
        )
    else:
        # No node of the graph; for Dynamo no Function, to which it gives a context at times only.
        with torch.no_grad():
            forward = operator("neg_lse", _forward, scale, sample_ids, *views)
            neg_lse, own_logits, *agreement = forward(views, scale, sample_ids, *static, needs_grad)
        agreement = agreement[-1:] if spec.group else []
    return neg_lse, own_logits, agreement[0][:-1] if agreement else None


def neg_lse(
    views: Sequence[Tensor],
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    normalize: bool = True,
    candidates: Table | None = None,
    sample_ids: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
    group: Group = None,
    exchange: ExchangeName = "gather",
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
        compute_dtype, backend, group, exchange: as for :func:`gcl_kernels.gcl_loss`; each process
            gets the rows of its own samples.

    Returns:
        [V, N], float32 (float64 where the products are float64), natural logarithm; -inf for an
        anchor without negatives, with gradient 0.

    Raises:
        ValueError, TypeError: malformed arguments; the message names what was expected and given.
        RuntimeError, NotImplementedError: as :func:`gcl_kernels.gcl_loss`.
    """
    views = view_list(views)
    if not views:
        raise ValueError("views: expected at least 1, got 0")
    check_views(views, [f"views[{v}]" for v in range(len(views))])
    table: BoolTable
    if candidates is None:
        table = tuple(tuple(True for _ in views) for _ in views)
    else:
        table = bool_table("candidates", candidates, len(views))
    given = Arguments(
        logit_scale, temperature, normalize, sample_ids, compute_dtype, backend, group, exchange
    )
    scale, spec = prepare(views, table, given)
    return negatives(views, scale, sample_ids, (), spec)[0]


class Arguments(NamedTuple):
    """What every loss is given alike and hands on, as its user gave it."""

    logit_scale: float | Tensor | None
    temperature: float | Tensor | None
    normalize: bool
    sample_ids: Tensor | None
    compute_dtype: torch.dtype | None
    backend: BackendName
    group: Group
    exchange: ExchangeName


def prepare(
    views: Sequence[Tensor], candidates: BoolTable, given: Arguments
) -> tuple[Tensor, NegativesSpec]:
    """Check the arguments that all losses share: the scale as a tensor, and the spec."""
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace: expected torch.compile or torch.export; a trace keeps this batch's "
            "number of samples and is silently wrong for another"
        )
    check_sample_ids(given.sample_ids, views[0])
    check_normalize(given.normalize)
    device = views[0].device
    compute_dtype, accum_dtype = resolve_dtypes(given.compute_dtype, views)
    scale, max_scale = resolve_scale(given.logit_scale, given.temperature, device, accum_dtype)
    warn_of_temperature(max_scale, given.normalize)
    backend = resolve_backend(given.backend, device, compute_dtype)
    group = resolve_group(given.group, given.exchange, backend)
    return scale, NegativesSpec(
        candidates,
        given.normalize,
        compute_dtype,
        accum_dtype,
        max_scale,
        backend,
        group,
        given.exchange,
    )
