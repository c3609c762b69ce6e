"""Ranks of positives, counted in chunks, beside their definition over dense logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gcl_kernels
from gcl_kernels import hits, positive_ranks, ranks, watch_ranks

TABLE = [[0, 1, 1], [1, 0, 0], [1, 1, 1]]


def dense_ranks(
    views, pool="local", candidates=None, normalize=True, ids=None, present=None, level=0.0
):
    """Entry by entry, from float64 logits.

    Args:
        level: cosines that differ by less are level.
    """
    num_views, n = len(views), views[0].shape[0]
    z = torch.stack([view.double() for view in views])
    if normalize:
        z = torch.nn.functional.normalize(z, dim=-1)
    x = torch.einsum("ajd,bkd->ajbk", z, z)
    lengths = z.norm(dim=-1)
    ids = range(n) if ids is None else ids.tolist()
    there = torch.ones(num_views, n, dtype=torch.bool) if present is None else present
    expected = torch.full((num_views, num_views, n), -1)
    for a in range(num_views):
        for b in range(num_views):
            pooled = [b]
            if pool == "union":
                pooled = [m for m in range(num_views) if candidates is None or candidates[a][m]]
            for j in range(n):
                if a == b or not (there[a, j] and there[b, j]):
                    continue
                bar = x[a, j, b, j] - level * lengths[a, j] * lengths[b, j]
                expected[a, b, j] = sum(
                    not bool(x[a, j, m, k] < bar)
                    for m in pooled
                    for k in range(n)
                    if ids[k] != ids[j] and there[m, k]
                )
    return expected


def random_views(count: int, n: int, d: int, dtype=torch.float32, seed: int = 0) -> list[Tensor]:
    """Views that have something in common, so that ranks are of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, d, generator=generator)
    return [(common + 1.5 * torch.randn(n, d, generator=generator)).to(dtype) for _ in range(count)]


@pytest.fixture(params=["whole", "chunks"], autouse=True)
def chunks(request, monkeypatch) -> None:
    """In one chunk, and in chunks of some rows of which the last is smaller."""
    if request.param == "chunks":
        monkeypatch.setattr(ranks, "CHUNK_BYTES", {"cpu": 3000})


