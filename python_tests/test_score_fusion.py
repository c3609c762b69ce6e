"""Score fusion, ``gcl_loss`` without ``e_it``: what is its own beside ``test_contract``."""

from __future__ import annotations

import pytest
import torch
from calls import spec_of
from contract import WEIGHTS, both_fused_roads, random_views
from oracle import dense_neg_lse
from torch import Tensor

import gcl_kernels
from gcl_kernels.operators import negatives
from gcl_kernels.problem import Extra, SampleData
from gcl_kernels.spec import ABSENT


@pytest.mark.parametrize("weights", [(1.0, 1.0), WEIGHTS, (0.0, 2.0), (0.0, 0.0)])
def test_equals_the_sum_given(float64_backend, device, tiling, weights):
    """Also where the fused view is a base (weight 0) and where it vanishes (both 0)."""
    leaves = [v.requires_grad_() for v in random_views(21, 7, device, "fused")]
    numbers = gcl_kernels.gcl_loss(*leaves, fusion_weights=weights, backend=float64_backend)
    kind = {"dtype": torch.float64, "device": device, "requires_grad": True}
    tensors = [torch.tensor(w, **kind) for w in weights]
    learned = gcl_kernels.gcl_loss(*leaves, fusion_weights=tensors, backend=float64_backend)
    summed = tensors[0] * leaves[0] + tensors[1] * leaves[1]
    general = gcl_kernels.gcl_loss(*leaves, summed, backend=float64_backend)
    torch.testing.assert_close(numbers, general)
    assert torch.equal(numbers, learned)
    if not any(weights):
        return  # the gradient at a zero vector is a convention: see test_zero_fused_vector
    grads = (torch.autograd.grad(loss, [*leaves, *tensors]) for loss in (learned, general))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@both_fused_roads
def test_zero_fused_vector(backend, device, tiling, road):
    """It has logits 0, as the general road's zero vector, and nothing flows through it."""
    e_i, e_t = (v.float() for v in random_views(20, 8, device, road))
    e_t[3] = -e_i[3]
    leaves = [e_i.requires_grad_(), e_t.requires_grad_()]
    loss = gcl_kernels.gcl_loss(*leaves, backend=backend)
    torch.testing.assert_close(loss, gcl_kernels.gcl_loss(*leaves, e_i + e_t, backend="reference"))
    grads = torch.autograd.grad(loss, leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    keep = torch.ones_like(exact[0])
    keep[3] = 0
    expected = gcl_kernels.gcl_loss(*exact, (exact[0] + exact[1]) * keep, backend="reference")
    for a, b in zip(grads, torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6 * b.abs().max().item())


@both_fused_roads
def test_short_fused_vector(float64_backend, device, tiling, road):
    """Below 1e-12 it is a zero vector, in the oracle's fusion too."""
    e_i, e_t = random_views(20, 8, device, road)
    results = []
    for distance in (1e-13, 0.0):
        e_t[3] = distance - e_i[3]
        leaves = [e.clone().requires_grad_() for e in (e_i, e_t)]
        loss = gcl_kernels.gcl_loss(*leaves, backend=float64_backend)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_reference_fuses_in_the_accumulation_dtype():
    """float32 embeddings, float64 products: the sum is no float32 number."""
    e_i, e_t = (v.float() for v in random_views(20, 8, road="fused"))
    losses = [
        gcl_kernels.gcl_loss(a, b, backend="reference", compute_dtype=torch.float64)
        for a, b in ((e_i, e_t), (e_i.double(), e_t.double()))
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1e20, 1e20)])
def test_fused_length_that_overflows_makes_nan(backend, device, tiling, weights):
    """Where the bases' own lengths are finite."""
    e_i = torch.full((2, 8), 6e18 if weights == (1, 1) else 1.0, device=device)
    e_i[1, ::2] *= -1
    e_i[0] /= 1e3
    options = {"temperature": 0.1, "fusion_weights": weights, "backend": backend}
    assert gcl_kernels.gcl_loss(e_i, e_i.clone(), **options).isnan()


def test_keeps_a_fused_vector_beside_itself_where_its_parts_cancel(backend, device, tiling):
    """Its similarity to itself is one, whatever the rounding of its parts."""
    generator = torch.Generator().manual_seed(0)
    e_i, e_t, noise = torch.randn(3, 64, 32, generator=generator)
    e_t[5] = -e_i[5] + 1e-3 * noise[5]  # a + b of about 1800

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        leaf = e_i.to(device, dtype).requires_grad_()
        gcl_kernels.gcl_loss(
            leaf, e_t.to(device, dtype), None, 14.3, self_similarity="keep", backend=backend
        ).backward()
        return leaf.grad.double()

    exact = gradient(torch.float64, "reference")
    error = gradient(torch.float32, backend) - exact
    assert error.norm() < 0.02 * exact.norm()


def test_any_combinations(float64_backend, device, tiling):
    """The combination matrix is data: five views, text twice, no view that is the first base."""
    kind = {"dtype": torch.float64, "device": device}
    mixing = torch.tensor([[1, 2], [0, 1], [2, -1], [0.5, 0.1], [0, 1]], **kind).requires_grad_()
    candidates = tuple(tuple((a * b + a) % 3 != 1 for b in range(5)) for a in range(5))
    views = [v.requires_grad_() for v in random_views(21, 7, device, "fused")]
    s = torch.tensor(6.0, **kind, requires_grad=True)
    spec = spec_of(
        candidates=candidates,
        mixed=(None, 1, None, None, 1),
        compute_dtype=torch.float64,
        backend=float64_backend,
    )
    neg_lse, own_logits, _ = negatives(views, mixing, s, SampleData(), Extra(), spec)
    made = [row[0] * views[0] + row[1] * views[1] for row in mixing]
    anchors = [a for a, row in enumerate(candidates) if any(row)]
    for a in {*range(5)} - {*anchors}:
        assert (neg_lse[a] == -torch.inf).all()
    exact = torch.stack([dense_neg_lse(made, s, [candidates[a]] * 5)[a] for a in anchors])
    torch.testing.assert_close(neg_lse[anchors], exact)
    unit = [e / e.norm(dim=-1, keepdim=True) for e in made]
    own = s * (unit[0] * unit[1]).sum(-1)
    torch.testing.assert_close(own_logits[0, 1], own)
    assert own_logits[0, 2, 0] == ABSENT
    up = torch.rand(len(anchors), 21, **kind)
    inputs = [*views, mixing, s]
    loss = (neg_lse[anchors] * up).sum() + own_logits[0, 1].square().sum()
    expected = (exact * up).sum() + own.square().sum()
    got, want = (list(torch.autograd.grad(value, inputs)) for value in (loss, expected))
    for grads in (got, want):
        grads[2] = grads[2][[0, 2, 3]]  # the other rows are constants
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
