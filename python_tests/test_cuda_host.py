"""The CUDA backend: its geometry, its launches, and what it promises about bits. What it computes
is in ``test_kernels``.

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
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from block_checks import (
    CASES,
    CUDA,
    EMULATED,
    FEW,
    Case,
    check_block_functions,
    lines_of,
    make_problem,
    results,
    run_stats,
)
from cuda_host import emulated_build
from processes import run_fresh
from torch import Tensor

import gcl_kernels
from gcl_kernels import dispatch
from gcl_kernels.backends import cuda as backend
from gcl_kernels.backends import triton
from gcl_kernels.backends.triton import tiles
from gcl_kernels.blocks import Block, plan_blocks
from gcl_kernels.problem import RowStats, Workspace

DEVICE = CUDA.device

runs = pytest.mark.skipif(
    not CUDA.available,
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
    others = ("test_kernels.py", "test_contract.py", "test_score_fusion.py")
    files = [__file__, *(str(here / name) for name in others)]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["-p", "cuda_host.use_emulated_gpu", *files, "-k", SELECTED]
    environment = emulated_build.environment()
    path = os.pathsep.join([str(here), environment.get("PYTHONPATH", "")])
    result = subprocess.run(
        command, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


SELECTED = "test_cuda_host or (cuda and not ragged)"
"""What the second process runs: this file, and the contract on this backend."""


# --- The tensor side -----------------------------------------------------------------------------


def test_auto_is_triton_else_cuda_else_tiled(monkeypatch):
    missing: set[str] = set()
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    for name in ("triton", "cuda"):

        def why_not(device: torch.device, dtype: torch.dtype, name: str = name) -> str | None:
            return "missing" if name in missing else "float64" if dtype == torch.float64 else None

        monkeypatch.setattr(dispatch.BACKENDS[name], "why_unavailable", lambda: None)
        monkeypatch.setattr(dispatch.BACKENDS[name], "why_not", why_not)

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


def test_judges_the_device_of_the_tensors(monkeypatch):
    """An old GPU beside a new one, whichever is the current."""
    capabilities = [(7, 5), (9, 0)]
    extension = SimpleNamespace(device_type="cuda", device_count=lambda: 2, compiled_archs="80;90")
    monkeypatch.setattr(backend, "_cuda", extension)
    monkeypatch.setattr(triton, "_TRITON_INSTALLED", True)
    monkeypatch.setattr(triton, "_interpreted", lambda: False)
    monkeypatch.setattr(triton, "device_chip", tiles.find_chip)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_capability",
        lambda device: capabilities[getattr(device, "index", device)],
    )
    old, new = torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    for name in ("triton", "cuda"):
        assert gcl_kernels.backends()[name] == "available"
        assert dispatch.resolve_backend(name, new, torch.bfloat16) == name
        with pytest.raises(RuntimeError, match=f"backend: '{name}' is not available: needs .* 8.0"):
            dispatch.resolve_backend(name, old, torch.bfloat16)
    assert dispatch.resolve_backend("auto", new, torch.bfloat16) == "triton"
    assert dispatch.resolve_backend("auto", old, torch.bfloat16) == "tiled"
    capabilities[1] = (7, 0)
    for name in ("triton", "cuda"):
        assert "compute capability 8.0 or later" in gcl_kernels.backends()[name]


ALLOW_TF32 = [
    "torch.set_float32_matmul_precision('high')",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.allow_tf32 = True",
]


@pytest.mark.skipif(EMULATED or not hasattr(os, "fork"), reason="asks PyTorch alone, by fork")
def test_tf32_is_allowed_by_any_of_the_settings():
    """Each in a process of its own: some of them can't be taken back."""
    code = f"""
import os
import torch
from gcl_kernels.problem import allows_tf32
for setting in {ALLOW_TF32}:
    if os.fork() == 0:
        before = allows_tf32()
        exec(setting)
        print(before, allows_tf32(), flush=True)
        os._exit(0)
    os.wait()
"""
    assert run_fresh(code).splitlines() == ["False True"] * len(ALLOW_TF32)


@pytest.mark.skipif(backend._cuda is not None, reason="the extension is built")
def test_says_how_to_get_it_where_it_is_not_built():
    assert "docs/building.md" in gcl_kernels.backends()["cuda"]
    with pytest.raises(RuntimeError, match="'cuda' is not available: its extension is not built"):
        gcl_kernels.gcl_loss(*torch.randn(3, 4, 8), backend="cuda")


