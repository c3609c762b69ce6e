"""The CPU extension: every road that this processor can execute, whichever it takes by itself.

A road is an instruction set and who multiplies: the extension's own product, PyTorch's BLAS called
by the extension, or PyTorch called between the blocks. With either of the first two a whole pass is
one call.
"""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from calls import gradients_on_cpu, with_threads
from contract import OPTIONS, check, random_views
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import gcl_kernels
from gcl_kernels import problem
from gcl_kernels.backends import cpu
from gcl_kernels.blocks import plan_blocks
from gcl_kernels.dispatch import BACKENDS
from gcl_kernels.problem import Workspace

CPU = BACKENDS["cpu"]
BUILT = CPU.why_unavailable() is None
pytestmark = pytest.mark.skipif(not BUILT, reason="the CPU extension is not built")
SETS = cpu._cpu.supported_instruction_sets() if BUILT else []
PRODUCTS = cpu._cpu.supported_products() if BUILT else []


@contextmanager
def using(instruction_set: str, products: str) -> Iterator[None]:
    """Every call within takes this road."""
    before = cpu._cpu.instruction_set(), cpu._cpu.products()
    cpu._cpu.use_instruction_set(instruction_set)
    cpu._cpu.use_products(products)
    try:
        yield
    finally:
        cpu._cpu.use_instruction_set(before[0])
        cpu._cpu.use_products(before[1])


def roads(*who: str) -> pytest.MarkDecorator:
    """The test on every road with one of these products. With PyTorch's or its BLAS's, instruction
    sets differ in what is between the products alone."""
    every = [(name, products) for name in SETS for products in PRODUCTS if products in who]
    return pytest.mark.parametrize("road", every, ids="-".join, indirect=True)


@pytest.fixture
def road(request):
    with using(*request.param):
        yield request.param


WHOLE = ("own", "blas")
"""Products with which a whole pass is one call."""

ONCE = [(SETS[-1], products) for products in PRODUCTS if products in WHOLE] if BUILT else []
"""Each of them with the widest instruction set."""

whole_passes = pytest.mark.parametrize("road", ONCE, ids="-".join, indirect=True)


def test_the_extension_multiplies_wherever_pytorch_shows_its_blas():
    """As PyTorch's wheels for x86 do; no processor is left with calls from Python."""
    if torch.backends.mkl.is_available():
        assert PRODUCTS == ["own", "blas", "pytorch"]
        assert cpu._cpu.products() in WHOLE


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
@roads(*WHOLE)
def test_product(road, dtype, rows, depth, cols):
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
@roads("own")
def test_product_with_its_own_transpose(road, dtype, rows):
    """Half of it is a copy; its bits are those of the whole product."""
    a = laid_out(torch.randn(rows, 300, dtype=dtype), False)
    out = torch.full((rows, rows + 5), torch.nan, dtype=dtype)
    CPU.write_product(out[:, :rows], a, a.t())
    whole = torch.empty(rows, rows, dtype=dtype)
    CPU.write_product(whole, a, a.clone().t())
    assert torch.equal(out[:, :rows], whole)
    assert out[:, rows:].isnan().all()


@roads(*WHOLE)
def test_product_keeps_what_is_not_a_number(road):
    a, b = torch.randn(9, 20), torch.randn(20, 70)
    a[4, 7], b[3, 66] = torch.nan, torch.inf
    out = torch.empty(9, 70)
    CPU.write_product(out, a, b)
    assert out[4].isnan().all() and out[:, 66].isinf().logical_or(out[:, 66].isnan()).all()
    assert out.isfinite().sum() == 8 * 69


@pytest.mark.skipif("blas" not in PRODUCTS, reason="PyTorch shows no BLAS")
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch.mm may call others")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blas_is_what_pytorch_calls(dtype):
    """The same bits as ``torch.mm`` and ``addmm``."""
    a, b = torch.randn(96, 512, dtype=dtype), torch.randn(80, 512, dtype=dtype)
    start = torch.randn(96, 80, dtype=dtype)
    results = {}
    for products in ("blas", "pytorch"):
        with using(SETS[-1], products):
            out, added = torch.full_like(start, torch.nan), start.clone()
            CPU.write_product(out, a, b.t())
            CPU.add_product(added, a, b.t())
            results[products] = out, added
    assert all(map(torch.equal, results["blas"], results["pytorch"]))


