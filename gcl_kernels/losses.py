"""The losses: what they are given, checked and handed on to the operator and to their terms.

    L = sum_{a != b} w_ab * mean_j [ log den(a,j) - x(a,j; b,j) ]

(Lee et al., Generalized Contrastive Learning for Universal Multimodal Retrieval, NeurIPS 2025,
arXiv 2509.25638, for three views, all candidates and equal weights.) ``den(a,j)`` sums exp x over
the anchor's negatives and those embeddings of its own sample that compete; see ``docs/maths.md``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gcl_kernels.dispatch import check_backend, half_dtypes, resolve_backend
from gcl_kernels.distributed import check_group, resolve_group
from gcl_kernels.operators import negatives, small_loss
from gcl_kernels.positives import margin_limits, same_id_loss, unit_views
from gcl_kernels.problem import Extra, SampleData
from gcl_kernels.spec import (
    CROSS,
    DEFAULT_TEMPERATURE,
    BackendName,
    Bases,
    BoolTable,
    ExchangeName,
    Group,
    LossSpec,
    NegativesSpec,
    OtherPositives,
    Pairs,
    Reduction,
    SameId,
    SelfSimilarity,
    Table,
    accum_dtype_of,
    candidate_table,
    check_anchors,
    check_compute_dtype,
    check_fusion_weights,
    check_normalize,
    check_positive,
    check_views,
    is_dtensor,
    make_loss_spec,
    resolve_candidate_weights,
    resolve_compute_dtype,
    resolve_extra,
    resolve_present,
    resolve_sample_ids,
    resolve_scale,
    view_list,
    warn_of_temperature,
)
from gcl_kernels.terms import Batch, reduce_terms


class _Candidates(NamedTuple):
    """What says which candidates there are beyond ids, as a user gave it."""

    present: Any
    extra_negatives: Any
    extra_ids: Any
    extra_anchors: Any
    weights: Any


class _Arguments(NamedTuple):
    """What every loss is given alike and hands on, as its user gave it."""

    logit_scale: float | Tensor | None
    temperature: float | Tensor | None
    normalize: bool
    sample_ids: Tensor | None
    compute_dtype: torch.dtype | None
    backend: BackendName
    group: Group
    exchange: ExchangeName
    candidates: _Candidates


def _prepare(
    views: Sequence[Tensor],
    candidates: BoolTable,
    own_pairs: Pairs,
    given: _Arguments,
    mixed: Bases | None = None,
) -> tuple[Tensor, SampleData, Extra, NegativesSpec]:
    """Check the arguments that all losses share: the scale as a tensor, what samples are given
    beside their embeddings, extra negatives, and the spec."""
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace: expected torch.compile or torch.export; a trace keeps this batch's "
            "number of samples and is silently wrong for another"
        )
    first, num_views, of = views[0], len(candidates), given.candidates
    ids = resolve_sample_ids(given.sample_ids, first)
    check_normalize(given.normalize)
    device = first.device
    beyond, extra_ids, anchors = resolve_extra(
        of.extra_negatives, of.extra_ids, of.extra_anchors, num_views, first
    )
    if extra_ids is not None and ids is None:
        raise ValueError("extra_ids: expected sample_ids to compare them with, got None")
    inputs = views if beyond is None else (*views, beyond)
    compute_dtype = resolve_compute_dtype(
        given.compute_dtype, inputs, lambda: half_dtypes(given.backend, device)
    )
    accum_dtype = accum_dtype_of(compute_dtype)
    scale, max_scale = resolve_scale(given.logit_scale, given.temperature, device, accum_dtype)
    warn_of_temperature(max_scale, given.normalize)
    backend = resolve_backend(given.backend, device, compute_dtype)
    spec = NegativesSpec(
        candidates,
        own_pairs,
        mixed,
        given.normalize,
        compute_dtype,
        max_scale,
        backend,
        resolve_group(given.group, given.exchange, backend),
        given.exchange,
        anchors,
    )
    log_weights = resolve_candidate_weights(of.weights, num_views, first, accum_dtype)
    return scale, SampleData(ids, log_weights), Extra(beyond, extra_ids), spec


def _loss(
    views: Sequence[Tensor],
    spec: LossSpec,
    given: _Arguments,
    fusion_weights: Sequence[float | Tensor] | None = None,
) -> Tensor:
    """Of views that are given, or of two with ``fusion_weights``: these and their sum."""
    mixed = None if fusion_weights is None else (0, 1, None)
    scale, data, extra, static = _prepare(views, spec.candidates, spec.own_pairs, given, mixed)
    mixing = None
    if fusion_weights is not None:
        mixing = _mixing(fusion_weights, scale.dtype, views[0].device)
    present = resolve_present(given.candidates.present, len(views), views[0])
    if static.extra_anchors:
        # A view that anchors no pair has no use for them.
        meets = zip(static.extra_anchors, spec.pair_weights, strict=True)
        anchors = tuple(of_view and any(row) for of_view, row in meets)
        static = static._replace(extra_anchors=anchors)
    plain = present is None and extra.embeddings is None and spec.same_id == "ignore"
    if plain and spec.reduction in ("mean", "sum"):
        loss = small_loss(views, mixing, scale, data, static, spec)
        if loss is not None:
            return loss
    if present is not None:
        # What lies in an absent one's row, NaN too, is not read.
        views = [
            view.masked_fill(~of.unsqueeze(1), 0) for view, of in zip(views, present, strict=True)
        ]
        if mixing is not None:
            present = torch.cat([present, present.all(0, keepdim=True)])
        log_weights = torch.zeros_like(present, dtype=scale.dtype)
        if data.log_weights is not None:
            log_weights = data.log_weights
        data = data._replace(log_weights=log_weights.masked_fill(~present, -torch.inf))
    ids = data.sample_ids
    if spec.same_id == "positive":
        _check_same_id(ids, static)
        data = data._replace(sample_ids=None)
        if extra.ids is not None:
            extra = extra._replace(anchor_ids=ids)
    if spec.false_negative_margin is not None:
        with torch.no_grad():
            z = unit_views(views, mixing, static)
            data = data._replace(limits=margin_limits(z, scale, present, spec))
    neg_lse, own_logits, sizes = negatives(views, mixing, scale, data, extra, static)
    batch = Batch(neg_lse, own_logits, sizes, static.group, present)
    if spec.same_id == "positive" and ids is not None:
        return same_id_loss(batch, unit_views(views, mixing, static), ids, scale, spec)
    return reduce_terms(batch, spec)


def _check_same_id(ids: Tensor | None, static: NegativesSpec) -> None:
    if ids is None:
        raise ValueError("same_id: 'positive' needs sample_ids, got None")
    if static.group:
        raise ValueError(
            "same_id: 'positive' is of one process, whose samples are positives of each other; got "
            "a group of several"
        )


def multiview_contrastive_loss(
    views: Sequence[Tensor],
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    normalize: bool = True,
    pair_weights: Table | None = None,
    candidates: Table | None = None,
    sample_ids: Tensor | None = None,
    same_id: SameId = "ignore",
    present: Tensor | Sequence[Tensor | None] | None = None,
    extra_negatives: Tensor | None = None,
    extra_ids: Tensor | None = None,
    extra_anchors: Sequence[bool] | None = None,
    candidate_weights: Tensor | None = None,
    false_negative_margin: float | None = None,
    self_similarity: SelfSimilarity = "mask",
    other_positives: OtherPositives = "compete",
    reduction: Reduction = "mean",
    compute_dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
    group: Group = None,
    exchange: ExchangeName = "gather",
) -> Tensor:
    """The contrastive loss over any ``V >= 2`` views of ``N`` samples.

    Args:
        views: V tensors [N, D], float64, float32, bfloat16 or float16; dtypes may differ.
        Others: as for :func:`gcl_loss`, with tables V x V, and V for 3.

    Returns:
        0-d (or [N] with ``reduction="none"``, [V, V] with ``"pairs"``), float32; float64 where the
        products are float64.

    Raises:
        As :func:`gcl_loss`.
    """
    views = view_list(views)
    if len(views) < 2:
        raise ValueError(f"views: expected at least 2, got {len(views)}")
    check_views(views, [f"views[{v}]" for v in range(len(views))])
    spec = make_loss_spec(
        len(views), pair_weights, candidates, self_similarity, other_positives, reduction, same_id,
        false_negative_margin,
    )  # fmt: skip
    given = _Arguments(
        logit_scale, temperature, normalize, sample_ids, compute_dtype, backend, group, exchange,
        _Candidates(present, extra_negatives, extra_ids, extra_anchors, candidate_weights),
    )  # fmt: skip
    return _loss(views, spec, given)


def _mixing(weights: Sequence[float | Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What image, text and fused embeddings are made of: [3, 2]."""
    learned = any(isinstance(weight, Tensor) for weight in weights)
    if device.type == "cpu" and not learned and not torch.compiler.is_compiling():
        return torch.tensor([[1, 0], [0, 1], weights], dtype=dtype, device=device)
    one = torch.ones((), dtype=dtype, device=device)
    zero = torch.zeros_like(one)
    alpha, beta = (
        # A number as an operand, too: filled in, it would be a constant of a compiled graph.
        weight.reshape(()).to(dtype) if isinstance(weight, Tensor) else one * weight
        for weight in weights
    )
    return torch.stack([one, zero, zero, one, alpha, beta]).view(3, 2)