# --- Products, and memory around them -------------------------------------------------------------


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@runs
@pytest.mark.parametrize("name", sorted(FEW))
def test_tf32(name, tf32):
    check_block_functions(CUDA, CASES[name], torch.float32)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [1, 4])
def test_operands_that_start_anywhere(dtype, offset):
    """Rows of 64 elements whose first is not aligned to 16 bytes."""
    case = replace(CASES["several tiles"], num_samples=45)
    aligned = make_problem(CUDA, case, dtype)
    memory = torch.full((aligned.z_rows.numel() + offset,), torch.nan, device=DEVICE, dtype=dtype)
    z = memory[offset:].view(aligned.z_rows.shape).copy_(aligned.z_rows)
    plan = plan_blocks(case.num_samples, case.candidates, case.block_rows)
    shifted = run_stats(CUDA, replace(aligned, z_rows=z, z_cols=z), plan)
    for a, b in zip(run_stats(CUDA, aligned, plan), shifted, strict=True):
        assert torch.equal(a, b)


@runs
@pytest.mark.parametrize("pitch", [67, 80])
def test_weights_leave_everything_around_them_alone(pitch, monkeypatch):
    """A tile of a wider matrix, rows aligned or not."""
    case = replace(CASES["one block, running maximum"], num_samples=22)
    problem = make_problem(CUDA, case, torch.bfloat16)
    block = plan_blocks(22, case.candidates, 8192)[0]
    wide = torch.full((70, pitch), 7.0, dtype=torch.bfloat16, device=DEVICE)
    workspace = Workspace(wide.device, [block])
    lse, grad = torch.zeros(66, device=DEVICE), torch.ones(66, device=DEVICE)
    lines = lines_of(lse, grad)
    expected = CUDA.backend.block_weights(problem, block, lines, lines, workspace)
    monkeypatch.setattr(workspace, "tile", lambda slot, shape, dtype: wide[:66, :66])
    got = CUDA.backend.block_weights(problem, block, lines, lines, workspace)
    assert torch.equal(got, expected)
    assert (wide[66:] == 7).all() and (wide[:, 66:] == 7).all()


@runs
def test_more_than_2_to_the_31_elements():
    dim, last = 64, slice((1 << 25) + 16, (1 << 25) + 32)
    try:
        # Pages that nobody touches cost nothing.
        z = torch.empty(last.stop, dim, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("needs 4.3 GB of address space")
    small = make_problem(CUDA, Case(16, dim, 20.0, candidates=((True,),)), torch.float16)
    z[last] = small.z_rows
    large, tables = replace(small, z_rows=z, z_cols=z), []
    for problem, span in ((large, (last.start, last.stop)), (small, (0, 16))):
        block = Block(*span, *span, True, True, True, (0,))
        tables.append(backend._tables(problem, block)[0].zero_())
        at = tables[-1].data_ptr()
        call = backend._Call(problem, block)
        call.over_tiles(backend._cuda.block_stats, row_table=at, col_table=at)
    assert tables[0].any() and torch.equal(*tables)


@runs
@pytest.mark.parametrize("slots", [1, 8, 61])
def test_fold_of_many_slots(slots):
    """Into the middle of longer lines; rows and columns in one launch, and one side without any."""
    length, total = 145, 160
    where = slice(10, 10 + length)
    generator = torch.Generator().manual_seed(slots)
    table = torch.randn(2, slots, length, generator=generator).mul(30).to(DEVICE)
    m, sums = torch.randn(2, total, generator=generator).mul(20).to(DEVICE)
    table[1].abs_()
    sums.abs_()
    expected, before = sums.double(), m.clone()
    all_m = torch.cat([m[None, where], table[0]]).double()
    top = all_m.amax(0)
    all_sums = torch.cat([expected[None, where], table[1].double()])
    expected[where] = (all_sums * (all_m - top).exp()).sum(0)
    before[where] = top.float()
    problem = make_problem(CUDA, CASES["a dimension of one"], torch.float32)
    call = backend._Call(problem, Block(0, 1, 0, 1, True, True, True, (0,)))
    none, all_of_it = (
        backend._fold(table, RowStats(m, sums), where, served) for served in (False, True)
    )
    rows_first = slots == 8
    call.start(
        backend._cuda.fold,
        rows=all_of_it if rows_first else none,
        cols=none if rows_first else all_of_it,
    )
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(m, before)


SCHEDULED = {
    "several blocks": Case(43, 72, 60.0, block_rows=80),
    "several tiles, running maximum": Case(70, 72, 60.0),
    "several tiles, bounded": Case(70, 72, 20.0),
}


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SCHEDULED.values(), ids=SCHEDULED)
def test_results_do_not_depend_on_the_schedule(case, dtype):
    """A missing barrier, or a wait for too few copies, does."""
    library = ctypes.CDLL(str(emulated_build.MODULE))
    expected = results(CUDA, case, dtype)
    try:
        for order in range(3):
            for copies_are_late in (0, 1):
                library.emulated_gpu_schedule(order, 1 + copies_are_late, copies_are_late)
                got = results(CUDA, case, dtype)
                assert all(map(torch.equal, expected, got)), (order, copies_are_late)
    finally:
        library.emulated_gpu_schedule(0, 0, 1)


