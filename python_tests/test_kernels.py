"""What the backends of GPU kernels must do, block functions first; ``block_checks`` says where they
run. Without a GPU, ``test_in_the_interpreter`` starts this file once more for Triton's, and
``test_cuda_host.test_on_the_emulated_gpu`` for CUDA's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from block_checks import (
    CASES,
    CUDA,
    FEW,
    FUSED_CASES,
    RECTANGLES,
    TRITON,
    UNIT,
    Case,
    Kernels,
    check_block_functions,
    check_fused_block_functions,
    check_fused_rectangle,
    check_rectangle,
    error,
    fused_problem,
    fused_results,
    make_problem,
    results,
    rounding,
    run_fused_weights,
    run_stats,
    run_weights,
)
from interpreter import run_file, starts
from torch import Tensor

import gcl_kernels
from gcl_kernels.blocks import Samples, plan_rectangle
from gcl_kernels.problem import Problem, Workspace, empty_stats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


of_fusing = pytest.mark.parametrize(
    "kernels",
    [kernels for kernels in (TRITON, CUDA) if kernels.backend.fuses_scores],
    ids=lambda kernels: kernels.name,
    indirect=True,
)
"""For the block functions of score fusion, which not all have."""


@pytest.fixture(params=[TRITON, CUDA], ids=lambda kernels: kernels.name)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if not request.param.available:
        pytest.skip("they run in another process, or on a GPU")
    return request.param


@starts
def test_in_the_interpreter():
    run_file(__file__)


@pytest.mark.parametrize("kernels", [TRITON, CUDA], ids=lambda kernels: kernels.name)
def test_calls_that_they_cannot_serve(kernels):
    reason = kernels.backend.why_not(torch.device("cuda"), torch.float64)
    assert reason is not None and "float64" in reason
    z = torch.zeros(4, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"'{kernels.name}' cannot serve this call: no float64"):
        kernels.backend.block_rows(z)


# --- Block functions, against dense float64 ------------------------------------------------------


def skip_repetition(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    if kernels.device == "cpu" and dtype != torch.float32 and name not in FEW:
        pytest.skip("float32 takes the same way, and slow machines stand in for GPUs")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_block_functions(kernels, name, dtype):
    skip_repetition(kernels, name, dtype)
    check_block_functions(kernels, CASES[name], dtype)


@of_fusing
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUSED_CASES)
def test_fused_block_functions(kernels, name, dtype):
    skip_repetition(kernels, name, dtype)
    check_fused_block_functions(kernels, FUSED_CASES[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECTANGLES)
def test_rectangle(kernels, name, dtype):
    """Own rows against the embeddings of other processes."""
    check_rectangle(kernels, RECTANGLES[name], dtype)


@of_fusing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECTANGLES)
def test_fused_rectangle(kernels, name, dtype):
    check_fused_rectangle(kernels, RECTANGLES[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scale", "bad"), [(20, torch.nan), (100, torch.nan), (100, torch.inf)])
def test_not_a_number_reaches_every_row_that_meets_it(kernels, scale, bad, dtype):
    case = Case(40, 16, scale, block_rows=48)
    problem = make_problem(kernels, case, dtype)
    problem.z_rows[7, 3] = bad
    maxima, sums = run_stats(kernels, problem, case.plan)
    lse = sums.log() + maxima
    meets = torch.ones(120, dtype=torch.bool)
    meets[[47, 87]] = False  # its sample's other views meet neither it nor each other
    if bad != bad:
        assert torch.equal(lse.isnan().cpu(), meets)
        h = run_weights(kernels, problem, case.plan, torch.zeros_like(lse), torch.ones_like(lse))
        assert torch.equal(h[7].isnan().cpu(), meets & (torch.arange(120) != 7))
    else:
        assert lse[7].isnan(), "inf - inf"


def test_logits_far_below_others_of_their_tile(kernels):
    """Whose rows' sums are all of numbers that one exponential of the tile makes tiny."""
    levels = torch.tensor([0.0, 79.0]).repeat(50), torch.tensor([0.0, -3.0, -9.0]).repeat(80)
    ones = [torch.ones_like(level) for level in levels]
    z = torch.stack([levels[0], ones[0]], 1), torch.stack([ones[1], levels[1].sort()[0]], 1)
    z_rows, z_cols = (side.to(kernels.device) for side in z)
    scale = torch.ones((), device=kernels.device)
    problem = Problem(z_rows, z_cols, None, None, scale, None, False)
    stats = [empty_stats(problem, side) for side in (z_rows, z_cols)]
    plan = plan_rectangle(Samples(0, 100, 100), Samples(0, 240, 240), ((True,),), 64)
    for block in plan:
        kernels.backend.block_stats(problem, block, *stats, Workspace(z_rows.device, plan))
    x = z_rows.double() @ z_cols.double().T
    for of_side, axis in zip(stats, (1, 0), strict=True):
        assert error(of_side.sum.log() + of_side.max, x.logsumexp(axis)) < 1e-6


