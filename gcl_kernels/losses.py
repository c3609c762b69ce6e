"""The losses: O(V^2 N) algebra on ``neg_lse`` and the own-sample similarities.

    L = sum_{a != b} w_ab * mean_j [ log den(a,j) - x(a,j; b,j) ]

(Lee et al., Generalized Contrastive Learning for Universal Multimodal Retrieval, NeurIPS 2025,
arXiv 2509.25638, for three views, all candidates and equal weights.) ``den(a,j)`` sums exp x over
the anchor's negatives and those embeddings of its own sample that compete; see ``docs/maths.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcl_kernels.dispatch import BACKENDS, check_backend
from gcl_kernels.distributed import check_group
from gcl_kernels.embeddings import ABSENT
from gcl_kernels.negatives import Arguments, negatives, prepare
from gcl_kernels.score_fusion import fused_negatives
from gcl_kernels.spec import (
    DEFAULT_TEMPERATURE,
    NORM_EPS,
    BackendName,
    ExchangeName,
    Group,
    LossSpec,
    NegativesSpec,
    OtherPositives,
    Reduction,
    SelfSimilarity,
    Table,
    check_compute_dtype,
    check_normalize,
    check_positive,
    check_views,
    is_dtensor,
    make_loss_spec,
    plain_number,
    recordable,
    refuse_dtensor,
    view_list,
)


def _table(rows: Sequence[Sequence[Any]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small constant on the device, without the synchronising copy that a GPU would need."""
    if device.type == "cpu":
        return torch.tensor(rows, dtype=dtype, device=device)
    table = torch.full((len(rows), len(rows)), rows[0][1], dtype=dtype, device=device)
    for a, row in enumerate(rows):
        for b, entry in enumerate(row):
            if entry != rows[0][1]:
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


def _loss(views: Sequence[Tensor], spec: LossSpec, given: Arguments) -> Tensor:
    scale, negatives_spec = prepare(views, spec.candidates, given)
    own_pairs = spec.own_pairs
    return _reduce(*negatives(views, scale, given.sample_ids, own_pairs, negatives_spec), spec)


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
        len(views),
        pair_weights=pair_weights,
        candidates=candidates,
        self_similarity=self_similarity,
        other_positives=other_positives,
        reduction=reduction,
    )
    given = Arguments(
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


def _with_fused(
    bases: Sequence[Tensor], mixing: Tensor, spec: NegativesSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Image, text and fused embeddings, as score fusion has them: the sum in the accumulation
    dtype, and a zero vector where it is normalised and too short."""
    # The bases too: autograd then rounds the gradients of both their roads once, added.
    e_i, e_t = (recordable(base.to(spec.accum_dtype)) for base in bases)
    alpha, beta = mixing[2]
    fused = alpha * e_i + beta * e_t
    if spec.normalize:
        too_short = torch.linalg.vector_norm(fused.detach(), dim=-1, keepdim=True) <= NORM_EPS
        fused = fused.masked_fill(too_short, 0)
    return e_i, e_t, fused


def _checked_fusion_weights(
    weights: Any, device: torch.device | None = None
) -> tuple[float | Tensor, float | Tensor]:
    """``weights`` as two Python numbers or tensors; raises unless they are such."""
    if not isinstance(weights, (tuple, list)) or len(weights) != 2:
        raise ValueError(f"fusion_weights: expected two numbers or tensors, got {weights!r}")
    alpha, beta = (recordable(plain_number(weight)) for weight in weights)
    for index, weight in enumerate((alpha, beta)):
        name = f"fusion_weights[{index}]"
        refuse_dtensor(name, weight)
        if isinstance(weight, Tensor):
            if not weight.dtype.is_floating_point:
                raise TypeError(f"{name}: expected a floating tensor, got {weight.dtype}")
            if weight.numel() != 1 or weight.dim() > 1:
                raise ValueError(f"{name}: expected shape [] or [1], got {list(weight.shape)}")
            if device is not None and weight.device != device:
                raise ValueError(f"{name}: expected device {device}, got {weight.device}")
        elif isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"{name}: expected a number or a tensor, got {type(weight).__name__}")
        elif not -math.inf < weight < math.inf:
            raise ValueError(f"{name}: expected a finite number, got {weight}")
    return alpha, beta


def _gcl(
    spec: LossSpec,
    e_i: Tensor,
    e_t: Tensor,
    e_it: Tensor | None,
    fusion_weights: Sequence[float | Tensor],
    given: Arguments,
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
    fusion_weights = _checked_fusion_weights(fusion_weights, e_i.device)
    scale, negatives_spec = prepare((e_i, e_t), spec.candidates, given)
    mixing = _mixing(fusion_weights, negatives_spec.accum_dtype, e_i.device)
    rest = (scale, given.sample_ids, spec.own_pairs, negatives_spec)
    if BACKENDS[negatives_spec.backend].fuses_scores:
        return _reduce(*fused_negatives(e_i, e_t, mixing, (0, 1, None), *rest), spec)
    views = _with_fused((e_i, e_t), mixing, negatives_spec)
    return _reduce(*negatives(views, *rest), spec)


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
    spec = make_loss_spec(
        3,
        pair_weights=pair_weights,
        candidates=candidates,
        self_similarity=self_similarity,
        other_positives=other_positives,
        reduction=reduction,
    )
    given = Arguments(
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
    spec = make_loss_spec(
        2, pair_weights=pair_weights, candidates=((False, True), (True, False)), reduction=reduction
    )
    given = Arguments(
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
    spec = make_loss_spec(
        2, pair_weights=pair_weights, self_similarity=self_similarity, reduction=reduction
    )
    given = Arguments(
        logit_scale, temperature, normalize, sample_ids, compute_dtype, backend, group, exchange
    )
    return _loss((e_1, e_2), spec, given)


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
            3,
            pair_weights=pair_weights,
            candidates=candidates,
            self_similarity=self_similarity,
            other_positives=other_positives,
            reduction=reduction,
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
        self.alpha, self.beta = _checked_fusion_weights(fusion_weights)
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
        given = Arguments(
            logit_scale,
            temperature,
            self.normalize,
            sample_ids,
            self.compute_dtype,
            self.backend,
            self.group,
            self.exchange,
        )
        return _gcl(self.spec, e_i, e_t, e_it, (self.alpha, self.beta), given)

    def extra_repr(self) -> str:
        """The temperature, and the options that are not the defaults."""
        default, learnable = make_loss_spec(3), self.log_logit_scale is not None
        fusion_weights = tuple(
            type(weight).__name__ if isinstance(weight, Tensor) else weight
            for weight in (self.alpha, self.beta)
        )
        options = {
            "temperature": (self.temperature, None),
            "learnable_scale": (learnable, False),
            "max_logit_scale": (self.max_logit_scale, self.max_logit_scale if not learnable else 0),
            "normalize": (self.normalize, True),
            **{
                name: (getattr(self.spec, name), getattr(default, name))
                for name in (
                    "pair_weights",
                    "candidates",
                    "self_similarity",
                    "other_positives",
                    "reduction",
                )
            },
            "fusion_weights": (fusion_weights, (1.0, 1.0)),
            "compute_dtype": (self.compute_dtype, None),
            "backend": (self.backend, "auto"),
            "group": (self.group, None),
            "exchange": (self.exchange, "gather"),
        }
        return ", ".join(
            f"{name}={value!r}" for name, (value, usual) in options.items() if value != usual
        )