def _gcl(
    spec: LossSpec,
    e_i: Tensor,
    e_t: Tensor,
    e_it: Tensor | None,
    fusion_weights: Sequence[float | Tensor],
    given: _Arguments,
) -> Tensor:
    if e_it is not None:
        if isinstance(e_it, (int, float)) or isinstance(e_it, Tensor) and e_it.dim() == 0:
            raise TypeError(
                "e_it: expected a 2-D tensor [N, D] or None, got a scalar; logit_scale is the "
                "fourth argument"
            )
        check_views((e_i, e_t, e_it), ("e_i", "e_t", "e_it"))
        return _loss((e_i, e_t, e_it), spec, given)
    check_views((e_i, e_t), ("e_i", "e_t"))
    return _loss((e_i, e_t), spec, given, check_fusion_weights(fusion_weights, e_i.device))


def gcl_loss(
    e_i: Tensor,
    e_t: Tensor,
    e_it: Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    normalize: bool = True,
    pair_weights: Table | None = None,
    candidates: Table | None = None,
    sample_ids: Tensor | None = None,
    same_id: SameId = "ignore",
    present: Tensor | Sequence[Tensor | None] | None = None,
    extra_negatives: Tensor | None = None,
    extra_ids: Tensor | None = None,
    extra_anchors: Sequence[bool] | None = None,
    candidate_weights: Tensor | None = None,
    false_negative_margin: float | None = None,
    self_similarity: SelfSimilarity = "mask",
    other_positives: OtherPositives = "compete",
    fusion_weights: Sequence[float | Tensor] = (1.0, 1.0),
    reduction: Reduction = "mean",
    compute_dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
    group: Group = None,
    exchange: ExchangeName = "gather",
) -> Tensor:
    """The Generalized Contrastive Learning loss (Lee et al., NeurIPS 2025, arXiv 2509.25638).

    Every image, text and fused embedding is an anchor that has to find the two other embeddings of
    its sample among all 3N embeddings of the batch.

    Args:
        e_i, e_t: image and text embeddings [N, D]; float64, float32, bfloat16 or float16, dtypes
            may differ.
        e_it: fused embeddings [N, D]. Default: ``alpha * e_i + beta * e_t`` of the embeddings as
            given, with ``(alpha, beta) = fusion_weights``; from raw embeddings this is UniIR's
            CLIP-SF. These fused vectors are never formed (but by the backends ``cuda`` and
            ``reference``), which takes 4/9 of the work that giving them takes (``docs/maths.md``).
            ``fusion_weights`` is not used where ``e_it`` is given.
        logit_scale, temperature: at most one; ``logit_scale = 1 / temperature``. A number > 0 or a
            tensor of shape [] or [1] on the embeddings' device, with gradient if it requires one.
            Default: temperature 0.07.
        normalize: divide every embedding by ``max(length, 1e-12)`` first.
        pair_weights: 3 x 3 finite numbers >= 0 with zero diagonal, divided by their sum; entry
            [a][b] weighs "anchor view a finds view b". Default: the six pairs at 1/6. The order of
            views is image, text, fused. Tables are nested sequences, NumPy arrays or CPU tensors.
        candidates: 3 x 3 booleans; entry [a][m] says whether anchors of view a meet view m in their
            denominator. Default: all true.
        sample_ids: N integers (int64, int32, int16, int8 or uint8) on the embeddings' device.
            Samples with equal ids are neither positives nor negatives of each other, or, with
            ``same_id="positive"``, positives. Default: all different.
        same_id: ``"ignore"``, or ``"positive"``: an anchor has to find all embeddings of its id,
            which are all in its denominator: the supervised contrastive form (Khosla et al. 2020,
            L_out), of two views that meet across UniCL's. Those of the anchor's own view count
            where ``candidates[a][a]``. Of one process; with ``other_positives="compete"``, without
            a margin.
        present: which of the given embeddings there are: booleans [3, N] ([2, N] without ``e_it``:
            the fused one is there where both are), or for each view [N] or None. An absent one is
            no anchor, no positive and no candidate; what lies in its row, NaN too, is not read and
            gets a gradient of zero. The mean is over the terms that exist (where there are none,
            the loss is 0). Default: all.
        extra_negatives: embeddings [K, D], raw or unit as the others, which are negatives of every
            anchor: a queue, mined or hard negatives. With a gradient if they require one. Of a
            ``group``, for this process's anchors alone.
        extra_ids: K integers: no negatives of anchors whose ``sample_ids`` are equal.
        extra_anchors: three booleans, whether the view's anchors meet them. Default: all true.
        candidate_weights: floating [3, N], finite, >= 0: what an embedding counts in others'
            denominators, such as a sampling correction 1 / q. Without a gradient. Default: 1.
        false_negative_margin: a number >= 0: another sample whose similarity to the anchor is
            larger by more than this than that of its nearest positive is no negative
            (Qwen3-Embedding, Zhang et al. 2025, with 0.1). Default: None.
        self_similarity: ``"mask"`` leaves the anchor itself out of its denominator; ``"keep"``
            keeps it (where ``candidates[a][a]``), the literal sum over all embeddings.
        other_positives: ``"compete"``: a denominator holds all other views of the anchor's sample
            that are candidates; ``"exclude"``: only the pair's own positive.
        fusion_weights: two finite numbers or tensors of shape [] or [1] (with gradient).
        reduction: ``"mean"``, ``"sum"``, ``"none"`` for N losses, whose mean is the mean (of a
            ``group``, that of all processes' losses), or ``"pairs"`` for the 3 x 3 terms whose sum,
            weighted by ``pair_weights``, is the mean; 0 where that weight is 0.
        compute_dtype: dtype of the matrix products. Default: autocast's where enabled, else the
            inputs' common dtype. Half types are used on CUDA devices, and bfloat16 by the backend
            ``cpu`` on processors that multiply it; elsewhere they compute in float32.
        backend: ``"auto"`` or a name of :func:`gcl_kernels.backends`.
        group: the processes that share the batch: ``"world"`` for all, or a ``torch.distributed``
            process group. Each gives its own samples, at least one; N may differ. All of them must
            call, and go backward, together. Default: None, this process's samples are the batch,
            whether ``torch.distributed`` is initialised or not.
        exchange: of a ``group``: ``"gather"`` holds the embeddings of all processes during a pass,
            ``"ring"`` those of two.

    Returns:
        0-d (or [N] with ``reduction="none"``, [3, 3] with ``"pairs"``), float32; float64 where the
        products are float64. NaN where an input that takes part holds NaN or inf. Of a ``group``:
        this process's share, the mean over its own samples (weighted where N differs), such that
        the average over processes is the loss of the whole batch; gradients of embeddings are those
        of the sum over processes, so that DistributedDataParallel's average is the gradient of that
        loss.

    Raises:
        ValueError, TypeError: malformed arguments; the message names argument, expected and got.
            Values of ``present`` and ``candidate_weights`` are checked on a CPU alone; elsewhere
            that would wait for the device, and a negative weight gives NaN.
        ValueError: the processes of a ``group`` differ in what they must have in common; raised in
            all of them.
        RuntimeError: a backend asked for by name is not available here, or serves no ``group``;
            ``group="world"`` without ``torch.distributed``.
        NotImplementedError: on differentiating the gradient (``backend="reference"`` can).
    """
    spec = make_loss_spec(
        3, pair_weights, candidates, self_similarity, other_positives, reduction, same_id,
        false_negative_margin,
    )  # fmt: skip
    given = _Arguments(
        logit_scale, temperature, normalize, sample_ids, compute_dtype, backend, group, exchange,
        _Candidates(present, extra_negatives, extra_ids, extra_anchors, candidate_weights),
    )  # fmt: skip
    return _gcl(spec, e_i, e_t, e_it, fusion_weights, given)


