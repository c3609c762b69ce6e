"""The losses: O(V^2 N) algebra on ``neg_lse`` and the own-sample similarities.

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
import torch.nn.functional as F
from torch import Tensor, nn

from gcl_kernels.dispatch import check_backend, resolve_backend
from gcl_kernels.distributed import check_group, resolve_group
from gcl_kernels.operators import negatives, small_loss
from gcl_kernels.problem import SampleData
from gcl_kernels.spec import (
    ABSENT,
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
    SelfSimilarity,
    Table,
    accum_dtype_of,
    candidate_table,
    check_compute_dtype,
    check_fusion_weights,
    check_normalize,
    check_positive,
    check_views,
    is_dtensor,
    make_loss_spec,
    resolve_compute_dtype,
    resolve_sample_ids,
    resolve_scale,
    view_list,
    warn_of_temperature,
)


def _table(rows: Sequence[Sequence[Any]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small constant on the device, without the synchronising copy that a GPU would need."""
    if device.type == "cpu":
        return torch.tensor(rows, dtype=dtype, device=device)
    usual = diagonal = rows[0][1]
    table = torch.full((len(rows), len(rows)), usual, dtype=dtype, device=device)
    if rows[0][0] != usual and all(row[a] == rows[0][0] for a, row in enumerate(rows)):
        diagonal = rows[0][0]
        table.fill_diagonal_(diagonal)  # two launches are then all, for most losses
    for a, row in enumerate(rows):
        for b, entry in enumerate(row):
            if entry != (diagonal if a == b else usual):
                table[a, b].fill_(entry)  # assigning would copy a scalar tensor from the host
    return table


def _log_ratio(neg_lse: Tensor, own_logits: Tensor, spec: LossSpec) -> Tensor:
    """[V, V, N]: the log of the positive's share of its denominator."""
    views = range(spec.num_views)
    device = neg_lse.device
    keeps_self = spec.self_similarity == "keep"
    if spec.other_positives == "compete" and spec.num_views > 2:
        competes = [
            [spec.candidates[a][b] and (a != b or keeps_self) for b in views] for a in views
        ]
        if all(competes[a][b] or (a == b and not keeps_self) for a in views for b in views):
            # Without the negatives' own entry, whose weight is zero and which may be -inf.
            return torch.cat([neg_lse.unsqueeze(1), own_logits], 1).log_softmax(1)[:, 1:]
        mask = ~_table(competes, torch.bool, device).unsqueeze(-1)
        terms = torch.cat([neg_lse.unsqueeze(1), own_logits.masked_fill(mask, ABSENT)], 1)
        log_den = terms.logsumexp(1)
        if all(any(row) for row in competes):
            return own_logits - log_den.unsqueeze(1)
        # Some denominators hold nothing of their own sample, and without a negative nothing at all:
        # log 0, not ABSENT; and zero times the infinite loss of such a pair is not zero.
        alone = _table([[not any(row)] * len(row) for row in competes], torch.bool, device)
        log_den = torch.where(alone[:, :1], neg_lse, log_den)
        unweighted = [[weight == 0 for weight in row] for row in spec.pair_weights]
        mask = _table(unweighted, torch.bool, device).unsqueeze(-1)
        return (own_logits - log_den.unsqueeze(1)).masked_fill(mask, 0)
    # No other positive in the denominator: -log(1 + exp(log(den - own term) - x)). Its gradient
    # keeps full relative precision where the batch is nearly solved.
    rest = neg_lse
    if keeps_self:
        rest = torch.logaddexp(neg_lse, torch.stack([own_logits[a, a] for a in views]))
    margin = own_logits - rest.unsqueeze(1)
    log_ratio = F.logsigmoid(margin)
    inside = [[spec.candidates[a][b] or spec.pair_weights[a][b] == 0 for b in views] for a in views]
    if not all(all(row) for row in inside):
        # The positive is no candidate: it is not in its denominator (a decoupled loss).
        log_ratio = torch.where(_table(inside, torch.bool, device).unsqueeze(-1), log_ratio, margin)
    return log_ratio


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