@of_fusing
@pytest.mark.parametrize("base", [0, 1])
@pytest.mark.parametrize("scale", [20, 100])
def test_not_a_number_in_a_base_reaches_every_row_that_meets_it(kernels, scale, base):
    case = Case(40, 16, scale, block_rows=16)
    problem = fused_problem(kernels, case, torch.float32)
    problem.z_rows[base, 7, 3] = torch.nan
    maxima, sums = run_stats(kernels, problem, case.fused_plan)
    lse = sums.log() + maxima
    meets = torch.arange(40) != 7
    # Itself and the sum reach all others; the other base, which is whole, meets those of the rest.
    assert lse[:, meets].isnan().all()
    assert lse[[base, 2], 7].isnan().all()
    assert lse[1 - base, 7].isfinite()
    zeros = torch.zeros_like(lse)
    f, inner = run_fused_weights(kernels, problem, case.fused_plan, zeros, zeros + 1)
    assert f[base, :, 7, meets].isnan().all() and inner[2].isnan().all()


def test_not_a_number_in_the_scale(kernels):
    case = CASES["one block, bounded"]
    problem = make_problem(kernels, case, torch.float32)
    problem.scale.fill_(torch.nan)
    assert run_stats(kernels, problem, case.plan)[1].isnan().all()


def of_one_id(problem):
    """The problem, general or fused, in which no embedding is another's negative."""
    zeros = torch.zeros(problem.z_rows.shape[-2], dtype=torch.int64, device=problem.z_rows.device)
    return replace(problem, ids_rows=zeros, ids_cols=zeros)


@pytest.mark.parametrize("scale", [20.0, 100.0])
@pytest.mark.parametrize("num_samples", [1, 33])
def test_rows_without_a_negative_have_no_weight(kernels, num_samples, scale):
    """One sample, and samples of one id."""
    case = Case(num_samples, 16, scale, block_rows=32)
    problem = make_problem(kernels, case, torch.float32)
    if num_samples > 1:
        problem = of_one_id(problem)
    maxima, sums = run_stats(kernels, problem, case.plan)
    assert maxima.isfinite().all() and (sums == 0).all()
    infinite, ones = torch.full_like(sums, torch.inf), torch.ones_like(sums)
    assert (run_weights(kernels, problem, case.plan, infinite, ones) == 0).all()


@of_fusing
@pytest.mark.parametrize("scale", [20.0, 100.0])
@pytest.mark.parametrize("num_samples", [1, 33])
def test_fused_rows_without_a_negative_have_no_weight(kernels, num_samples, scale):
    case = Case(num_samples, 16, scale, block_rows=16)
    problem = fused_problem(kernels, case, torch.float32)
    if num_samples > 1:
        problem = of_one_id(problem)
    maxima, sums = run_stats(kernels, problem, case.fused_plan)
    assert maxima.isfinite().all() and (sums == 0).all()
    infinite, ones = torch.full_like(sums, torch.inf), torch.ones_like(sums)
    for result in run_fused_weights(kernels, problem, case.fused_plan, infinite, ones):
        assert (result == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["many blocks", "ids"])
def test_two_runs_give_the_same_bits(kernels, name, dtype):
    if kernels.device == "cpu":
        pytest.skip("the backends' own tests run programs and threads in several orders")
    for run, cases in ((results, CASES), (fused_results, FUSED_CASES))[
        : 1 + kernels.backend.fuses_scores
    ]:
        first, second = (run(kernels, cases[name], dtype) for _ in range(2))
        assert all(map(torch.equal, first, second))


# --- Losses in one block and in several, against the reference backend in float64 -----------------


def loss_and_gradients(
    function: Callable[..., Tensor], values: list[Tensor], frozen: tuple[int, ...], dtype, device
) -> list[Tensor]:
    leaves = [
        value.to(device, dtype, copy=True).requires_grad_(index not in frozen)
        for index, value in enumerate(values)
    ]
    loss = function(*leaves)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]


def check_loss(
    kernels: Kernels, values: list[Tensor], function: Callable[..., Tensor],
    allowed: float, frozen: tuple[int, ...] = (),
) -> None:  # fmt: skip
    """``function(backend, *values)`` and the gradients of all values that are not frozen."""
    exact, single, got = (
        loss_and_gradients(
            lambda *leaves: function(name, *leaves),  # noqa: B023
            values, frozen, torch.float64 if name == "reference" else torch.float32, kernels.device,
        )
        for name in ("reference", "tiled", kernels.name)
    )  # fmt: skip
    for index, (g, s, e) in enumerate(zip(got, single, exact, strict=True)):
        assert error(g, e) <= 2 * error(s, e) + allowed, index


