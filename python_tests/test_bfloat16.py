"""Products of bfloat16 on a CPU: each instruction that this processor has, and models of all of
them, which share packing and loops with the instructions and run on any processor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from block_checks import RECTANGLES, Kernels, check_fused_rectangle, check_rectangle
from calls import gradients_on_cpu, with_threads
from contract import OPTIONS, check, collapsed_views, every_road, random_views
from torch import Tensor

import gcl_kernels
from gcl_kernels import losses, problem
from gcl_kernels.backends import cpu
from gcl_kernels.dispatch import BACKENDS, resolve_backend
from gcl_kernels.spec import resolve_compute_dtype

CPU = BACKENDS["cpu"]
BUILT = CPU.why_unavailable() is None
pytestmark = pytest.mark.skipif(not BUILT, reason="the CPU extension is not built")
INSTRUCTIONS = cpu._cpu.supported_half_instructions()[1:] if BUILT else []  # but for "none"
MODELS = ["amx_model", "avx512_bf16_model"]


@contextmanager
def multiplying(instruction: str) -> Iterator[None]:
    """Every product of bfloat16 within is by this one; ``none``: there is none."""
    before, had = cpu._cpu.half_instruction(), CPU.multiplies_bfloat16
    cpu._cpu.use_half_instruction(instruction)
    CPU.multiplies_bfloat16 = instruction != "none"
    try:
        yield
    finally:
        cpu._cpu.use_half_instruction(before)
        CPU.multiplies_bfloat16 = had


@pytest.fixture(params=INSTRUCTIONS)
def instruction(request: pytest.FixtureRequest) -> Iterator[str]:
    with multiplying(request.param):
        yield request.param


def laid_out(matrix: Tensor, transposed: bool) -> Tensor:
    """The same numbers, by rows or by columns, an odd number of others between them."""
    if transposed:
        return laid_out(matrix.t(), False).t()
    rows, cols = matrix.shape
    wide = torch.full((rows, cols + 3 - cols % 2), torch.nan, dtype=matrix.dtype)
    wide[:, :cols] = matrix
    return wide[:, :cols]


# Below, at and above a pair, a vector's words, a step (32), a block of C (8 x 48 and 32 x 32), a
# part of rows (128) and a slice (512).
SIZES = [
    (1, 1, 1), (8, 2, 48), (32, 32, 32), (7, 31, 15), (9, 33, 49), (33, 63, 31), (65, 513, 97),
    (129, 545, 40), (40, 1030, 130), (300, 64, 70),
]  # fmt: skip


@pytest.mark.parametrize("rounds", [False, True], ids=["bfloat16", "float32 rounded"])
@pytest.mark.parametrize(("rows", "depth", "cols"), SIZES)
def test_product(instruction, rows, depth, cols, rounds):
    """Against the rounded operands in float64, both layouts of both; nothing beside the result
    changes."""
    a, b = torch.randn(rows, depth), torch.randn(depth, cols).bfloat16()
    left = a.bfloat16()
    exact, size = left.double() @ b.double(), left.double().abs() @ b.double().abs()
    start = torch.randn(rows, cols + 5)
    for a_transposed, b_transposed, add in itertools.product([False, True], repeat=3):
        out = start.clone()
        out[:, :cols] = start[:, :cols] if add else torch.nan
        operands = laid_out(a if rounds else left, a_transposed), laid_out(b, b_transposed)
        cpu._multiply(*operands, out[:, :cols], add)
        want = exact + start[:, :cols] if add else exact
        bound = (depth + 2) * torch.finfo(torch.float32).eps * (size + start[:, :cols].abs())
        assert ((out[:, :cols] - want).abs() <= bound).all()
        assert torch.equal(out[:, cols:], start[:, cols:])


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 130, 257])
def test_product_with_its_own_transpose(instruction, rows):
    """Half of it is a copy; its bits are those of the whole product."""
    a = laid_out(torch.randn(rows, 70).bfloat16(), False)
    out, whole = torch.full((rows, rows + 5), torch.nan), torch.empty(rows, rows)
    CPU.write_product(out[:, :rows], a, a.t())
    CPU.write_product(whole, a, a.clone().t())
    assert torch.equal(out[:, :rows], whole)
    assert out[:, rows:].isnan().all()


def test_rounding(instruction):
    """Of A, to the nearest and ties to even, as PyTorch rounds; what is not finite stays so."""
    ties = [1.00390625, 1.01171875, -1.00390625, 3.3895e38, 3.4e38, torch.inf, torch.nan, 0.3]
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    a = torch.cat([torch.tensor(ties), bits])
    for given in (a.view(-1, 1), a.view(1, -1).t()):
        out = torch.empty(len(a), 1)
        CPU.write_product(out, given, torch.ones(1, 1).bfloat16())
        torch.testing.assert_close(out[:, 0], a.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_product_keeps_what_is_not_a_number(instruction):
    a, b = torch.randn(9, 20).bfloat16(), torch.randn(20, 70).bfloat16()
    a[4, 7], b[3, 66] = torch.nan, torch.inf
    out = torch.empty(9, 70)
    CPU.write_product(out, a, b)
    assert out[4].isnan().all() and out[:, 66].isinf().logical_or(out[:, 66].isnan()).all()
    assert out.isfinite().sum() == 8 * 69


def test_any_number_of_threads_gives_the_same_bits(instruction):
    leaves = [torch.randn(170, 70).bfloat16().requires_grad_() for _ in range(3)]
    first, *others = with_threads((1, 2, 3), lambda: gradients_on_cpu(leaves))
    for other in others:
        assert all(map(torch.equal, first, other))


BFLOAT16 = {"backend": "cpu", "dtypes": (torch.bfloat16,) * 3}
IDS = {"sample_ids": torch.arange(45) // 2}


@pytest.mark.parametrize("scale", [14.3, 100.0], ids=["bounded", "running"])
@pytest.mark.parametrize("options", [*OPTIONS.values(), IDS], ids=[*OPTIONS, "ids"])
@every_road
def test_options(instruction, tiling, road, options, scale):
    check(random_views(45, 37, road=road), scale, **BFLOAT16, **options)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 3, (torch.float32,) * 3], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@every_road
def test_inputs(instruction, tiling, road, dtypes, normalize):
    options = {"compute_dtype": torch.bfloat16, "dtypes": dtypes, "normalize": normalize}
    scale = 20.0 if normalize else 0.2
    check(random_views(21, 24, road=road), scale, backend="cpu", **options)
    if normalize:
        check(collapsed_views(40, 64, road=road), scale, backend="cpu", **options)


@pytest.mark.parametrize("frozen", [(), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("upstream", [1.0, -1e-6, 0.0])
def test_frozen_views(instruction, tiling, road, frozen, upstream):
    """Whose scale has a gradient: block by block, in Python."""
    views, given = random_views(40, 32, road=road), torch.tensor(upstream)
    check(views, 20.0, upstream=given, frozen=frozen, **BFLOAT16)


@pytest.mark.parametrize("other_positives", ["compete", "exclude"])
@every_road
def test_nearly_solved_batch(instruction, road, other_positives):
    base = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0][:20]
    views = [base + 1e-3 * noise for noise in random_views(20, 40, road=road)]
    check(views, 100.0, weights=(1.0, 1.0), other_positives=other_positives, **BFLOAT16)


@pytest.mark.parametrize("kept", [0, 700, 1 << 20])
@pytest.mark.parametrize("products", ["own", "pytorch"])
def test_a_pass_in_one_call_is_the_loop_over_blocks(
    instruction, ragged, monkeypatch, road, kept, products
):
    """The same numbers, but where a weight lies between two of bfloat16. Whoever multiplies float32
    makes no difference."""
    monkeypatch.setattr(problem, "KEPT_ELEMENTS", kept)
    monkeypatch.setattr(CPU, "makes_losses", False)
    shown = [view.bfloat16() for view in random_views(45, 12, road=road)]

    def run() -> list[Tensor]:
        leaves = [view.clone().requires_grad_() for view in shown]
        loss = gcl_kernels.gcl_loss(*leaves, logit_scale=30.0, backend="cpu")
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    before = cpu._cpu.products()
    cpu._cpu.use_products(products)
    try:
        whole = run()
        for name in ("statistics", "matrix_gradient"):
            monkeypatch.setattr(CPU, name, lambda *_: None)
        for one, other in zip(whole, run(), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-6)
    finally:
        cpu._cpu.use_products(before)


@pytest.mark.parametrize("frozen", [None, 1])
@pytest.mark.parametrize("ids", [None, torch.arange(45) // 2], ids=["default ids", "ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_loss_in_one_call_is_the_passes(instruction, monkeypatch, road, dtype, ids, frozen):
    shown = [view.to(dtype) for view in random_views(45, 12, road=road)]
    monkeypatch.setattr(cpu, "BLOCK_ROWS", 32)

    def run() -> list[Tensor]:
        leaves = [view.clone().requires_grad_(n != frozen) for n, view in enumerate(shown)]
        options = {"sample_ids": ids, "compute_dtype": torch.bfloat16, "backend": "cpu"}
        loss = gcl_kernels.gcl_loss(*leaves, logit_scale=30.0, **options)
        (3 * loss).backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]

    made = []
    ask = type(CPU).loss
    monkeypatch.setattr(type(CPU), "loss", lambda *given: made.append(ask(*given)) or made[-1])
    together = run()
    assert len(made) == 1 and made[0] is not None
    monkeypatch.setattr(CPU, "makes_losses", False)
    for one, other in zip(together, run(), strict=True):
        assert one.dtype == other.dtype
        # Unit vectors may lie between two of bfloat16, too.
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-8 * other.abs().max().item())


@pytest.mark.parametrize("check", [check_rectangle, check_fused_rectangle])
@pytest.mark.parametrize("name", RECTANGLES)
def test_rectangle(instruction, check, name):
    """Own rows against the embeddings of other processes."""
    # Weights are rounded as they are multiplied.
    check(Kernels("cpu", CPU, "cpu", True, {torch.bfloat16: 0.0}), RECTANGLES[name], torch.bfloat16)


# --- Which dtype a call computes in ---------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The compute dtypes of all calls."""
    seen: list[torch.dtype] = []
    ask = losses.negatives

    def negatives(*arguments):
        seen.append(arguments[-1].compute_dtype)
        return ask(*arguments)

    monkeypatch.setattr(losses, "negatives", negatives)
    monkeypatch.setattr(CPU, "makes_losses", False)
    return seen


