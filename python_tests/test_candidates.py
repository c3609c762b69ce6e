"""Options on the candidates: absent views, weights, extra negatives, samples of one id as
positives, a margin for false negatives; every backend and road against dense float64."""

from __future__ import annotations

import pytest
import torch
from calls import with_threads
from contract import check, every_road, random_views
from oracle import dense_gcl, dense_loss
from tolerance import assert_accurate
from torch import Tensor

import gcl_kernels

N, D, K = 35, 12, 23


def drawn(device: torch.device, road: str, seed: int = 0) -> dict[str, object]:
    """Each option's tensors for ``N`` samples."""
    generator = torch.Generator().manual_seed(seed)
    given = 3 if road == "views" else 2
    weights = torch.rand(3, N, generator=generator) * 3
    weights[:, ::7] = 0
    return {
        "present": (torch.rand(given, N, generator=generator) < 0.7).to(device),
        "candidate_weights": weights.to(device),
        "extra_negatives": torch.randn(K, D, generator=generator).to(device),
        "extra_ids": torch.randint(0, N, (K,), generator=generator).to(device),
        "sample_ids": torch.randint(0, N // 2, (N,), generator=generator).to(device),
    }


CASES: dict[str, tuple[list[str], dict[str, object]]] = {
    "present": (["present"], {}),
    "present, excluded": (["present"], {"other_positives": "exclude", "self_similarity": "keep"}),
    "present, sum": (["present"], {"reduction": "sum"}),
    "present, candidates": (
        ["present", "sample_ids"],
        {
            "candidates": [[0, 1, 1], [1, 0, 1], [1, 1, 0]],
            "pair_weights": [[0, 1, 2], [3, 0, 1], [1, 1, 0]],
        },
    ),
    "weights": (["candidate_weights"], {}),
    "weights, present, ids": (["candidate_weights", "present", "sample_ids"], {}),
    "extra": (["extra_negatives"], {}),
    "extra of some anchors": (["extra_negatives"], {"extra_anchors": [True, False, True]}),
    "extra with ids": (["extra_negatives", "extra_ids", "sample_ids"], {}),
    "extra, weights, present": (["extra_negatives", "candidate_weights", "present"], {}),
    "margin": (["extra_negatives"], {"false_negative_margin": 0.1}),
    "margin, present": (["present", "sample_ids"], {"false_negative_margin": 0.0}),
    "positives": (["sample_ids"], {"same_id": "positive"}),
    "positives across": (
        ["sample_ids"],
        {
            "same_id": "positive",
            "candidates": [[0, 1, 1], [1, 0, 1], [1, 1, 0]],
            "pair_weights": [[0, 1, 2], [0.5, 0, 0], [1, 3, 0]],
        },
    ),
    "positives, everything": (
        ["sample_ids", "extra_negatives", "extra_ids", "candidate_weights", "present"],
        {"same_id": "positive", "self_similarity": "keep"},
    ),
}  # fmt: skip


def options_of(name: str, device: torch.device, road: str) -> dict[str, object]:
    names, options = CASES[name]
    tensors = drawn(device, road)
    return {**{of: tensors[of] for of in names}, **options}


@pytest.mark.parametrize("name", CASES)
@every_road
def test_against_the_definition(backend, device, tiling, road, name):
    views = random_views(N, D, device, road)
    check(views, 9.0, backend=backend, **options_of(name, device, road))


def gradients_of(
    loss: Tensor, leaves: dict[str, Tensor], upstream: Tensor | None = None
) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(leaves.values()), upstream, allow_unused=True)
    return {
        "loss": loss.detach(),
        **{
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), found, strict=True)
        },
    }


