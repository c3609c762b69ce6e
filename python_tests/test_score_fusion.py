"""gcl_loss without e_it: every backend, against the oracle on the fused vectors themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracle import dense_loss, dense_neg_lse
from test_contract import DTYPES, OPTIONS, collapsed_views, random_views, weights_rounding
from tolerance import assert_accurate
from torch import Tensor
from torch.library import opcheck

import gcl_kernels
from gcl_kernels import negatives, problem, score_fusion
from gcl_kernels.backends import tiled
from gcl_kernels.dispatch import BACKENDS
from gcl_kernels.embeddings import ABSENT
from gcl_kernels.spec import HALF_DTYPES, NegativesSpec

WEIGHTS = (0.7, -1.3)


def fused(views: list[Tensor], weights) -> list[Tensor]:
    return [*views, weights[0] * views[0] + weights[1] * views[1]]


def check(
    views, scale, *, backend, dtypes=(torch.float32,) * 2, weights=WEIGHTS, upstream=None, **options
):
    """Loss and all gradients, of the weights too, by the tolerance rule."""
    inputs = [view.to(dtype) for view, dtype in zip(views, dtypes, strict=True)]
    accum = torch.float64 if torch.float64 in dtypes else torch.float32
    device = inputs[0].device

    def run(function, dtype):
        leaves = [(x if dtype is None else x.to(dtype)).clone().requires_grad_() for x in inputs]
        kind = {"dtype": dtype or accum, "device": device, "requires_grad": True}
        s, *mixed = (torch.tensor(value, **kind) for value in (scale, *weights))
        loss = function(leaves, mixed, s)
        loss.backward(None if upstream is None else upstream.to(loss.dtype))
        return [loss.detach(), s.grad, *(w.grad for w in mixed), *(e.grad for e in leaves)]

    def ours(e, w, s, backend=backend):
        return gcl_kernels.gcl_loss(*e, None, s, fusion_weights=w, backend=backend, **options)

    result = run(ours, None)
    exact = run(lambda e, w, s: dense_loss(fused(e, w), s, **options), torch.float64)
    compute, _ = negatives.resolve_dtypes(None, inputs)
    if compute in HALF_DTYPES:
        dense = run(lambda e, w, s: ours(e, w, s, "reference"), None)
    else:
        dense = run(lambda e, w, s: dense_loss(fused(e, w), s, **options), accum)
    assert result[0].dtype == accum
    for grad, leaf in zip(result[4:], inputs, strict=True):
        assert grad.dtype == leaf.dtype
    n = inputs[0].shape[0]
    per_loss = 1.0 if upstream is None else upstream.abs().max().item() * n
    if options.get("reduction") == "sum":
        per_loss = float(n)
    e = fused([x.double() for x in inputs], weights)
    lengths = [x.norm(dim=-1) for x in e]
    # What rounds in the fused view's logits is the sum of its two parts, each at most a, b.
    parts = sum(abs(w) * x for w, x in zip(weights, lengths, strict=False)) / lengths[2]
    if options.get("normalize") is False:
        largest = max(x.max().item() for x in lengths)
        logit, lengths = scale * largest**2, [1 / x for x in lengths]
        amplified = torch.full_like(parts, sum(map(abs, weights)) + 1)
    else:
        logit, amplified = scale * parts.max().item() ** 2, 1 + parts**2
    losses = n**0.5 if result[0].dim() else per_loss
    if compute in HALF_DTYPES:
        # Of the fused view both bases are rounded, where the dense computation rounds their sum.
        dense = [x + amplified.mean() * (d - x) for d, x in zip(dense, exact, strict=True)]
    assert_accurate("loss", result[0], exact[0], dense[0], (logit + 10) * losses)
    rest = list(zip(result, exact, dense, strict=True))[1:]
    size = 4 * per_loss * amplified.max().item()
    rounded = weights_rounding(compute) * per_loss * logit / scale
    assert_accurate("logit_scale.grad", *rest[0], size * max(1.0, logit / scale) + rounded)
    for index, name in ((1, "alpha.grad"), (2, "beta.grad")):
        assert_accurate(name, *rest[index], size * max(scale, logit) / abs(weights[index - 1]))
    # A weight exp(x - lse) has the relative rounding of x, whose two parts are larger than x.
    weight = 1 + scale * (parts**2).mean().item() / 8
    for name, length, triple in zip(("e_i.grad", "e_t.grad"), lengths, rest[3:], strict=False):
        terms = 4 * scale * per_loss / n * amplified / length * weight
        assert_accurate(name, *triple, terms.norm().item())


@pytest.mark.parametrize("n", [1, 2, 33, 800])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(backend, device, tiling, options, n):
    if n == 800 and (tiling == "ragged" or backend not in ("tiled", "cpu")):
        pytest.skip("800 samples are several of tiled's and cpu's blocks as shipped")
    if n == 800 and options not in (OPTIONS["default"], OPTIONS["one-sided candidates"]):
        pytest.skip("the others meet several blocks at 33 samples, ragged")
    if n == 1 and "candidates" in options:
        pytest.skip("nothing but the own sample")
    check(random_views(n, 19, device)[:2], 14.3, backend=backend, **options)


@pytest.mark.parametrize(
    "dtypes",
    [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float64, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("normalize", [True, False])
def test_dtypes(backend, device, tiling, dtypes, normalize):
    if torch.float64 in dtypes and BACKENDS[backend].why_not(device, torch.float64):
        pytest.skip("no float64")
    scale = 20.0 if normalize else 0.2
    views = random_views(21, 24, device)[:2]
    check(views, scale, backend=backend, dtypes=dtypes, normalize=normalize)


@pytest.mark.parametrize("scale", [1e-3, 39.9, 40.1, 100.0, 3000.0])
def test_extreme_temperature(backend, device, tiling, scale):
    check(random_views(12, 8, device)[:2], scale, backend=backend)


@pytest.mark.parametrize("ids", ["pairs", "equal", "strided", "expanded"])
def test_sample_ids(backend, device, tiling, ids):
    order = torch.arange(46, device=device)
    sample_ids = {
        "pairs": order[:23] // 2,
        "equal": torch.full_like(order[:23], 7, dtype=torch.int32),
        "strided": (order // 6)[::2],
        "expanded": order[3:4].expand(23),
    }[ids]
    for options in ({}, {"self_similarity": "keep", "other_positives": "exclude"}):
        views = random_views(23, 9, device)[:2]
        check(views, 25.0, backend=backend, sample_ids=sample_ids, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradient(backend, device, tiling, reduction):
    views = random_views(19, 9, device)[:2]
    upstream = torch.tensor(-2.5) if reduction == "mean" else torch.linspace(-1, 2, 19)
    check(views, 9.0, backend=backend, reduction=reduction, upstream=upstream.to(device))


def test_nearly_solved_batch(backend, device, tiling):
    base = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0][:20].to(device)
    views = [base + 1e-3 * noise for noise in random_views(20, 40, device)[:2]]
    check(views, 100.0, backend=backend, weights=(1.0, 1.0))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 2.0), (0.0, 0.0)])
def test_both_roads_agree(float64_backend, device, tiling, weights):
    """Also where the fused view is a base (weight 0) and where it vanishes (both 0)."""
    leaves = [v.requires_grad_() for v in random_views(21, 7, device)[:2]]
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
    for a, b in zip(
        torch.autograd.grad(learned, [*leaves, *tensors]),
        torch.autograd.grad(general, [*leaves, *tensors]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_zero_fused_vector(backend, device, tiling):
    """It has logits 0, as the general road's zero vector, and nothing flows through it."""
    e_i, e_t = (v.float() for v in random_views(20, 8, device)[:2])
    e_t[3] = -e_i[3]
    leaves = [e_i.requires_grad_(), e_t.requires_grad_()]
    loss = gcl_kernels.gcl_loss(*leaves, backend=backend)
    torch.testing.assert_close(loss, gcl_kernels.gcl_loss(*leaves, e_i + e_t, backend="reference"))
    grads = torch.autograd.grad(loss, leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    summed = exact[0] + exact[1]
    keep = torch.ones_like(summed)
    keep[3] = 0
    expected = gcl_kernels.gcl_loss(*exact, summed * keep, backend="reference")
    for a, b in zip(grads, torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6 * b.abs().max().item())


def test_short_fused_vector(float64_backend, device, tiling):
    """Below 1e-12 it is a zero vector, in the oracle's fusion too."""
    e_i, e_t = random_views(20, 8, device)[:2]
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
    e_i, e_t = (v.float() for v in random_views(20, 8, torch.device("cpu"))[:2])
    losses = [
        gcl_kernels.gcl_loss(a, b, backend="reference", compute_dtype=torch.float64)
        for a, b in ((e_i, e_t), (e_i.double(), e_t.double()))
    ]
    assert torch.equal(*losses)


def test_zero_base_vector(backend, device, tiling):
    e_i, e_t = (v.float() for v in random_views(20, 8, device)[:2])
    e_t[3] = 0
    loss = gcl_kernels.gcl_loss(e_i, e_t, backend=backend)
    torch.testing.assert_close(loss, gcl_kernels.gcl_loss(e_i, e_t, e_i + e_t, backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearly_collapsed(backend, device, tiling, dtype):
    if dtype == torch.float64 and BACKENDS[backend].why_not(device, dtype):
        pytest.skip("no float64")
    check(collapsed_views(40, 64, device)[:2], 50.0, backend=backend, dtypes=(dtype,) * 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", [True, False])
def test_bad_numbers_make_nan(backend, device, tiling, bad, normalize):
    e_i, e_t = (v.float() for v in random_views(20, 8, device)[:2])
    e_t[7, 2] = bad
    loss = gcl_kernels.gcl_loss(e_i, e_t, temperature=1.0, normalize=normalize, backend=backend)
    assert loss.isnan()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1e20, 1e20)])
def test_fused_length_that_overflows_makes_nan(backend, device, tiling, weights):
    """Where the bases' own lengths are finite."""
    e_i = torch.full((2, 8), 6e18 if weights == (1, 1) else 1.0, device=device)
    e_i[1, ::2] *= -1
    e_i[0] /= 1e3
    loss = gcl_kernels.gcl_loss(
        e_i, e_i.clone(), temperature=0.1, fusion_weights=weights, backend=backend
    )
    assert loss.isnan()


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


@pytest.mark.parametrize("needs", [(1, 0, 0, 0), (0, 1, 0, 1), (0, 0, 1, 0), (0, 0, 0, 1)], ids=str)
def test_subset_of_inputs(backend, device, tiling, needs):
    values = [*(v.float() for v in random_views(20, 8, device)[:2])]
    values += [torch.tensor(w, device=device) for w in (*WEIGHTS, 12.0)]

    def grads(needs):
        leaves = [
            v.clone().requires_grad_(bool(n))
            for v, n in zip(values, (*needs[:3], needs[2], needs[3]), strict=True)
        ]
        loss = gcl_kernels.gcl_loss(
            *leaves[:2], None, leaves[4], fusion_weights=leaves[2:4], backend=backend
        )
        loss.backward()
        return [leaf.grad for leaf in leaves]

    for one, every in zip(grads(needs), grads((1,) * 4), strict=True):
        if one is None:
            continue
        if BACKENDS[backend].fuses_scores:
            torch.testing.assert_close(one, every, rtol=1e-6, atol=1e-9)
        else:  # the general road's blocks of frozen views are others, and so is the order of sums
            size = every.abs().max().item()
            torch.testing.assert_close(one, every, rtol=2e-5, atol=1e-6 * size)


def test_same_bits_every_time(backend, device, tiling):
    leaves = [v.float().requires_grad_() for v in random_views(40, 16, device)[:2]]

    def run():
        loss = gcl_kernels.gcl_loss(*leaves, backend=backend)
        return [loss, *torch.autograd.grad(loss, leaves)]

    first = run()
    assert all(all(map(torch.equal, first, run())) for _ in range(2))


def test_strided_inputs_and_retained_graph(backend, device, tiling):
    e_i, e_t = (v.float() for v in random_views(20, 16, device)[:2])
    leaves = [e_i.t().contiguous().t()[:, ::2], e_t.repeat(1, 2)[:, 3:11]]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    loss = gcl_kernels.gcl_loss(*leaves, backend=backend)
    plain = [leaf.detach().contiguous().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(gcl_kernels.gcl_loss(*plain, backend=backend), plain)
    for _ in range(2):
        grads = torch.autograd.grad(loss, leaves, retain_graph=True)
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_gradcheck(float64_backend, device, ragged):
    views = random_views(19, 5, device)[:2]
    kind = {"dtype": torch.float64, "device": device}
    scalars = [torch.tensor(x, **kind) for x in (5.0, *WEIGHTS)]
    inputs = [x.requires_grad_() for x in (*views, *scalars)]

    def function(e_i, e_t, s, alpha, beta):
        return gcl_kernels.gcl_loss(
            e_i, e_t, None, s, fusion_weights=(alpha, beta), backend=float64_backend
        )

    assert torch.autograd.gradcheck(function, inputs)


def test_double_backward_is_refused(device):
    leaves = [v.requires_grad_() for v in random_views(6, 5, device)[:2]]
    loss = gcl_kernels.gcl_loss(*leaves, backend="tiled")
    (grad,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        grad.sum().backward()


def _negatives(views, mixing, bases, scale, candidates, backend, pairs=((0, 1),)):
    spec = NegativesSpec(candidates, True, torch.float64, torch.float64, None, backend)
    return score_fusion.fused_negatives(*views, mixing, bases, scale, None, pairs, spec)[:2]


def test_any_combinations(float64_backend, device, tiling):
    """The combination matrix is data: five views, text twice, no view that is the first base."""
    if float64_backend == "reference":
        pytest.skip("takes views, not combinations")
    kind = {"dtype": torch.float64, "device": device}
    mixing = torch.tensor([[1, 2], [0, 1], [2, -1], [0.5, 0.1], [0, 1]], **kind).requires_grad_()
    bases = (None, 1, None, None, 1)
    candidates = tuple(tuple((a * b + a) % 3 != 1 for b in range(5)) for a in range(5))
    views = [v.requires_grad_() for v in random_views(21, 7, device)[:2]]
    s = torch.tensor(6.0, **kind, requires_grad=True)
    neg_lse, own_logits = _negatives(views, mixing, bases, s, candidates, float64_backend)
    made = [row[0] * views[0] + row[1] * views[1] for row in mixing]
    used = tuple(tuple(row) for row in candidates)
    for a, row in enumerate(used):
        if not any(row):
            assert (neg_lse[a] == -torch.inf).all()
    anchors = [a for a, row in enumerate(used) if any(row)]
    exact = torch.stack(
        [dense_neg_lse(made, s, [used[a] if b == a else used[anchors[0]] for b in range(5)])[a]
         for a in anchors]
    )  # fmt: skip
    torch.testing.assert_close(neg_lse[anchors], exact)
    unit = [e / e.norm(dim=-1, keepdim=True) for e in made]
    torch.testing.assert_close(own_logits[0, 1], s * (unit[0] * unit[1]).sum(-1))
    assert own_logits[0, 2, 0] == ABSENT
    up = torch.rand(len(anchors), 21, **kind)
    inputs = [*views, mixing, s]
    loss = (neg_lse[anchors] * up).sum() + own_logits[0, 1].square().sum()
    expected = (exact * up).sum() + (s * (unit[0] * unit[1]).sum(-1)).square().sum()
    got, want = (list(torch.autograd.grad(value, inputs)) for value in (loss, expected))
    for grads in (got, want):
        grads[2] = grads[2][[0, 2, 3]]  # the other rows are constants
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("fuses_scores", [True, False])
def test_half_inputs_as_on_a_gpu(
    emulated_half_products, tiling, monkeypatch, dtype, normalize, fuses_scores
):
    """What test_dtypes asks of a GPU, where there is none."""
    row = dataclasses.replace(BACKENDS["tiled"], fuses_scores=fuses_scores)
    monkeypatch.setitem(BACKENDS, "tiled", row)
    views = random_views(21, 24, torch.device("cpu"))[:2]
    scale = 20.0 if normalize else 0.2
    check(views, scale, backend="tiled", dtypes=(dtype,) * 2, normalize=normalize)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upstream", [1.0, -1e-6])
def test_half_products(emulated_half_products, tiling, dtype, upstream):
    views = [v.to(dtype) for v in random_views(40, 32, torch.device("cpu"))[:2]]

    def run(kind, backend, compute):
        leaves = [v.to(kind).requires_grad_() for v in views]
        loss = gcl_kernels.gcl_loss(*leaves, backend=backend, compute_dtype=compute)
        return [loss, *torch.autograd.grad(loss * upstream, leaves)]

    result, dense = (run(torch.float32, backend, dtype) for backend in ("tiled", "reference"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(negatives, "resolve_dtypes", lambda dtype, views: (dtype, dtype))
        exact = run(torch.float64, "reference", torch.float64)
    eps = torch.finfo(dtype).eps
    for got, plain, want in zip(result, dense, exact, strict=True):
        error, dense_error = ((x.double() - want).norm() for x in (got, plain))
        assert error <= 3 * dense_error + eps / 4 * want.norm(), (error, dense_error, want.norm())


@pytest.mark.parametrize("needs", [[True] * 4, [True, False, False, True]])
def test_opcheck(needs):
    views = [v.float() for v in random_views(12, 6, torch.device("cpu"))[:2]]
    mixing = torch.tensor([[1, 0], [0, 1], [0.5, 2.0]])
    static = ([True] * 9, [0, 1, 0, 2, 2, 2], [0, 1, -1], True, None)
    forward = (*views, mixing, torch.tensor(3.0), None)
    forward += (*static, torch.float32, "tiled", "", "gather", needs)
    opcheck(torch.ops.gcl_kernels.fused_neg_lse.default, forward)
    neg_lse, own_logits, *saved = torch.ops.gcl_kernels.fused_neg_lse(*forward)
    grads = (torch.rand_like(neg_lse), torch.rand_like(own_logits))
    backward = (*forward[:5], *static, "tiled", "", "gather", *saved, neg_lse, *grads, needs)
    opcheck(torch.ops.gcl_kernels.fused_neg_lse_backward.default, backward)


def test_product_count(monkeypatch):
    """16 N^2 D and, for the diagonal, one product in sixteen of a block row; one frozen tower saves
    its gradient's."""
    from torch.utils.flop_counter import FlopCounterMode

    n, d, rows = 128, 32, 32
    count = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    static = ([True] * 9, [], [0, 1, -1], True, None)
    mixing, scale = torch.tensor([[1.0, 0], [0, 1], [1, 1]]), torch.tensor(9.0)

    def measure(needs):
        views = [torch.randn(n, d) for _ in range(2)]
        inputs = (*views, mixing, scale, None)
        with FlopCounterMode(display=False, custom_mapping=count) as counter:
            neg_lse, own_logits, *saved = score_fusion._forward(
                *inputs, *static, torch.float32, "tiled", "", "gather", needs
            )
            grads = (torch.ones_like(neg_lse), torch.ones_like(own_logits))
            score_fusion._backward(
                *inputs, *static, "tiled", "", "gather", *saved, neg_lse, *grads, needs
            )
        return counter.get_total_flops() / (n * n * d)

    monkeypatch.setattr(tiled, "FUSED_BLOCK_ROWS", {"default": rows})
    monkeypatch.setattr(problem, "KEPT_ELEMENTS", 0)
    assert measure([True] * 4) == pytest.approx(16 + 2 * rows / n)
    assert measure([True, False, False, False]) == pytest.approx(12 + 2 * rows / n)
    monkeypatch.setattr(problem, "KEPT_ELEMENTS", 4 * n * n)
    assert measure([True] * 4) == pytest.approx(12 + rows / n)