def _prepare(
    views: Sequence[Tensor],
    candidates: BoolTable,
    own_pairs: Pairs,
    given: _Arguments,
    mixed: Bases | None = None,
) -> tuple[Tensor, SampleData, NegativesSpec]:
    """Check the arguments that all losses share: the scale as a tensor, what samples are given
    beside their embeddings, and the spec."""
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace: expected torch.compile or torch.export; a trace keeps this batch's "
            "number of samples and is silently wrong for another"
        )
    data = SampleData(resolve_sample_ids(given.sample_ids, views[0]))
    check_normalize(given.normalize)
    device = views[0].device
    compute_dtype = resolve_compute_dtype(given.compute_dtype, views)
    scale, max_scale = resolve_scale(
        given.logit_scale, given.temperature, device, accum_dtype_of(compute_dtype)
    )
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
    )
    return scale, data, spec


def _loss(
    views: Sequence[Tensor],
    spec: LossSpec,
    given: _Arguments,
    fusion_weights: Sequence[float | Tensor] | None = None,
) -> Tensor:
    """Of views that are given, or of two with ``fusion_weights``: these and their sum."""
    mixed = None if fusion_weights is None else (0, 1, None)
    scale, data, static = _prepare(views, spec.candidates, spec.own_pairs, given, mixed)
    mixing = None
    if fusion_weights is not None:
        mixing = _mixing(fusion_weights, scale.dtype, views[0].device)
    if spec.reduction != "none":
        loss = small_loss(views, mixing, scale, data, static, spec)
        if loss is not None:
            return loss
    return _reduce(*negatives(views, mixing, scale, data, static), spec)


def _reduce(neg_lse: Tensor, own_logits: Tensor, sizes: Tensor | None, spec: LossSpec) -> Tensor:
    """The loss from ``neg_lse`` [V, N], ``own_logits`` [V, V, N] and, of many processes, their
    numbers of samples."""
    means = spec.reduction == "mean"
    divisor = neg_lse.shape[1] if means and sizes is None else 1
    weights = [[-weight / divisor for weight in row] for row in spec.pair_weights]
    table = _table(weights, neg_lse.dtype, neg_lse.device).unsqueeze(-1)
    losses = table * _log_ratio(neg_lse, own_logits, spec)
    if spec.reduction == "none":
        return losses.sum((0, 1))
    if means and sizes is not None:
        # The processes' average is then the mean of all samples, whatever each one's number. A
        # 0-d tensor on the CPU meets one on any device.
        return losses.sum() / sizes.to(neg_lse.dtype).mean()
    return losses.sum()