# --- Faults --------------------------------------------------------------------------------------


@emulated
def test_an_error_of_cuda_is_an_exception_and_the_next_call_works():
    problem = make_problem(CUDA, CASES["one block, bounded"], torch.float32)
    plan = plan_blocks(37, ((True,) * 3,) * 3, 8192)
    library = ctypes.CDLL(str(emulated_build.MODULE))
    library.emulated_gpu_refuse_next_launch(b"invalid resource handle")
    with pytest.raises(RuntimeError, match="block_stats: invalid resource handle"):
        run_stats(CUDA, problem, plan)
    assert run_stats(CUDA, problem, plan)[1].isfinite().all()


@runs
def test_tensors_on_two_devices():
    problem = make_problem(CUDA, CASES["one block, bounded"], torch.float32)
    block = plan_blocks(37, ((True,) * 3,) * 3, 8192)[0]
    here, elsewhere = (lines_of(*torch.zeros(2, 111, device=of)) for of in (DEVICE, "meta"))
    with pytest.raises(RuntimeError, match="'cuda' was given tensors on .* and on meta"):
        CUDA.backend.block_weights(problem, block, elsewhere, here, Workspace(DEVICE, [block]))


@runs
def test_arguments_of_the_binding_are_keywords():
    with pytest.raises(TypeError):
        backend._cuda.Side(0, 0, 0, 4)
    assert backend._cuda.device_count() >= 1


@runs
@pytest.mark.parametrize("fused", [False, True])
def test_compiles_into_one_graph(fused):
    views = torch.randn(3, 20, 8, device=DEVICE).unbind()
    leaves = [value.requires_grad_() for value in (*views, torch.tensor(0.7, device=DEVICE))]

    def step(run):
        loss = run(*leaves)
        needed = leaves if not fused else [*leaves[:2], leaves[3]]
        return [loss, *torch.autograd.grad(loss, needed, materialize_grads=True)]

    def loss(e_i, e_t, e_it, alpha):
        e_it = None if fused else e_it
        weights = (alpha, 1.3)
        return gcl_kernels.gcl_loss(e_i, e_t, e_it, 20.0, fusion_weights=weights, backend="cuda")

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager_decomp_partition")
    for a, b in zip(step(compiled), step(loss), strict=True):
        torch.testing.assert_close(a, b)


# --- On a GPU only -------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(EMULATED or not CUDA.available, reason="needs a GPU and the extension")


def training_step(views: list[Tensor], scale: Tensor) -> list[Tensor]:
    loss = gcl_kernels.gcl_loss(*views, scale, backend="cuda")
    return [loss.detach(), *torch.autograd.grad(loss, [*views, scale])]


def leaves_on(device: str, count: int = 700) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(count, 96, generator=generator).to(device) for _ in range(3)]
    scale = torch.tensor(50.0, device=device, requires_grad=True)
    return [view.bfloat16().requires_grad_() for view in views], scale


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
    problem = make_problem(CUDA, CASES["one block, bounded"], torch.float32)
    call = backend._Call(problem, plan_blocks(37, ((True,) * 3,) * 3, 8192)[0])
    table = torch.zeros(4096, device="cuda:0").data_ptr()
    with pytest.raises(RuntimeError, match="block_stats: "):
        backend._cuda.block_stats(
            device=0, stream=torch.cuda.Stream("cuda:1").cuda_stream,
            product=backend._cuda.Product.float32, block=call.block,
            row_table=table, col_table=table,
        )  # fmt: skip
    assert all(map(torch.equal, expected, training_step(*leaves_on("cuda:0"))))