def test_bfloat16_is_multiplied_as_such_by_cpu_alone(computed, monkeypatch):
    views = [view.float() for view in random_views(6, 5)]
    loss = partial(gcl_kernels.gcl_loss, *views)
    with multiplying(MODELS[0]):
        loss(compute_dtype=torch.bfloat16)
        loss(compute_dtype=torch.bfloat16, backend="cpu")
        gcl_kernels.gcl_loss(*(view.bfloat16() for view in views))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss()
        assert computed == [torch.bfloat16] * 4
        computed.clear()
        loss(compute_dtype=torch.float16)
        loss(compute_dtype=torch.float32)
        loss(compute_dtype=torch.bfloat16, backend="tiled")
        loss(compute_dtype=torch.bfloat16, backend="reference")
        gcl_kernels.gcl_loss(views[0].half(), views[1].bfloat16())
        monkeypatch.setenv("GCL_KERNELS_BACKEND", "tiled")
        loss(compute_dtype=torch.bfloat16)
        assert computed == [torch.float32] * 6
        monkeypatch.setenv("GCL_KERNELS_BACKEND", "cpu")
        computed.clear()
        loss(compute_dtype=torch.bfloat16)
        assert computed == [torch.bfloat16]
    computed.clear()
    with multiplying("none"):
        loss(compute_dtype=torch.bfloat16)
        loss(compute_dtype=torch.bfloat16, backend="cpu")
        assert computed == [torch.float32] * 2