def clip_loss(
    e_i: Tensor,
    e_t: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    normalize: bool = True,
    pair_weights: Table | None = None,
    sample_ids: Tensor | None = None,
    same_id: SameId = "ignore",
    present: Tensor | Sequence[Tensor | None] | None = None,
    extra_negatives: Tensor | None = None,
    extra_ids: Tensor | None = None,
    extra_anchors: Sequence[bool] | None = None,
    candidate_weights: Tensor | None = None,
    false_negative_margin: float | None = None,
    reduction: Reduction = "mean",
    compute_dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
    group: Group = None,
    exchange: ExchangeName = "gather",
) -> Tensor:
    """CLIP's symmetric cross-entropy (Radford et al. 2021): candidates are the other view.

    Arguments, result and errors as for :func:`gcl_loss`, of two views: 2 x 2 ``pair_weights``
    (default 1/2 for each direction). Equals ``open_clip.ClipLoss`` on unit vectors.
    """
    check_views((e_i, e_t), ("e_i", "e_t"))
    spec = make_loss_spec(
        2, pair_weights, CROSS, reduction=reduction, same_id=same_id,
        false_negative_margin=false_negative_margin,
    )  # fmt: skip
    given = _Arguments(
        logit_scale, temperature, normalize, sample_ids, compute_dtype, backend, group, exchange,
        _Candidates(present, extra_negatives, extra_ids, extra_anchors, candidate_weights),
    )  # fmt: skip
    return _loss((e_i, e_t), spec, given)


