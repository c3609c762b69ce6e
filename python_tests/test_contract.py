"""The contract: what every backend must do, on every device there is."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import dense_loss, dense_neg_lse
from tolerance import assert_accurate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gcl_kernels
from gcl_kernels import negatives, problem
from gcl_kernels.dispatch import BACKENDS
from gcl_kernels.spec import HALF_DTYPES

NAMES = ("e_i", "e_t", "e_it")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def random_views(n: int, d: int, device: torch.device, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed * 1000 + n)
    return [torch.randn(n, d, generator=generator, dtype=torch.float64).to(device) for _ in NAMES]


def collapsed_views(n: int, d: int, device: torch.device) -> list[Tensor]:
    """A mean cosine of 0.9996, as of a text encoder before its training."""
    center = torch.randn(1, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [center.to(device) + 0.02 * view for view in random_views(n, d, device)]


def weights_rounding(compute: torch.dtype) -> float:
    """What rounding ``H`` takes of the sum over ``|H|``, at most 2, in ``assert_accurate``'s units
    (4 eps of float32)."""
    if compute not in HALF_DTYPES:
        return 0.0
    return torch.finfo(compute).eps / (4 * torch.finfo(torch.float32).eps)


def check(views, scale, *, backend, dtypes=(torch.float32,) * 3, upstream=None, **options):
    """Loss and all gradients of ``gcl_loss`` against the oracle, by the tolerance rule."""
    inputs = [view.to(dtype) for view, dtype in zip(views, dtypes, strict=True)]
    accum = torch.float64 if torch.float64 in dtypes else torch.float32
    device = inputs[0].device

    def run(function, dtype):
        leaves = [(x if dtype is None else x.to(dtype)).clone().requires_grad_() for x in inputs]
        s = torch.tensor(scale, dtype=dtype or accum, device=device, requires_grad=True)
        loss = function(leaves, s)
        loss.backward(None if upstream is None else upstream.to(loss.dtype))
        return [loss.detach(), s.grad, *(leaf.grad for leaf in leaves)]

    result = run(lambda e, s: gcl_kernels.gcl_loss(*e, s, backend=backend, **options), None)
    exact = run(lambda e, s: dense_loss(e, s, **options), torch.float64)
    compute, _ = negatives.resolve_dtypes(None, inputs)
    if compute in HALF_DTYPES:
        # Products of half types: the dense computation rounds the unit vectors as well.
        dense = run(lambda e, s: gcl_kernels.gcl_loss(*e, s, backend="reference", **options), None)
    else:
        dense = run(lambda e, s: dense_loss(e, s, **options), accum)
    assert result[0].dtype == accum
    for grad, leaf in zip(result[2:], inputs, strict=True):
        assert grad.dtype == leaf.dtype
    n = inputs[0].shape[0]
    # Every anchor's weights sum to 1/3 for its positives and as much for its denominator. The
    # terms of a logit are s, of a gradient 2 s / (N |e|), once as anchor and once as candidate.
    per_loss = 1.0 if upstream is None else upstream.abs().max().item() * n
    if options.get("reduction") == "sum":
        per_loss = float(n)
    lengths = [e.double().norm(dim=-1).clamp_min(1e-12) for e in inputs]
    if options.get("normalize") is False:
        lengths = [1 / length for length in lengths]
    logit = (
        scale * max(1.0, *(x.max().item() for x in lengths))
        if (options.get("normalize") is False)
        else scale
    )
    losses = n**0.5 if result[0].dim() else per_loss
    assert_accurate("loss", result[0], exact[0], dense[0], (logit + 10) * losses)
    # The weights of the backward pass are rounded to half types, those of dense autograd are not.
    rounded = weights_rounding(compute) * per_loss * logit / scale
    assert_accurate("logit_scale.grad", result[1], exact[1], dense[1], 4 * per_loss + rounded)
    for name, length, *grads in zip(NAMES, lengths, result[2:], exact[2:], dense[2:], strict=True):
        assert_accurate(name + ".grad", *grads, (4 * scale * per_loss / n / length).norm().item())


OPTIONS = {
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


@pytest.mark.parametrize("n", [2, 7, 33, 260])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(backend, device, tiling, options, n):
    if n == 260 and (tiling == "ragged" or backend not in ("tiled", "cpu")):
        pytest.skip("260 samples are several of tiled's and cpu's blocks as shipped")
    check(random_views(n, 19, device), 14.3, backend=backend, **options)


@pytest.mark.parametrize("options", list(OPTIONS.values())[:6], ids=list(OPTIONS)[:6])
def test_one_sample(backend, device, tiling, options):
    check(random_views(1, 5, device), 14.3, backend=backend, **options)


@pytest.mark.parametrize(
    "dtypes",
    [(d,) * 3 for d in DTYPES]
    + [
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.float64, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("normalize", [True, False])
def test_dtypes(backend, device, tiling, dtypes, normalize):
    if torch.float64 in dtypes and BACKENDS[backend].why_not(device, torch.float64):
        pytest.skip("no float64")
    scale = 20.0 if normalize else 0.2
    check(random_views(21, 24, device), scale, backend=backend, dtypes=dtypes, normalize=normalize)


@pytest.mark.parametrize("scale", [1e-3, 39.9, 40.1, 100.0, 3000.0])
def test_extreme_temperature(backend, device, tiling, scale):
    """Opposite and equal vectors: logits span all of [-s, s] around the bound's switch."""
    views = random_views(12, 8, device)
    views[1] = -views[0] + 1e-3 * views[1]
    views[2][6:] = views[0][:6]
    check(views, scale, backend=backend)


