"""The Triton backend: its geometry, its tiles, and its accesses to memory. What it computes is in
``test_kernels``.

Kernels run on a GPU where there is one. Without one they run in Triton's interpreter:
``test_in_the_interpreter`` starts this file once more, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from block_checks import CASES, FEW, TRITON, check_block_functions, error, results
from interpreter import (
    DEVICE,
    HAS_TRITON,
    checked_memory,
    run_file,
    runs,
    starts,
    watches_memory,
)
from torch import Tensor

import gcl_kernels
from gcl_kernels.backends import triton as triton_backend
from gcl_kernels.backends.triton import tiles
from gcl_kernels.blocks import Block, plan_blocks
from gcl_kernels.problem import Problem, Workspace, empty_stats


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
    assert tile.size**2 / (chip.lanes * tile.warps_of("stats")) <= 128
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


@pytest.mark.parametrize(
    ("dim", "rows", "fused_rows"),
    [(512, 8448, 4224), (768, 5632, 2816), (1024, 8448, 4224), (1280, 6656, 3328)],
)
def test_blocks_with_weights_fill_whole_waves(dim, rows, fused_rows):
    chip = tiles.CHIPS["sm_90"]
    assert tiles.wave_rows(chip, dim, triton_backend.BLOCK_ROWS, 256) == rows
    assert tiles.wave_rows(chip, dim, triton_backend.FUSED_BLOCK_ROWS, 128) == fused_rows
    waves = rows / 128 * -(-dim // 256) / chip.multiprocessors
    assert -(-waves // 1) - waves < 0.04
    assert tiles.wave_rows(chip, dim, 64, 256) == 64, "no tile"
    assert tiles.wave_rows(tiles.CHIPS["gfx942"], dim, 8192, 256) == 8192


def test_blocks_of_statistics_are_larger():
    z = torch.empty(3, 20_000, 768, dtype=torch.bfloat16, device="meta")
    backend = triton_backend.Triton()
    backend.why_not = lambda *arguments: None
    assert backend.stats_block_rows(z) == 4 * backend.block_rows(z)
    assert backend.fused_stats_block_rows(z, 3) == 3 * backend.fused_block_rows(z, 3)


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


@starts
def test_importing_the_package_does_not_import_triton():
    code = (
        "import sys, torch; before = 'triton' in sys.modules\n"
        "import gcl_kernels; gcl_kernels.backends()\n"
        "print(before, 'triton' in sys.modules)"
    )
    before, after = run_python(code).split()
    assert before == after


@starts
def test_reasons_for_being_unavailable():
    ask = "import gcl_kernels; print(gcl_kernels.backends()['triton'])"
    absent = "import sys; sys.modules['triton'] = None; "
    assert run_python(absent + ask).strip() == "Triton is not installed: pip install triton"
    no_gpu = run_python(ask, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="").strip()
    assert no_gpu == ("no CUDA or ROCm device" if HAS_TRITON else no_gpu)


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
        out, num_row_tiles, num_col_tiles, id_offset, id_period, count,
        DIAGONAL: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr,
    ):  # fmt: skip
        """Of all programs at once: for each an interpreted launch takes a millisecond."""
        programs = tl.minimum(tl.arange(0, SIZE), count - 1)
        row, col = tile_of(programs, num_row_tiles, num_col_tiles, DIAGONAL)
        masks = may_hold_same_sample(row * TILE, col * TILE, id_offset, id_period, TILE)
        tl.store(out + 3 * programs, row)
        tl.store(out + 3 * programs + 1, col)
        tl.store(out + 3 * programs + 2, masks.to(tl.int32))


def geometry(
    rows: int, cols: int, diagonal: bool, tile: int = 1, id_diagonals: tuple[int, int] = (0, 1)
) -> Tensor:
    """(row, column, whether it masks) of every program's tile [programs, 3]."""
    count = tiles.num_tiles(rows, cols, diagonal, tile)
    out = torch.full((count, 3), -1, dtype=torch.int32, device=DEVICE)
    geometry_kernel[(1,)](
        out, -(-rows // tile), -(-cols // tile), *id_diagonals, count,
        DIAGONAL=diagonal, TILE=tile, SIZE=triton.next_power_of_2(count),
    )  # fmt: skip
    return out.cpu()


@runs
def test_every_tile_has_one_program():
    # GROUP_ROWS rows of tiles, some more, and two groups.
    for rows in (*range(1, 11), 16, 17, 31, 33, 64):
        for cols in (*range(1, 11), 16, 33, 64):
            visited = geometry(rows, cols, False)[:, :2]
            assert sorted(map(tuple, visited.tolist())) == [
                (r, c) for r in range(rows) for c in range(cols)
            ]
    for count in range(1, 70):
        visited = geometry(count, count, True)[:, :2]
        assert sorted(map(tuple, visited.tolist())) == [
            (r, c) for r in range(count) for c in range(r, count)
        ]


@runs
@pytest.mark.parametrize("diagonal", [False, True])
def test_programs_that_run_together_share_operands(diagonal):
    visited = geometry(64, 64, diagonal)[:, :2]
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
        visited = geometry(*block.shape, block.diagonal, size, block.id_diagonals).tolist()
        masks = {(row, col): bool(masked) for row, col, masked in visited}
        assert len(masks) == len(visited)
        # Tiles that stick out are masked in any case.
        for row in range(block.shape[0] // size):
            for col in range(row if block.diagonal else 0, block.shape[1] // size):
                first = (col - row) * size - size + 1
                crossed = any(
                    (block.row_start - block.col_start - difference) % num_samples == 0
                    for difference in range(first, first + 2 * size - 1)
                )
                assert masks[row, col] == crossed, (block, row, col)
                unmasked += not crossed
    assert unmasked > 100


# --- Tiles ---------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("row", ["large", "small", "fma"])
@pytest.mark.parametrize("name", ["rows not aligned", "one-sided, no bound"])
def test_every_tile_size(name, row, force_tile):
    force_tile(row)
    case = replace(CASES[name], num_samples=90, block_rows=144)
    check_block_functions(TRITON, case, torch.float32)


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
    stats = empty_stats(problem, problem.z_rows)
    TRITON.backend.block_stats(problem, block, stats, stats, Workspace(z.device, [block]))
    x = (z[last].double() @ z[last].double().T) / dim
    x.fill_diagonal_(-torch.inf)
    lse = stats.sum[last].log() + stats.max[last]
    assert error(lse, x.logsumexp(1)) < 1e-5


# --- Kept tiles: off -----------------------------------------------------------------------------


def loss_and_gradients(views: int, n: int, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, 24, generator=generator).to(DEVICE) for _ in range(views)]
    leaves += [torch.tensor(30.0, device=DEVICE)]
    for leaf in leaves:
        leaf.requires_grad_()
    *of_views, scale = leaves
    options = {"logit_scale": scale, "backend": "triton", **options}
    loss = gcl_kernels.gcl_loss(*of_views, **options)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@runs
@pytest.mark.parametrize(
    "options",
    [{}, {"sample_ids": torch.arange(50) // 2}, {"false_negative_margin": 0.0}],
    ids=["default", "ids", "limits"],
)
@pytest.mark.parametrize(
    ("views", "rows", "kept"),
    [(3, 8192, 1 << 20), (3, 64, 5000), (2, 8192, 1 << 20), (2, 32, 5000)],
)
def test_kept_tiles_change_no_bit(views, rows, kept, options, monkeypatch):
    """All of them, and those of the first blocks alone."""
    from gcl_kernels.backends.triton import fused_weights, weights

    options = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    module, name = (weights, "BLOCK_ROWS") if views == 3 else (fused_weights, "FUSED_BLOCK_ROWS")
    for stats in ("", "STATS_"):
        attribute = name.replace("BLOCK", f"{stats}BLOCK")
        monkeypatch.setattr(triton_backend, attribute, rows)
    expected = loss_and_gradients(views, 50, **options)
    start, launched = module.start, []

    def noting(kernel: Any, grid: tuple[int, ...], named: dict[str, Any]) -> None:
        if "kept" in named:
            launched.append(named["kept"] is not None)
        start(kernel, grid, named)

    monkeypatch.setattr(module, "start", noting)
    monkeypatch.setattr(TRITON.backend, "keeps_tiles", True)
    monkeypatch.setattr(TRITON.backend, "kept_elements", kept)
    got = loss_and_gradients(views, 50, **options)
    assert all(map(torch.equal, got, expected))
    assert any(launched) and all(launched) == (rows > 100)


# --- Memory --------------------------------------------------------------------------------------


@watches_memory
@pytest.mark.parametrize(
    ("name", "dtype"),  # float32 differs by slices of D alone
    [*((name, torch.bfloat16) for name in CASES), *((name, torch.float32) for name in sorted(FEW))],
    ids=str,
)
def test_no_access_out_of_bounds_and_no_race(name, dtype):
    """Nor do results depend on the programs' order, or on what memory held before."""
    expected = results(TRITON, CASES[name], dtype)
    with checked_memory(reverse=True) as memory:
        checked = results(TRITON, CASES[name], dtype)
    assert {"stats_kernel", "fold_kernel", "weights_kernel"} <= set(memory.launches)
    for a, b in zip(expected, checked, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


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


@watches_memory
@pytest.mark.parametrize(
    ("fault", "message"),
    [("bounds", "outside"), ("writes", "two programs write"), ("reads", "another program writes")],
)
def test_the_memory_check_sees_faults(fault, message):
    from triton.runtime.errors import InterpreterError

    with checked_memory(), pytest.raises((AssertionError, InterpreterError), match=message):
        faulty_kernel[(2,)](torch.zeros(3), FAULT=fault)


@watches_memory
@pytest.mark.parametrize("loss", ["gcl", "clip"])
def test_a_small_batch_is_one_block_and_five_launches(loss):
    views = [torch.randn(70, 16, requires_grad=True) for _ in range(3 if loss == "gcl" else 2)]
    function = gcl_kernels.gcl_loss if loss == "gcl" else gcl_kernels.clip_loss
    with checked_memory() as memory:
        function(*views, 20.0, backend="triton").backward()
    assert memory.launches == [
        "embed_kernel", "stats_kernel", "fold_kernel", "weights_kernel", "gradients_kernel"
    ]  # fmt: skip
    table = ((True,) * 3,) * 3 if loss == "gcl" else ((False, True), (True, False))
    for num_samples in (1, 256, 1024, 2048):
        assert len(plan_blocks(num_samples, table, triton_backend.BLOCK_ROWS)) == 1