def nt_xent_loss(
    e_1: Tensor,
    e_2: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    normalize: bool = True,
    pair_weights: Table | None = None,
    sample_ids: Tensor | None = None,
    same_id: SameId = "ignore",
    present: Tensor | Sequence[Tensor | None] | None = None,
    extra_negatives: Tensor | None = None,
    extra_ids: Tensor | None = None,
    extra_anchors: Sequence[bool] | None = None,
    candidate_weights: Tensor | None = None,
    false_negative_margin: float | None = None,
    self_similarity: SelfSimilarity = "mask",
    reduction: Reduction = "mean",
    compute_dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
    group: Group = None,
    exchange: ExchangeName = "gather",
) -> Tensor:
    """SimCLR's NT-Xent (Chen et al. 2020): both views' embeddings, all but the anchor, compete.

    ``e_1``, ``e_2`` [N, D]; arguments, result and errors as for :func:`gcl_loss`, of two views:
    2 x 2 ``pair_weights`` (default 1/2 for each direction).
    """
    check_views((e_1, e_2), ("e_1", "e_2"))
    spec = make_loss_spec(
        2, pair_weights, None, self_similarity, reduction=reduction, same_id=same_id,
        false_negative_margin=false_negative_margin,
    )  # fmt: skip
    given = _Arguments(
        logit_scale, temperature, normalize, sample_ids, compute_dtype, backend, group, exchange,
        _Candidates(present, extra_negatives, extra_ids, extra_anchors, candidate_weights),
    )  # fmt: skip
    return _loss((e_1, e_2), spec, given)


