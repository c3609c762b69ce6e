"""The CUDA backend against dense float64, its geometry, and what it promises about bits.

Kernels run on a GPU where there is one. Without one they run on an emulated GPU: the same sources
compiled by a plain C++ compiler (``cuda_host``), with the address sanitizer where there is one.
``test_on_the_emulated_gpu`` starts this file once more, in a process that has that extension.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from cuda_host import emulated_build
from torch import Tensor

import gcl_kernels
from gcl_kernels import dispatch
from gcl_kernels.backends import cuda as backend
from gcl_kernels.blocks import Block, plan_blocks
from gcl_kernels.problem import FusedProblem, Problem, Workspace
from gcl_kernels.spec import BoolTable

EMULATED = backend._cuda is not None and backend._cuda.device_type == "cpu"
DEVICE = "cpu" if EMULATED else "cuda"

runs = pytest.mark.skipif(
    backend.why_unavailable() is not None,
    reason="needs a GPU and the extension; test_on_the_emulated_gpu runs it without",
)
emulated = pytest.mark.skipif(not EMULATED, reason="asks the emulated GPU")
compiles = pytest.mark.skipif(
    EMULATED
    or emulated_build.COMPILER is None
    or not sys.platform.startswith("linux")
    or importlib.util.find_spec("pybind11") is None,
    reason="needs a C++ compiler on Linux, and pybind11",
)
UNIT = 2.0**-24
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of rounding weights to the compute dtype."""


