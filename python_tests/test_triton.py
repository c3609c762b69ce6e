"""The Triton backend against dense float64, its geometry, and what it promises about bits.

Kernels run on a GPU where there is one. Without one they run in Triton's interpreter:
``test_in_the_interpreter`` starts this file once more, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from interpreter import (
    DEVICE,
    HAS_TRITON,
    INTERPRETED,
    ROUNDING,
    UNIT,
    checked_memory,
    error,
    interpreted_bfloat16,
    run_file,
    runs,
    starts,
)
from torch import Tensor

import gcl_kernels
from gcl_kernels.backends import triton as backend
from gcl_kernels.backends.triton import tiles
from gcl_kernels.blocks import Block, plan_blocks
from gcl_kernels.problem import Problem, Workspace
from gcl_kernels.spec import BoolTable

__all__ = ["interpreted_bfloat16"]  # a fixture of this module


@starts
def test_in_the_interpreter():
    run_file(__file__)


@pytest.fixture
def force_tile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], tiles.Tile]]:
    """Makes every launch use one row of the table."""

    def force(row: str) -> tiles.Tile:
        from gcl_kernels.backends.triton import primitives

        tile = tiles.TILES["sm_80", row]
        monkeypatch.setattr(primitives, "pick_tile", lambda *arguments: tile)
        return tile

    yield force


# --- Without any GPU and without Triton --------------------------------------------------------


@pytest.mark.parametrize("key", sorted(tiles.TILES), ids="-".join)
def test_every_row_of_the_table_fits_its_chip(key):
    chip, tile = tiles.CHIPS[key[0]], tiles.TILES[key]
    assert tile.shared_bytes(chip) <= chip.shared_bytes
    assert tile.size**2 / (chip.lanes * tile.warps) <= 64, "logits of a thread, in registers"
    for dtype in (torch.bfloat16, torch.float32):
        assert tile.slice_elements(dtype) >= 16, "the smallest slice that tl.dot multiplies"
    assert tile.size // 4 >= 16, "weights are computed a quarter of the columns at a time"
    assert len(tile.reason) > 10


def test_two_large_programs_share_a_multiprocessor_where_the_table_says_so():
    chip, tile = tiles.CHIPS["sm_90"], tiles.TILES["sm_90", "large"]
    assert 2 * (tile.shared_bytes(chip) + tiles.KIB) <= chip.shared_bytes + tiles.KIB


@pytest.mark.parametrize(
    ("capability", "arch", "name"),
    [
        ((8, 0), None, "sm_80"),
        ((8, 6), None, "sm_89"),
        ((8, 9), None, "sm_89"),
        ((9, 0), None, "sm_90"),
        ((10, 3), None, "sm_100"),
        ((12, 1), None, "sm_120"),
        ((14, 0), None, "sm_89"),
        (None, "gfx942:sramecc+:xnack-", "gfx942"),
        (None, "gfx950", "gfx950"),
    ],
)
def test_chip_of_a_device(capability, arch, name):
    chip = tiles.chip_of(capability, arch)
    assert chip is not None
    assert chip.name == name


def test_devices_without_a_row():
    assert tiles.chip_of((7, 5), None) is None
    assert tiles.chip_of(None, "gfx90a") is None
    assert tiles.chip_of(None, None) is None


def test_tile_choice():
    chip = tiles.CHIPS["sm_90"]
    assert tiles.pick_tile(chip, False, 512, 8192, 8192, False).size == 128
    assert tiles.pick_tile(chip, False, 512, 768, 768, True).size == 64
    assert tiles.pick_tile(chip, False, 500, 8192, 8192, False).size == 64, "rows not aligned"
    assert tiles.pick_tile(chip, True, 512, 8192, 8192, False) is tiles.TILES["sm_90", "fma"]
    amd = tiles.CHIPS["gfx942"]
    assert tiles.pick_tile(amd, True, 512, 8192, 8192, False) is tiles.TILES["gfx942", "large"]
    assert tiles.num_tiles(129, 128, False, 128) == 2
    assert tiles.num_tiles(257, 257, True, 128) == 6


@pytest.mark.parametrize("leading", [(), (2, 2)])
@pytest.mark.parametrize("cols", [1, 16, 37])
def test_rows_of_the_workspace_are_aligned(cols, leading):
    block = Block(0, 5, 0, cols, True, True, False, ())
    workspace = Workspace(torch.device("cpu"), [block])
    shape = (*leading, *block.shape)
    tile = workspace.tile(0, shape, torch.bfloat16)
    assert tile.shape == shape and tile.stride(-1) == 1
    for row in tile.flatten(0, -2) if not leading else tile[1, 1]:
        assert row.data_ptr() % 32 == 0
    assert workspace.tile(0, shape, torch.bfloat16).data_ptr() == tile.data_ptr()


def run_python(code: str, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env={**env, **environment}, capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip


def test_importing_the_package_does_not_import_triton():
    code = (
        "import sys, torch; before = 'triton' in sys.modules\n"
        "import gcl_kernels; from gcl_kernels.backends import triton; triton.why_unavailable()\n"
        "print(before, 'triton' in sys.modules)"
    )
    before, after = run_python(code).split()
    assert before == after


def test_reasons_for_being_unavailable():
    ask = "from gcl_kernels.backends import triton; print(triton.why_unavailable())"
    absent = "import sys; sys.modules['triton'] = None; "
    assert run_python(absent + ask).strip() == "Triton is not installed: pip install triton"
    no_gpu = run_python(ask, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="").strip()
    assert no_gpu == ("no CUDA or ROCm device" if HAS_TRITON else no_gpu)


def test_calls_that_it_cannot_serve():
    reason = backend.why_not(torch.device("cuda"), torch.float64)
    assert reason is not None and "float64" in reason
    assert backend.why_not(torch.device("cuda"), torch.bfloat16) is None
    z = torch.zeros(4, 4, dtype=torch.float64)
    problem = Problem(z, z, None, None, torch.ones((), dtype=torch.float64), None, True)
    with pytest.raises(RuntimeError, match="'triton' cannot serve this call: no float64"):
        backend.block_rows(problem)


# --- Geometry ------------------------------------------------------------------------------------


def blocks_of_many_shapes() -> list[tuple[Block, int]]:
    """(block, number of samples)."""
    return [
        (block, num_samples)
        for num_samples in (1, 2, 16, 37, 70, 150, 400)
        for candidates in (((True,) * 3,) * 3, ((False, True), (True, False)))
        for block_rows in (48, 160, 8192)
        for block in plan_blocks(num_samples, candidates, block_rows)
    ]


if HAS_TRITON:
    import triton
    import triton.language as tl

    from gcl_kernels.backends.triton.primitives import may_hold_same_sample, tile_of

    @triton.jit
    def geometry_kernel(
        out, num_row_tiles, num_col_tiles, id_offset, id_period,
        DIAGONAL: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        row, col = tile_of(program, num_row_tiles, num_col_tiles, DIAGONAL)
        masks = may_hold_same_sample(row * TILE, col * TILE, id_offset, id_period, TILE)
        tl.store(out + 3 * program, row)
        tl.store(out + 3 * program + 1, col)
        tl.store(out + 3 * program + 2, masks.to(tl.int32))

    @triton.jit
    def order_kernel(
        out, num_row_tiles, num_col_tiles, count, DIAGONAL: tl.constexpr, SIZE: tl.constexpr
    ):  # fmt: skip
        programs = tl.minimum(tl.arange(0, SIZE), count - 1)
        row, col = tile_of(programs, num_row_tiles, num_col_tiles, DIAGONAL)
        tl.store(out + 2 * programs, row)
        tl.store(out + 2 * programs + 1, col)


def visiting_order(num_row_tiles: int, num_col_tiles: int, diagonal: bool) -> Tensor:
    """(row, column) of every program's tile [programs, 2]."""
    count = tiles.num_tiles(num_row_tiles, num_col_tiles, diagonal, 1)
    out = torch.full((count, 2), -1, dtype=torch.int32, device=DEVICE)
    order_kernel[(1,)](
        out, num_row_tiles, num_col_tiles, count, DIAGONAL=diagonal,
        SIZE=triton.next_power_of_2(count),
    )  # fmt: skip
    return out.cpu()