def neg_lse(
    views: Sequence[Tensor],
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    normalize: bool = True,
    candidates: Table | None = None,
    sample_ids: Tensor | None = None,
    extra_negatives: Tensor | None = None,
    extra_ids: Tensor | None = None,
    extra_anchors: Sequence[bool] | None = None,
    candidate_weights: Tensor | None = None,
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
        extra_negatives, extra_ids, extra_anchors, candidate_weights: as for
            :func:`gcl_kernels.gcl_loss`.
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
    table = candidate_table(candidates, len(views))
    given = _Arguments(
        logit_scale, temperature, normalize, sample_ids, compute_dtype, backend, group, exchange,
        _Candidates(None, extra_negatives, extra_ids, extra_anchors, candidate_weights),
    )  # fmt: skip
    scale, data, extra, spec = _prepare(views, table, (), given)
    return negatives(views, None, scale, data, extra, spec)[0]


class GCLLoss(nn.Module):
    """:func:`gcl_loss` as a module; it may own a learnable logit scale.

    Args:
        temperature: fixed temperature, or the initial one of a learnable scale; default 0.07.
        learnable_scale: own ``log_logit_scale``, a float32 parameter of shape [1] initialised to
            ``log(1 / temperature)`` and used as its exponential. Before each use the parameter is
            brought back to at most ``log(max_logit_scale)`` in place (CLIP's convention). State
            dicts in which it is 0-d load too.
        max_logit_scale: upper bound of the learnable scale, default 100.
        fusion_weights: as for :func:`gcl_loss`; an ``nn.Parameter`` becomes a parameter of the
            module (``alpha``, ``beta``).
        Others: as for :func:`gcl_loss`; checked here, once. A module with ``group="world"`` can be
            copied and pickled, one with a process group cannot.

    Raises:
        ValueError, TypeError: malformed arguments.
    """

    _shards: tuple[Any, ...] = ()

    def __init__(
        self,
        *,
        temperature: float | None = None,
        learnable_scale: bool = False,
        max_logit_scale: float = 100.0,
        normalize: bool = True,
        pair_weights: Table | None = None,
        candidates: Table | None = None,
        same_id: SameId = "ignore",
        extra_anchors: Sequence[bool] | None = None,
        false_negative_margin: float | None = None,
        self_similarity: SelfSimilarity = "mask",
        other_positives: OtherPositives = "compete",
        fusion_weights: Sequence[float | Tensor] = (1.0, 1.0),
        reduction: Reduction = "mean",
        compute_dtype: torch.dtype | None = None,
        backend: BackendName = "auto",
        group: Group = None,
        exchange: ExchangeName = "gather",
    ) -> None:
        super().__init__()
        self.spec = make_loss_spec(
            3, pair_weights, candidates, self_similarity, other_positives, reduction, same_id,
            false_negative_margin,
        )  # fmt: skip
        temperature = DEFAULT_TEMPERATURE if temperature is None else temperature
        temperature = check_positive("temperature", temperature)
        max_logit_scale = check_positive("max_logit_scale", max_logit_scale)
        if learnable_scale and 1 / temperature > max_logit_scale:
            raise ValueError(
                "temperature: expected at least 1 / max_logit_scale = "
                f"{1 / max_logit_scale:g}, got {temperature}"
            )
        check_normalize(normalize)
        if compute_dtype is not None:
            check_compute_dtype(compute_dtype)
        check_backend(backend)
        check_group(group, exchange)
        self.temperature = temperature
        self.max_logit_scale = max_logit_scale
        self.normalize = normalize
        self.alpha, self.beta = check_fusion_weights(fusion_weights)
        self.extra_anchors = check_anchors(extra_anchors, 3)
        self.compute_dtype = compute_dtype
        self.backend = backend
        self.group = group
        self.exchange = exchange
        self.log_logit_scale: nn.Parameter | None = None
        if learnable_scale:
            # Not 0-d, which fully_shard refuses.
            self.log_logit_scale = nn.Parameter(torch.empty(1, dtype=torch.float32))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Bring a learnable scale to its initial value, as after ``to_empty`` of a module made on
        the meta device."""
        if self.log_logit_scale is not None:
            nn.init.constant_(self.log_logit_scale, -math.log(self.temperature))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "log_logit_scale" and is_dtensor(value):
            # What fully_shard trains: in forward there is a gathered copy in its place, and what
            # is done to that is lost.
            self._shards = (value,)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = f"{prefix}log_logit_scale"
        if name in state_dict and state_dict[name].dim() == 0:
            state_dict[name] = state_dict[name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        e_i: Tensor,
        e_t: Tensor,
        e_it: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
        *,
        sample_ids: Tensor | None = None,
        present: Tensor | Sequence[Tensor | None] | None = None,
        extra_negatives: Tensor | None = None,
        extra_ids: Tensor | None = None,
        candidate_weights: Tensor | None = None,
    ) -> Tensor:
        """As :func:`gcl_loss`; a ``logit_scale`` given here replaces the fixed temperature.

        Raises:
            ValueError: ``logit_scale`` given to a module that owns one.
        """
        temperature = None
        if self.log_logit_scale is not None:
            if logit_scale is not None:
                raise ValueError("logit_scale: this module owns a learnable one, got another")
            parameter = self.log_logit_scale
            if is_dtensor(parameter):
                raise RuntimeError(
                    "log_logit_scale: expected a plain tensor, got a DTensor; call the loss in the "
                    "forward of the module given to fully_shard, or give it the loss too"
                )
            # The parameter, not its exponential: beyond a bound on that no gradient leads back.
            # Whoever saved the parameter for a backward pass before may still use it.
            bound = math.log(self.max_logit_scale)
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(parameter):
                parameter.clamp_(max=bound)
                for shard in self._shards:
                    shard.to_local().clamp_(max=bound)
            # A half type's exponential would be off by more than the half type's logarithm is.
            logit_scale = parameter.to(torch.promote_types(parameter.dtype, torch.float32)).exp()
        elif logit_scale is None:
            temperature = self.temperature
        place = self.compute_dtype, self.backend, self.group, self.exchange
        anchors = None if extra_negatives is None else self.extra_anchors
        of = _Candidates(present, extra_negatives, extra_ids, anchors, candidate_weights)
        given = _Arguments(logit_scale, temperature, self.normalize, sample_ids, *place, of)
        return _gcl(self.spec, e_i, e_t, e_it, (self.alpha, self.beta), given)

    def extra_repr(self) -> str:
        """The temperature, and the options that are not the defaults."""
        learnable = self.log_logit_scale is not None
        weights = tuple(
            type(weight).__name__ if isinstance(weight, Tensor) else weight
            for weight in (self.alpha, self.beta)
        )
        given = {**vars(self), **vars(self.spec), "fusion_weights": weights}
        given["learnable_scale"] = learnable
        usual = {name: of.default for name, of in inspect.signature(GCLLoss).parameters.items()}
        usual["max_logit_scale"] = None if learnable else self.max_logit_scale
        default = {**usual, **vars(make_loss_spec(3))}
        return ", ".join(f"{n}={given[n]!r}" for n in usual if given[n] != default[n])
