"""From ``neg_lse`` and own-sample logits to a loss: O(V^2 N) algebra, on any device.

    L = sum_{a != b} w_ab * mean_j [ log den(a,j) - x(a,j; b,j) ]

``den(a,j)`` sums exp x over the anchor's negatives and those embeddings of its own sample that
compete. Of samples that lack views the terms that exist are left, and the mean is over these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gcl_kernels.distributed import mean_of_group
from gcl_kernels.spec import ABSENT, LossSpec


class Batch(NamedTuple):
    """What the terms are made of.

    Attributes:
        neg_lse: [V, N].
        own_logits: [V, V, N], ``ABSENT`` where not asked for.
        sizes: of many processes, their numbers of samples [W], on the CPU.
        group: their name, as of :class:`spec.NegativesSpec`.
        present: the embeddings that there are, booleans [V, N]; None: all.
    """

    neg_lse: Tensor
    own_logits: Tensor
    sizes: Tensor | None
    group: str
    present: Tensor | None


def make_table(rows: Sequence[Sequence[Any]], dtype: torch.dtype, device: torch.device) -> Tensor:
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
        mask = ~make_table(competes, torch.bool, device).unsqueeze(-1)
        terms = torch.cat([neg_lse.unsqueeze(1), own_logits.masked_fill(mask, ABSENT)], 1)
        log_den = terms.logsumexp(1)
        if all(any(row) for row in competes):
            return own_logits - log_den.unsqueeze(1)
        # Some denominators hold nothing of their own sample, and without a negative nothing at all:
        # log 0, not ABSENT; and zero times the infinite loss of such a pair is not zero.
        alone = make_table([[not any(row)] * len(row) for row in competes], torch.bool, device)
        log_den = torch.where(alone[:, :1], neg_lse, log_den)
        unweighted = [[weight == 0 for weight in row] for row in spec.pair_weights]
        mask = make_table(unweighted, torch.bool, device).unsqueeze(-1)
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
        log_ratio = torch.where(
            make_table(inside, torch.bool, device).unsqueeze(-1), log_ratio, margin
        )
    return log_ratio


def reduce_terms(batch: Batch, spec: LossSpec) -> Tensor:
    """The loss: 0-d, [N] with the reduction ``"none"``, [V, V] with ``"pairs"``."""
    neg_lse, own_logits, _, _, present = batch
    absent, count = None, None
    if present is not None:
        absent = ~(present.unsqueeze(0) & present.unsqueeze(1))
        own_logits = own_logits.masked_fill(absent, ABSENT)
        # No anchor: whatever stands here, and infinities, must not meet a weight of zero.
        neg_lse = neg_lse.masked_fill(~present, 0)
    log_ratio = _log_ratio(neg_lse, own_logits, spec)
    if spec.reduction == "mean" and absent is None and batch.sizes is None:
        return (_weights(spec, -neg_lse.shape[1], neg_lse) * log_ratio).sum()
    table = _weights(spec, 1, neg_lse)
    if absent is not None:
        log_ratio = log_ratio.masked_fill(absent, 0)
        count = (table * ~absent).sum()
    if spec.reduction == "pairs":
        # A term without a weight was not computed.
        unweighted = [[weight == 0 for weight in row] for row in spec.pair_weights]
        mask = make_table(unweighted, torch.bool, neg_lse.device).unsqueeze(-1)
        return _mean(-log_ratio.masked_fill(mask, 0), (2,), batch, count)
    return reduce_samples(-table * log_ratio, (0, 1), batch, spec, count)


def reduce_samples(
    losses: Tensor, dims: tuple[int, ...], batch: Batch, spec: LossSpec, count: Tensor | None
) -> Tensor:
    """The reductions ``"mean"``, ``"sum"`` and ``"none"`` of weighted terms [..., N].

    Args:
        dims: all but the last.
        count: of the terms that exist, their weights' sum; None: the number of samples.
    """
    if spec.reduction == "sum":
        return losses.sum()
    if spec.reduction == "mean":
        return _mean(losses, None, batch, count)
    of_samples = losses.sum(dims)
    if count is None:
        return of_samples
    # Their mean is the mean over the terms that exist.
    num_samples: Any = losses.shape[-1]
    if batch.sizes is not None:
        num_samples = batch.sizes.to(losses.dtype).mean()
    return of_samples * (num_samples / _shared(count, batch))


def _mean(
    losses: Tensor, dims: tuple[int, ...] | None, batch: Batch, count: Tensor | None
) -> Tensor:
    total = losses.sum() if dims is None else losses.sum(dims)
    if count is not None:
        return total / _shared(count, batch)
    if batch.sizes is None:
        return total / losses.shape[-1]
    # The processes' average is then the mean of all samples, whatever each one's number. A 0-d
    # tensor on the CPU meets one on any device.
    return total / batch.sizes.to(losses.dtype).mean()


def _shared(count: Tensor, batch: Batch) -> Tensor:
    """The processes' mean of a number of terms; where there are none at all, 1."""
    count = count.detach()
    if batch.sizes is not None:
        count = mean_of_group(count, batch.group)
    return torch.where(count > 0, count, 1)


def _weights(spec: LossSpec, divisor: int, like: Tensor) -> Tensor:
    """The pairs' [V, V, 1]."""
    rows = [[weight / divisor for weight in row] for row in spec.pair_weights]
    return make_table(rows, like.dtype, like.device).unsqueeze(-1)
