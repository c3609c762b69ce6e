"""Calls below the losses: specs, the two passes, and backends as tests want them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import gcl_kernels
from gcl_kernels import losses, passes, problem
from gcl_kernels.backends import cpu, tiled
from gcl_kernels.dispatch import BACKENDS
from gcl_kernels.spec import NegativesSpec

MIXED = (0, 1, None)
"""Of score fusion: two views are bases, the third is their combination."""


def spec_of(num_views: int = 3, **changes: object) -> NegativesSpec:
    """Everything competes, in float32, on ``tiled``."""
    given = {
        "candidates": ((True,) * num_views,) * num_views,
        "own_pairs": ((0, 1),),
        "mixed": None,
        "normalize": True,
        "compute_dtype": torch.float32,
        "max_scale": None,
        "backend": "tiled",
    }
    return NegativesSpec(**{**given, **changes})


def mixing_of(spec: NegativesSpec) -> Tensor | None:
    """What ``MIXED`` views are made of."""
    if spec.mixed is None:
        return None
    return torch.tensor([[1.0, 0], [0, 1], [0.5, 2]], dtype=spec.accum_dtype)


def run_forward(
    bases: Sequence[Tensor],
    spec: NegativesSpec,
    needs_grad: Sequence[bool],
    scale: Tensor,
    ids: Tensor | None = None,
    mixing: Tensor | None = None,
    options: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """``neg_lse``, own-sample logits, and what is saved between the passes.

    Args:
        options: log weights and limits, both or neither.
    """
    mixing = mixing_of(spec) if mixing is None else mixing
    return passes.forward(bases, mixing, scale, [ids, *options], spec, needs_grad)


def run_backward(
    bases: Sequence[Tensor],
    spec: NegativesSpec,
    needs_grad: Sequence[bool],
    scale: Tensor,
    results: Sequence[Tensor],
    ids: Tensor | None = None,
    options: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Gradients, of upstream ones, from what :func:`run_forward` gave."""
    neg_lse, own_logits, *saved = results
    upstream = torch.ones_like(neg_lse), torch.ones_like(own_logits)
    data, saved = [ids, *options], [*saved, neg_lse]
    return passes.backward(bases, scale, data, saved, *upstream, spec, needs_grad)


def with_threads(
    counts: Sequence[int], run: Callable[[], Sequence[Tensor]]
) -> list[Sequence[Tensor]]:
    """What ``run`` returns with each number of threads."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    return results


def gradients_on_cpu(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Loss and gradients of three views on backend ``cpu``, and of the first two fused."""
    results = []
    for views in (leaves, leaves[:2]):
        loss = gcl_kernels.gcl_loss(*views, backend="cpu")
        results += [loss, *torch.autograd.grad(loss, views)]
    return results


def cut_small(patch: pytest.MonkeyPatch) -> None:
    """Blocks of at most 16 rows, recomputed in the backward pass: many tiles from few samples."""
    for backend, rows in ((tiled, {"default": 16}), (cpu, 16)):
        patch.setattr(backend, "BLOCK_ROWS", rows)
        patch.setattr(backend, "FUSED_BLOCK_ROWS", rows)
    patch.setattr(problem, "KEPT_ELEMENTS", 0)


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    add = accumulator.baddbmm_ if a.dim() == 3 else accumulator.addmm_
    add(a.to(accumulator.dtype), b.to(accumulator.dtype))


def emulate_half_products(patch: pytest.MonkeyPatch) -> None:
    """On a CPU half types compute in float32 with ``tiled``; this gives it the arithmetic of a GPU:
    half operands, float32 accumulation and results."""
    patch.setattr(BACKENDS["tiled"], "write_product", write_product)
    patch.setattr(BACKENDS["tiled"], "add_product", add_product)
    patch.setattr(losses, "resolve_compute_dtype", half_on_a_gpu)


def half_on_a_gpu(
    compute_dtype: torch.dtype | None,
    views: Sequence[Tensor],
    half_dtypes: object = None,
) -> torch.dtype:
    """As ``spec.resolve_compute_dtype`` for tensors on a GPU."""
    return compute_dtype or functools.reduce(torch.promote_types, (view.dtype for view in views))