@runs
def test_every_tile_has_one_program():
    for rows in (*range(1, 35), 64):
        for cols in (*range(1, 20), 33, 64):
            visited = visiting_order(rows, cols, False)
            assert sorted(map(tuple, visited.tolist())) == [
                (r, c) for r in range(rows) for c in range(cols)
            ]
    for count in range(1, 70):
        visited = visiting_order(count, count, True)
        assert sorted(map(tuple, visited.tolist())) == [
            (r, c) for r in range(count) for c in range(r, count)
        ]


@runs
@pytest.mark.parametrize("diagonal", [False, True])
def test_programs_that_run_together_share_operands(diagonal):
    visited = visiting_order(64, 64, diagonal)
    for first in range(0, len(visited) - 132, 44):
        rows, cols = visited[first : first + 132].unbind(1)
        # Two groups of 8 rows where one ends; on a triangle, its upper and its lower part.
        assert len(rows.unique()) + len(cols.unique()) <= 2 * (8 + 17) + diagonal * 18


@runs
def test_tiles_are_visited_once_and_masked_where_equal_ids_can_be():
    size = 16
    unmasked = 0
    for block, num_samples in blocks_of_many_shapes():
        if max(block.shape) > 500 or num_samples == 2:
            continue
        count = tiles.num_tiles(*block.shape, block.diagonal, size)
        out = torch.full((count, 3), -1, dtype=torch.int32, device=DEVICE)
        geometry_kernel[(count,)](
            out, *(-(-length // size) for length in block.shape), *block.id_diagonals,
            DIAGONAL=block.diagonal, TILE=size,
        )  # fmt: skip
        visited = {(row, col): bool(masked) for row, col, masked in out.tolist()}
        assert len(visited) == count
        # Tiles that stick out are masked in any case.
        for row in range(block.shape[0] // size):
            for col in range(row if block.diagonal else 0, block.shape[1] // size):
                first = (col - row) * size - size + 1
                crossed = any(
                    (block.row_start - block.col_start - difference) % num_samples == 0
                    for difference in range(first, first + 2 * size - 1)
                )
                assert visited[row, col] == crossed, (block, row, col)
                unmasked += not crossed
    assert unmasked > 100


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
    "dimension no multiple of 8": Case(45, 67, 50.0, block_rows=96),
    "aligned": Case(64, 64, 30.0, block_rows=64),
    "many blocks": Case(70, 32, 14.0, block_rows=48),
    "ids": Case(50, 32, 100.0, ids=True, block_rows=80),
    "two views, off the diagonal": Case(75, 48, 100.0, candidates=((False, True), (True, False))),
    "one-sided candidates": Case(
        41, 40, 20.0, candidates=((True, True, False), (False, True, True), (False, False, False)),
    ),
    "one-sided, no bound": Case(
        41, 40, 60.0, candidates=((False, True, False), (False, False, True), (True, False, False)),
        block_rows=32, ids=True,
    ),
    "not normalised": Case(40, 20, 3.0, unit_rows=False, block_rows=64),
}  # fmt: skip


def make_problem(case: Case, dtype: torch.dtype) -> Problem:
    generator = torch.Generator().manual_seed(case.num_samples + case.dim)
    num_rows = len(case.candidates) * case.num_samples
    z = torch.randn(num_rows, case.dim, generator=generator, dtype=torch.float64)
    if case.unit_rows:
        z = torch.nn.functional.normalize(z)
    z = z.to(DEVICE, dtype)
    ids = None
    if case.ids:
        ids = torch.randint(0, case.num_samples // 2, (case.num_samples,), generator=generator)
        ids = ids.repeat(len(case.candidates)).to(DEVICE)
    scale = torch.tensor(case.scale, dtype=torch.float32, device=DEVICE)
    return Problem(z, z, ids, ids, scale, None, case.unit_rows)


def make_mask(case: Case, problem: Problem) -> Tensor:
    """True where a column is a negative of the row."""
    ids = problem.ids_rows
    if ids is None:
        ids = torch.arange(case.num_samples, device=DEVICE).repeat(len(case.candidates))
    table = torch.tensor(case.candidates, device=DEVICE)
    n = case.num_samples
    table = table.repeat_interleave(n, 0).repeat_interleave(n, 1)
    return table & (ids[:, None] != ids[None, :])


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
    problem: Problem, mask: Tensor, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """neg_lse and H, computed densely in ``dtype`` from the rounded embeddings."""
    z = problem.z_rows.to(dtype)
    x = problem.scale.to(dtype) * (z @ z.T)
    lse = x.masked_fill(~mask, -torch.inf).logsumexp(1)
    weights = torch.where(mask, grad.to(dtype)[:, None] * (x - lse[:, None]).exp(), 0)
    return lse, weights + weights.T


def bound(case: Case, of_float32: float, dtype: torch.dtype) -> float:
    """Twice the dense float32 error; and of four roundings of numbers as large as a logit (x, lse,
    and both in base 2), each a relative error of exp(x - lse); and H rounded once."""
    largest = case.scale if case.unit_rows else case.scale * 4 * case.dim
    return 2 * of_float32 + 4 * max(largest, 1.0) * UNIT + ROUNDING[dtype]


def check_block_functions(case: Case, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype)
    plan = plan_blocks(case.num_samples, case.candidates, case.block_rows)
    mask = make_mask(case, problem)
    # Positive and negative, and large enough that no weight of a half type is subnormal.
    grad = torch.randn(mask.shape[0], generator=torch.Generator().manual_seed(1)).to(DEVICE) * 64
    grad *= mask.any(1)
    lse64, h64 = dense(problem, mask, grad, torch.float64)
    lse32, h32 = dense(problem, mask, grad, torch.float32)
    h32 = h32.nan_to_num(0)
    h64 = h64.nan_to_num(0)

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
    check_block_functions(CASES[name], dtype)


@runs
@pytest.mark.parametrize("row", ["large", "small", "fma"])
@pytest.mark.parametrize("name", ["dimension no multiple of 8", "one-sided, no bound"])
def test_every_tile_size(name, row, force_tile):
    force_tile(row)
    case = replace(CASES[name], num_samples=90, block_rows=144)
    check_block_functions(case, torch.float32)


@runs
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_ids_of_every_dtype(dtype):
    case = CASES["ids"]
    problem = make_problem(case, torch.float32)
    plan = plan_blocks(case.num_samples, case.candidates, case.block_rows)
    assert problem.ids_rows is not None
    ids = problem.ids_rows.to(dtype)
    other = replace(problem, ids_rows=ids, ids_cols=ids)
    for expected, got in zip(run_stats(problem, plan), run_stats(other, plan), strict=True):
        assert torch.equal(expected, got)


@runs
@pytest.mark.parametrize(("scale", "bad"), [(20, torch.nan), (100, torch.nan), (100, torch.inf)])
def test_not_a_number_reaches_every_row_that_meets_it(scale, bad):
    case = Case(40, 16, scale, block_rows=48)
    problem = make_problem(case, torch.float32)
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
@pytest.mark.parametrize("name", ["many blocks", "ids"])
def test_two_runs_give_the_same_bits(name):
    case = CASES[name]
    problem = make_problem(case, torch.bfloat16)
    plan = plan_blocks(case.num_samples, case.candidates, case.block_rows)
    first, second = run_stats(problem, plan), run_stats(problem, plan)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    lse = first[1].log() + first[0]
    grad = torch.ones_like(lse)
    assert torch.equal(run_weights(problem, plan, lse, grad), run_weights(problem, plan, lse, grad))


@runs
def test_more_than_2_to_the_31_elements():
    dim, num_rows = 1 << 16, (1 << 15) + 32
    try:
        # Pages that nobody touches cost nothing.
        z = torch.empty(num_rows, dim, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("needs 4.3 GB of address space")
    last = slice(num_rows - 16, num_rows)
    z[last] = torch.randn(16, dim, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    scale = torch.tensor(1 / dim, device=DEVICE)
    problem = Problem(z, z, None, None, scale, None, False)
    block = Block(num_rows - 16, num_rows, num_rows - 16, num_rows, True, True, True, (0,))
    stats = backend.start_stats(problem)
    backend.block_stats(problem, block, stats, stats, Workspace(z.device, [block]))
    x = (z[last].double() @ z[last].double().T) / dim
    x.fill_diagonal_(-torch.inf)
    lse = stats.sum[last].log() + stats.max[last]
    assert error(lse, x.logsumexp(1)) < 1e-5


# --- Memory --------------------------------------------------------------------------------------

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="watches the interpreter's memory")


def run_both(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    problem = make_problem(case, dtype)
    plan = plan_blocks(case.num_samples, case.candidates, case.block_rows)
    maxima, sums = run_stats(problem, plan)
    lse = torch.where(sums > 0, sums.log() + maxima, torch.inf)
    return maxima, sums, run_weights(problem, plan, lse, torch.ones_like(lse))


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_no_access_out_of_bounds_and_no_race(name, dtype):
    plain = run_both(CASES[name], dtype)
    for reverse in (False, True):
        with checked_memory(reverse) as memory:
            checked = run_both(CASES[name], dtype)
        assert {"stats_kernel", "fold_kernel", "weights_kernel"} <= set(memory.launches)
        for a, b in zip(plain, checked, strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), "depends on the programs' order"


if HAS_TRITON:

    @triton.jit
    def faulty_kernel(out, FAULT: tl.constexpr):
        program = tl.program_id(0)
        if FAULT == "bounds":
            tl.store(out + 4 * program, 1.0)
        elif FAULT == "writes":
            tl.store(out, 1.0)
        else:
            tl.store(out + program, tl.load(out + 1))


@needs_interpreter
@pytest.mark.parametrize(
    ("fault", "message"),
    [("bounds", "outside"), ("writes", "two programs write"), ("reads", "another program writes")],
)
def test_the_memory_check_sees_faults(fault, message):
    from triton.runtime.errors import InterpreterError

    with checked_memory(), pytest.raises((AssertionError, InterpreterError), match=message):
        faulty_kernel[(2,)](torch.zeros(3), FAULT=fault)


@needs_interpreter
@pytest.mark.parametrize("loss", ["gcl", "clip"])
def test_a_small_batch_is_one_block_and_three_launches(loss):
    views = [torch.randn(70, 16, requires_grad=True) for _ in range(3 if loss == "gcl" else 2)]
    function = gcl_kernels.gcl_loss if loss == "gcl" else gcl_kernels.clip_loss
    with checked_memory() as memory:
        function(*views, 20.0, backend="triton").backward()
    assert memory.launches == ["stats_kernel", "fold_kernel", "weights_kernel"]
    table = ((True,) * 3,) * 3 if loss == "gcl" else ((False, True), (True, False))
    for num_samples in (1, 256, 1024, 2048):
        assert len(plan_blocks(num_samples, table, backend.BLOCK_ROWS)) == 1


# --- Losses, against the reference backend in float64 --------------------------------------------


def loss_and_gradients(
    views: list[Tensor], scale: float, backend_name: str, frozen: tuple[int, ...], **options: object
) -> list[Tensor]:
    dtype = torch.float64 if backend_name == "reference" else torch.float32
    leaves = [
        view.detach().to(DEVICE, dtype).requires_grad_(v not in frozen)
        for v, view in enumerate(views)
    ]
    logit_scale = torch.tensor(scale, dtype=dtype, device=DEVICE, requires_grad=True)
    loss = gcl_kernels.multiview_contrastive_loss(
        leaves, logit_scale, backend=backend_name, **options
    )
    loss.backward()
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [loss.detach(), *grads, logit_scale.grad]


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


@runs
@pytest.mark.parametrize("block_rows", [64, 8192])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, block_rows, monkeypatch):
    monkeypatch.setattr(backend, "BLOCK_ROWS", block_rows)
    num_samples, dim, scale, options = LOSSES[name]
    options = {"frozen": (), **options}
    if "sample_ids" in options:
        options["sample_ids"] = options["sample_ids"].to(DEVICE)
    num_views = len(options.get("candidates", "123"))
    generator = torch.Generator().manual_seed(3)
    views = [torch.randn(num_samples, dim, generator=generator) for _ in range(num_views)]
    expected = loss_and_gradients(views, scale, "reference", **options)
    dense32 = loss_and_gradients(views, scale, "tiled", **options)
    got = loss_and_gradients(views, scale, "triton", **options)
    case = Case(num_samples, dim, scale, unit_rows=options.get("normalize", True))
    for index, (g, d, e) in enumerate(zip(got, dense32, expected, strict=True)):
        assert error(g, e) <= bound(case, error(d, e), torch.float32), index


@runs
@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_one_sample_and_one_id(scale):
    for num_samples, ids in ((1, None), (33, torch.zeros(33, dtype=torch.int64, device=DEVICE))):
        views = [torch.randn(num_samples, 8) for _ in range(3)]
        for g, e in zip(
            loss_and_gradients(views, scale, "triton", (), sample_ids=ids),
            loss_and_gradients(views, scale, "reference", (), sample_ids=ids),
            strict=True,
        ):
            torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-5)


@runs
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_bad_input_gives_nan(bad, normalize):
    views = [torch.randn(40, 8) for _ in range(3)]
    views[1][11, 2] = bad
    loss = loss_and_gradients(views, 20.0, "triton", (), normalize=normalize)[0]
    assert loss.isnan()


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_in_a_cuda_graph_replays_to_the_same_bits():
    views = [torch.randn(700, 96, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    leaves = [view.requires_grad_() for view in views]
    scale = torch.tensor(50.0, device="cuda", requires_grad=True)
    inputs = [*leaves, scale]

    def step() -> list[Tensor]:
        loss = gcl_kernels.gcl_loss(*leaves, scale, backend="triton")
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

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
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