def multiview_contrastive_loss(
    views: Sequence[Tensor],
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    normalize: bool = True,
    pair_weights: Table | None = None,
    candidates: Table | None = None,
    sample_ids: Tensor | None = None,
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
        Others: as for :func:`gcl_loss`, with tables V x V.

    Returns:
        0-d (or [N] with ``reduction="none"``), float32; float64 where the products are float64.

    Raises:
        As :func:`gcl_loss`.
    """
    views = view_list(views)
    if len(views) < 2:
        raise ValueError(f"views: expected at least 2, got {len(views)}")
    check_views(views, [f"views[{v}]" for v in range(len(views))])
    spec = make_loss_spec(
        len(views), pair_weights, candidates, self_similarity, other_positives, reduction
    )
    given = _Arguments(
        logit_scale, temperature, normalize, sample_ids, compute_dtype, backend, group, exchange
    )
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
            Samples with equal ids are neither positives nor negatives of each other. Default: all
            different.
        self_similarity: ``"mask"`` leaves the anchor itself out of its denominator; ``"keep"``
            keeps it (where ``candidates[a][a]``), the literal sum over all embeddings.
        other_positives: ``"compete"``: a denominator holds all other views of the anchor's sample
            that are candidates; ``"exclude"``: only the pair's own positive.
        fusion_weights: two finite numbers or tensors of shape [] or [1] (with gradient).
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for N losses, whose mean is the mean (of a
            ``group``, that of all processes' losses).
        compute_dtype: dtype of the matrix products. Default: autocast's where enabled, else the
            inputs' common dtype. Half types are used on CUDA devices; elsewhere they compute in
            float32.
        backend: ``"auto"`` or a name of :func:`gcl_kernels.backends`.
        group: the processes that share the batch: ``"world"`` for all, or a ``torch.distributed``
            process group. Each gives its own samples, at least one; N may differ. All of them must
            call, and go backward, together. Default: None, this process's samples are the batch,
            whether ``torch.distributed`` is initialised or not.
        exchange: of a ``group``: ``"gather"`` holds the embeddings of all processes during a pass,
            ``"ring"`` those of two.

    Returns:
        0-d (or [N] with ``reduction="none"``), float32; float64 where the products are float64.
        NaN where an input that takes part holds NaN or inf. Of a ``group``: this process's share,
        the mean over its own samples (weighted where N differs), such that the average over
        processes is the loss of the whole batch; gradients of embeddings are those of the sum over
        processes, so that
        DistributedDataParallel's average is the gradient of that loss.

    Raises:
        ValueError, TypeError: malformed arguments; the message names argument, expected and got.
        ValueError: the processes of a ``group`` differ in what they must have in common; raised in
            all of them.
        RuntimeError: a backend asked for by name is not available here, or serves no ``group``;
            ``group="world"`` without ``torch.distributed``.
        NotImplementedError: on differentiating the gradient (``backend="reference"`` can).
    """
    spec = make_loss_spec(3, pair_weights, candidates, self_similarity, other_positives, reduction)
    given = _Arguments(
        logit_scale, temperature, normalize, sample_ids, compute_dtype, backend, group, exchange
    )
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
    reduction: Reduction = "mean",
    compute_dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
    group: Group = None,
    exchange: ExchangeName = "gather",
) -> Tensor:
    """CLIP's symmetric cross-entropy (Radford et al. 2021): candidates are the other view.

    Arguments, result and errors as for :func:`gcl_loss`, with 2 x 2 ``pair_weights`` (default 1/2
    for each direction). Equals ``open_clip.ClipLoss`` on unit vectors.
    """
    check_views((e_i, e_t), ("e_i", "e_t"))
    spec = make_loss_spec(2, pair_weights, CROSS, reduction=reduction)
    given = _Arguments(
        logit_scale, temperature, normalize, sample_ids, compute_dtype, backend, group, exchange
    )
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
    self_similarity: SelfSimilarity = "mask",
    reduction: Reduction = "mean",
    compute_dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
    group: Group = None,
    exchange: ExchangeName = "gather",
) -> Tensor:
    """SimCLR's NT-Xent (Chen et al. 2020): both views' embeddings, all but the anchor, compete.

    ``e_1``, ``e_2`` [N, D]; arguments, result and errors as for :func:`gcl_loss`, with 2 x 2
    ``pair_weights`` (default 1/2 for each direction).
    """
    check_views((e_1, e_2), ("e_1", "e_2"))
    spec = make_loss_spec(2, pair_weights, None, self_similarity, reduction=reduction)
    given = _Arguments(
        logit_scale, temperature, normalize, sample_ids, compute_dtype, backend, group, exchange
    )
    return _loss((e_1, e_2), spec, given)


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
    table = candidate_table(candidates, len(views))
    given = _Arguments(
        logit_scale, temperature, normalize, sample_ids, compute_dtype, backend, group, exchange
    )
    scale, data, spec = _prepare(views, table, (), given)
    return negatives(views, None, scale, data, spec)[0]


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
            3, pair_weights, candidates, self_similarity, other_positives, reduction
        )
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
        given = _Arguments(logit_scale, temperature, self.normalize, sample_ids, *place)
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