@roads(*WHOLE, "pytorch")
def test_any_number_of_threads_gives_the_same_bits(road):
    """Of the extension's own work; a BLAS may choose by threads, so its products are small."""
    size = (700, 40) if road[1] == "own" else (300, 4)
    leaves = [torch.randn(size).requires_grad_() for _ in range(3)]
    first, *others = with_threads((1, 2, 3), lambda: gradients_on_cpu(leaves))
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("scale", [14.0, 100.0], ids=["bounded", "running"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@roads(*WHOLE, "pytorch")
def test_every_road(road, ragged, dtype, scale):
    """Several ragged blocks, with and without score fusion, against the oracle."""
    views = random_views(53, 37, torch.device("cpu"))
    check(views, scale, backend="cpu", dtypes=(dtype,) * 3)
    check(views[:2], scale, backend="cpu", dtypes=(dtype,) * 2)


@pytest.fixture
def planted_error(monkeypatch):
    """A BLAS whose every product has one number wrong by a thousandth of the largest."""
    if "blas" not in PRODUCTS:
        pytest.skip("PyTorch shows no BLAS")
    single, twice = cpu._find_blas()
    signature = ctypes.CFUNCTYPE(None, *(ctypes.c_void_p,) * 13)

    def gemm(*arguments):
        signature(single)(*arguments)
        rows, cols, pitch = (
            ctypes.cast(arguments[at], ctypes.POINTER(ctypes.c_int))[0] for at in (2, 3, 12)
        )
        numbers = ctypes.cast(arguments[11], ctypes.POINTER(ctypes.c_float))
        column = (cols - 1) * pitch
        numbers[column] += 1e-3 * max(abs(numbers[column + i]) for i in range(rows))

    wrong = signature(gemm)
    cpu._cpu.set_blas(ctypes.cast(wrong, ctypes.c_void_p).value, twice)
    with using(SETS[-1], "blas"):
        yield
    cpu._cpu.set_blas(single, twice)


@pytest.mark.parametrize("fused", [False, True])
def test_a_planted_error_is_seen(planted_error, ragged, fused):
    views = random_views(53, 37, torch.device("cpu"))
    with pytest.raises(AssertionError, match="exceeds bound"):
        check(views[:2] if fused else views, 14.0, backend="cpu")


UNUSED_VIEW = [[1, 1, 0], [1, 0, 0], [0, 0, 0]]


def with_and_without_passes(monkeypatch, halved, step, shown, needs) -> None:
    """Assert that a step's result and gradients are the same with whole passes in one call, and
    with the loop over blocks. ``step`` takes the views and the scale, and returns its result and
    what to differentiate."""
    monkeypatch.setattr(CPU, "halves_diagonal", halved)

    def run():
        leaves = [
            value.clone().requires_grad_(bool(need))
            for value, need in zip((*shown, torch.tensor(30.0)), needs, strict=True)
        ]
        result, total = step(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return [result.detach(), *torch.autograd.grad(total, wanted)]

    whole = run()
    for name in ("statistics", "matrix_gradient"):
        monkeypatch.setattr(CPU, name, lambda *_: None)
    for one, other in zip(whole, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * other.abs().max().item())


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("kept", [0, 700, 1 << 20])
@pytest.mark.parametrize("needs", [(1, 1, 1, 0), (0, 1, 0, 0), (1, 0, 1, 1)], ids=str)
@pytest.mark.parametrize("candidates", [None, [[1, 0, 1], [0, 0, 1], [0, 1, 0]], UNUSED_VIEW])
@whole_passes
def test_a_pass_in_one_call_is_the_loop_over_blocks(
    road, ragged, monkeypatch, candidates, needs, kept, halved
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

    with_and_without_passes(monkeypatch, halved, step, shown, needs)


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("kept", [0, 2500, 1 << 20])
@pytest.mark.parametrize("needs", [(1, 1, 1), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("candidates", [None, [[1, 0, 1], [0, 0, 1], [0, 1, 0]], UNUSED_VIEW])
@whole_passes
def test_a_fused_pass_in_one_call_is_the_loop_over_blocks(
    road, ragged, monkeypatch, candidates, needs, kept, halved
):
    monkeypatch.setattr(problem, "KEPT_ELEMENTS", kept)
    shown = [v.float() for v in random_views(45, 12, torch.device("cpu"))[:2]]
    weights = None if candidates is not UNUSED_VIEW else [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    options = {"candidates": candidates, "pair_weights": weights, "backend": "cpu"}

    def step(e_i, e_t, scale):
        loss = gcl_kernels.gcl_loss(e_i, e_t, logit_scale=scale, **options)
        return loss, loss

    with_and_without_passes(monkeypatch, halved, step, shown, needs)


ONE_CALL = {
    **OPTIONS,
    "one way": {"pair_weights": [[0, 1, 0], [0, 0, 0], [0, 0, 0]], "candidates": UNUSED_VIEW},
    "raw": {"normalize": False},
    "ids": {"sample_ids": torch.arange(24) // 2},
}


def one_step(fused: bool, dtype: torch.dtype, frozen: int | None, **options) -> list[Tensor]:
    """Loss and gradients of 24 samples; a third of the views' length where they stay raw."""
    shown = [v.to(dtype) / 3 for v in random_views(24, 20)[: 2 if fused else 3]]
    views = [v.requires_grad_(n != frozen) for n, v in enumerate(shown)]
    scale = torch.tensor(14.0, dtype=dtype, requires_grad=frozen is None)
    weights = [torch.tensor(w, dtype=dtype, requires_grad=True) for w in (0.7, 1.3)] * fused
    if fused:
        options["fusion_weights"] = weights
    loss = gcl_kernels.gcl_loss(*views, logit_scale=scale, backend="cpu", **options)
    (3 * loss).backward()
    return [loss.detach(), *(of.grad for of in (*views, scale, *weights) if of.requires_grad)]


@pytest.fixture
def made(monkeypatch) -> list:
    """What the one call returned, whenever it was asked."""
    results: list = []
    ask = type(CPU).loss

    def loss(*given):
        results.append(ask(*given))
        return results[-1]

    monkeypatch.setattr(type(CPU), "loss", loss)
    return results


@pytest.mark.parametrize("options", ONE_CALL.values(), ids=ONE_CALL)
@pytest.mark.parametrize("frozen", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [False, True], ids=["views", "fused"])
@roads("own", "blas")
def test_a_small_loss_in_one_call_is_the_passes(
    road, fused, dtype, frozen, options, made, monkeypatch
):
    """Whose block functions, in several kept blocks, are the same: what rounds otherwise is the
    algebra between them."""
    monkeypatch.setattr(cpu, "BLOCK_ROWS", 16)
    monkeypatch.setattr(cpu, "FUSED_BLOCK_ROWS", 16)
    together = one_step(fused, dtype, frozen, **options)
    assert len(made) == 1 and made[0] is not None
    monkeypatch.setattr(CPU, "makes_losses", False)
    for a, b in zip(together, one_step(fused, dtype, frozen, **options), strict=True):
        assert (a - b).abs().max() <= 40 * torch.finfo(dtype).eps * b.abs().max()
    assert len(made) == 1


def test_who_takes_the_passes(made, monkeypatch):
    """Where the one call would waste work, be watched, or cannot serve."""
    views = [v.float().requires_grad_() for v in random_views(8, 6)]
    loss = partial(gcl_kernels.gcl_loss, backend="cpu")
    with torch.no_grad():
        loss(*views)
    loss(*(v.detach() for v in views))
    loss(*views, reduction="none")
    with FlopCounterMode(display=False):
        loss(*views)
    assert not made
    scale = torch.tensor(9.0, requires_grad=True)
    loss(views[0].detach(), *views[1:], scale).backward()
    monkeypatch.setattr(problem, "KEPT_ELEMENTS", 24 * 24 - 1)
    loss(*views).backward()
    assert made == [None] * 2
    monkeypatch.setattr(problem, "KEPT_ELEMENTS", 24 * 24)
    loss(*views).backward()
    assert made[-1] is not None


@pytest.mark.parametrize(
    "dtypes", [(torch.float16,) * 3, (torch.float64, torch.bfloat16, torch.float32)], ids=str
)
def test_a_small_loss_of_any_dtypes(made, dtypes):
    """Of long embeddings, whose gradients float16 holds only once they are multiplied by their
    upstream."""
    long = [5000 * view for view in random_views(24, 20)]
    check(long, 14.0, backend="cpu", dtypes=dtypes, upstream=torch.tensor(4096.0))
    assert len(made) == 1 and made[0] is not None


@pytest.mark.parametrize("seed", range(3))
@roads(*WHOLE)
def test_blocks_in_any_order(road, seed):
    """Rows are first written, then added to, whichever blocks come first."""
    size = 100
    z, scale = F.normalize(torch.randn(size, 20), dim=-1), torch.tensor(9.0)
    square = problem.Problem(z, z, None, None, scale, 9.0, True)
    plan = list(plan_blocks(size, ((True,),), 32, halve_diagonal=True))
    random.Random(seed).shuffle(plan)
    kept, grad = torch.full((2500,), torch.nan), torch.rand(size)
    neg_lse = CPU.statistics(square, tuple(plan), kept)
    needs_grad = [True, False, True]  # of the one view, of no mixing, of the scale
    hz, _ = CPU.matrix_gradient(square, tuple(plan), kept, neg_lse, grad, needs_grad)
    x = (9.0 * z @ z.T).fill_diagonal_(-torch.inf)
    h = grad[:, None] * (x - neg_lse[:, None]).exp()
    torch.testing.assert_close(neg_lse, x.logsumexp(1))
    torch.testing.assert_close(hz, (h + h.T) @ z)
    used = Workspace(z.device, plan, kept).kept_elements
    assert not kept.isnan().any() and 0 < used < 2500 and (kept[used:] == 0).all()


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="instruction_set: not supported here: sse9"):
        cpu._cpu.use_instruction_set("sse9")
    with pytest.raises(ValueError, match="products: not supported here: magma"):
        cpu._cpu.use_products("magma")


def misaligned(tensor: Tensor) -> Tensor:
    """The same numbers a byte beside where PyTorch would put them, as behind a file's header."""
    data = bytearray(1) + bytearray(tensor.detach().numpy().tobytes())
    copy = torch.frombuffer(data, dtype=tensor.dtype, offset=1).view(tensor.shape)
    assert copy.data_ptr() % tensor.element_size()
    return copy


@pytest.fixture
def addresses(monkeypatch):
    """Those that the extension is given."""
    seen: list[int] = []
    function = cpu._function

    def watched(name, dtype):
        def call(*arguments):
            for argument in arguments:
                numbers = argument if isinstance(argument, (list, tuple)) else [argument]
                # No size is so large here, and no address so small.
                seen.extend(n for n in numbers if isinstance(n, int) and n > 1 << 32)
            return function(name, dtype)(*arguments)

        return call

    monkeypatch.setattr(cpu, "_function", watched)
    return seen


@pytest.mark.parametrize("products", ["own", "pytorch"], ids=["whole passes", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [False, True], ids=["three views", "fused"])
@pytest.mark.parametrize("name", BACKENDS)
def test_memory_that_is_not_aligned(name, fused, dtype, products, addresses):
    """Embeddings, sample ids and the weights of a sum may lie anywhere; the extension is given
    aligned memory, which its compiler counts on."""
    if reason := BACKENDS[name].why_not(torch.device("cpu"), dtype):
        pytest.skip(reason)
    views = [v.to(dtype) for v in random_views(21, 19, torch.device("cpu"))][: 2 if fused else 3]
    ids, weights = torch.arange(21) // 2, torch.tensor([1.0, 0.5], dtype=dtype)

    def run(placed):
        wanted = leaves = [placed(view).requires_grad_() for view in views]
        options = {"sample_ids": placed(ids), "backend": name}
        if fused:
            of_sum = placed(weights).requires_grad_()
            wanted, leaves = [*leaves, of_sum], [*leaves, None]
            options["fusion_weights"] = of_sum.unbind()
        loss = gcl_kernels.gcl_loss(*leaves, 9.0, **options)
        return [loss, *torch.autograd.grad(loss, wanted)]

    with using(SETS[-1], products):
        results = run(misaligned), run(torch.clone)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert bool(addresses) == (name == "cpu")
    assert not any(address % 4 for address in addresses)


@pytest.mark.parametrize("products", PRODUCTS)
def test_an_upstream_gradient_that_is_not_aligned(products, addresses):
    """It comes as it is where ``neg_lse`` is what is differentiated."""
    views = [v.float().requires_grad_() for v in random_views(21, 19, torch.device("cpu"))]
    upstream = torch.rand(3, 21)
    with using(SETS[-1], products):
        result = gcl_kernels.neg_lse(views, 9.0, backend="cpu")
        one, other = (
            torch.autograd.grad(result, views, grad, retain_graph=True)
            for grad in (misaligned(upstream), upstream)
        )
    assert all(map(torch.equal, one, other))
    assert addresses and not any(address % 4 for address in addresses)