LOSSES: dict[str, tuple[int, int, float, dict]] = {
    # name: N, D, scale, options
    "three views": (50, 40, 20.0, {}),
    "scale 100": (70, 33, 100.0, {}),
    "clip": (90, 24, 100.0, {"candidates": [[0, 1], [1, 0]]}),
    "one direction": (
        60, 24, 30.0, {"candidates": [[0, 1], [0, 0]], "pair_weights": [[0, 1], [0, 0]]},
    ),
    "ids": (66, 20, 50.0, {"sample_ids": torch.arange(66) // 3}),
    "exclude, keep": (30, 20, 25.0, {"other_positives": "exclude", "self_similarity": "keep"}),
    "frozen view": (45, 20, 60.0, {"frozen": (1,)}),
    "two frozen views": (45, 20, 20.0, {"frozen": (0, 2)}),
    "not normalised": (40, 12, 2.0, {"normalize": False}),
}  # fmt: skip


def patch_block_rows(kernels: Kernels, monkeypatch: pytest.MonkeyPatch, name: str, rows: int):
    if kernels.device == "cpu" and rows > 1000:
        pytest.skip("one block, as in the contract; slow machines stand in for GPUs")
    module = sys.modules[type(kernels.backend).__module__]
    monkeypatch.setattr(module, name, rows)
    # Blocks without weights have their own size where they may.
    of_stats = name.replace("BLOCK_ROWS", "STATS_BLOCK_ROWS")
    if hasattr(module, of_stats):
        monkeypatch.setattr(module, of_stats, rows + 32)


def on_device(options: dict, device: str) -> dict:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}


@pytest.mark.parametrize("block_rows", [64, 8192])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(kernels, name, block_rows, monkeypatch):
    patch_block_rows(kernels, monkeypatch, "BLOCK_ROWS", block_rows)
    n, d, scale, options = LOSSES[name]
    options = on_device(options, kernels.device)
    frozen = options.pop("frozen", ())
    generator = torch.Generator().manual_seed(3)
    num_views = len(options.get("candidates", "123"))
    views = [torch.randn(n, d, generator=generator) for _ in range(num_views)]

    def function(backend: str, *leaves: Tensor) -> Tensor:
        return gcl_kernels.multiview_contrastive_loss(
            leaves[:-1], leaves[-1], backend=backend, **options
        )

    allowed = rounding(Case(n, d, scale, unit_rows=options.get("normalize", True)))
    check_loss(kernels, [*views, torch.tensor(scale)], function, allowed, frozen)


FUSED_LOSSES: dict[str, tuple[int, int, float, tuple[float, float], dict]] = {
    # name: N, D, scale, fusion weights, options
    "default": (90, 40, 20.0, (1.0, 1.0), {}),
    "difference": (90, 33, 100.0, (0.7, -1.3), {}),
    "ids": (66, 20, 50.0, (1.0, 0.5), {"sample_ids": torch.arange(66) // 3}),
    "candidates": (
        50, 24, 60.0, (1.0, 1.0), {"candidates": [[0, 1, 1], [1, 0, 1], [1, 1, 0]]},
    ),
    "one sample": (1, 8, 20.0, (1.0, 1.0), {}),
}  # fmt: skip


@pytest.mark.parametrize("block_rows", [32, 4096])
@pytest.mark.parametrize("name", FUSED_LOSSES)
def test_fused_losses(kernels, name, block_rows, monkeypatch):
    attribute = "FUSED_BLOCK_ROWS" if kernels.backend.fuses_scores else "BLOCK_ROWS"
    patch_block_rows(kernels, monkeypatch, attribute, block_rows)
    n, d, scale, weights, options = FUSED_LOSSES[name]
    options = on_device(options, kernels.device)
    generator = torch.Generator().manual_seed(3)
    embeddings = [torch.randn(n, d, generator=generator) for _ in range(2)]

    def function(backend: str, e_i: Tensor, e_t: Tensor, *scalars: Tensor) -> Tensor:
        return gcl_kernels.gcl_loss(
            e_i, e_t, logit_scale=scalars[0], fusion_weights=scalars[1:], backend=backend, **options
        )

    values = [*embeddings, *map(torch.tensor, (scale, *weights))]
    check_loss(kernels, values, function, 8 * scale * UNIT)


@pytest.mark.parametrize("num_given", [3, 2])
def test_a_step_in_a_cuda_graph_replays_to_the_same_bits(kernels, num_given):
    if kernels.device == "cpu":
        pytest.skip("needs a GPU")
    views = [torch.randn(700, 96, device="cuda", dtype=torch.bfloat16) for _ in range(num_given)]
    leaves = [view.requires_grad_() for view in views]
    scale = torch.tensor(50.0, device="cuda", requires_grad=True)

    def step() -> list[Tensor]:
        loss = gcl_kernels.gcl_loss(*leaves, logit_scale=scale, backend=kernels.name)
        return [loss.detach(), *torch.autograd.grad(loss, [*leaves, scale])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = [value.clone() for value in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
        assert all(map(torch.equal, captured, eager))
