"""Floating-point operations of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

As that counter has it, of the matrix products alone, two for a multiplication and an addition. A
pair of views is multiplied once, and half of a view with itself; tiles that stay between the passes
are not multiplied again; gradients count where they are needed. Of a group: this process's share,
where all have as many samples.

Imported where operations are counted: the counter's module brings Triton with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import flop_registry, register_flop_formula


def _products(candidates: Sequence[bool], needs: Sequence[bool]) -> tuple[float, float]:
    """Products ``N x N x D`` that make the logits, and those that make gradients of them."""
    num_views = len(needs)
    logits = gradients = 0.0
    for a, b in itertools.combinations_with_replacement(range(num_views), 2):
        if candidates[a * num_views + b] or candidates[b * num_views + a]:
            logits += 0.5 if a == b else 1
            gradients += needs[a] if a == b else needs[a] + needs[b]
    return logits, gradients


def _forward(z: Size, candidates: Sequence[bool], agreement: Size) -> int:
    num_views, num_samples, dim = z
    logits, _ = _products(candidates, [False] * num_views)
    return int(logits * 2 * num_samples**2 * dim) * _world(agreement)


def _backward(
    z: Size, candidates: Sequence[bool], agreement: Size, kept: Size, needs: Sequence[bool]
) -> int:
    _, num_samples, dim = z
    logits, gradients = _products(candidates, needs)
    product = 2 * num_samples**2 * dim * _world(agreement)
    # A kept block on the diagonal holds both halves, so that all kept tiles may be more than all.
    again = max(int(logits * product) - 2 * dim * kept.numel(), 0)
    return again + int(gradients * product)


def _world(agreement: Size) -> int:
    """Of a group there are the processes' numbers of samples, and one more."""
    return max(1, agreement.numel() - 1)


_ALL = [True] * 4
"""Candidates of the two bases of score fusion, whatever views they make."""


def _neg_lse(*args: Any, out_shape: Any) -> int:
    return _forward(out_shape[2], args[3], out_shape[-1])


def _neg_lse_backward(*args: Any, out_shape: Any) -> int:
    *_, z, _norm, _inverse, _own, kept, agreement, _lse, _grad, _grad_own, needs = args
    return _backward(z, args[3], agreement, kept, needs[:-1])


def _fused_neg_lse(*args: Any, out_shape: Any) -> int:
    return _forward(out_shape[2], _ALL, out_shape[-1])


def _fused_neg_lse_backward(*args: Any, out_shape: Any) -> int:
    *_, z, _inverse, _lengths, _k, _dots, kept, agreement, _lse, _grad, _grad_own, needs = args
    return _backward(z, _ALL, agreement, kept, needs[:2])


_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.gcl_kernels.neg_lse: _neg_lse,
    torch.ops.gcl_kernels.neg_lse_backward: _neg_lse_backward,
    torch.ops.gcl_kernels.fused_neg_lse: _fused_neg_lse,
    torch.ops.gcl_kernels.fused_neg_lse_backward: _fused_neg_lse_backward,
}

for _operator, _formula in _FORMULAS.items():
    register_flop_formula(_operator)(_formula)


def inform_counters() -> None:
    """Give the formulas to counters that are counting: each copied the registry when it began."""
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if registry is not None:
            registry.update({operator: flop_registry[operator] for operator in _FORMULAS})