def check_all(views: list[Tensor], leaves: list[str], backend: str, **options: object) -> None:
    """Every result with gradients for ``leaves`` alone (views by number, extra, scale)."""
    extra = options.pop("extra_negatives", None)

    def run(dtype: torch.dtype, exact: bool) -> dict[str, Tensor]:
        tensors = {f"{v}": view.to(dtype, copy=True) for v, view in enumerate(views)}
        tensors["scale"] = torch.tensor(9.0, dtype=dtype, device=views[0].device)
        if extra is not None:
            tensors["extra"] = extra.to(dtype, copy=True)
        needed = {name: tensors[name].requires_grad_() for name in leaves}
        of = {**options, "extra_negatives": tensors.get("extra")}
        e = [tensors[f"{v}"] for v in range(len(views))]
        if exact:
            return gradients_of(dense_gcl(e, tensors["scale"], **of), needed)
        loss = gcl_kernels.gcl_loss(*e, logit_scale=tensors["scale"], backend=backend, **of)
        return gradients_of(loss, needed)

    result, exact = run(torch.float32, False), run(torch.float64, True)
    dense = run(torch.float32, True)
    for name, value in result.items():
        # Of an extra one's gradient the terms are s / |e| times its weight: a few thousandths.
        size = {"loss": 20.0, "scale": 8.0}.get(name, 36 / N**0.5)
        assert_accurate(name, value, exact[name], dense[name], size)


@pytest.mark.parametrize(
    "leaves",
    [["0", "1", "extra", "scale"], ["extra"], ["scale"], ["1"], ["1", "scale"], ["0", "extra"]],
    ids=str,
)
@every_road
def test_gradients_of_extra_negatives(backend, device, tiling, road, leaves):
    """And of the others where some are frozen, of which a rectangle has shares of its own."""
    tensors = drawn(device, road)
    extra, ids = tensors["extra_negatives"], tensors["sample_ids"]
    options = {"extra_negatives": extra, "extra_ids": tensors["extra_ids"], "sample_ids": ids}
    check_all(random_views(N, D, device, road), leaves, backend, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_products_with_extra_negatives(emulated_half_products, tiling, road, dtype):
    """As on a GPU, weights in the half type."""
    device = torch.device("cpu")
    views = random_views(N, D, device, road)
    tensors = drawn(device, road)
    options = {"extra_negatives": tensors["extra_negatives"].to(dtype)}
    check(views, 20.0, backend="tiled", dtypes=(dtype,) * 3, **options)
    options |= {name: tensors[name] for name in ("candidate_weights", "present")}
    check(views, 20.0, backend="tiled", dtypes=(dtype,) * 3, **options)


@every_road
def test_what_is_absent_is_not_read(backend, device, tiling, road):
    """NaN and huge numbers in absent rows change nothing and get gradients of zero."""
    present = drawn(device, road)["present"]
    results = []
    for filler in (0.0, torch.nan, 1e30):
        views = [
            torch.where(of[:, None], view.float(), filler).requires_grad_()
            for of, view in zip(present, random_views(N, D, device, road), strict=True)
        ]
        loss = gcl_kernels.gcl_loss(*views, temperature=0.1, present=present, backend=backend)
        loss.backward()
        results.append([loss.detach(), *(view.grad for view in views)])
        for of, view in zip(present, views, strict=True):
            assert (view.grad[~of] == 0).all()
            assert view.grad[of].isfinite().all()
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@every_road
def test_all_present_is_the_loss_without_the_option(backend, device, road):
    views = [view.float() for view in random_views(N, D, device, road)]
    given = torch.ones(len(views), N, dtype=torch.bool, device=device)
    for present in (given, [None] * len(views), list(given)):
        torch.testing.assert_close(
            gcl_kernels.gcl_loss(*views, present=present, backend=backend),
            gcl_kernels.gcl_loss(*views, backend=backend),
        )


def test_a_zero_vector_is_another_candidate():
    """What people do without the option: it competes with a logit of 0."""
    views = [view.clone() for view in random_views(8, 16)]
    present = torch.ones(3, 8, dtype=torch.bool)
    present[0, :3] = False
    views[0][:3] = 0
    loss = gcl_kernels.gcl_loss(*views, present=present)
    exact = dense_loss(views, torch.tensor(1 / 0.07, dtype=torch.float64), present=present)
    torch.testing.assert_close(loss, exact)
    assert abs(gcl_kernels.gcl_loss(*views) - loss) > 1e-3


def test_a_sample_without_any_view_is_no_sample():
    views = [view for view in random_views(9, 16)]
    present = torch.ones(3, 9, dtype=torch.bool)
    present[:, 8] = False
    torch.testing.assert_close(
        gcl_kernels.gcl_loss(*views, present=present),
        gcl_kernels.gcl_loss(*(view[:8] for view in views)),
    )


@pytest.mark.parametrize("queries_meet", [False, True])
def test_margin_is_that_of_qwen3(float64_backend, device, queries_meet):
    """Zhang et al. 2025, and the package memeff: queries find documents among those that are not
    more similar than the positive by over 0.1, and among other queries if they meet."""
    q, d = (torch.nn.functional.normalize(e, dim=1) for e in random_views(N, 4, device)[:2])
    positive = (q * d).sum(1)
    own = torch.eye(N, dtype=torch.bool, device=device)
    terms = [(q @ d.T).masked_fill((q @ d.T > positive[:, None] + 0.1) & ~own, -torch.inf)]
    if queries_meet:
        terms.append((q @ q.T).masked_fill((q @ q.T > positive[:, None] + 0.1) | own, -torch.inf))
    expected = ((torch.cat(terms, 1) / 0.05).logsumexp(1) - positive / 0.05).mean()
    result = gcl_kernels.multiview_contrastive_loss(
        [q, d],
        temperature=0.05,
        pair_weights=[[0, 1], [0, 0]],
        candidates=[[queries_meet, True], [False, False]],
        false_negative_margin=0.1,
        backend=float64_backend,
    )
    torch.testing.assert_close(result, expected)
    without = gcl_kernels.clip_loss(q, d, temperature=0.05, pair_weights=[[0, 1], [0, 0]])
    assert abs(result - without) > 0.1


@pytest.mark.parametrize("views", [2, 3])
def test_positives_of_one_class_are_supervised_contrastive(float64_backend, device, views):
    """Khosla et al. 2020, L_out, all embeddings of the batch as anchors."""
    e = random_views(N, D, device)[:views]
    labels = drawn(device, "views")["sample_ids"]
    z = torch.nn.functional.normalize(torch.cat(e), dim=1)
    x = z @ z.T / 0.1
    others = ~torch.eye(len(z), dtype=torch.bool, device=device)
    log_p = x - x.masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)
    positive = (labels.repeat(views)[:, None] == labels.repeat(views)[None, :]) & others
    expected = -(torch.where(positive, log_p, 0).sum(1) / positive.sum(1)).mean()
    result = gcl_kernels.multiview_contrastive_loss(
        e, temperature=0.1, sample_ids=labels, same_id="positive", backend=float64_backend
    )
    torch.testing.assert_close(result, expected)