def test_number_and_tensor_as_scale_agree(backend, device, tiling):
    """On either side of the bound below which one exponential serves rows and columns."""
    views = random_views(21, 8, device)
    views[1] = -views[0]
    for scale in (0.5, 14.3, 40.0, 40.5):
        leaves = [[v.float().requires_grad_() for v in views] for _ in range(2)]
        fixed = gcl_kernels.gcl_loss(*leaves[0], scale, backend=backend)
        learned = gcl_kernels.gcl_loss(
            *leaves[1], torch.tensor(scale, device=device), backend=backend
        )
        fixed.backward()
        learned.backward()
        torch.testing.assert_close(fixed, learned, rtol=1e-6, atol=0)
        for a, b in zip(*leaves, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6 * a.grad.abs().max())


@pytest.mark.parametrize("scale", [0.0, -3.0])
def test_learned_scale_of_any_sign(float64_backend, device, tiling, scale):
    views = [v.requires_grad_() for v in random_views(9, 4, device)]
    s = torch.tensor(scale, dtype=torch.float64, device=device, requires_grad=True)
    loss = gcl_kernels.gcl_loss(*views, s, backend=float64_backend)
    expected = dense_loss(views, s)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        torch.autograd.grad(loss, (*views, s)),
        torch.autograd.grad(expected, (*views, s)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("other_positives", ["compete", "exclude"])
def test_nearly_solved_batch(backend, device, tiling, other_positives):
    base = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0][:20].to(device)
    views = [base + 1e-3 * noise for noise in random_views(20, 40, device)]
    check(views, 100.0, backend=backend, other_positives=other_positives)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_nearly_collapsed(backend, device, tiling, dtype, scale):
    if dtype == torch.float64 and BACKENDS[backend].why_not(device, dtype):
        pytest.skip("no float64")
    check(collapsed_views(40, 64, device), scale, backend=backend, dtypes=(dtype,) * 3)


