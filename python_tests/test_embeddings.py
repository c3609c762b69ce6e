"""The O(M*D) side of each backend, ``embed`` and ``gradients``, against its definition in float64,
in every dtype of products: on a CPU the losses reach it with float32 and float64 alone.

Triton's kernels run in Triton's interpreter where there is no GPU: ``test_in_the_interpreter``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from calls import spec_of
from interpreter import checked_memory, run_file, starts, watches_memory
from tolerance import assert_accurate
from torch import Tensor

from gcl_kernels.backends.base import Backend
from gcl_kernels.dispatch import BACKENDS
from gcl_kernels.problem import Embedded
from gcl_kernels.spec import ABSENT, Bases, NegativesSpec

DTYPES: dict[str, tuple[tuple[torch.dtype, ...], torch.dtype]] = {
    "float32": ((torch.float32,) * 3, torch.float32),
    "bfloat16": ((torch.bfloat16,) * 3, torch.bfloat16),
    "float16": ((torch.float16,) * 3, torch.float16),
    "half inputs, float32 products": ((torch.bfloat16,) * 3, torch.float32),
    "mixed": ((torch.float16, torch.float64, torch.bfloat16), torch.bfloat16),
}
"""Of the bases, and of the products."""

ROADS: dict[str, tuple[Bases | None, list[list[float]]]] = {
    "views": (None, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    "gcl": ((0, 1, None), [[1, 0], [0, 1], [0.7, 1.3]]),
    "two combinations": ((None, 1, None), [[2, -0.5], [0, 1], [1, 1]]),
}
"""``mixed`` of a spec, and how views are made of the bases."""

CASES = [
    ("views", 1, 1, "contiguous"), ("views", 9, 512, "contiguous"), ("views", 10, 300, "slices"),
    ("views", 5, 300, "columns"), ("two combinations", 9, 200, "contiguous"),
    ("gcl", 9, 200, "slices"), ("gcl", 9, 200, "columns"),
]  # fmt: skip
"""Road, samples, elements of each, and how they lie in memory."""

PAIRS = ((0, 1), (1, 2), (2, 2))
ASKED = torch.tensor([[False, True, False], [True, False, True], [False, True, True]])
SCALE = 3.0


@starts
def test_in_the_interpreter():
    run_file(__file__)


@pytest.fixture
def own(backend: str, device: torch.device, request: pytest.FixtureRequest) -> Backend:
    """A backend with functions of its own; ``tiled`` stands for all that have PyTorch's."""
    row = BACKENDS[backend]
    if type(row).embed is Backend.embed and backend != "tiled":
        pytest.skip("it has PyTorch's functions, or none: tiled's tests are theirs")
    if "dtypes" in request.fixturenames and backend != "tiled":
        reason = row.why_not(device, DTYPES[request.getfixturevalue("dtypes")][1])
        if reason is not None:
            pytest.skip(reason)
    return row


class Given(NamedTuple):
    """Arguments of ``embed``."""

    bases: list[Tensor]
    mixing: Tensor | None
    scale: Tensor
    spec: NegativesSpec


def make(
    road: str, shape: tuple[int, int], layout: str, dtypes: str, device: torch.device,
    normalize: bool = True,
) -> Given:  # fmt: skip
    """Rows of very different lengths. Of the odd bases either rows start anywhere, or elements of a
    row lie apart."""
    generator = torch.Generator().manual_seed(sum(shape))
    of_bases, compute_dtype = DTYPES[dtypes]
    mixed, table = ROADS[road]
    bases = []
    for index, dtype in enumerate(of_bases[: len(table[0])]):
        data = torch.randn(*shape, generator=generator, dtype=torch.float64)
        stretch = torch.rand(shape[0], 1, generator=generator, dtype=torch.float64)
        data = (data * stretch.add(-0.5).mul(6).exp()).to(device, dtype)
        if index % 2 and layout == "slices":
            data = torch.cat([data, data, data[:, :1]], 1)[:, shape[1] : 2 * shape[1]]
        if index % 2 and layout == "columns":
            data = data.t().contiguous().t()
        bases.append(data)
    mixing = None if mixed is None else torch.tensor(table, device=device)
    spec = spec_of(own_pairs=PAIRS, mixed=mixed, normalize=normalize, compute_dtype=compute_dtype)
    return Given(bases, mixing, torch.tensor(SCALE, device=device), spec)


