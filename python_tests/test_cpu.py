"""The CPU extension: its matrix product, and every instruction set that this processor has."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from test_contract import check, random_views
from test_score_fusion import check as check_fused
from torch import Tensor

import gcl_kernels
from gcl_kernels import problem
from gcl_kernels.backends import cpu
from gcl_kernels.blocks import plan_blocks
from gcl_kernels.dispatch import BACKENDS, by_blocks
from gcl_kernels.problem import Workspace

pytestmark = pytest.mark.skipif(
    cpu.why_unavailable() is not None, reason="the CPU extension is not built"
)

SETS = cpu._cpu.supported_instruction_sets() if cpu.why_unavailable() is None else []


@contextmanager
def using(name: str) -> Iterator[None]:
    """Every call within takes this instruction set."""
    before = cpu._cpu.instruction_set()
    cpu._cpu.use_instruction_set(name)
    try:
        yield
    finally:
        cpu._cpu.use_instruction_set(before)


@pytest.fixture(params=SETS)
def instruction_set(request):
    with using(request.param):
        yield request.param


@pytest.fixture
def has_product():
    if "avx512" not in SETS:
        pytest.skip("this processor has no AVX-512")
    with using("avx512"):
        yield


def laid_out(matrix: Tensor, transposed: bool) -> Tensor:
    """The same numbers, by rows or by columns, with others between them."""
    if transposed:
        return laid_out(matrix.t(), False).t()
    rows, cols = matrix.shape
    wide = torch.full((rows, cols + 3), torch.nan, dtype=matrix.dtype)
    wide[:, :cols] = matrix
    return wide[:, :cols]


# Below, at and above a register tile (6 x 64, 6 x 32 in float64), a vector, a panel and a slice.
SIZES = [(1, 1, 1), (6, 16, 64), (7, 257, 65), (5, 256, 130), (100, 600, 31), (203, 40, 48)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "depth", "cols"), SIZES)
def test_product(has_product, dtype, rows, depth, cols):
    """Both layouts of both operands, overwriting and adding; nothing beside the result changes."""
    a, b = torch.randn(rows, depth, dtype=dtype), torch.randn(depth, cols, dtype=dtype)
    start = torch.randn(rows, cols + 5, dtype=dtype)
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    for a_transposed, b_transposed, add in itertools.product([False, True], repeat=3):
        out = start.clone()
        out[:, :cols] = start[:, :cols] if add else torch.nan
        operands = laid_out(a, a_transposed), laid_out(b, b_transposed)
        cpu._multiply(*operands, out[:, :cols], add)
        want = exact + start[:, :cols] if add else exact
        bound = (depth + 2) * torch.finfo(dtype).eps * (size + start[:, :cols].abs())
        assert ((out[:, :cols] - want).abs() <= bound).all()
        assert torch.equal(out[:, cols:], start[:, cols:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 100, 257])
def test_product_with_its_own_transpose(has_product, dtype, rows):
    """Half of it is a copy; its bits are those of the whole product."""
    a = laid_out(torch.randn(rows, 300, dtype=dtype), False)
    out = torch.full((rows, rows + 5), torch.nan, dtype=dtype)
    cpu.product(a, a.t(), out[:, :rows])
    whole = cpu.product(a, a.clone().t(), torch.empty(rows, rows, dtype=dtype))
    assert torch.equal(out[:, :rows], whole)
    assert out[:, rows:].isnan().all()


def test_product_keeps_what_is_not_a_number(has_product):
    a, b = torch.randn(9, 20), torch.randn(20, 70)
    a[4, 7], b[3, 66] = torch.nan, torch.inf
    out = cpu.product(a, b, torch.empty(9, 70))
    assert out[4].isnan().all() and out[:, 66].isinf().logical_or(out[:, 66].isnan()).all()
    assert out.isfinite().sum() == 8 * 69


def test_any_number_of_threads_gives_the_same_bits(instruction_set):
    """Of the extension's own work; PyTorch's products may choose by threads, so they are small."""
    size = (700, 40) if cpu._cpu.product_pays() else (300, 4)
    leaves = [torch.randn(size).requires_grad_() for _ in range(3)]
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for views in (leaves, leaves[:2]):
                loss = gcl_kernels.gcl_loss(*views, backend="cpu")
                results.append([loss, *torch.autograd.grad(loss, views)])
    finally:
        torch.set_num_threads(threads)
    for index, other in enumerate(results[2:]):
        assert all(map(torch.equal, results[index % 2], other))


@pytest.mark.parametrize("scale", [14.0, 100.0], ids=["bounded", "running"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set(instruction_set, ragged, dtype, scale):
    """Several ragged blocks of both roads."""
    views = random_views(53, 37, torch.device("cpu"))
    check(views, scale, backend="cpu", dtypes=(dtype,) * 3)
    check_fused(views[:2], scale, backend="cpu", dtypes=(dtype,) * 2)


UNUSED_VIEW = [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
PASSES = ("statistics", "matrix_gradient", "fused_statistics", "fused_matrix_gradient")


def with_and_without(passes, monkeypatch, halved, step, shown, needs) -> None:
    """Assert that a step's result and gradients are the same with these passes in one call, and
    with the loop over blocks. ``step`` takes the views and the scale, and returns its result and
    what to differentiate."""

    def run(**changed):
        row = dataclasses.replace(BACKENDS["cpu"], halves_diagonal=halved, **changed)
        monkeypatch.setitem(BACKENDS, "cpu", row)
        leaves = [
            value.clone().requires_grad_(bool(need))
            for value, need in zip((*shown, torch.tensor(30.0)), needs, strict=True)
        ]
        result, total = step(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return [result.detach(), *torch.autograd.grad(total, wanted)]

    whole, loop = run(), run(**dict.fromkeys(passes, by_blocks))
    for one, other in zip(whole, loop, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * other.abs().max().item())


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("kept", [0, 700, 1 << 20])
@pytest.mark.parametrize("needs", [(1, 1, 1, 0), (0, 1, 0, 0), (1, 0, 1, 1)], ids=str)
@pytest.mark.parametrize("candidates", [None, [[1, 0, 1], [0, 0, 1], [0, 1, 0]], UNUSED_VIEW])
def test_a_pass_in_one_call_is_the_loop_over_blocks(
    has_product, ragged, monkeypatch, candidates, needs, kept, halved
):
    """The same numbers; some rows have no negative, and some tiles stay between the passes, of
    which one may be a call and the other a loop."""
    monkeypatch.setattr(problem, "KEPT_ELEMENTS", kept)
    shown = [v.float() for v in random_views(45, 12, torch.device("cpu"))]
    ids = torch.arange(45) // 3 * (torch.arange(45) > 20)
    upstream = torch.rand(3, 45)

    def step(a, b, c, scale):
        arguments = {"candidates": candidates, "sample_ids": ids, "backend": "cpu"}
        result = gcl_kernels.neg_lse((a, b, c), scale, **arguments)
        return result, (result.clamp_min(-1e4) * upstream).sum()

    with_and_without(PASSES[:2], monkeypatch, halved, step, shown, needs)


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("kept", [0, 2500, 1 << 20])
@pytest.mark.parametrize("needs", [(1, 1, 1), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("candidates", [None, [[1, 0, 1], [0, 0, 1], [0, 1, 0]], UNUSED_VIEW])
def test_a_fused_pass_in_one_call_is_the_loop_over_blocks(
    has_product, ragged, monkeypatch, candidates, needs, kept, halved
):
    monkeypatch.setattr(problem, "KEPT_ELEMENTS", kept)
    shown = [v.float() for v in random_views(45, 12, torch.device("cpu"))[:2]]
    weights = None if candidates is not UNUSED_VIEW else [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    options = {"candidates": candidates, "pair_weights": weights, "backend": "cpu"}

    def step(e_i, e_t, scale):
        loss = gcl_kernels.gcl_loss(e_i, e_t, logit_scale=scale, **options)
        return loss, loss

    with_and_without(PASSES[2:], monkeypatch, halved, step, shown, needs)


@pytest.mark.parametrize("seed", range(3))
def test_blocks_in_any_order(has_product, seed):
    """Rows are first written, then added to, whichever blocks come first."""
    size = 100
    z, scale = F.normalize(torch.randn(size, 20), dim=-1), torch.tensor(9.0)
    square = problem.Problem(z, z, None, None, scale, 9.0, True)
    plan = list(plan_blocks(size, ((True,),), 32, halve_diagonal=True))
    random.Random(seed).shuffle(plan)
    kept, grad = torch.full((2500,), torch.nan), torch.rand(size)
    neg_lse = cpu.statistics(square, tuple(plan), kept)
    hz = cpu.matrix_gradient(square, tuple(plan), kept, neg_lse, grad, [True, True])
    x = (9.0 * z @ z.T).fill_diagonal_(-torch.inf)
    h = grad[:, None] * (x - neg_lse[:, None]).exp()
    torch.testing.assert_close(neg_lse, x.logsumexp(1))
    torch.testing.assert_close(hz, (h + h.T) @ z)
    used = Workspace(z.device, plan, kept).kept_elements
    assert not kept.isnan().any() and 0 < used < 2500 and (kept[used:] == 0).all()


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="not supported by this processor: sse9"):
        cpu._cpu.use_instruction_set("sse9")