def test_compiled():
    """In one graph, and to the same bits."""
    views = [view.float().requires_grad_() for view in random_views(20, 12)]
    loss = partial(gcl_kernels.gcl_loss, compute_dtype=torch.bfloat16, reduction="none")
    with multiplying(MODELS[0]):
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        results = [
            [value, *torch.autograd.grad(value.sum(), views)]
            for value in (loss(*views), compiled(*views))
        ]
    assert all(map(torch.equal, *results))


def test_the_argument_then_autocast_then_the_inputs():
    half, single = torch.bfloat16, torch.float32
    views = [torch.zeros(2, 2, dtype=half)] * 2
    assert resolve_compute_dtype(None, views) == single
    assert resolve_compute_dtype(None, views, lambda: (half,)) == half
    assert resolve_compute_dtype(torch.float16, views, lambda: (half,)) == single
    assert resolve_compute_dtype(torch.float64, views, lambda: (half,)) == torch.float64
    with torch.autocast("cpu", dtype=half):
        assert resolve_compute_dtype(None, [torch.zeros(2, 2)], lambda: (half,)) == half
        assert resolve_compute_dtype(single, views, lambda: (half,)) == single


def test_what_is_not_there_is_refused():
    """As a program that was exported elsewhere may ask for it."""
    with multiplying("none"):
        with pytest.raises(RuntimeError, match="this processor has no product of bfloat16"):
            resolve_backend("cpu", torch.device("cpu"), torch.bfloat16)
        operand = torch.zeros(2, 2, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="bfloat16: this processor has no product of it"):
            CPU.write_product(torch.empty(2, 2), operand, operand)
    with pytest.raises(ValueError, match="half_instruction: not supported here: mmx"):
        cpu._cpu.use_half_instruction("mmx")


def test_models_are_for_tests_alone():
    assert cpu._cpu.half_instruction() not in MODELS
    assert set(MODELS) <= set(INSTRUCTIONS)
