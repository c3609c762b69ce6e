"""The CPU extension: its matrix product, and every instruction set that this processor has."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from test_contract import check, random_views
from test_score_fusion import check as check_fused
from torch import Tensor

import gcl_kernels
from gcl_kernels.backends import cpu

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


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="not supported by this processor: sse9"):
        cpu._cpu.use_instruction_set("sse9")