POOLS = {
    "local": {},
    "union": {"pool": "union"},
    "union of candidates": {"pool": "union", "candidates": TABLE},
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ranks_are_those_of_the_definition(dtype, options, normalize):
    views = random_views(3, 31, 12, dtype)
    options = {**options, "normalize": normalize}
    found = positive_ranks(views, **options)
    assert found.dtype == torch.int64 and not found.requires_grad
    expected = dense_ranks(views, **options)
    # What is nearer than float32 can tell may be level; never may it be behind.
    level = 0.0 if dtype == torch.float64 else 2e-6
    assert (expected <= found).all() and (found <= dense_ranks(views, **options, level=level)).all()
    assert (found != expected).sum() <= 2
    assert found.max() > 5 and (found == 0).any()


@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ids_absent_ones_and_ties(dtype, options):
    """Small integers, whose products are exact: half of the logits are tied with another."""
    generator = torch.Generator().manual_seed(3)
    views = list(torch.randint(-1, 2, (3, 37, 6), generator=generator).to(dtype))
    ids = torch.randint(0, 20, (37,), generator=generator)
    present = torch.rand(3, 37, generator=generator) < 0.7
    present[:, 5] = False
    expected = dense_ranks(views, normalize=False, ids=ids, present=present, **options)
    for dirt in (0.0, torch.nan, torch.inf):
        given = [view.clone() for view in views]
        for view, there in zip(given, present, strict=True):
            view[~there] = dirt
        for of_ids in (ids, ids.to(torch.int16)):
            found = positive_ranks(
                given, normalize=False, sample_ids=of_ids, present=present, **options
            )
            assert torch.equal(found, expected)
    for changed in ({"ids": None}, {"present": None}):
        without = {"ids": ids, "present": present, **changed}
        assert not torch.equal(dense_ranks(views, normalize=False, **without, **options), expected)


@pytest.mark.parametrize("d", [33, 300, 768, 2048])
def test_embeddings_that_are_all_alike_find_nothing(d):
    """Also where a BLAS sums up the last columns in another order."""
    for row in (torch.ones(d), torch.rand(d), torch.randn(d)):
        for n in (2, 17, 65, 300):
            views = [row.repeat(n, 1)] * 2
            for pool, others in (("local", n - 1), ("union", 2 * n - 2)):
                for normalize in (True, False):
                    found = positive_ranks(views, pool=pool, normalize=normalize)
                    assert (found[0, 1] == others).all() and (found[1, 0] == others).all()


def test_a_duplicate_without_an_id_stands_level():
    views = random_views(2, 40, 96)
    views[0] = views[1] + 0.01 * views[0]  # all hits
    assert (positive_ranks(views)[0, 1] == 0).all()
    views = [torch.cat([view, view[:7]]) for view in views]
    found = positive_ranks(views)[0, 1]
    assert found.tolist() == [1] * 7 + [0] * 33 + [1] * 7
    ids = torch.arange(47) % 40
    assert (positive_ranks(views, sample_ids=ids)[0, 1] == 0).all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_what_is_not_finite_flatters_nobody(bad, normalize):
    """1e30: its square overflows."""
    views = random_views(3, 20, 8)
    clean = positive_ranks(views, pool="union", normalize=normalize)
    views[1][4, 2] = bad
    found = positive_ranks(views, pool="union", normalize=normalize)
    assert (found[1, :, 4] == torch.tensor([57, -1, 57])).all()
    assert (found[:, 1, 4] == torch.tensor([57, -1, 57])).all()
    others = torch.arange(20) != 4
    assert ((found - clean)[..., others] >= 0).all()
    anchors = found[0, 2, others] - clean[0, 2, others]
    assert set(anchors.tolist()) == {0, 1}  # one candidate more before the positive, if it was not


def test_zero_vectors_and_one_sample():
    views = random_views(2, 6, 4)
    views[1][2] = 0
    assert positive_ranks(views)[1, 0, 2] == 5
    alone = positive_ranks([view[:1] for view in views], pool="union")
    assert alone.tolist() == [[[-1], [0]], [[0], [-1]]]
    same = positive_ranks(views, sample_ids=torch.zeros(6, dtype=torch.int64))
    assert (same[0, 1] == 0).all()


def test_fused_by_addition():
    e_i, e_t = random_views(2, 25, 9, torch.float64)
    weights = (0.7, torch.tensor([-1.3], dtype=torch.float64, requires_grad=True))
    expected = dense_ranks([e_i, e_t, 0.7 * e_i - 1.3 * e_t], "union")
    found = positive_ranks([e_i, e_t], pool="union", fusion_weights=weights)
    assert torch.equal(found, expected)


def test_autocast_does_not_round_what_computes_in_float32():
    views = random_views(2, 60, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(positive_ranks(views), dense_ranks(views))


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(result) if torch.is_tensor(x)]
        self.bytes = max([self.bytes, *sizes])
        return result


@pytest.mark.parametrize("pool", ["local", "union"])
def test_nothing_is_larger_than_a_chunk(monkeypatch, pool):
    monkeypatch.setattr(ranks, "CHUNK_BYTES", {"cpu": 700_000})
    views = random_views(3, 1000, 8)
    present = torch.ones(3, 1000, dtype=torch.bool)
    with Largest() as found:
        positive_ranks(views, pool=pool, present=present)
    assert found.bytes < 700_000 < 4 * 1000 * 1000


@pytest.mark.parametrize("pool", ["local", "union"])
def test_compiles_to_one_graph(pool):
    torch._dynamo.reset()
    views = random_views(2, 33, 8)

    def step(e_0: Tensor, e_1: Tensor) -> Tensor:
        ids = torch.arange(len(e_0)) // 2
        present = torch.stack([ids > 1, ids < 9])
        options = {"pool": pool, "sample_ids": ids, "present": present}
        return hits(positive_ranks([e_0, e_1], **options), 3)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*views), step(*views), equal_nan=True)


def test_hits():
    found = torch.tensor([[[-1, -1, -1], [0, 4, -1]], [[5, 0, 1], [-1, -1, -1]]])
    nan = math.nan
    for k, rates in ((1, [0.5, 1 / 3]), (2, [0.5, 2 / 3]), (5, [1.0, 2 / 3]), (6, [1.0, 1.0])):
        expected = torch.tensor([[nan, rates[0]], [rates[1], nan]])
        torch.testing.assert_close(hits(found, k), expected, equal_nan=True)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        hits(found, 0)