@compiles
def test_geometry_is_its_definition():
    program = emulated_build.build_program(emulated_build.HERE / "geometry.cpp")
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@compiles
def test_on_the_emulated_gpu():
    try:
        emulated_build.build()
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stdout[-6000:])
    here = Path(__file__).parent
    files = [__file__, str(here / "test_contract.py"), str(here / "test_score_fusion.py")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["-p", "cuda_host.use_emulated_gpu", *files, "-k", SELECTED]
    environment = emulated_build.environment()
    path = os.pathsep.join([str(here), environment.get("PYTHONPATH", "")])
    result = subprocess.run(
        command, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


SELECTED = "test_cuda_host or (cuda and not ragged and not subset)"
"""What the second process runs: this file, and most of the contract on this backend."""


# --- The tensor side -----------------------------------------------------------------------------


def test_calls_that_it_cannot_serve():
    reason = backend.why_not(torch.device("cuda"), torch.float64)
    assert reason is not None and "float64" in reason
    z = torch.zeros(4, 4, dtype=torch.float64)
    problem = Problem(z, z, None, None, torch.ones((), dtype=torch.float64), None, True)
    with pytest.raises(RuntimeError, match="'cuda' cannot serve this call: no float64"):
        backend.block_rows(problem)


def test_auto_is_triton_else_cuda_else_tiled(monkeypatch):
    missing: set[str] = set()
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    for name in ("triton", "cuda"):

        def why_unavailable(name: str = name) -> str | None:
            return "missing" if name in missing else None

        row = replace(
            dispatch.BACKENDS[name],
            why_unavailable=why_unavailable,
            why_not=lambda device, dtype: "float64" if dtype == torch.float64 else None,
        )
        monkeypatch.setitem(dispatch.BACKENDS, name, row)

    def auto(dtype: torch.dtype) -> str:
        return dispatch.resolve_backend("auto", torch.device("cuda"), dtype)

    assert auto(torch.bfloat16) == "triton" and auto(torch.float64) == "tiled"
    missing.add("triton")
    assert auto(torch.bfloat16) == "cuda" and auto(torch.float64) == "tiled"
    missing.add("cuda")
    assert auto(torch.bfloat16) == "tiled"


@pytest.mark.parametrize(
    ("capability", "archs", "reason"),
    [
        ((8, 0), "80;90+PTX", None),
        ((8, 7), "80;86", None),
        ((9, 0), "80;90a", None),
        ((12, 1), "80;90+PTX", None),
        ((10, 3), "80;100", None),
        ((7, 5), "80", "needs a GPU of compute capability 8.0 or later, this one has 7.5"),
        ((8, 6), "89", "its extension was built for 89, not for compute capability 8.6"),
        ((12, 0), "80;90", "its extension was built for 80;90, not for compute capability 12.0"),
        ((9, 1), "90a", "its extension was built for 90a, not for compute capability 9.1"),
        ((8, 9), "90+PTX", "its extension was built for 90+PTX, not for compute capability 8.9"),
    ],
)
def test_devices_that_the_compiled_targets_serve(capability, archs, reason):
    got = backend._why_not_capability(capability, archs)
    assert got is None if reason is None else got is not None and got.startswith(reason)


@pytest.mark.skipif(backend._cuda is not None, reason="the extension is built")
def test_says_how_to_get_it_where_it_is_not_built():
    assert "docs/building.md" in gcl_kernels.backends()["cuda"]
    with pytest.raises(RuntimeError, match="'cuda' is not available: its extension is not built"):
        gcl_kernels.gcl_loss(*torch.randn(3, 4, 8), backend="cuda")


# --- Block functions, against dense float64 ------------------------------------------------------


@dataclass(frozen=True)
class Case:
    num_samples: int
    dim: int
    scale: float
    unit_rows: bool = True
    candidates: BoolTable = ((True,) * 3,) * 3
    block_rows: int = 8192
    ids: bool = False


CASES = {
    "one block, bounded": Case(37, 40, 20.0),
    "one block, running maximum": Case(37, 40, 100.0),
    "bounded at the limit": Case(30, 24, 40.0),
    "a dimension of one": Case(25, 1, 10.0),
    "rows not aligned": Case(45, 67, 50.0, block_rows=96),
    "several tiles": Case(110, 64, 30.0),
    "several tiles, running maximum": Case(95, 104, 60.0, ids=True),
    "many blocks": Case(70, 32, 14.0, block_rows=48),
    "ids": Case(50, 33, 100.0, ids=True, block_rows=80),
    "two views, off the diagonal": Case(135, 48, 100.0, candidates=((False, True), (True, False))),
    "one-sided candidates": Case(
        41, 40, 20.0, candidates=((True, True, False), (False, True, True), (False, False, False)),
    ),
    "one-sided, no bound": Case(
        29, 40, 60.0, candidates=((False, True, False), (False, False, True), (True, False, False)),
        block_rows=32, ids=True,
    ),
    "not normalised": Case(40, 20, 3.0, unit_rows=False, block_rows=64),
}  # fmt: skip
FEW = ["one block, running maximum", "rows not aligned", "one-sided candidates"]


def rounded_to_tf32(z: Tensor) -> Tensor:
    """To the nearest number of 11 bits."""
    bits = z.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def random_ids(case: Case, generator: torch.Generator) -> Tensor:
    ids = torch.randint(0, case.num_samples // 2, (case.num_samples,), generator=generator)
    return (ids - 2**40).to(DEVICE)


def make_problem(case: Case, dtype: torch.dtype) -> Problem:
    generator = torch.Generator().manual_seed(case.num_samples + case.dim)
    num_rows = len(case.candidates) * case.num_samples
    z = torch.randn(num_rows, case.dim, generator=generator, dtype=torch.float64)
    if case.unit_rows:
        z = torch.nn.functional.normalize(z)
    ids = None
    if case.ids:
        ids = random_ids(case, generator).repeat(len(case.candidates))
    scale = torch.tensor(case.scale, dtype=torch.float32, device=DEVICE)
    z = z.to(DEVICE, dtype)
    return Problem(z, z, ids, ids, scale, None, case.unit_rows)


def allowed(case: Case, ids: Tensor | None) -> Tensor:
    """[V, N, V, N]: whether column (w, k) is a negative of row (v, j)."""
    if ids is None:
        ids = torch.arange(case.num_samples, device=DEVICE)
    ids = ids[: case.num_samples]
    differ = ids[:, None] != ids[None, :]
    return torch.tensor(case.candidates, device=DEVICE)[:, None, :, None] & differ[:, None, :]


def make_mask(case: Case, problem: Problem) -> Tensor:
    return allowed(case, problem.ids_rows).reshape((problem.z_rows.shape[0],) * 2)


def run_stats(problem: Problem, plan: tuple[Block, ...]) -> tuple[Tensor, Tensor]:
    workspace = Workspace(problem.z_rows.device, plan)
    stats = backend.start_stats(problem)
    for block in plan:
        backend.block_stats(problem, block, stats, stats, workspace)
    return stats.max, stats.sum


def run_weights(problem: Problem, plan: tuple[Block, ...], lse: Tensor, grad: Tensor) -> Tensor:
    """All blocks of H in one matrix."""
    num_rows = problem.z_rows.shape[0]
    h = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=DEVICE)
    workspace = Workspace(problem.z_rows.device, plan)
    for block in plan:
        part = backend.block_weights(problem, block, lse, lse, grad, grad, workspace)
        assert part.dtype == problem.compute_dtype and part.shape == block.shape
        h[block.rows, block.cols] = part.double()
        if not block.diagonal:
            h[block.cols, block.rows] = part.double().T
        part.fill_(torch.nan)  # the next block must write all of its own
    return h


def dense(
    z: Tensor, problem: Problem, mask: Tensor, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """neg_lse and H, computed densely in ``dtype``."""
    z = z.to(dtype)
    x = problem.scale.to(dtype) * (z @ z.T)
    lse = x.masked_fill(~mask, -torch.inf).logsumexp(1)
    weights = torch.where(mask, grad.to(dtype)[:, None] * (x - lse[:, None]).exp(), 0)
    return lse, (weights + weights.T).nan_to_num(0)


def error(value: Tensor, expected: Tensor) -> float:
    difference = torch.where(value == expected, 0, value.double() - expected)  # also -inf
    finite = expected.masked_fill(expected.isinf(), 0)
    return float(difference.norm() / finite.norm().clamp_min(1e-30))


def bound(case: Case, of_float32: float, dtype: torch.dtype) -> float:
    """Twice the dense float32 error; and of four roundings of numbers as large as a logit (x, lse,
    and both in base 2), each a relative error of exp(x - lse); and H rounded once."""
    largest = case.scale if case.unit_rows else case.scale * 4 * case.dim
    return 2 * of_float32 + 4 * max(largest, 1.0) * UNIT + ROUNDING[dtype]


def random_grad(shape: tuple[int, ...]) -> Tensor:
    """Positive and negative, and large enough that no weight of a half type is subnormal."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 64


def check_block_functions(case: Case, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype)
    plan = plan_blocks(case.num_samples, case.candidates, case.block_rows)
    mask = make_mask(case, problem)
    grad = random_grad(mask.shape[:1]) * mask.any(1)
    z = problem.z_rows
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        z = rounded_to_tf32(z)
    lse64, h64 = dense(z, problem, mask, grad, torch.float64)
    lse32, h32 = dense(z, problem, mask, grad, torch.float32)

    maxima, sums = run_stats(problem, plan)
    lse = sums.log() + maxima
    assert error(lse, lse64) <= bound(case, error(lse32, lse64), torch.float32)
    no_negative = ~mask.any(1)
    assert torch.equal(sums == 0, no_negative)
    assert maxima.isfinite().all()

    # From the exact lse, so that an error of the other function does not hide here.
    given = lse64.masked_fill(no_negative, torch.inf).float()
    h = run_weights(problem, plan, given, grad)
    assert error(h, h64) <= bound(case, error(h32, h64), dtype)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_block_functions(name, dtype):
    if EMULATED and dtype == torch.float16 and name not in FEW:
        pytest.skip("bfloat16 runs the same template")
    check_block_functions(CASES[name], dtype)


@runs
@pytest.mark.parametrize("name", FEW)
def test_tf32(name, tf32):
    check_block_functions(CASES[name], torch.float32)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [1, 4])
def test_operands_that_start_anywhere(dtype, offset):
    """Rows of 64 elements whose first is not aligned to 16 bytes."""
    case = replace(CASES["several tiles"], num_samples=45)
    aligned = make_problem(case, dtype)
    memory = torch.full((aligned.z_rows.numel() + offset,), torch.nan, device=DEVICE, dtype=dtype)
    z = memory[offset:].view(aligned.z_rows.shape).copy_(aligned.z_rows)
    plan = plan_blocks(case.num_samples, case.candidates, case.block_rows)
    shifted = run_stats(replace(aligned, z_rows=z, z_cols=z), plan)
    for a, b in zip(run_stats(aligned, plan), shifted, strict=True):
        assert torch.equal(a, b)


@runs
@pytest.mark.parametrize("pitch", [67, 80])
def test_weights_leave_everything_around_them_alone(pitch, monkeypatch):
    """A tile of a wider matrix, rows aligned or not."""
    case = replace(CASES["one block, running maximum"], num_samples=22)
    problem = make_problem(case, torch.bfloat16)
    block = plan_blocks(22, case.candidates, 8192)[0]
    wide = torch.full((70, pitch), 7.0, dtype=torch.bfloat16, device=DEVICE)
    workspace = Workspace(wide.device, [block])
    lse, grad = torch.zeros(66, device=DEVICE), torch.ones(66, device=DEVICE)
    expected = backend.block_weights(problem, block, lse, lse, grad, grad, workspace)
    monkeypatch.setattr(workspace, "tile", lambda slot, shape, dtype: wide[:66, :66])
    got = backend.block_weights(problem, block, lse, lse, grad, grad, workspace)
    assert torch.equal(got, expected)
    assert (wide[66:] == 7).all() and (wide[:, 66:] == 7).all()


@runs
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_ids_of_every_dtype(dtype):
    case = CASES["ids"]
    problem = make_problem(case, torch.float32)
    assert problem.ids_rows is not None
    ids = problem.ids_rows + 2**40
    plan = plan_blocks(case.num_samples, case.candidates, case.block_rows)
    other = replace(problem, ids_rows=ids.to(dtype), ids_cols=ids.to(dtype))
    for expected, got in zip(run_stats(problem, plan), run_stats(other, plan), strict=True):
        assert torch.equal(expected, got)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scale", "bad"), [(20, torch.nan), (100, torch.nan), (100, torch.inf)])
def test_not_a_number_reaches_every_row_that_meets_it(scale, bad, dtype):
    case = Case(40, 16, scale, block_rows=48)
    problem = make_problem(case, dtype)
    problem.z_rows[7, 3] = bad
    plan = plan_blocks(case.num_samples, case.candidates, case.block_rows)
    maxima, sums = run_stats(problem, plan)
    lse = sums.log() + maxima
    meets = torch.ones(120, dtype=torch.bool)
    meets[[47, 87]] = False  # its sample's other views meet neither it nor each other
    if bad != bad:
        assert torch.equal(lse.isnan().cpu(), meets)
        h = run_weights(problem, plan, torch.zeros_like(lse), torch.ones_like(lse))
        assert torch.equal(h[7].isnan().cpu(), meets & (torch.arange(120) != 7))
    else:
        assert lse[7].isnan(), "inf - inf"


@runs
def test_not_a_number_in_the_scale():
    problem = make_problem(CASES["one block, bounded"], torch.float32)
    problem.scale.fill_(torch.nan)
    _, sums = run_stats(problem, plan_blocks(37, ((True,) * 3,) * 3, 8192))
    assert sums.isnan().all()


@runs
def test_rows_without_a_negative_have_no_weight():
    case = Case(20, 16, 50.0)
    problem = make_problem(case, torch.float32)
    zeros = torch.zeros(60, dtype=torch.int64, device=DEVICE)
    problem = replace(problem, ids_rows=zeros, ids_cols=zeros)
    plan = plan_blocks(20, case.candidates, 32)
    maxima, sums = run_stats(problem, plan)
    assert maxima.isfinite().all() and (sums == 0).all()
    infinite = torch.full_like(sums, torch.inf)
    assert (run_weights(problem, plan, infinite, torch.ones_like(sums)) == 0).all()


@runs
def test_more_than_2_to_the_31_elements():
    """From one base's embeddings to the other's."""
    dim, last = 64, slice((1 << 25) + 16, (1 << 25) + 32)
    try:
        # Pages that nobody touches cost nothing.
        z = torch.empty(2, last.stop, dim, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("needs 8.6 GB of address space")
    generator = torch.Generator().manual_seed(0)
    z[:, last] = torch.randn(2, 16, dim, generator=generator).half().to(DEVICE)
    small = fused_problem(Case(16, dim, 1 / dim, unit_rows=False), torch.float16)
    small = replace(small, z_rows=z[:, last].contiguous(), z_cols=z[:, last].contiguous())
    coefficients = torch.zeros(3, 2, 1, device=DEVICE).expand(3, 2, last.stop)
    large = replace(small, z_rows=z, z_cols=z, coefficients_rows=coefficients)
    wide, narrow = (
        backend._Call(problem, Block(*span, *span, True, True, True, (0,)))
        for problem, span in ((large, (last.start, last.stop)), (small, (0, 16)))
    )
    tables = [torch.zeros(2, 1, 3 * 16, device=DEVICE) for _ in range(2)]
    for call, table in zip((wide, narrow), tables, strict=True):
        call.over_tiles(
            backend._cuda.fused_block_stats,
            views=backend._views(small, Block(0, 16, 0, 16, True, True, True, (0,))),
            row_table=table.data_ptr(),
            col_table=table.data_ptr(),
        )
    assert tables[0].any() and torch.equal(*tables)


@runs
@pytest.mark.parametrize("slots", [1, 8, 61])
@pytest.mark.parametrize("of_statistics", [True, False])
def test_fold_of_many_slots(slots, of_statistics):
    """Into the middle of longer lines; rows and columns in one launch, and one side without any."""
    length, groups, total = 45, 3, 60
    where = slice(10, 10 + length)
    generator = torch.Generator().manual_seed(slots)
    values = (2,) if of_statistics else ()
    table = torch.randn(*values, slots, groups * length, generator=generator) * 30
    m, sums = torch.randn(2, groups, total, generator=generator).mul(20).to(DEVICE)
    if of_statistics:
        table[1].abs_()
        sums.abs_()
    table = table.to(DEVICE)
    parts = table.view(*values, slots, groups, length).double()
    expected = sums.double()
    if of_statistics:
        all_m = torch.cat([m[None, :, where].double(), parts[0]])
        all_sums = torch.cat([expected[None, :, where], parts[1]])
        top = all_m.amax(0)
        folded = (all_sums * (all_m - top).exp()).sum(0)
    else:
        folded = expected[:, where] + parts.sum(0)
    expected[:, where] = folded
    before = m.clone()
    problem = make_problem(CASES["a dimension of one"], torch.float32)
    call = backend._Call(problem, Block(0, 1, 0, 1, True, True, True, (0,)))
    arguments = (table, length, m if of_statistics else None, sums, where)
    none, all_of_it = backend._fold(*arguments, False), backend._fold(*arguments, True)
    rows_first = slots == 8
    call.start(
        backend._cuda.fold,
        rows=all_of_it if rows_first else none,
        cols=none if rows_first else all_of_it,
    )
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)
    if of_statistics:
        before[:, where] = top.float()
    assert torch.equal(m, before)


# --- Score fusion --------------------------------------------------------------------------------

FUSED_CASES = {
    "one tile, bounded": Case(37, 40, 20.0),
    "one tile, running maximum": Case(37, 40, 100.0),
    "one sample": Case(1, 8, 20.0),
    "two samples": Case(2, 8, 60.0),
    "rows not aligned": Case(45, 33, 50.0, block_rows=32),
    "several tiles": Case(150, 64, 30.0),
    "ids": Case(70, 32, 100.0, ids=True, block_rows=48),
    "ids, bounded": Case(139, 24, 30.0, ids=True),
    "other candidates": Case(
        41, 40, 60.0, candidates=((True, True, False), (False, True, True), (False, False, False)),
        block_rows=32,
    ),
    "other candidates, bounded": Case(
        70, 40, 20.0, candidates=((False, True, True), (True, False, False), (True, False, False)),
    ),
    "two views": Case(30, 16, 50.0, candidates=((False, True), (True, False))),
    "seven views": Case(20, 16, 50.0, candidates=((True,) * 7,) * 7),
    "not normalised": Case(40, 20, 3.0, unit_rows=False, block_rows=64),
}  # fmt: skip


def fused_problem(case: Case, dtype: torch.dtype) -> FusedProblem:
    """Two bases and combinations of them, of length one where the case says so."""
    generator = torch.Generator().manual_seed(case.num_samples)
    num_views = len(case.candidates)
    z = torch.randn(2, case.num_samples, case.dim, generator=generator, dtype=torch.float64)
    if case.unit_rows:
        z = torch.nn.functional.normalize(z, dim=-1)
    z = z.to(dtype)
    shape = (num_views, 2, case.num_samples)
    coefficients = torch.randn(shape, generator=generator, dtype=torch.float64)
    coefficients[:2] = torch.eye(2, dtype=torch.float64).unsqueeze(-1)
    if case.unit_rows:
        views = torch.einsum("vbn,bnd->vnd", coefficients, z.double())
        coefficients[2:] /= views[2:].norm(dim=-1).unsqueeze(1)
    ids = random_ids(case, generator) if case.ids else None
    coefficients, z = coefficients.to(DEVICE, torch.float32), z.to(DEVICE)
    return FusedProblem(
        z_rows=z, z_cols=z, coefficients_rows=coefficients, coefficients_cols=coefficients,
        bases=(0, 1, *(None,) * (num_views - 2)), candidates=case.candidates,
        ids_rows=ids, ids_cols=ids, scale=torch.tensor(case.scale, device=DEVICE), max_scale=None,
        unit_rows=case.unit_rows,
    )  # fmt: skip


def fused_plan(case: Case) -> tuple[Block, ...]:
    return plan_blocks(case.num_samples, ((True,),), case.block_rows)


def run_fused_stats(case: Case, problem: FusedProblem) -> tuple[Tensor, Tensor]:
    plan = fused_plan(case)
    stats = backend.fused_start_stats(problem)
    for block in plan:
        workspace = Workspace(problem.z_rows.device, plan)
        backend.fused_block_stats(problem, block, stats, stats, workspace)
    return stats.max, stats.sum


def run_fused_weights(
    case: Case, problem: FusedProblem, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """F [2, 2, N, N] and U [V, 2, N]."""
    plan = fused_plan(case)
    n = case.num_samples
    f = torch.full((2, 2, n, n), torch.nan, dtype=torch.float64, device=DEVICE)
    inner = torch.zeros_like(problem.coefficients_rows)
    workspace = Workspace(problem.z_rows.device, plan)
    for block in plan:
        part = backend.fused_block_weights(
            problem, block, lse, lse, grad, grad, inner, inner, workspace
        )
        assert part.dtype == problem.compute_dtype and part.shape == (2, 2, *block.shape)
        f[:, :, block.rows, block.cols] = part.double()
        if not block.diagonal:
            f[:, :, block.cols, block.rows] = part.double().permute(1, 0, 3, 2)
        part.fill_(torch.nan)  # the next block must write all of its own
    return f, inner


def fused_dense(
    problem: FusedProblem, z: Tensor, mask: Tensor, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """neg_lse [V, N], F and U by their definitions, in ``dtype``."""
    k, z = problem.coefficients_rows.to(dtype), z.to(dtype)
    y = torch.einsum("bnd,cmd->bcnm", z, z)
    toward = torch.einsum("wcm,bcnm->bnwm", k, y)
    x = problem.scale.to(dtype) * torch.einsum("vbn,bnwm->vnwm", k, toward)
    lse = x.masked_fill(~mask, -torch.inf).logsumexp((2, 3))
    weights = grad.to(dtype)[..., None, None] * (x - lse[..., None, None]).exp()
    weights = torch.where(mask, weights, 0).nan_to_num(0)
    h = weights + weights.permute(2, 3, 0, 1)
    f = torch.einsum("vbn,wcm,vnwm->bcnm", k, k, h)
    return lse, f, torch.einsum("vnwm,bnwm->vbn", h, toward)


def check_fused_block_functions(case: Case, dtype: torch.dtype) -> None:
    problem = fused_problem(case, dtype)
    mask = allowed(case, problem.ids_rows)
    has_negative = mask.any(3).any(2)
    grad = random_grad(has_negative.shape) * has_negative
    z = problem.z_rows
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        z = rounded_to_tf32(z)
    lse64, f64, inner64 = fused_dense(problem, z, mask, grad, torch.float64)
    lse32, f32, inner32 = fused_dense(problem, z, mask, grad, torch.float32)

    maxima, sums = run_fused_stats(case, problem)
    # Sums of up to four products, of which each may be larger than their sum.
    size = float(problem.coefficients_rows.abs().sum(1).max()) ** 2 * case.scale
    loose = replace(case, scale=size)
    lse = sums.log() + maxima
    assert error(lse, lse64) <= bound(loose, error(lse32, lse64), torch.float32)
    assert torch.equal(sums == 0, ~has_negative)
    assert maxima.isfinite().all()

    given = lse64.masked_fill(~has_negative, torch.inf).float()
    f, inner = run_fused_weights(case, problem, given, grad)
    assert error(f, f64) <= bound(loose, error(f32, f64), dtype)
    assert error(inner, inner64) <= bound(loose, error(inner32, inner64), torch.float32)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUSED_CASES)
def test_fused_block_functions(name, dtype):
    if EMULATED and dtype == torch.float16 and name not in FEW:
        pytest.skip("bfloat16 runs the same template")
    check_fused_block_functions(FUSED_CASES[name], dtype)


@runs
@pytest.mark.parametrize("name", ["rows not aligned", "several tiles"])
def test_fused_tf32(name, tf32):
    check_fused_block_functions(FUSED_CASES[name], torch.float32)


@runs
@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_not_a_number_in_a_base_reaches_every_sample_that_meets_it(scale):
    case = Case(40, 16, scale, block_rows=32)
    problem = fused_problem(case, torch.float32)
    problem.z_rows[1, 7, 3] = torch.nan
    maxima, sums = run_fused_stats(case, problem)
    assert (sums.log() + maxima)[1:].isnan().all()
    zeros = torch.zeros_like(sums)
    f, inner = run_fused_weights(case, problem, zeros, zeros + 1)
    assert f[1, 1, 7].isnan()[torch.arange(40) != 7].all() and inner[2].isnan().all()


@runs
def test_too_many_views():
    problem = fused_problem(Case(3, 8, 20.0, candidates=((True,) * 8,) * 8), torch.float32)
    with pytest.raises(RuntimeError, match="fuses at most 7 views, got 8"):
        backend.fused_block_rows(problem)


# --- The same bits, whoever runs first -----------------------------------------------------------


def results(case: Case, dtype: torch.dtype) -> list[Tensor]:
    problem, fused = make_problem(case, dtype), fused_problem(case, dtype)
    plan = plan_blocks(case.num_samples, case.candidates, case.block_rows)
    maxima, sums = run_stats(problem, plan)
    fused_maxima, fused_sums = run_fused_stats(case, fused)
    lse, fused_lse = maxima + sums.log(), fused_maxima + fused_sums.log()
    weights = run_weights(problem, plan, lse, random_grad(lse.shape))
    return [
        lse, weights, fused_lse,
        *run_fused_weights(case, fused, fused_lse, random_grad(fused_lse.shape)),
    ]  # fmt: skip


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_give_the_same_bits(dtype):
    case = replace(CASES["many blocks"], block_rows=112)
    for a, b in zip(results(case, dtype), results(case, dtype), strict=True):
        assert torch.equal(a, b)


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_schedule(dtype):
    """A missing barrier, or a wait for too few copies, does."""
    case = Case(43, 72, 60.0)
    library = ctypes.CDLL(str(emulated_build.MODULE))
    expected = results(case, dtype)
    try:
        for order in range(3):
            for copies_are_late in (0, 1):
                library.emulated_gpu_schedule(order, 1 + copies_are_late, copies_are_late)
                for a, b in zip(expected, results(case, dtype), strict=True):
                    assert torch.equal(a, b), (order, copies_are_late)
    finally:
        library.emulated_gpu_schedule(0, 0, 1)


# --- Faults --------------------------------------------------------------------------------------


@emulated
def test_an_error_of_cuda_is_an_exception_and_the_next_call_works():
    problem = make_problem(CASES["one block, bounded"], torch.float32)
    plan = plan_blocks(37, ((True,) * 3,) * 3, 8192)
    library = ctypes.CDLL(str(emulated_build.MODULE))
    library.emulated_gpu_refuse_next_launch(b"invalid resource handle")
    with pytest.raises(RuntimeError, match="block_stats: invalid resource handle"):
        run_stats(problem, plan)
    assert run_stats(problem, plan)[1].isfinite().all()


@runs
def test_tensors_on_two_devices():
    problem = make_problem(CASES["one block, bounded"], torch.float32)
    block = plan_blocks(37, ((True,) * 3,) * 3, 8192)[0]
    elsewhere = torch.zeros(111, device="meta")
    lse = torch.zeros(111, device=DEVICE)
    with pytest.raises(RuntimeError, match="'cuda' was given tensors on .* and on meta"):
        backend.block_weights(
            problem, block, elsewhere, lse, lse, lse, Workspace(lse.device, [block])
        )


@runs
def test_arguments_of_the_binding_are_keywords():
    with pytest.raises(TypeError):
        backend._cuda.Side(0, 0, 0, 4)
    assert backend._cuda.device_count() >= 1


@runs
def test_compiles_into_one_graph():
    views = list(torch.randn(3, 20, 8, device=DEVICE))

    def loss(e_i, e_t, e_it):
        return gcl_kernels.gcl_loss(e_i, e_t, e_it, 20.0, backend="cuda")

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*views), loss(*views))


# --- On a GPU only -------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(
    EMULATED or backend.why_unavailable() is not None, reason="needs a GPU and the extension"
)


def training_step(views: list[Tensor], scale: Tensor) -> list[Tensor]:
    loss = gcl_kernels.gcl_loss(*views, scale, backend="cuda")
    return [loss.detach(), *torch.autograd.grad(loss, [*views, scale])]


def leaves_on(device: str, count: int = 700) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(count, 96, generator=generator).to(device) for _ in range(3)]
    scale = torch.tensor(50.0, device=device, requires_grad=True)
    return [view.bfloat16().requires_grad_() for view in views], scale


@on_gpu
def test_a_step_in_a_cuda_graph_replays_to_the_same_bits():
    views, scale = leaves_on("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = [value.clone() for value in training_step(views, scale)]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step(views, scale)
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


@on_gpu
def test_out_of_memory_is_pytorchs_and_the_next_call_works():
    views, scale = leaves_on("cuda")
    expected = training_step(views, scale)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            training_step(*leaves_on("cuda", 9000))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(map(torch.equal, expected, training_step(views, scale)))


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_and_a_stream_of_the_other():
    expected = training_step(*leaves_on("cuda:0"))
    for a, b in zip(expected, training_step(*leaves_on("cuda:1")), strict=True):
        assert torch.equal(a.cpu(), b.cpu())
    assert torch.cuda.current_device() == 0
    problem = make_problem(CASES["one block, bounded"], torch.float32)
    call = backend._Call(problem, plan_blocks(37, ((True,) * 3,) * 3, 8192)[0])
    table = torch.zeros(4096, device="cuda:0").data_ptr()
    with pytest.raises(RuntimeError, match="block_stats: "):
        backend._cuda.block_stats(
            device=0, stream=torch.cuda.Stream("cuda:1").cuda_stream,
            product=backend._cuda.Product.float32, block=call.block,
            row_table=table, col_table=table,
        )  # fmt: skip
    assert all(map(torch.equal, expected, training_step(*leaves_on("cuda:0"))))