def test_solved_two_view_gradient_keeps_relative_precision(backend, device):
    """log(1 + e^-30) in float32: the dense form rounds it, and its gradient, to zero."""
    z = torch.eye(8, device=device)
    e = [z.clone().requires_grad_() for _ in range(2)]
    exact = [z.double().requires_grad_() for _ in range(2)]
    gcl_kernels.clip_loss(*e, 30.0, backend=backend).backward()
    gcl_kernels.clip_loss(*exact, 30.0, backend="reference").backward()
    assert exact[0].grad.norm() > 0
    torch.testing.assert_close(e[0].grad.double(), exact[0].grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ids", ["pairs", "equal", "spread", "int32", "strided"])
@pytest.mark.parametrize("options", list(OPTIONS.values())[:4], ids=list(OPTIONS)[:4])
def test_sample_ids(backend, device, tiling, ids, options):
    n = 23
    order = torch.arange(n)
    sample_ids = {
        "pairs": order // 2,
        "equal": torch.full((n,), 7),
        "spread": (order * 7919) % 5 - 2**62,
        "int32": (order % 20).int(),
        "strided": (torch.arange(2 * n, device=device) // 6)[::2],
    }[ids].to(device)
    check(random_views(n, 9, device), 25.0, backend=backend, sample_ids=sample_ids, **options)


def test_distinct_ids_are_the_default(backend, device, tiling):
    views = [v.float() for v in random_views(18, 9, device)]
    ids = torch.randperm(18, device=device)
    torch.testing.assert_close(
        gcl_kernels.gcl_loss(*views, sample_ids=ids, backend=backend),
        gcl_kernels.gcl_loss(*views, backend=backend),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_upstream_gradient_and_no_reduction(backend, device, tiling, sign):
    n = 19
    upstream = sign * torch.linspace(-1, 3, n, dtype=torch.float64, device=device)
    check(random_views(n, 9, device), 30.0, backend=backend, reduction="none", upstream=upstream)
    check(
        random_views(n, 9, device),
        30.0,
        backend=backend,
        upstream=torch.tensor(-2.5, dtype=torch.float64, device=device),
    )


def test_reductions_agree(backend, device):
    views = [v.float() for v in random_views(9, 5, device)]
    none = gcl_kernels.gcl_loss(*views, reduction="none", backend=backend)
    assert none.shape == (9,)
    for reduction, expected in (("mean", none.mean()), ("sum", none.sum())):
        loss = gcl_kernels.gcl_loss(*views, reduction=reduction, backend=backend)
        assert loss.shape == ()
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("candidates", [None, [[1, 0, 1], [1, 1, 0], [1, 1, 1]]])
def test_subset_of_inputs_needs_gradients(backend, device, tiling, candidates):
    """The gradient is the same for any subset, and none appears for the rest."""
    # 260 samples: several blocks of tiled and cpu, whose tiles are kept; too many for stand-ins of
    # a GPU, to which they are one block.
    few = tiling == "ragged" or (device.type == "cpu" and backend in ("triton", "cuda"))
    views = [v.float() for v in random_views(21 if few else 260, 9, device)]

    def grads(which):
        tensors = [v.clone().requires_grad_(n) for v, n in zip(views, which, strict=False)]
        s = torch.tensor(20.0, device=device, requires_grad=which[3])
        gcl_kernels.gcl_loss(*tensors, s, candidates=candidates, backend=backend).backward()
        return [t.grad for t in (*tensors, s)]

    full = grads([True] * 4)
    for needs in list(itertools.product([False, True], repeat=4))[1:-1]:
        for grad, expected, need in zip(grads(needs), full, needs, strict=True):
            assert (grad is not None) == need, needs
            if need:
                size = expected.abs().max().item()
                torch.testing.assert_close(grad, expected, rtol=2e-5, atol=1e-6 * size)


def test_strided_and_expanded_inputs(backend, device, tiling):
    n, d = 13, 6
    base = random_views(n, 2 * d, device)
    views = [
        base[0][:, ::2],
        base[1].T.contiguous().T[:, :d],
        base[2][:1, :d].expand(n, d),
    ]
    check(views, 10.0, backend=backend)
    leaves = [v.float().detach().requires_grad_() for v in base]
    strided = [leaves[0][:, ::2], leaves[1].T[:d].T, leaves[2][:1, :d].expand(n, d)]
    plain = [v.contiguous() for v in strided]
    a = gcl_kernels.gcl_loss(*strided, backend=backend)
    b = gcl_kernels.gcl_loss(*plain, backend=backend)
    for x, y in zip(torch.autograd.grad(a, leaves), torch.autograd.grad(b, leaves), strict=True):
        torch.testing.assert_close(x, y)


def test_zero_vector(backend, device, tiling):
    """It normalises to zero; no NaN; other rows' gradients are right."""
    views = random_views(9, 6, device)
    views[1][4] = 0
    leaves = [v.float().requires_grad_() for v in views]
    exact = [v.clone().requires_grad_() for v in views]
    loss = gcl_kernels.gcl_loss(*leaves, 10.0, backend=backend)
    expected = dense_loss(exact, torch.tensor(10.0, dtype=torch.float64, device=device))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for leaf, want in zip(leaves, exact, strict=True):
        assert leaf.grad.isfinite().all()
        torch.testing.assert_close(leaf.grad.double(), want.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("view", range(3))
@pytest.mark.parametrize("normalize", [True, False])
def test_non_finite_input_gives_nan(backend, device, tiling, bad, view, normalize):
    """Also a finite float32 whose square overflows: no wrong number may come out."""
    if bad == 1e30 and not normalize:
        pytest.skip("1e30 is a valid logit")
    for n in (1, 11):
        views = [v.float() for v in random_views(n, 6, device)]
        views[view][0, 2] = bad
        loss = gcl_kernels.gcl_loss(*views, 5.0, normalize=normalize, backend=backend)
        assert loss.isnan(), loss
        one_anchor = {"pair_weights": [[0, 1, 1], [0, 0, 0], [0, 0, 0]]}
        loss = gcl_kernels.gcl_loss(*views, 5.0, normalize=normalize, backend=backend, **one_anchor)
        assert loss.isnan(), loss


@pytest.mark.parametrize("given", [True, False], ids=["three views", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_length_of_one_number(backend, device, dtype, given):
    """Its square may overflow, its length does not; in more dimensions the square's NaN stays."""
    if BACKENDS[backend].why_not(device, dtype):
        pytest.skip("no float64")
    large = 1e20 if dtype == torch.float32 else 1e200
    views = [v.to(dtype) for v in random_views(9, 1, device)]
    leaves = [(view * large).requires_grad_() for view in views[:2]]
    third = [views[2]] if given else []
    loss = gcl_kernels.gcl_loss(*leaves, *third, logit_scale=3.0, backend=backend)
    exact = [view.detach().double() for view in leaves]
    exact.append(third[0].double() if given else exact[0] + exact[1])
    want = dense_loss([view / view.abs() for view in exact], torch.tensor(3.0, device=device))
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-6, atol=0)
    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert (leaf * grad).abs().max() < 1e-5  # a unit vector of one dimension cannot turn
    wide = [view.detach().expand(9, 2) for view in leaves]
    assert gcl_kernels.gcl_loss(*wide, logit_scale=3.0, backend=backend).isnan()


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, -torch.inf])
def test_scale_that_is_no_number_gives_nan(backend, device, tiling, scale):
    """An infinite one too: of this solved batch the logits are then infinite, of either sign."""
    leaves = [(torch.eye(11, device=device) - 0.1).requires_grad_() for _ in range(3)]
    s = torch.tensor(scale, device=device, requires_grad=True)
    for loss in (
        gcl_kernels.gcl_loss(*leaves, s, backend=backend),
        gcl_kernels.gcl_loss(*leaves[:2], None, s, backend=backend),
        gcl_kernels.clip_loss(*leaves[:2], s, backend=backend),
        gcl_kernels.neg_lse(leaves, s, backend=backend).sum(),
    ):
        assert loss.isnan()
        assert all(g.isnan().any() for g in torch.autograd.grad(loss, leaves[:2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("other_positives", ["compete", "exclude"])
@pytest.mark.parametrize("without", ["all views", "one view"])
def test_positive_of_an_empty_denominator(
    backend, device, dtype, num_views, other_positives, without
):
    """log 0: no negative, and its own sample's other views are no candidates either."""
    if dtype == torch.float64 and BACKENDS[backend].why_not(device, dtype):
        pytest.skip("no float64")
    table = [
        [a == b or without == "one view" and a > 0 for b in range(num_views)] for a in range(3)
    ]
    for n, ids in ((1, None), (4, torch.zeros(4, dtype=torch.int64, device=device))):
        views = [v.to(dtype).requires_grad_() for v in random_views(n, 6, device)[:num_views]]
        s = torch.tensor(9.0, device=device, requires_grad=True)
        loss = gcl_kernels.multiview_contrastive_loss(
            views,
            s,
            candidates=table[:num_views],
            other_positives=other_positives,
            sample_ids=ids,
            backend=backend,
        )
        assert loss == -torch.inf
        grads = torch.autograd.grad(loss, [*views, s])
        # Of the positives' logits: nothing flows through an empty denominator.
        assert all(grad.isfinite().all() for grad in grads) and grads[0].any()


@pytest.mark.parametrize("fixed", [True, False])
def test_same_bits_every_time(backend, device, tiling, fixed):
    def run():
        views = [v.float().requires_grad_() for v in random_views(30, 16, device)]
        s = 20.0 if fixed else torch.tensor(20.0, device=device, requires_grad=True)
        loss = gcl_kernels.gcl_loss(*views, s, backend=backend)
        loss.backward()
        return [loss.detach(), *(v.grad for v in views), *([] if fixed else [s.grad])]

    first, second = run(), run()
    torch.use_deterministic_algorithms(True)
    try:
        third = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for results in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_default_device_is_not_asked(backend, device):
    """Where ``torch.set_default_device`` names another than the embeddings'."""
    views = [v.float() for v in random_views(8, 6, device)]

    def losses():
        return [
            gcl_kernels.gcl_loss(*views, backend=backend),
            gcl_kernels.gcl_loss(*views[:2], backend=backend),
            gcl_kernels.gcl_loss(*views, other_positives="exclude", backend=backend),
            gcl_kernels.clip_loss(*views[:2], backend=backend),
        ]

    expected = losses()
    with torch.device("meta"):
        results = losses()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("num_views", [2, 3])
def test_saved_tensors_may_come_back_in_another_layout(backend, device, tiling, num_views):
    def transposed(tensor: Tensor) -> Tensor:
        return tensor.mT.contiguous().mT if tensor.dim() >= 2 else tensor

    gradients = []
    for unpack in (lambda tensor: tensor, transposed):
        views = [v.float().requires_grad_() for v in random_views(20, 16, device)[:num_views]]
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            loss = gcl_kernels.gcl_loss(*views, temperature=0.1, backend=backend)
        loss.backward()
        gradients.append([v.grad for v in views])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_backward_twice_with_retained_graph(backend, device, tiling):
    views = [v.float().requires_grad_() for v in random_views(20, 16, device)]
    loss = gcl_kernels.gcl_loss(*views, torch.tensor(20.0, device=device), backend=backend)
    first = torch.autograd.grad(loss, views, retain_graph=True)
    second = torch.autograd.grad(loss, views)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scale", [20.0, 90.0])
@pytest.mark.parametrize("loss", ["all pairs", "some pairs", "frozen view", "fused"])
def test_any_number_of_kept_tiles(backend, device, ragged, monkeypatch, loss, scale):
    """Tiles that stay between the passes are those that would be computed again."""
    if not BACKENDS[backend].keeps_tiles:
        pytest.skip("it keeps no tiles")
    shown = [v.float() for v in random_views(40, 8, device)]

    def run(kept, asked=slice(None)):
        monkeypatch.setattr(problem, "KEPT_ELEMENTS", kept)
        views = [
            v.clone().requires_grad_(loss != "frozen view" or i != 1)
            for i, v in enumerate(shown[: 2 if loss == "fused" else 3])
        ]
        options = {"candidates": [[1, 1, 0]] * 3} if loss == "some pairs" else {}
        value = gcl_kernels.gcl_loss(
            *views,
            logit_scale=scale,
            sample_ids=torch.arange(40, device=device) // 2,
            backend=backend,
            **options,
        )
        wanted = [view for view in views if view.requires_grad][asked]
        first = torch.autograd.grad(value, wanted, retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(value, wanted)))
        return [value.detach(), *first]

    expected = run(0)
    for kept in (255, 256, 3000, 1 << 20):
        for got, want in zip(run(kept), expected, strict=True):
            # Kept tiles have rows without gaps; for them cuBLAS may choose another kernel.
            exactly = {} if device.type == "cuda" else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(got, want, **exactly)
    # Another subset of gradients visits other blocks: the kept tiles are not theirs.
    for part, full in zip(run(1 << 20, slice(1)), expected, strict=False):
        torch.testing.assert_close(part, full, rtol=2e-5, atol=1e-6)


def test_gradcheck(float64_backend, device, tiling):
    views = [(0.5 * v).requires_grad_() for v in random_views(7, 3, device)]
    s = torch.tensor(3.0, dtype=torch.float64, device=device, requires_grad=True)
    ids = torch.tensor([0, 1, 2, 2, 3, 4, 5], device=device)

    def function(a, b, c, s):
        return gcl_kernels.gcl_loss(
            a, b, c, s, sample_ids=ids, reduction="none", backend=float64_backend
        )

    assert torch.autograd.gradcheck(function, (*views, s))


def test_double_backward(float64_backend, device):
    views = [v.requires_grad_() for v in random_views(4, 3, device)]
    scale = torch.tensor(2.0, dtype=torch.float64, device=device, requires_grad=True)

    def function(a, b, c, s):
        return gcl_kernels.gcl_loss(a, b, c, s, backend=float64_backend)

    if float64_backend == "reference":
        assert torch.autograd.gradgradcheck(function, (*views, scale))
        return
    grads = torch.autograd.grad(function(*views, scale), views, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        grads[0].sum().backward()


@pytest.mark.parametrize("num_views", [1, 2, 4])
def test_neg_lse(float64_backend, device, tiling, num_views):
    n = 14
    views = [v for seed in (1, 2) for v in random_views(n, 6, device, seed)][:num_views]
    table = [[(a * 3 + m) % 4 != 1 for m in range(num_views)] for a in range(num_views)]
    ids = torch.arange(n, device=device) // 3
    s = torch.tensor(12.0, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.randn(num_views, n, dtype=torch.float64, device=device)
    leaves = [v.requires_grad_() for v in views]
    result = gcl_kernels.neg_lse(
        leaves, s, candidates=table, sample_ids=ids, backend=float64_backend
    )
    expected = dense_neg_lse(leaves, s, table, ids)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad((result * weights).sum(), [*leaves, s]),
        torch.autograd.grad((expected * weights).sum(), [*leaves, s]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_neg_lse_without_negatives(backend, device):
    views = [v.float().requires_grad_() for v in random_views(5, 4, device)]
    ids = torch.tensor([0, 0, 0, 0, 1], device=device)
    result = gcl_kernels.neg_lse(
        views, candidates=[[True] * 3, [False] * 3, [True] * 3], sample_ids=ids, backend=backend
    )
    assert (result[1] == -torch.inf).all() and result[0].isfinite().all()
    result[1].sum().backward()
    assert all((v.grad == 0).all() for v in views)


def test_clip_loss_is_symmetric_cross_entropy(float64_backend, device, tiling):
    e_i, e_t, _ = random_views(21, 9, device)
    s = torch.tensor(9.0, dtype=torch.float64, device=device)
    x = s * torch.nn.functional.normalize(e_i) @ torch.nn.functional.normalize(e_t).T
    labels = torch.arange(21, device=device)
    expected = [torch.nn.functional.cross_entropy(y, labels) for y in (x, x.T)]
    torch.testing.assert_close(
        gcl_kernels.clip_loss(e_i, e_t, s, backend=float64_backend), (expected[0] + expected[1]) / 2
    )
    torch.testing.assert_close(
        gcl_kernels.clip_loss(e_i, e_t, s, pair_weights=[[0, 3], [1, 0]], backend=float64_backend),
        0.75 * expected[0] + 0.25 * expected[1],
    )


def test_nt_xent_loss(float64_backend, device, tiling):
    views = random_views(17, 9, device)[:2]
    s = torch.tensor(5.0, dtype=torch.float64, device=device)
    for option in ("mask", "keep"):
        torch.testing.assert_close(
            gcl_kernels.nt_xent_loss(*views, s, self_similarity=option, backend=float64_backend),
            dense_loss(views, s, self_similarity=option),
        )


def test_five_views(float64_backend, device, tiling):
    views = [v for seed in (1, 2) for v in random_views(11, 7, device, seed)][:5]
    s = torch.tensor(8.0, dtype=torch.float64, device=device)
    for option in ("compete", "exclude"):
        torch.testing.assert_close(
            gcl_kernels.multiview_contrastive_loss(
                views, s, other_positives=option, backend=float64_backend
            ),
            dense_loss(views, s, other_positives=option),
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fused_by_addition(backend, device, dtype):
    """Equal to giving the sum, with gradients through both roads and to the weights."""
    if dtype == torch.float64 and BACKENDS[backend].why_not(device, dtype):
        pytest.skip("no float64")
    leaves = [v.to(dtype).requires_grad_() for v in random_views(15, 8, device)[:2]]
    weights = [torch.tensor(w, device=device, requires_grad=True) for w in (0.7, -1.3)]
    loss = gcl_kernels.gcl_loss(*leaves, fusion_weights=weights, backend=backend)
    grads = torch.autograd.grad(loss, [*leaves, *weights])
    exact = [v.detach().double().requires_grad_() for v in (*leaves, *weights)]
    expected = gcl_kernels.gcl_loss(
        exact[0], exact[1], exact[2] * exact[0] + exact[3] * exact[1], backend="reference"
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for a, b in zip(grads, torch.autograd.grad(expected, exact), strict=True):
        eps = torch.finfo(a.dtype).eps + 1e-6
        torch.testing.assert_close(a.double(), b, rtol=4 * eps, atol=2 * eps * b.abs().max().item())


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, device, autocast_dtype):
    views = [v.float().requires_grad_() for v in random_views(24, 16, device)]

    def run(**options):
        return gcl_kernels.gcl_loss(*views, 20.0, backend=backend, **options)

    with torch.autocast(device.type, dtype=autocast_dtype):
        loss, full = run(), run(compute_dtype=torch.float32)
        # Nor does autocast around the backward pass change anything.
        grads = torch.autograd.grad(loss, views, retain_graph=True)
    assert loss.dtype == torch.float32
    outside = torch.autograd.grad(run(compute_dtype=autocast_dtype), views)
    assert all(map(torch.equal, grads, outside))
    for a, b in ((loss, run(compute_dtype=autocast_dtype)), (full, run())):
        assert torch.equal(a, b)
        assert all(map(torch.equal, torch.autograd.grad(a, views), torch.autograd.grad(b, views)))


class _Watch(TorchDispatchMode):
    """Records the largest result, and every value read on the host."""

    def __init__(self):
        super().__init__()
        self.largest, self.reads = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            self.reads.append(args[0])
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("learnable", [False, True])
def test_tiles_only_and_no_host_read(device, learnable):
    """Nothing of size M x M, and no value is read back but the scale in a CPU's own memory."""
    n, d = 2000, 4
    views = [v.float() for v in random_views(n, d, device)]
    scale = torch.tensor(20.0, device=device)
    fixed = None if learnable else 20.0
    static = ([True] * 9, True, fixed)
    with _Watch() as watch:
        neg_lse, own_logits, *saved = negatives._forward(
            views,
            scale,
            None,
            static[0],
            [0, 1, 0, 2, 1, 2],
            *static[1:],
            torch.float32,
            "tiled",
            "",
            "gather",
            [True] * 4,
        )
        negatives._backward(
            views,
            scale,
            None,
            *static,
            "tiled",
            "",
            "gather",
            *saved,
            neg_lse,
            torch.ones_like(neg_lse),
            torch.ones_like(own_logits),
            [True] * 4,
        )
    assert all(read is scale and device.type == "cpu" for read in watch.reads)
    assert watch.largest < (3 * n) ** 2 / 4


def _products(candidates, needs, n=96, d=64):
    from torch.utils.flop_counter import FlopCounterMode

    size = len(candidates)
    views = [torch.randn(n, d) for _ in range(size)]
    scale, flat = torch.tensor(20.0), [bool(c) for row in candidates for c in row]
    count = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=count) as counter:
        neg_lse, own_logits, *saved = negatives._forward(
            views, scale, None, flat, [], True, None, torch.float32, "tiled", "", "gather", needs
        )
        negatives._backward(
            views,
            scale,
            None,
            flat,
            True,
            None,
            "tiled",
            "",
            "gather",
            *saved,
            neg_lse,
            torch.ones_like(neg_lse),
            torch.ones_like(own_logits),
            needs,
        )
    return counter.get_total_flops() / (n * n * d)


def test_product_count(ragged):
    """4 M^2 D and half a block row for the diagonal; nothing for unused pairs and frozen views."""
    blocks = 3 * 96 / 16
    full = _products([[1] * 3] * 3, [True] * 4)
    assert full == pytest.approx(9 * (4 + 2 / blocks))
    assert _products([[0, 1], [1, 0]], [True, True, True]) == 8
    assert _products([[0, 1], [1, 0]], [True, False, False]) == 6
    assert _products([[0, 1], [1, 0]], [True, False, True]) == 6
    assert _products([[0, 1], [1, 0]], [False, True, True]) == 6
    assert _products([[0, 1], [1, 0]], [False, False, True]) == 6
    # One anchor view: blocks (0,0), (0,1), (0,2); gradients to view 0 alone.
    diagonal = 1 + 16 / 96
    assert _products([[1, 1, 1], [0] * 3, [0] * 3], [True, False, False, False]) == pytest.approx(
        2 * (diagonal + 4) + 3 * 2
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [True, False])
def test_half_inputs_as_on_a_gpu(emulated_half_products, tiling, dtype, normalize):
    """What test_dtypes and test_nearly_collapsed ask of a GPU, where there is none."""
    views = random_views(21, 24, torch.device("cpu"))
    scale = 20.0 if normalize else 0.2
    check(views, scale, backend="tiled", dtypes=(dtype,) * 3, normalize=normalize)
    if normalize:
        collapsed = collapsed_views(40, 64, torch.device("cpu"))
        check(collapsed, scale, backend="tiled", dtypes=(dtype,) * 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs", [(True,) * 4, (True, False, True, True)], ids=str)
@pytest.mark.parametrize("upstream", [1.0, -1e-6, 0.0])
def test_half_products(emulated_half_products, tiling, dtype, needs, upstream):
    """Also where weights (about upstream / M^2) are below the smallest float16."""
    n = 24 if tiling == "ragged" else 150
    views = [v.to(dtype) for v in random_views(n, 32, torch.device("cpu"))]

    def run(kind, backend, compute):
        leaves = [v.to(kind).clone().requires_grad_(r) for v, r in zip(views, needs, strict=False)]
        s = torch.tensor(
            20.0, dtype=kind if kind == torch.float64 else torch.float32, requires_grad=True
        )
        loss = gcl_kernels.gcl_loss(*leaves, s, backend=backend, compute_dtype=compute)
        loss.backward(torch.tensor(upstream, dtype=loss.dtype))
        return [loss.detach(), s.grad, *(leaf.grad for leaf in leaves if leaf.requires_grad)]

    result = run(torch.float32, "tiled", dtype)
    dense = run(torch.float32, "reference", dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(negatives, "resolve_dtypes", lambda dtype, views: (dtype, dtype))
        exact = run(torch.float64, "reference", torch.float64)
    eps = torch.finfo(dtype).eps
    for got, plain, want in zip(result, dense, exact, strict=True):
        error, dense_error = ((x.double() - want).norm() for x in (got, plain))
        assert error <= 2 * dense_error + eps / 4 * want.norm(), (error, dense_error, want.norm())