@pytest.mark.parametrize("given", [False, True])
def test_a_loss_reports_its_batches(given):
    views = [view.requires_grad_() for view in random_views(3 if given else 2, 12, 8)]
    loss = gcl_kernels.GCLLoss(fusion_weights=(0.5, 2.0))
    ids = torch.arange(12) // 2
    found: list[Tensor] = []
    handle = watch_ranks(torch.nn.Sequential(loss), found.append, every=3)
    with torch.no_grad():
        loss(*views)
    for _ in range(4):
        loss(*views, sample_ids=ids).backward()
    assert len(found) == 2  # the first call and the fourth
    handle.remove()
    loss(*views)
    assert len(found) == 2
    expected = positive_ranks(
        views, pool="union", sample_ids=ids, fusion_weights=None if given else (0.5, 2.0)
    )
    assert all(torch.equal(of, expected) for of in found)

    by_name: list[Tensor] = []
    watch_ranks(loss, by_name.append, every=1, pool="local")
    names = dict(zip(("e_i", "e_t", "e_it"), views, strict=False))
    loss(**names, logit_scale=torch.tensor(20.0))
    loss(**names)
    expected = positive_ranks(views, fusion_weights=None if given else (0.5, 2.0))
    assert len(by_name) == 2 and all(torch.equal(of, expected) for of in by_name)


def test_watching_leaves_a_compiled_loss_right():
    torch._dynamo.reset()
    views = [view.requires_grad_() for view in random_views(2, 12, 8)]
    loss = gcl_kernels.GCLLoss()
    expected = loss(*views)
    found: list[Tensor] = []
    watch_ranks(loss, found.append, every=2)
    compiled = torch.compile(loss, backend="aot_eager")
    for _ in range(5):
        torch.testing.assert_close(compiled(*views), expected)
    assert len(found) == 3


E = torch.randn(4, 8)
CASES = {
    "one view": (lambda: positive_ranks([E]), ValueError, "views: expected at least 2, got 1"),
    "no sequence": (lambda: positive_ranks(3), TypeError, "views: expected a sequence.*int"),
    "N differs": (lambda: positive_ranks([E, E[:3]]), ValueError, r"views\[1\]: expected shape"),
    "pool": (
        lambda: positive_ranks([E, E], pool="both"),
        ValueError,
        "pool: expected one of 'local', 'union', got 'both'",
    ),
    "candidates of one view": (
        lambda: positive_ranks([E, E], candidates=[[0, 1], [1, 0]]),
        ValueError,
        "candidates: expected None with pool='local'",
    ),
    "candidates": (
        lambda: positive_ranks([E, E], pool="union", candidates=TABLE),
        ValueError,
        "candidates: expected 2 x 2 booleans",
    ),
    "normalize": (lambda: positive_ranks([E, E], normalize=1), TypeError, "normalize: expected"),
    "ids": (
        lambda: positive_ranks([E, E], sample_ids=torch.arange(5)),
        ValueError,
        r"sample_ids: expected shape \[4\], got \[5\]",
    ),
    "present of numbers": (
        lambda: positive_ranks([E, E], present=torch.ones(2, 4)),
        TypeError,
        "present: expected dtype bool, got torch.float32",
    ),
    "present as a list": (
        lambda: positive_ranks([E, E], present=[[True] * 4] * 2),
        TypeError,
        r"present\[0\]: expected booleans \[N\] or None, got list",
    ),
    "present of three views where two are given": (
        lambda: positive_ranks(
            [E, E], fusion_weights=(1, 1), present=torch.ones(3, 4, dtype=torch.bool)
        ),
        ValueError,
        r"present: expected shape \[2, 4\], got \[3, 4\]",
    ),
    "present elsewhere": (
        lambda: positive_ranks([E, E], present=torch.ones(2, 4, dtype=torch.bool, device="meta")),
        ValueError,
        "present: expected device cpu, got meta",
    ),
    "fusion of three": (
        lambda: positive_ranks([E, E, E], fusion_weights=(1, 1)),
        ValueError,
        "fusion_weights: expected None or 2 views, got 3 views",
    ),
    "fusion weights": (
        lambda: positive_ranks([E, E], fusion_weights=(1, "a")),
        TypeError,
        r"fusion_weights\[1\]: expected a number or a tensor, got str",
    ),
    "compute_dtype": (
        lambda: positive_ranks([E, E], compute_dtype=torch.int8),
        ValueError,
        "compute_dtype: expected",
    ),
    "no loss": (
        lambda: watch_ranks(torch.nn.Linear(2, 2), print),
        ValueError,
        "loss: expected a module with one gcl_kernels.GCLLoss, got 0",
    ),
    "every": (
        lambda: watch_ranks(gcl_kernels.GCLLoss(), print, every=0),
        ValueError,
        "every: expected at least 1, got 0",
    ),
    "pool of a watched loss": (
        lambda: watch_ranks(gcl_kernels.GCLLoss(), print, pool="both"),
        ValueError,
        "pool: expected one of",
    ),
}


@pytest.mark.parametrize("call, error, message", CASES.values(), ids=CASES)
def test_errors(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
