"""The O(M*D) side of each backend against its definition in float64, in every dtype of products:
on a CPU the losses reach it with float32 and float64 alone.

Triton's kernels run in Triton's interpreter where there is no GPU: ``test_in_the_interpreter``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from interpreter import checked_memory, run_file, starts, watches_memory
from tolerance import assert_accurate
from torch import Tensor

from gcl_kernels import embeddings
from gcl_kernels.dispatch import BACKENDS
from gcl_kernels.embeddings import ABSENT

DTYPES: dict[str, tuple[tuple[torch.dtype, ...], torch.dtype]] = {
    "float32": ((torch.float32,) * 3, torch.float32),
    "bfloat16": ((torch.bfloat16,) * 3, torch.bfloat16),
    "float16": ((torch.float16,) * 3, torch.float16),
    "half inputs, float32 products": ((torch.bfloat16,) * 3, torch.float32),
    "mixed": ((torch.float16, torch.float64, torch.bfloat16), torch.bfloat16),
}
"""Of the views, and of the products."""

SHAPES = [
    (1, 1, "contiguous"), (9, 512, "contiguous"), (10, 300, "slices"),
    (5, 300, "columns"),
]  # fmt: skip
"""Samples, elements of each, and how they lie in memory."""

LAYOUTS = ["contiguous", "slices", "columns"]
FUSED_LAYOUTS = [("two combinations", "contiguous"), ("gcl", "slices"), ("gcl", "columns")]
SCALE = 3.0
FUSED = {
    "gcl": ([0, 1, -1], [[1, 0], [0, 1], [0.7, 1.3]]),
    "two combinations": ([-1, 1, -1], [[2, -0.5], [0, 1], [1, 1]]),
}


@starts
def test_in_the_interpreter():
    run_file(__file__)


@pytest.fixture
def row(backend: str, device: torch.device, request: pytest.FixtureRequest) -> Any:
    if BACKENDS[backend].embed is embeddings.embed and backend != "tiled":
        pytest.skip("it has PyTorch's functions, or none: tiled's tests are theirs")
    if "dtypes" in request.fixturenames and backend != "tiled":  # which has PyTorch's functions
        compute_dtype = DTYPES[request.getfixturevalue("dtypes")][1]
        reason = BACKENDS[backend].why_not(device, compute_dtype)
        if reason is not None:
            pytest.skip(reason)
    return BACKENDS[backend]


def make_views(
    dtypes: Sequence[torch.dtype], n: int, d: int, device: torch.device, layout: str = "contiguous"
) -> list[Tensor]:
    """Rows of very different lengths. Of the odd views either rows start anywhere, or elements of a
    row lie apart."""
    generator = torch.Generator().manual_seed(n + d)
    views = []
    for index, dtype in enumerate(dtypes):
        data = torch.randn(n, d, generator=generator, dtype=torch.float64)
        data *= torch.rand(n, 1, generator=generator, dtype=torch.float64).add(-0.5).mul(6).exp()
        data = data.to(device, dtype)
        if index % 2 and layout == "slices":
            data = torch.cat([data, data, data[:, :1]], 1)[:, d : 2 * d]
        if index % 2 and layout == "columns":
            data = data.t().contiguous().t()
        views.append(data)
    return views


def units(views: Sequence[Tensor], normalize: bool, dtype: torch.dtype) -> Tensor:
    e = torch.stack([view.to(dtype) for view in views])
    return e / e.norm(dim=-1, keepdim=True).clamp_min(1e-12) if normalize else e


def random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(device)


def judge(name: str, grad: Tensor, exact: Tensor, dense: Tensor, size: float) -> None:
    """The rule of ``tolerance``; a float64 view's gradient is a float32 number here."""
    if grad.dtype == torch.float64:
        assert torch.equal(grad, grad.float().double())
        grad = grad.float()
    assert_accurate(name, grad, exact, dense.to(grad.dtype), size)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_embed(row, device, shape, dtypes, normalize):
    of_views, compute_dtype = DTYPES[dtypes]
    n, d, layout = shape
    views, pairs = make_views(of_views, n, d, device, layout), [(0, 0), (0, 2), (1, 2)]
    scale = torch.tensor(SCALE, device=device)
    z, norm, inverse, own, own_logits = row.embed(views, pairs, normalize, compute_dtype, scale)
    exact, dense = (units(views, normalize, dtype) for dtype in (torch.float64, torch.float32))
    assert z.dtype == compute_dtype and z.is_contiguous()
    assert_accurate("z", z, exact, dense.to(compute_dtype), exact.norm().item())
    lengths = [torch.stack(views_of).norm(dim=-1) for views_of in (
        [view.double() for view in views], [view.float() for view in views])]  # fmt: skip
    if normalize:
        assert_accurate("norm", norm, *lengths, lengths[0].norm().item())
        size = (1 / lengths[0]).norm().item()
        assert_accurate("inverse", inverse, 1 / lengths[0], 1 / lengths[1], size)
    else:
        assert not norm.numel() and not inverse.numel()
    for a in range(3):
        for b in range(3):
            if (min(a, b), max(a, b)) in pairs:
                size = (exact[a] * exact[b]).norm().item()
                products = [(z[a] * z[b]).sum(-1) for z in (exact, dense)]
                assert_accurate(f"own[{a}, {b}]", own[a, b], *products, size)
                assert torch.equal(own_logits[a, b], own[a, b] * SCALE)
            else:
                assert (own[a, b] == 0).all() and (own_logits[a, b] == ABSENT).all()


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_embed_backward(row, device, shape, dtypes, normalize, needs):
    """The gradient of ``s (sum <hz, z> + sum grad_own <z_a, z_b>)``, and what it says of the
    scale's."""
    of_views, compute_dtype = DTYPES[dtypes]
    n, d, layout = shape
    if not (normalize or all(needs)):
        pytest.skip("which views need one and normalisation do not meet in the kernels")
    views = make_views(of_views, n, d, device, layout)
    scale = torch.tensor(SCALE, device=device)
    pairs = [(a, b) for a in range(3) for b in range(a, 3)]
    z, norm, inverse, own, _ = row.embed(views, pairs, normalize, compute_dtype, scale)
    hz, grad_own = random(3, n, d, device=device), random(3, 3, n, device=device)

    strided = grad_own.permute(2, 0, 1).contiguous().permute(1, 2, 0)

    def gradients(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        leaves = [view.detach().to(dtype).requires_grad_() for view in views]
        u = units(leaves, normalize, dtype)
        inner = (u * hz.to(dtype)).sum(-1)
        own_terms = ((u.unsqueeze(0) * u.unsqueeze(1)).sum(-1) * grad_own.to(dtype)).sum()
        grads = torch.autograd.grad(SCALE * (inner.sum() + own_terms), leaves)
        needed = torch.tensor(needs, device=device).unsqueeze(-1)
        return list(grads), 0.5 * (inner * needed).sum() + own_terms

    grads, grad_scale = row.embed_backward(
        views, normalize, z, norm, inverse, own, hz.clone(), strided, scale, needs
    )
    (exact, exact_scale), (dense, dense_scale) = map(gradients, (torch.float64, torch.float32))
    pulls = SCALE * (hz.double().norm().item() + 6 * grad_own.double().norm().item())
    for v, (view, grad) in enumerate(zip(views, grads, strict=True)):
        if not needs[v]:
            assert not grad.numel()
            continue
        assert grad.dtype == view.dtype
        length = view.double().norm(dim=-1)
        size = pulls * (float((1 / length).max()) if normalize else float(length.max()))
        judge(f"grad[{v}]", grad, exact[v], dense[v], size)
    largest = 1.0 if normalize else max(float(view.double().norm(dim=-1).max()) for view in views)
    terms = (hz.double().norm().item() + grad_own.double().norm().item()) * largest**2
    assert_accurate("grad_scale", grad_scale, exact_scale, dense_scale, terms)


def made_of(
    views: Sequence[Tensor], table: Tensor, normalize: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What ``embed_fused`` returns, from the views that are made."""
    e, weights = torch.stack([view.to(dtype) for view in views]), table.to(dtype)
    made = torch.einsum("vb,bnd->vnd", weights, e)
    norms, lengths = e.norm(dim=-1), made.norm(dim=-1)
    coefficients = weights.unsqueeze(-1).expand(3, 2, e.shape[1])
    if normalize:
        coefficients = coefficients * norms / lengths.unsqueeze(1)
        made = made / lengths.unsqueeze(-1)
    u = units(views, normalize, dtype)
    found = {
        "z": u,
        "coefficients": coefficients,
        "dots": torch.einsum("bnd,cnd->bcn", u, u),
        "own_logits": SCALE * torch.einsum("vnd,wnd->vwn", made, made),
    }
    return found | {"inverse": 1 / norms, "lengths": lengths} if normalize else found


PAIRS = [(0, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("case", "layout"), FUSED_LAYOUTS)
def test_embed_fused(row, device, case, layout, dtypes, normalize):
    of_views, compute_dtype = DTYPES[dtypes]
    bases, mixing = FUSED[case]
    table = torch.tensor(mixing, dtype=torch.float32, device=device)
    views = make_views(of_views[:2], 9, 200, device, layout)
    scale = torch.tensor(SCALE, device=device)
    given = (views, table, bases, PAIRS, normalize, compute_dtype, scale)
    names = ("z", "inverse", "lengths", "coefficients", "dots", "own_logits")
    results = dict(zip(names, row.embed_fused(*given), strict=True))
    exact, dense = (made_of(views, table, normalize, t) for t in (torch.float64, torch.float32))
    dense["z"] = dense["z"].to(compute_dtype)
    assert results["z"].dtype == compute_dtype
    asked = torch.tensor([[(min(v, w), max(v, w)) in PAIRS for w in range(3)] for v in range(3)])
    assert (results["own_logits"][~asked] == ABSENT).all()
    if normalize:
        assert (results["own_logits"][2, 2] == SCALE).all(), "exactly one, times s"
    for found in (results, exact, dense):
        found["own_logits"] = found["own_logits"][asked]
    # Of a logit the terms are products of coefficients.
    size = (exact["coefficients"].abs().sum(1) ** 2).norm().item() * exact[
        "dots"
    ].abs().max().item()
    sizes = {name: of.norm().item() for name, of in exact.items()} | {"own_logits": SCALE * size}
    for name, of in exact.items():
        assert_accurate(name, results[name], of, dense[name], sizes[name])
    assert torch.equal(results["dots"][0, 1], results["dots"][1, 0])


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("case", "layout"), FUSED_LAYOUTS)
def test_fused_gradients(row, device, case, layout, dtypes, normalize, needs):
    """The gradient of ``s (sum <(H z)_v, z_v> + sum grad_own <z_v, z_w>)`` through the views that
    are made, with ``(H z)_v`` any constants in place of their own."""
    if not (normalize or all(needs)):
        pytest.skip("as for test_embed_backward")
    of_views, compute_dtype = DTYPES[dtypes]
    views = make_views(of_views[:2], 9, 200, device, layout)
    bases, mixing = FUSED[case]
    table = torch.tensor(mixing, dtype=torch.float32, device=device)
    scale = torch.tensor(SCALE, device=device)
    hz, grad_own = random(3, 9, 200, device=device), random(3, 3, 9, device=device)
    # Unit vectors are paired with themselves: no gradient; else it is that of a square.
    strided = grad_own.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    *embedded, _ = row.embed_fused(views, table, bases, PAIRS, normalize, compute_dtype, scale)
    exact_units = units(views, normalize, torch.float64)
    coefficients = made_of(views, table, normalize, torch.float64)["coefficients"]
    r = torch.einsum("vbn,vnd->bnd", coefficients, hz.double()).float().contiguous()
    inner = torch.einsum("vnd,bnd->vbn", hz.double(), exact_units).float().contiguous()
    for v, base in enumerate(bases):
        if base >= 0:
            inner[v, 1 - base] = 0  # which the block functions leave out
    given = (views, bases, PAIRS, normalize, *embedded, r.clone(), inner, strided, scale, needs)
    grads, grad_mixing, grad_scale = row.fused_gradients(*given)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        leaves = [view.detach().to(dtype).requires_grad_() for view in views]
        weights = table.to(dtype).requires_grad_()
        made = torch.einsum("vb,bnd->vnd", weights, torch.stack(leaves))
        if normalize:
            made = made / made.norm(dim=-1, keepdim=True)
        along = (made * hz.to(dtype)).sum()
        own = ((made.unsqueeze(0) * made.unsqueeze(1)).sum(-1) * grad_own.to(dtype)).sum()
        grads = torch.autograd.grad(SCALE * (along + own), [*leaves, weights])
        fixed = torch.tensor(bases, device=device).unsqueeze(-1) >= 0
        return [*grads[:2], grads[2].masked_fill(fixed, 0), (0.5 * along + own).detach()]

    exact, dense = gradients(torch.float64), gradients(torch.float32)
    most = coefficients.abs().sum(1).amax().item() ** 2 * (1 + 3 * grad_own.abs().amax().item())
    for b, (view, grad) in enumerate(zip(views, grads, strict=True)):
        if not needs[b]:
            assert not grad.numel()
            continue
        assert grad.dtype == view.dtype
        length = view.double().norm(dim=-1, keepdim=True)
        terms = r[b].double().abs() + most * exact_units.abs().sum(0)
        size = SCALE * (terms / length if normalize else terms).norm().item()
        judge(f"grad[{b}]", grad, exact[b], dense[b], size)
    terms = SCALE * most * (inner.norm().item() + 9)
    lengths = torch.stack([view.double().norm(dim=-1) for view in views])
    if needs[2]:
        longest = (lengths.max() / embedded[2].min()).item() if normalize else lengths.max().item()
        judge("grad_mixing", grad_mixing, exact[2], dense[2], terms * longest)
    else:
        assert not grad_mixing.numel()
    size = terms if normalize else terms * lengths.max().item() ** 2
    judge("grad_scale", grad_scale, exact[3], dense[3], size)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16"])
def test_what_is_not_finite_becomes_nan(row, device, dtypes, normalize, bad):
    dtype = DTYPES[dtypes][1]
    views = make_views((dtype,) * 3, 5, 40, device)
    views[1][2, 3] = bad
    scale = torch.tensor(SCALE, device=device)
    z, *_, own_logits = row.embed(views, [(0, 1)], normalize, dtype, scale)
    assert z[1, 2].isnan().any() and own_logits[0, 1, 2].isnan()
    assert z[1, 2].isfinite().any() != normalize
    others = [0, 1, 3, 4]
    assert z[1, others].isfinite().all() and own_logits[0, 1, others].isfinite().all()


def test_short_vectors(row, device):
    """Below a length of 1e-12 the divisor is a constant: no projection. A combination of length
    zero has no coefficients; those of a base are one and zero."""
    views = make_views((torch.float32,) * 2, 5, 40, device)
    views[0][1] = 0
    views[0][3] *= 1e-13 / views[0][3].norm()
    views[1][2] = -views[0][2]
    scale = torch.tensor(SCALE, device=device)
    z, norm, inverse, own, _ = row.embed(views, [(0, 1)], True, torch.float32, scale)
    assert (z[0, 1] == 0).all() and norm[0, 1] == 0
    torch.testing.assert_close(z[0, 3], views[0][3] * 1e12)
    hz, zero = random(2, 5, 40, device=device), torch.zeros(2, 2, 5, device=device)
    given = (views, True, z, norm, inverse, own, hz.clone(), zero, scale, (True, True))
    grads, _ = row.embed_backward(*given)
    for line in (1, 3):
        torch.testing.assert_close(grads[0][line], hz[0, line] * SCALE * 1e12, rtol=1e-6, atol=0)
    table = torch.tensor([[1.0, 0], [0, 1], [1, 1]], device=device)
    _, _, lengths, coefficients, _, own_logits = row.embed_fused(
        views, table, [0, 1, -1], [(0, 1), (2, 2)], True, torch.float32, scale
    )
    assert own_logits[2, 2].tolist() == [SCALE, SCALE, 0, SCALE, SCALE]
    assert lengths[2, 2] == 0 and (coefficients[2, :, 2] == 0).all()
    assert coefficients.isfinite().all()
    assert torch.equal(coefficients[:2], table[:2].unsqueeze(-1).expand(2, 2, 5))


def run_all(row: Any, dtypes: str, layout: str, device: torch.device) -> list[Tensor]:
    """What the four functions give."""
    of_views, compute_dtype = DTYPES[dtypes]
    views, scale = make_views(of_views, 9, 300, device, layout), torch.tensor(SCALE, device=device)
    hz, grad_own = random(3, 9, 300, device=device), random(3, 3, 9, device=device)
    table = torch.tensor(FUSED["gcl"][1], device=device)
    embedded = row.embed(views, [(0, 2)], True, compute_dtype, scale)
    given = (views, True, *embedded[:4], hz, grad_own, scale, (True, False, True))
    grads, grad_scale = row.embed_backward(*given)
    made, pairs = [0, 1, -1], [(0, 1), (2, 2)]
    of_bases = row.embed_fused(views[:2], table, made, pairs, True, compute_dtype, scale)
    inner, needs = hz[:, :2, :9].contiguous(), (True, False, True)
    given = (views[:2], made, pairs, True, *of_bases[:5], hz[:2], inner, grad_own, scale, needs)
    fused_grads, *others = row.fused_gradients(*given)
    return [*embedded, *grads, grad_scale, *of_bases, *fused_grads, *others]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", ["bfloat16", "mixed"])
@watches_memory
def test_memory_of_triton(dtypes, layout):
    """Its kernels stay inside of their tensors, and their programs may run in any order."""

    def results(reverse: bool) -> list[Tensor]:
        with checked_memory(reverse) as memory:
            found = run_all(BACKENDS["triton"], dtypes, layout, torch.device("cpu"))
        assert memory.launches == [
            "embed_kernel", "embed_backward_kernel", "embed_fused_kernel", "fused_gradients_kernel"
        ]  # fmt: skip
        return found

    for first, second in zip(results(False), results(True), strict=True):
        assert torch.equal(first, second) and not first.isnan().any()
