"""What tests ask of ``gcl_loss`` on every backend and road, and the one check against float64.

A road is how the third view comes: ``views``, all three are given; ``fused``, two are, and the
weights of their sum; ``formed``, likewise, on a backend that forms the sum. ``conftest`` has the
fixture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from oracle import dense_gcl
from tolerance import assert_accurate
from torch import Tensor

import gcl_kernels
from gcl_kernels.dispatch import half_dtypes
from gcl_kernels.spec import HALF_DTYPES, accum_dtype_of

every_road = pytest.mark.parametrize("road", ["views", "fused", "formed"], indirect=True)
both_fused_roads = pytest.mark.parametrize("road", ["fused", "formed"], indirect=True)

CPU = torch.device("cpu")
NAMES = ("e_i", "e_t", "e_it")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = (0.7, -1.3)
"""Fusion weights, none of which is one, nor are their signs the same."""

OPTIONS: dict[str, dict] = {
    "default": {},
    "self kept": {"self_similarity": "keep"},
    "others excluded": {"other_positives": "exclude"},
    "self kept, others excluded": {"self_similarity": "keep", "other_positives": "exclude"},
    "sum": {"reduction": "sum"},
    "weights": {"pair_weights": [[0, 1, 2], [0.5, 0, 0], [1, 3, 0]]},
    "one anchor": {"pair_weights": [[0, 1, 1], [0, 0, 0], [0, 0, 0]]},
    "candidates": {"candidates": [[0, 1, 1], [1, 0, 1], [1, 1, 0]]},
    "one-sided candidates": {
        "candidates": [[1, 1, 0], [0, 1, 1], [1, 1, 1]],
        "other_positives": "exclude",
    },
    "decoupled": {
        "candidates": [[1, 0, 1], [1, 1, 0], [0, 1, 1]],
        "self_similarity": "keep",
    },
}


def random_views(
    n: int, d: int, device: torch.device = CPU, road: str = "views", seed: int = 0
) -> list[Tensor]:
    """What the road's loss is given: float64 [N, D], three of them or two."""
    generator = torch.Generator().manual_seed(seed * 1000 + n)
    count = 3 if road == "views" else 2
    views = torch.randn(count, n, d, generator=generator, dtype=torch.float64)
    return list(views.to(device))


