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

from gcl_kernels.problem import split_data
from gcl_kernels.spec import NegativesSpec, parse_spec


def _products(spec: NegativesSpec, needs: Sequence[bool]) -> tuple[float, float]:
    """Products ``N x N x D`` that make the logits, and those that make gradients of them."""
    logits = gradients = 0.0
    # The two bases of score fusion all meet, whatever views they make.
    candidates = spec.candidates if spec.mixed is None else ((True,) * 2,) * 2
    for a, b in itertools.combinations_with_replacement(range(len(candidates)), 2):
        if candidates[a][b] or candidates[b][a]:
            logits += 0.5 if a == b else 1
            gradients += needs[a] if a == b else needs[a] + needs[b]
    return logits, gradients


def _world(agreement: Size) -> int:
    """Of a group there are the processes' numbers of samples, and one more."""
    return max(1, agreement.numel() - 1)


def _beyond(spec: NegativesSpec, data: Sequence[Any], num_samples: int) -> int:
    """Operations of one product of the anchors' views with extra negatives."""
    if not spec.extra_anchors:
        return 0
    num_extra, dim = split_data(data)[1].embeddings  # type: ignore[misc]  # its shape
    return 2 * sum(spec.extra_anchors) * num_samples * num_extra * dim


def _forward(*args: Any, out_shape: Any) -> int:
    *_, data, text, needs_grad = args
    spec = parse_spec(text)
    _, num_samples, dim = out_shape[2]
    logits, _ = _products(spec, needs_grad)
    square = int(logits * 2 * num_samples**2 * dim) * _world(out_shape[-1])
    return square + _beyond(spec, data, num_samples)


def _backward(*args: Any, out_shape: Any) -> int:
    *_, data, saved, _grad, _grad_own, text, needs_grad = args
    spec = parse_spec(text)
    z, *_, kept, agreement, _lse = saved
    _, num_samples, dim = z
    logits, gradients = _products(spec, needs_grad)
    product = 2 * num_samples**2 * dim * _world(agreement)
    # A kept block on the diagonal holds both halves, so that all kept tiles may be more than all.
    again = max(int(logits * product) - 2 * dim * kept.numel(), 0)
    sides = 1 + any(needs_grad) + spec.extra_grad
    return again + int(gradients * product) + sides * _beyond(spec, data, num_samples)


_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.gcl_kernels.neg_lse: _forward,
    torch.ops.gcl_kernels.neg_lse_backward: _backward,
}

for _operator, _formula in _FORMULAS.items():
    register_flop_formula(_operator)(_formula)


def inform_counters() -> None:
    """Give the formulas to counters that are counting: each copied the registry when it began."""
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if registry is not None:
            registry.update({operator: flop_registry[operator] for operator in _FORMULAS})