def test_positives_across_two_views_are_unicl(float64_backend, device):
    """Yang et al. 2022: both directions, the mean over all pairs of one label."""
    e = random_views(N, D, device)[:2]
    labels = drawn(device, "views")["sample_ids"]
    x = torch.nn.functional.normalize(e[0], dim=1) @ torch.nn.functional.normalize(e[1], dim=1).T
    same = (labels[:, None] == labels[None, :]).double()
    target = same / same.sum(1, keepdim=True)
    directions = (-(target * (of / 0.1).log_softmax(1)).sum(1).mean() for of in (x, x.T))
    result = gcl_kernels.clip_loss(
        *e, temperature=0.1, sample_ids=labels, same_id="positive", backend=float64_backend
    )
    torch.testing.assert_close(result, sum(directions) / 2)


@every_road
def test_distinct_positives_are_the_loss_without_the_option(float64_backend, device, road):
    views = random_views(N, D, device, road)
    ids = torch.arange(N, device=device).flip(0)
    result = gcl_kernels.gcl_loss(
        *views, sample_ids=ids, same_id="positive", backend=float64_backend
    )
    torch.testing.assert_close(result, gcl_kernels.gcl_loss(*views, backend=float64_backend))


def test_positives_have_the_same_bits_with_any_number_of_threads():
    ids = torch.arange(600) % 7
    views = [view.float().requires_grad_() for view in random_views(600, 64)]

    def run() -> list[Tensor]:
        loss = gcl_kernels.gcl_loss(*views, sample_ids=ids, same_id="positive")
        return [loss, *torch.autograd.grad(loss, views)]

    first, *others = with_threads((1, 2, 5), run)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_positives_gradcheck(float64_backend, device):
    views = [view[:9].clone().requires_grad_() for view in random_views(N, 5, device)]
    options = {"sample_ids": torch.arange(9, device=device) // 2, "same_id": "positive"}
    torch.autograd.gradcheck(
        lambda *e: gcl_kernels.gcl_loss(*e, backend=float64_backend, **options), views
    )


@every_road
@pytest.mark.parametrize("absent", [False, True])
def test_terms_of_pairs(float64_backend, device, road, absent):
    """Their weighted sum is the loss; each is the definition's."""
    weights = [[0, 1, 2], [0.5, 0, 0], [1, 3, 0]]
    views = [view.requires_grad_() for view in random_views(N, D, device, road)]
    options = {"present": drawn(device, road)["present"]} if absent else {}
    options["pair_weights"] = weights
    given = {**options, "temperature": 0.1, "backend": float64_backend}
    pairs = gcl_kernels.gcl_loss(*views, reduction="pairs", **given)
    assert pairs.shape == (3, 3)
    w = torch.tensor(weights, dtype=pairs.dtype, device=device)
    mean = gcl_kernels.gcl_loss(*views, **given)
    torch.testing.assert_close((w / w.sum() * pairs).sum(), mean)
    scale = torch.tensor(10.0, dtype=torch.float64, device=device)
    torch.testing.assert_close(pairs, dense_gcl(views, scale, reduction="pairs", **options))
    of_pairs = torch.autograd.grad((w / w.sum() * pairs).sum(), views)
    for a, b in zip(of_pairs, torch.autograd.grad(mean, views), strict=True):
        torch.testing.assert_close(a, b)


def test_neg_lse_takes_weights_and_extra_ones(float64_backend, device):
    views = random_views(N, D, device)
    tensors = drawn(device, "views")
    options = {name: tensors[name].double() for name in ("extra_negatives", "candidate_weights")}
    result = gcl_kernels.neg_lse(views, 5.0, backend=float64_backend, **options)
    z = torch.nn.functional.normalize(torch.cat([*views, options["extra_negatives"]]), dim=1)
    x = (5 * z @ z.T)[: 3 * N] + torch.nn.functional.pad(
        options["candidate_weights"].log().flatten(), (0, K)
    )
    own = torch.arange(3 * N, device=device) % N
    x[:, : 3 * N].masked_fill_(own[:, None] == own[None, :], -torch.inf)
    torch.testing.assert_close(result.flatten(), x.logsumexp(1))


def test_the_module_takes_them_too():
    views = [view.float() for view in random_views(N, D)]
    tensors = drawn(torch.device("cpu"), "views")
    names = ("present", "extra_negatives", "extra_ids", "sample_ids", "candidate_weights")
    of_batch = {name: tensors[name] for name in names}
    static = {"false_negative_margin": 0.2, "extra_anchors": (True, True, False)}
    module = gcl_kernels.GCLLoss(**static)
    assert "false_negative_margin=0.2" in repr(module)
    assert "extra_anchors=(True, True, False)" in repr(module)
    expected = gcl_kernels.gcl_loss(*views, **of_batch, **static)
    assert torch.equal(module(*views, **of_batch), expected)
    plain = gcl_kernels.GCLLoss(**static)(*views)
    assert torch.equal(plain, gcl_kernels.gcl_loss(*views, false_negative_margin=0.2))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("road", ["views", "fused"])
def test_compiles(road, name):
    """In one graph, forwards and backwards."""
    torch._dynamo.reset()
    device = torch.device("cpu")
    options = options_of(name, device, road)

    def loss(*views: Tensor) -> Tensor:
        return gcl_kernels.gcl_loss(*views, temperature=0.1, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        views = [v.float().requires_grad_() for v in random_views(N, D, device, road)]
        value = function(*views)
        value.backward()
        results.append([value.detach(), *(view.grad for view in views)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


BAD: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "present, number": ({"present": 1}, TypeError, r"present: expected a tensor of shape \[3, 8\]"),
    "present, two masks": (
        {"present": [None, None]}, ValueError, "present: expected 3 masks of shape",
    ),
    "present, list of lists": (
        {"present": [[True] * 8] * 3}, TypeError, r"present\[0\]: expected booleans \[N\] or None",
    ),
    "present, shape": (
        {"present": torch.ones(3, 7, dtype=torch.bool)}, ValueError, r"got \[3, 7\]",
    ),
    "present, dtype": ({"present": torch.ones(3, 8)}, TypeError, "present: expected dtype bool"),
    "nothing present": (
        {"present": torch.zeros(3, 8, dtype=torch.bool)}, ValueError, "at least one embedding",
    ),
    "weights, shape": ({"candidate_weights": torch.ones(8)}, ValueError, r"shape \[3, 8\], got"),
    "weights, integers": (
        {"candidate_weights": torch.ones(3, 8, dtype=torch.int64)}, TypeError, "floating dtype",
    ),
    "weights, negative": (
        {"candidate_weights": -torch.ones(3, 8)}, ValueError, "finite numbers >= 0",
    ),
    "weights, infinite": (
        {"candidate_weights": torch.full((3, 8), torch.inf)}, ValueError, "finite numbers >= 0",
    ),
    "weights, learned": (
        {"candidate_weights": torch.ones(3, 8, requires_grad=True)}, ValueError, "constants",
    ),
    "no extra ones": (
        {"extra_negatives": torch.ones(0, 4)}, ValueError, r"shape \[K, 4\], K >= 1, got \[0, 4\]",
    ),
    "extra, dimension": ({"extra_negatives": torch.ones(2, 5)}, ValueError, r"got \[2, 5\]"),
    "extra, integers": (
        {"extra_negatives": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "torch.int64",
    ),
    "extra, list": ({"extra_negatives": [[1.0] * 4]}, TypeError, "got list"),
    "extra, device": (
        {"extra_negatives": torch.ones(2, 4, device="meta")}, ValueError, "expected device cpu",
    ),
    "extra ids alone": ({"extra_ids": torch.arange(2)}, ValueError, "expected extra_negatives"),
    "extra anchors alone": ({"extra_anchors": [True] * 3}, ValueError, "expected extra_negatives"),
    "extra ids, length": (
        {"extra_negatives": torch.ones(2, 4), "extra_ids": torch.arange(3),
         "sample_ids": torch.arange(8)}, ValueError, r"extra_ids: expected shape \[2\], got \[3\]",
    ),
    "extra ids without ids": (
        {"extra_negatives": torch.ones(2, 4), "extra_ids": torch.arange(2)}, ValueError,
        "extra_ids: expected sample_ids",
    ),
    "extra anchors, length": (
        {"extra_negatives": torch.ones(2, 4), "extra_anchors": [True]}, ValueError, "3 booleans",
    ),
    "extra anchors, none": (
        {"extra_negatives": torch.ones(2, 4), "extra_anchors": [False] * 3}, ValueError,
        "at least one true",
    ),
    "margin, negative": ({"false_negative_margin": -0.1}, ValueError, "finite number >= 0"),
    "margin, bool": ({"false_negative_margin": True}, TypeError, "a number or None, got bool"),
    "same_id": ({"same_id": "negative"}, ValueError, "'ignore', 'positive'"),
    "positive without ids": ({"same_id": "positive"}, ValueError, "needs sample_ids"),
    "positive, exclude": (
        {"same_id": "positive", "other_positives": "exclude", "sample_ids": torch.arange(8)},
        ValueError, "does not go with other_positives='exclude'",
    ),
    "positive, margin": (
        {"same_id": "positive", "false_negative_margin": 0.1, "sample_ids": torch.arange(8)},
        ValueError, "does not go with false_negative_margin=0.1",
    ),
    "positive, pairs": (
        {"same_id": "positive", "reduction": "pairs", "sample_ids": torch.arange(8)},
        ValueError, "does not go with reduction='pairs'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    options, error, text = BAD[name]
    views = [view[:8].float() for view in random_views(N, 4)]
    with pytest.raises(error, match=text):
        gcl_kernels.gcl_loss(*views, **options)
