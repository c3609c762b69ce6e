"""The contract: what every backend must do, on every device there is and every road."""

from __future__ import annotations

import itertools

import pytest
import torch
from calls import MIXED, run_backward, run_forward, spec_of
from contract import CPU, DTYPES, OPTIONS, WEIGHTS, check, collapsed_views, every_road, random_views
from oracle import dense_gcl, dense_loss, dense_neg_lse
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import gcl_kernels
from gcl_kernels import problem
from gcl_kernels.dispatch import BACKENDS


def skip_without(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    if BACKENDS[backend].why_not(device, dtype):
        pytest.skip(f"no {dtype}")


@pytest.mark.parametrize("n", [2, 33])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_road
def test_options(backend, device, tiling, road, options, n):
    if n == 2 and tiling == "ragged":
        pytest.skip("one block either way")
    check(random_views(n, 19, device, road), 14.3, backend=backend, **options)


@pytest.mark.parametrize("options", list(OPTIONS.values())[:6], ids=list(OPTIONS)[:6])
def test_one_sample(backend, device, road, options):
    check(random_views(1, 5, device, road), 14.3, backend=backend, **options)


@pytest.mark.parametrize("name", ["default", "one-sided candidates"])
@pytest.mark.parametrize("backend", ["tiled", "cpu"], indirect=True)
def test_several_blocks_as_shipped(backend, device, road, name):
    """The other options meet several blocks in ``test_options``."""
    n = 800 if road == "fused" and backend == "cpu" else 260
    check(random_views(n, 19, device, road), 14.3, backend=backend, **OPTIONS[name])


@pytest.mark.parametrize(
    "dtypes",
    [
        *((dtype,) * 3 for dtype in DTYPES),
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.float64, torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("normalize", [True, False])
@every_road
def test_dtypes(backend, device, tiling, road, dtypes, normalize):
    skip_without(dtypes[0], backend, device)
    scale, views = 20.0 if normalize else 0.2, random_views(21, 24, device, road)
    check(views, scale, backend=backend, dtypes=dtypes, normalize=normalize)


@pytest.mark.parametrize("scale", [1e-3, 39.9, 40.1, 100.0, 3000.0])
def test_extreme_temperature(backend, device, tiling, road, scale):
    """Opposite and equal vectors: logits span all of [-s, s] around the bound's switch."""
    views = random_views(12, 8, device, road)
    views[1] = -views[0] + 1e-3 * views[1]
    views[-1][6:] = views[0][:6]
    check(views, scale, backend=backend)


def test_number_and_tensor_as_scale_agree(backend, device, tiling, road):
    """On either side of the bound below which one exponential serves rows and columns."""
    views = random_views(21, 8, device, road)
    views[1] = 0.1 * views[1] - views[0]
    for scale in (1.0, 14.3, 40.0, 40.5):
        leaves = [[v.float().requires_grad_() for v in views] for _ in range(2)]
        losses = [
            gcl_kernels.gcl_loss(*e, logit_scale=s, backend=backend)
            for e, s in zip(leaves, (scale, torch.tensor(scale, device=device)), strict=True)
        ]
        sum(losses).backward()
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        for a, b in zip(*leaves, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6 * a.grad.abs().max())


@pytest.mark.parametrize("scale", [0.0, -3.0])
def test_learned_scale_of_any_sign(float64_backend, device, tiling, road, scale):
    leaves = [v.requires_grad_() for v in random_views(9, 4, device, road)]
    s = torch.tensor(scale, dtype=torch.float64, device=device, requires_grad=True)
    loss = gcl_kernels.gcl_loss(*leaves, logit_scale=s, backend=float64_backend)
    expected = dense_gcl(leaves, s)
    torch.testing.assert_close(loss, expected)
    grads = (torch.autograd.grad(of, (*leaves, s)) for of in (loss, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("other_positives", ["compete", "exclude"])
def test_nearly_solved_batch(backend, device, tiling, road, other_positives):
    base = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0][:20].to(device)
    views = [base + 1e-3 * noise for noise in random_views(20, 40, device, road)]
    options = {"weights": (1.0, 1.0), "other_positives": other_positives}
    check(views, 100.0, backend=backend, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_nearly_collapsed(backend, device, tiling, road, dtype, scale):
    skip_without(dtype, backend, device)
    check(collapsed_views(40, 64, device, road), scale, backend=backend, dtypes=(dtype,) * 3)


def test_solved_two_view_gradient_keeps_relative_precision(backend, device):
    """log(1 + e^-30) in float32: the dense form rounds it, and its gradient, to zero."""
    z = torch.eye(8, device=device)
    e = [z.clone().requires_grad_() for _ in range(2)]
    exact = [z.double().requires_grad_() for _ in range(2)]
    gcl_kernels.clip_loss(*e, 30.0, backend=backend).backward()
    gcl_kernels.clip_loss(*exact, 30.0, backend="reference").backward()
    assert exact[0].grad.norm() > 0
    torch.testing.assert_close(e[0].grad.double(), exact[0].grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ids", ["pairs", "equal", "spread", "uint8", "strided", "expanded"])
@pytest.mark.parametrize("name", ["default", "self kept, others excluded"])
def test_sample_ids(backend, device, tiling, road, ids, name):
    order = torch.arange(46, device=device)
    sample_ids = {
        "pairs": order[:23] // 2,
        "equal": torch.full_like(order[:23], 7),
        "spread": (order[:23] * 7919) % 5 - 2**62,
        "uint8": (order[:23] % 20).to(torch.uint8),
        "strided": (order // 6)[::2],
        "expanded": order[3:4].expand(23),
    }[ids]
    views = random_views(23, 9, device, road)
    check(views, 25.0, backend=backend, sample_ids=sample_ids, **OPTIONS[name])


def test_distinct_ids_are_the_default(backend, device, tiling, road):
    views = [v.float() for v in random_views(18, 9, device, road)]
    ids = torch.randperm(18, device=device)
    losses = [gcl_kernels.gcl_loss(*views, sample_ids=of, backend=backend) for of in (ids, None)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_upstream_gradient(backend, device, tiling, road, sign, reduction):
    upstream = torch.tensor(2.5) if reduction == "mean" else torch.linspace(-1, 3, 19)
    options = {"reduction": reduction, "upstream": sign * upstream.to(device)}
    check(random_views(19, 9, device, road), 30.0, backend=backend, **options)


def test_reductions_agree(backend, device, road):
    views = [v.float() for v in random_views(9, 5, device, road)]
    none = gcl_kernels.gcl_loss(*views, reduction="none", backend=backend)
    assert none.shape == (9,)
    for reduction, expected in (("mean", none.mean()), ("sum", none.sum())):
        loss = gcl_kernels.gcl_loss(*views, reduction=reduction, backend=backend)
        assert loss.shape == ()
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("candidates", [None, [[1, 0, 1], [1, 1, 0], [1, 1, 1]]])
def test_subset_of_inputs_needs_gradients(backend, device, tiling, road, candidates):
    """The gradient of one input, and of all but one, is what it is among all; the rest get none."""
    # 260 samples: several blocks of tiled and cpu, whose tiles are kept.
    few = tiling == "ragged" or backend not in ("tiled", "cpu")
    values = [v.float() for v in random_views(21 if few else 260, 9, device, road)]
    num_views = len(values)
    numbers = (20.0,) if road == "views" else (20.0, *WEIGHTS)
    values += [torch.tensor(number, device=device) for number in numbers]

    def grads(needs):
        leaves = [v.clone().requires_grad_(n) for v, n in zip(values, needs, strict=True)]
        s, *weights = leaves[num_views:]
        options = {"fusion_weights": weights or WEIGHTS, "candidates": candidates}
        gcl_kernels.gcl_loss(
            *leaves[:num_views], logit_scale=s, backend=backend, **options
        ).backward()
        return [leaf.grad for leaf in leaves]

    full = grads([True] * len(values))
    subsets = list(itertools.product(range(len(values)), [False, True]))
    # A slow machine in place of a GPU sees a few of them.
    of_kernels = device.type == "cpu" and backend in ("triton", "cuda")
    for one, others in subsets[:: 3 if of_kernels else 1]:
        needs = [others != (at == one) for at in range(len(values))]
        for grad, expected, need in zip(grads(needs), full, needs, strict=True):
            assert (grad is not None) == need, needs
            if need:
                size = expected.abs().max().item()
                torch.testing.assert_close(grad, expected, rtol=2e-5, atol=1e-6 * size)


def test_strided_and_expanded_inputs(backend, device, tiling, road):
    n, d = 13, 6
    leaves = [v.float().requires_grad_() for v in random_views(n, 2 * d, device)]
    strided = [leaves[0][:, ::2], leaves[1].T[:d].T, leaves[2][:1, :d].expand(n, d)]
    if road == "fused":
        del strided[0 if tiling == "ragged" else 2]
    losses = [
        gcl_kernels.gcl_loss(*e, backend=backend) for e in (strided, [v.clone() for v in strided])
    ]
    grads = (torch.autograd.grad(loss, leaves, allow_unused=True) for loss in losses)
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


def test_zero_vector(backend, device, tiling, road):
    """It normalises to zero; no NaN; other rows' gradients are right."""
    views = random_views(9, 6, device, road)
    views[1][4] = 0
    leaves, exact = [v.float().requires_grad_() for v in views], [v.requires_grad_() for v in views]
    loss = gcl_kernels.gcl_loss(*leaves, logit_scale=10.0, backend=backend)
    expected = dense_gcl(exact, torch.tensor(10.0, dtype=torch.float64, device=device))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for leaf, want in zip(leaves, exact, strict=True):
        assert leaf.grad.isfinite().all()
        torch.testing.assert_close(leaf.grad.double(), want.grad, rtol=1e-4, atol=1e-6)


ONE_ANCHOR = OPTIONS["one anchor"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("normalize", [True, False])
def test_non_finite_input_gives_nan(backend, device, tiling, road, bad, normalize):
    """Also a finite float32 whose square overflows: no wrong number may come out."""
    if bad == 1e30 and not normalize:
        pytest.skip("1e30 is a valid logit")
    for n, options in ((1, {}), (11, {}), (11, ONE_ANCHOR)):
        shown = [v.float() for v in random_views(n, 6, device, road)]
        for v in range(len(shown)):
            views = [view.clone() for view in shown]
            views[v][n // 2, 2] = bad
            options = {**options, "normalize": normalize, "backend": backend}
            assert gcl_kernels.gcl_loss(*views, logit_scale=5.0, **options).isnan(), (n, v, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_length_of_one_number(backend, device, road, dtype):
    """Its square may overflow, its length does not; in more dimensions the square's NaN stays."""
    skip_without(dtype, backend, device)
    large = 1e20 if dtype == torch.float32 else 1e200
    views = [v.to(dtype) for v in random_views(9, 1, device, road)]
    leaves = [(view * large).requires_grad_() for view in views[:2]]
    loss = gcl_kernels.gcl_loss(*leaves, *views[2:], logit_scale=3.0, backend=backend)
    exact = [view.detach().double() for view in (*leaves, *views[2:])]
    exact += [exact[0] + exact[1]] if road == "fused" else []
    want = dense_loss([view / view.abs() for view in exact], torch.tensor(3.0, device=device))
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-6, atol=0)
    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert (leaf * grad).abs().max() < 1e-4  # a unit vector of one dimension cannot turn
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


@pytest.mark.parametrize(
    ("of", "other_positives", "dtype"),
    [
        ("two views", "compete", torch.float32),
        ("fused", "exclude", torch.float32),
        ("views", "compete", torch.float32),
        *(("views", "exclude", dtype) for dtype in DTYPES),
    ],
)
@pytest.mark.parametrize("without", ["all views", "one view"])
def test_positive_of_an_empty_denominator(backend, device, of, other_positives, dtype, without):
    """log 0: no negative, and its own sample's other views are no candidates either."""
    skip_without(dtype, backend, device)
    views = range(2 if of == "two views" else 3)
    table = [[a == b or without == "one view" and a > 0 for b in views] for a in views]
    for n, ids in ((1, None), (4, torch.zeros(4, dtype=torch.int64, device=device))):
        leaves = [v.to(dtype).requires_grad_() for v in random_views(n, 6, device, of)]
        s = torch.tensor(9.0, device=device, requires_grad=True)
        options = {"candidates": table, "other_positives": other_positives, "sample_ids": ids}
        if of == "two views":
            loss = gcl_kernels.multiview_contrastive_loss(leaves, s, backend=backend, **options)
        else:
            loss = gcl_kernels.gcl_loss(*leaves, logit_scale=s, backend=backend, **options)
        assert loss == -torch.inf
        grads = torch.autograd.grad(loss, [*leaves, s])
        # Of the positives' logits: nothing flows through an empty denominator.
        assert all(grad.isfinite().all() for grad in grads) and grads[0].any()


@pytest.mark.parametrize("fixed", [True, False])
def test_same_bits_every_time(backend, device, tiling, road, fixed):
    def run():
        leaves = [v.float().requires_grad_() for v in random_views(24, 16, device, road)]
        s = torch.tensor(20.0, device=device, requires_grad=True)
        loss = gcl_kernels.gcl_loss(*leaves, logit_scale=20.0 if fixed else s, backend=backend)
        return [loss, *torch.autograd.grad(loss, leaves if fixed else [*leaves, s])]

    first, second = run(), run()
    torch.use_deterministic_algorithms(True)
    try:
        third = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for results in (second, third):
        assert all(map(torch.equal, first, results))


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


def test_saved_tensors_may_come_back_in_another_layout(backend, device, tiling, road):
    def transposed(tensor: Tensor) -> Tensor:
        return tensor.mT.contiguous().mT if tensor.dim() >= 2 else tensor

    gradients = []
    for unpack in (lambda tensor: tensor, transposed):
        leaves = [v.float().requires_grad_() for v in random_views(20, 16, device, road)]
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            loss = gcl_kernels.gcl_loss(*leaves, temperature=0.1, backend=backend)
        gradients.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_backward_twice_with_retained_graph(backend, device, tiling, road):
    leaves = [v.float().requires_grad_() for v in random_views(20, 16, device, road)]
    s = torch.tensor(20.0, device=device)
    loss = gcl_kernels.gcl_loss(*leaves, logit_scale=s, backend=backend)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))


@pytest.mark.parametrize("scale", [20.0, 90.0])
@pytest.mark.parametrize("loss", ["all pairs", "some pairs", "frozen view", "fused"])
def test_any_number_of_kept_tiles(backend, device, ragged, monkeypatch, loss, scale):
    """Tiles that stay between the passes are those that would be computed again."""
    if not BACKENDS[backend].keeps_tiles:
        pytest.skip("it keeps no tiles")
    monkeypatch.setattr(BACKENDS[backend], "makes_losses", False)  # without passes
    shown = [v.float() for v in random_views(40, 8, device)]

    def run(kept, asked=slice(None)):
        monkeypatch.setattr(problem, "KEPT_ELEMENTS", kept)
        views = [
            v.clone().requires_grad_(loss != "frozen view" or i != 1)
            for i, v in enumerate(shown[: 2 if loss == "fused" else 3])
        ]
        options = {"candidates": [[1, 1, 0]] * 3} if loss == "some pairs" else {}
        ids = torch.arange(40, device=device) // 2
        value = gcl_kernels.gcl_loss(
            *views, logit_scale=scale, sample_ids=ids, backend=backend, **options
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
    # Another subset of gradients has the tiles of the forward pass.
    for part, full in zip(run(1 << 20, slice(1)), expected, strict=False):
        torch.testing.assert_close(part, full, rtol=2e-5, atol=1e-6)


def test_gradcheck(float64_backend, device, tiling, road):
    """Of the gradients beside ``check``'s: of each loss, and where autograd gives some no input."""
    kind = {"dtype": torch.float64, "device": device, "requires_grad": True}
    leaves = [(0.5 * v).requires_grad_() for v in random_views(18, 3, device, road)]
    numbers = [torch.tensor(x, **kind) for x in ((3.0,) if road == "views" else (3.0, *WEIGHTS))]
    ids = torch.arange(18, device=device) // 2

    def function(*inputs):
        e, (s, *weights) = inputs[: len(leaves)], inputs[len(leaves) :]
        options = {"sample_ids": ids, "reduction": "none", "backend": float64_backend}
        return gcl_kernels.gcl_loss(*e, logit_scale=s, fusion_weights=weights or WEIGHTS, **options)

    assert torch.autograd.gradcheck(function, (*leaves, *numbers), fast_mode=True)


def test_double_backward(float64_backend, device, road):
    leaves = [v.requires_grad_() for v in random_views(4, 3, device, road)]
    scale = torch.tensor(2.0, dtype=torch.float64, device=device, requires_grad=True)

    def function(*inputs):
        return gcl_kernels.gcl_loss(*inputs[:-1], logit_scale=inputs[-1], backend=float64_backend)

    if float64_backend == "reference":
        assert torch.autograd.gradgradcheck(function, (*leaves, scale), fast_mode=True)
        return
    grads = torch.autograd.grad(function(*leaves, scale), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        grads[0].sum().backward()


@pytest.mark.parametrize("num_views", [1, 2, 4])
def test_neg_lse(float64_backend, device, tiling, num_views):
    n = 14
    leaves = [v for seed in (1, 2) for v in random_views(n, 6, device, seed=seed)][:num_views]
    leaves = [v.requires_grad_() for v in leaves]
    table = [[(a * 3 + m) % 4 != 1 for m in range(num_views)] for a in range(num_views)]
    ids = torch.arange(n, device=device) // 3
    s = torch.tensor(12.0, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.randn(num_views, n, dtype=torch.float64, device=device)
    options = {"candidates": table, "sample_ids": ids, "backend": float64_backend}
    result = gcl_kernels.neg_lse(leaves, s, **options)
    expected = dense_neg_lse(leaves, s, table, ids)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)
    grads = (torch.autograd.grad((of * weights).sum(), [*leaves, s]) for of in (result, expected))
    for a, b in zip(*grads, strict=True):
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
    views = [v for seed in (1, 2) for v in random_views(11, 7, device, seed=seed)][:5]
    s = torch.tensor(8.0, dtype=torch.float64, device=device)
    for option in ("compete", "exclude"):
        torch.testing.assert_close(
            gcl_kernels.multiview_contrastive_loss(
                views, s, other_positives=option, backend=float64_backend
            ),
            dense_loss(views, s, other_positives=option),
        )


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


# --- Costs ----------------------------------------------------------------------------------------


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
def test_tiles_only_and_no_host_read(device, monkeypatch, road, learnable):
    """Nothing of size M x M, and no value is read back but the scale in a CPU's own memory."""
    n, scale = 600, torch.tensor(20.0, device=device)
    monkeypatch.setattr(problem, "KEPT_ELEMENTS", n**2)
    bases = [v.float() for v in random_views(n, 4, device, road)]
    mixed = None if road == "views" else MIXED
    pairs, fixed = ((0, 1), (0, 2), (1, 2)), None if learnable else 20.0
    spec = spec_of(own_pairs=pairs, max_scale=fixed, mixed=mixed)
    needs = [*[True] * len(bases), mixed is not None, True]
    with _Watch() as watch:
        results = run_forward(bases, spec, needs, scale)
        run_backward(bases, spec, needs, scale, results)
    assert all(read is scale and device.type == "cpu" for read in watch.reads)
    assert watch.largest < (3 * n) ** 2 / 4


CLIP = {"candidates": ((False, True), (True, False))}
ONE_OF_THREE = {"candidates": ((True,) * 3, (False,) * 3, (False,) * 3)}


@pytest.mark.parametrize(
    ("options", "needs", "expected"),
    [
        ({}, (1, 1, 1, 0, 1), 9 * (4 + 2 / 9)),
        (CLIP, (1, 1, 0, 1), 8),
        (CLIP, (1, 0, 0, 0), 6),
        (CLIP, (1, 0, 0, 1), 6),
        (CLIP, (0, 1, 0, 1), 6),
        (CLIP, (0, 0, 0, 1), 6),
        # Blocks (0, 0), (0, 1), (0, 2); gradients to view 0 alone.
        (ONE_OF_THREE, (1, 0, 0, 0, 0), 2 * (1 + 1 / 3 + 4) + 3 * 2),
        ({"mixed": MIXED}, (1, 1, 1, 1), 16 + 4 / 3),
        ({"mixed": MIXED}, (1, 0, 0, 0), 12 + 4 / 3),
    ],
)
@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_product_count(ragged, monkeypatch, options, needs, expected, kept):
    """In N^2 D: 4 M^2 D of views, 16 N^2 D of score fusion, and a share of a block row for the
    diagonal; nothing for unused pairs and frozen views, nor again for tiles that are kept."""
    n, d, scale = 48, 64, torch.tensor(20.0)
    monkeypatch.setattr(problem, "KEPT_ELEMENTS", kept)
    bases, spec = torch.randn(len(needs) - 2, n, d).unbind(), spec_of(own_pairs=(), **options)
    count = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    forward, backward = (FlopCounterMode(display=False, custom_mapping=count) for _ in range(2))
    with forward:
        results = run_forward(bases, spec, needs, scale)
    with backward:
        run_backward(bases, spec, needs, scale, results)
    first, second = (of.get_total_flops() / (n * n * d) for of in (forward, backward))
    assert first + second == pytest.approx(expected - (first if kept else 0))


# --- Half types, as on a GPU ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [True, False])
@every_road
def test_half_inputs_as_on_a_gpu(emulated_half_products, tiling, road, dtype, normalize):
    """What test_dtypes and test_nearly_collapsed ask of a GPU, where there is none."""
    scale, options = 20.0 if normalize else 0.2, {"backend": "tiled", "dtypes": (dtype,) * 3}
    check(random_views(21, 24, CPU, road), scale, normalize=normalize, **options)
    if normalize:
        check(collapsed_views(40, 64, CPU, road), scale, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [(), (1,)], ids=str)
@pytest.mark.parametrize("upstream", [1.0, -1e-6, 0.0])
def test_half_products(emulated_half_products, tiling, road, dtype, frozen, upstream):
    """Also where weights (about upstream / M^2) are below the smallest float16."""
    views = random_views(24 if tiling == "ragged" else 150, 32, CPU, road)
    options = {"compute_dtype": dtype, "upstream": torch.tensor(upstream), "frozen": frozen}
    check([view.to(dtype) for view in views], 20.0, backend="tiled", **options)