def random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(device)


def units(e: Tensor, spec: NegativesSpec) -> Tensor:
    return e / e.norm(dim=-1, keepdim=True) if spec.normalize else e


def defined(road: str, given: Given, dtype: torch.dtype) -> dict[str, Tensor]:
    """What ``embed`` gives, for all pairs, from views that are made one by one."""
    e = torch.stack([base.to(dtype) for base in given.bases])
    table = torch.tensor(ROADS[road][1], dtype=dtype, device=e.device)
    made = torch.einsum("vb,bnd->vnd", table, e)
    u, views = units(e, given.spec), units(made, given.spec)
    k = table.unsqueeze(-1).expand(*table.shape, e.shape[1])
    found = {
        "z": u,
        "dots": torch.einsum("bnd,cnd->bcn", u, u),
        "own_logits": SCALE * torch.einsum("vnd,wnd->vwn", views, views),
    }
    if given.spec.normalize:
        norm, lengths = e.norm(dim=-1), made.norm(dim=-1)
        k = k * norm / lengths.unsqueeze(1)
        found |= {"inverse": 1 / norm, "lengths": lengths}
    return found | {"coefficients": k}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_embed(own, device, case, dtypes, normalize):
    road, *shape, layout = case
    given = make(road, tuple(shape), layout, dtypes, device, normalize)
    embedded, own_logits = own.embed(*given)
    results = embedded._asdict() | {"own_logits": own_logits}
    exact, dense = (defined(road, given, t) for t in (torch.float64, torch.float32))
    assert embedded.z.dtype == given.spec.compute_dtype and embedded.z.is_contiguous()
    assert (own_logits[~ASKED] == ABSENT).all()
    if normalize:
        assert (own_logits[2, 2] == SCALE).all(), "exactly one, times s"
    else:
        assert not embedded.inverse.numel() and not embedded.lengths.numel()
    # Of a view's logit the terms are products of coefficients.
    k, dots = exact["coefficients"].abs().sum(1), exact["dots"].abs()
    sizes = {name: of.norm().item() for name, of in exact.items()}
    sizes["own_logits"] = SCALE * (k**2).norm().item() * dots.max().item()
    for of in (results, exact, dense):
        of["own_logits"] = of["own_logits"][ASKED]
    if road == "views":
        assert not embedded.coefficients.numel() and (embedded.dots[~ASKED] == 0).all()
        del exact["coefficients"]
    for a, b in given.spec.base_pairs:
        size = (exact["z"][a] * exact["z"][b]).norm().item()
        assert torch.equal(embedded.dots[a, b], embedded.dots[b, a])
        of_pair = (of["dots"][a, b] for of in (results, exact, dense))
        assert_accurate(f"dots[{a}, {b}]", *of_pair, size)
    del exact["dots"]
    dense["z"] = dense["z"].to(given.spec.compute_dtype)
    for name, of in exact.items():
        assert_accurate(name, results[name], of, dense[name], sizes[name])


def judge(name: str, grad: Tensor, exact: Tensor, dense: Tensor, size: float) -> None:
    """The rule of ``tolerance``; a float64 base's gradient is a float32 number here."""
    if grad.dtype == torch.float64:
        assert torch.equal(grad, grad.float().double())
        grad = grad.float()
    assert_accurate(name, grad, exact, dense.to(grad.dtype), size)