def collapsed_views(
    n: int, d: int, device: torch.device = CPU, road: str = "views"
) -> list[Tensor]:
    """A mean cosine of 0.9996, as of a text encoder before its training."""
    center = torch.randn(1, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [center.to(device) + 0.02 * view for view in random_views(n, d, device, road)]


def check(
    views: Sequence[Tensor],
    scale: float,
    *,
    backend: str,
    dtypes: Sequence[torch.dtype] = (torch.float32,) * 3,
    weights: Sequence[float] = WEIGHTS,
    upstream: Tensor | None = None,
    frozen: Sequence[int] = (),
    **options: object,
) -> None:
    """Loss and all gradients of ``gcl_loss``, by the tolerance rule.

    Args:
        views: three, or two whose sum with ``weights`` is the third.
        dtypes: of the views, in which they are given.
        frozen: the views that need no gradient.
    """
    inputs = [view.to(dtype) for view, dtype in zip(views, dtypes, strict=False)]
    weights = () if len(inputs) == 3 else weights
    device, n = inputs[0].device, len(inputs[0])
    compute = gcl_kernels.losses.resolve_compute_dtype(
        options.get("compute_dtype"), inputs, lambda: half_dtypes(backend, device)
    )
    accum = accum_dtype_of(compute)

    def run(function: Callable[..., Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
        kind = {"dtype": dtype or accum, "device": device, "requires_grad": True}
        numbers = [torch.tensor(value, **kind) for value in (scale, *weights)]
        leaves = [x.to(dtype or x.dtype, copy=True) for x in inputs]
        leaves = [x.requires_grad_(v not in frozen) for v, x in enumerate(leaves)]
        loss = function(leaves, *numbers)
        loss.backward(None if upstream is None else upstream.to(loss.dtype))
        names = ("logit_scale", "alpha", "beta")
        grads = {name: x.grad for name, x in zip(names, numbers, strict=False)}
        grads |= {name: x.grad for name, x in zip(NAMES, leaves, strict=False) if x.requires_grad}
        return {"loss": loss.detach(), **grads}

    def ours(backend: str) -> Callable[..., Tensor]:
        return lambda e, s, *w: gcl_kernels.gcl_loss(
            *e, logit_scale=s, fusion_weights=w or WEIGHTS, backend=backend, **options
        )

    def definition(e: Sequence[Tensor], s: Tensor, *w: Tensor) -> Tensor:
        return dense_gcl(e, s, w, **{k: v for k, v in options.items() if k != "compute_dtype"})

    result, exact = run(ours(backend), None), run(definition, torch.float64)
    # Products of half types: the dense computation rounds the unit vectors as well.
    half = compute in HALF_DTYPES
    with pytest.MonkeyPatch.context() as patch:
        # By itself ``reference`` computes in float32 on a CPU.
        patch.setattr(gcl_kernels.losses, "resolve_compute_dtype", lambda *_: compute)
        dense = run(ours("reference"), None) if half else run(definition, accum)
    assert result["loss"].dtype == accum
    for name, given in zip(NAMES, inputs, strict=False):
        assert name not in result or result[name].dtype == given.dtype

    # Every anchor's weights sum to 1/3 for its positives and as much for its denominator. The
    # terms of a logit are s, of a gradient 2 s / (N |e|), once as anchor and once as candidate.
    total = float(n) if options.get("reduction") == "sum" else 1.0
    per_loss = total
    if upstream is not None:
        per_loss *= upstream.abs().max().item() * (n if upstream.dim() else 1)
    lengths = [x.double().norm(dim=-1).clamp_min(1e-12) for x in inputs]
    # What rounds in the fused view's logits is the sum of its two parts, larger than itself.
    parts = torch.zeros_like(lengths[0])
    if weights:
        fused = sum(w * x.double() for w, x in zip(weights, inputs, strict=True))
        parts = sum(abs(w) * length for w, length in zip(weights, lengths, strict=True))
        lengths.append(fused.norm(dim=-1))
        parts = parts / lengths[2]
    logit, amplified = scale * max(1.0, parts.max().item() ** 2), 1 + parts**2
    if options.get("normalize") is False:
        logit = scale * max(length.max().item() for length in lengths) ** 2
        amplified = torch.full_like(parts, sum(map(abs, weights)) + 1)
        lengths = [1 / length for length in lengths]
    if half:
        # Of the fused view both bases are rounded, where the dense computation rounds their sum.
        for name, value in dense.items():
            dense[name] = value + (amplified.mean() - 1) * (value - exact[name])
    # A weight exp(x - lse) has the relative rounding of x, whose two parts are larger than x.
    weight = 1 + scale * (parts**2).mean().item() / 8
    of_numbers = 4 * per_loss * amplified.max().item()
    # The weights of the backward pass are rounded to half types, those of dense autograd are not:
    # of the sum over |H|, at most 2, in units of the rule.
    rounded = torch.finfo(compute).eps / (4 * torch.finfo(accum).eps) if half else 0.0
    sizes = {
        "loss": (logit + 10) * (n**0.5 if result["loss"].dim() else total),
        "logit_scale": of_numbers * max(1.0, logit / scale) + rounded * per_loss * logit / scale,
    }
    for name, of in zip(("alpha", "beta"), weights, strict=False):
        sizes[name] = of_numbers * max(scale, logit) / abs(of)
    for name, length in zip(NAMES, lengths, strict=True):
        sizes[name] = (4 * scale * per_loss / n * amplified / length * weight).norm().item()
    for name, value in result.items():
        assert_accurate(name, value, exact[name], dense[name], sizes[name])