def gradients_of(
    own: Backend, road: str, given: Given, embedded: Embedded, hz: Tensor, grad_own: Tensor,
    needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """From a backward pass in which ``(H z)_v`` of the views are ``hz``; ``R`` and ``U`` of it."""
    exact = defined(road, given, torch.float64)
    sums = torch.einsum("vbn,vnd->bnd", exact["coefficients"], hz.double())
    inner = torch.einsum("vnd,bnd->vbn", hz.double(), exact["z"])
    for v, base in enumerate(given.spec.bases):
        if base is not None:
            inner[v, torch.arange(inner.shape[1]) != base] = 0  # which block functions leave out
    sums, inner = sums.float().contiguous(), inner.float().contiguous()
    passed = sums.clone(), sums.new_empty(0) if road == "views" else inner, grad_own
    grads = own.gradients(given.bases, given.scale, embedded, *passed, given.spec, needs)
    return grads, sums, inner


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(own, device, case, dtypes, normalize, frozen):
    """The gradient of ``s (sum <(H z)_v, z_v> + sum grad_own <z_v, z_w>)`` through the views that
    are made, with ``(H z)_v`` any constants in place of their own, and what it says of the
    scale's."""
    if frozen and not normalize:
        pytest.skip("which bases need one and normalisation do not meet in the kernels")
    road, *shape, layout = case
    given = make(road, tuple(shape), layout, dtypes, device, normalize)
    bases, table, spec = given.bases, torch.tensor(ROADS[road][1], device=device), given.spec
    hz = random(3, *shape, device=device)
    grad_own = random(3, 3, shape[0], device=device) * ASKED.to(device).unsqueeze(-1)
    strided = grad_own.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    needs = [not frozen or b == 1 for b in range(len(bases))]
    needs_mixing = road != "views" and not frozen
    embedded, all_needs = own.embed(*given)[0], [*needs, needs_mixing, True]
    grads, sums, inner = gradients_of(own, road, given, embedded, hz, strided, all_needs)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        leaves = [base.detach().to(dtype).requires_grad_() for base in bases]
        weights = table.to(dtype).requires_grad_()
        views = units(torch.einsum("vb,bnd->vnd", weights, torch.stack(leaves)), spec)
        along = (views * hz.to(dtype)).sum((1, 2))
        of_own = (torch.einsum("vnd,wnd->vwn", views, views) * grad_own.to(dtype)).sum()
        found = torch.autograd.grad(SCALE * (along.sum() + of_own), [*leaves, weights])
        fixed = torch.tensor([base is not None for base in spec.bases], device=device)
        # What a frozen view adds to the scale's gradient is missing.
        counted = torch.tensor(needs, device=device) if road == "views" else fixed | True
        of_scale = (0.5 * along * counted).sum() + of_own
        return [*found[:-1], found[-1].masked_fill(fixed.unsqueeze(-1), 0), of_scale.detach()]

    exact, dense = gradients(torch.float64), gradients(torch.float32)
    of_embed = defined(road, given, torch.float64)
    most = of_embed["coefficients"].abs().sum(1).amax().item() ** 2
    most *= 1 + 3 * grad_own.abs().amax().item()
    lengths = torch.stack([base.double().norm(dim=-1, keepdim=True) for base in bases])
    terms = SCALE * (sums.double().abs() + most * of_embed["z"].abs().sum(0))
    if normalize:
        terms /= lengths
    for b, base in enumerate(bases):
        if needs[b]:
            assert grads[b].dtype == base.dtype
            judge(f"grad[{b}]", grads[b], exact[b], dense[b], terms[b].norm().item())
        else:
            assert not grads[b].numel()
    size = SCALE * most * (inner.norm().item() + shape[0])
    if needs_mixing:
        shortest = of_embed["lengths"].min() if normalize else 1.0
        judge("mixing", grads[-2], exact[-2], dense[-2], size * float(lengths.max() / shortest))
    else:
        assert not grads[-2].numel()
    size *= 1 if normalize else lengths.max().item() ** 2
    judge("scale", grads[-1], exact[-1], dense[-1], size)


@pytest.mark.parametrize("road", ["views", "gcl"])
def test_a_unit_vector_beside_itself_has_no_gradient(own, device, road):
    """Not even rounding of one."""
    given = make(road, (9, 40), "contiguous", "float32", device)
    hz, grads = random(3, 9, 40, device=device), []
    for of_itself in (0.0, 1e6):
        grad_own = random(3, 3, 9, device=device) * ASKED.to(device).unsqueeze(-1)
        grad_own[2, 2] = of_itself
        needs = [True] * len(given.bases) + [road == "gcl", True]
        found, *_ = gradients_of(own, road, given, own.embed(*given)[0], hz, grad_own, needs)
        grads.append(found[:-1])
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("road", ["views", "gcl"])
def test_what_is_not_finite_becomes_nan(own, device, road, dtypes, normalize, bad):
    given = make(road, (5, 40), "contiguous", dtypes, device, normalize)
    given.bases[1][2, 3] = bad
    (z, *_), own_logits = own.embed(*given)
    assert z[1, 2].isnan().any() and z[1, 2].isfinite().any() != normalize
    assert own_logits[:2, 1, 2][ASKED[:2, 1]].isnan().all()
    assert own_logits[2, 1, 2].isnan()
    others = [0, 1, 3, 4]
    assert z[1, others].isfinite().all() and own_logits[..., others].isfinite().all()


def test_lengths_that_overflow_become_nan(own, device):
    given = make("gcl", (5, 40), "contiguous", "float32", device)
    given.bases[1][2] = 1e20
    embedded, own_logits = own.embed(*given)
    assert embedded.z[1, 2].isnan().all() and own_logits[:2, :, 2][ASKED[:2]].isnan().all()


def test_short_vectors(own, device):
    """Below a length of 1e-12 the divisor is a constant: no projection. A combination of length
    zero has no coefficients; those of a base are one and zero."""
    zero, one = torch.zeros(3, 3, 5, device=device), torch.eye(2, device=device).unsqueeze(-1)
    hz = random(3, 5, 40, device=device)
    for road in ("views", "gcl"):
        given = make(road, (5, 40), "contiguous", "float32", device)
        bases, mixing, *_, spec = given
        if mixing is not None:
            mixing[2] = 1
        bases[0][1] = 0
        bases[0][3] *= 1e-13 / bases[0][3].norm()
        bases[1][2] = -bases[0][2]
        embedded, own_logits = own.embed(*given)
        z, inverse, lengths, coefficients, _ = embedded
        assert (z[0, 1] == 0).all() and inverse[0, 1] == 1e12 and lengths[0, 1] == 0
        torch.testing.assert_close(z[0, 3], bases[0][3] * 1e12)
        sums, inner = hz[: len(bases)].clone(), zero[:, :2] if road == "gcl" else hz.new_empty(0)
        needs = [True] * len(bases) + [False, True]
        grads = own.gradients(
            bases, given.scale, embedded, sums, inner.contiguous(), zero, spec, needs
        )
        for line in (1, 3):
            expected = hz[0, line] * SCALE * 1e12
            torch.testing.assert_close(grads[0][line], expected, rtol=1e-6, atol=0)
        of_itself = [SCALE, SCALE, 0.0, SCALE, SCALE] if road == "gcl" else [SCALE] * 5
        assert own_logits[2, 2].tolist() == of_itself
        if road == "gcl":
            assert lengths[2, 2] == 0 and (coefficients[2, :, 2] == 0).all()
            assert coefficients.isfinite().all()
            assert torch.equal(coefficients[:2], one.expand(2, 2, 5))


@pytest.mark.parametrize("layout", ["contiguous", "slices", "columns"])
@pytest.mark.parametrize("dtypes", ["bfloat16", "mixed"])
@watches_memory
def test_memory_of_triton(dtypes, layout):
    """Its kernels stay inside of their tensors, and their programs may run in any order."""

    def results(reverse: bool) -> list[Tensor]:
        found: list[Tensor] = []
        device = torch.device("cpu")
        with checked_memory(reverse) as memory:
            for road in ("views", "gcl"):
                given = make(road, (9, 300), layout, dtypes, device)
                needs = [True, False, *[True] * len(given.bases)]
                hz, grad_own = (random(3, *of, 9, device=device) for of in ((300,), (3,)))
                embedded, own_logits = BACKENDS["triton"].embed(*given)
                grads, *_ = gradients_of(
                    BACKENDS["triton"], road, given, embedded, hz.mT, grad_own, needs
                )
                found += [*embedded, own_logits, *grads]
        assert memory.launches == ["embed_kernel", "gradients_kernel"] * 2
        return found

    for first, second in zip(results(False), results(True), strict=True):
        assert torch.equal(first, second) and not first.isnan().any()
