"""Statistics in strips and weights by TMA: off in the table of tiles, right where they are on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from block_checks import (
    CASES,
    FEW,
    RECTANGLES,
    TRITON,
    Case,
    check_block_functions,
    check_rectangle,
    error,
    make_problem,
    results,
    run_stats,
)
from interpreter import DEVICE, checked_memory, run_file, runs, starts, watches_memory

from gcl_kernels.backends.triton import tiles
from gcl_kernels.blocks import Block
from gcl_kernels.problem import Problem, Workspace, empty_stats

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@starts
def test_in_the_interpreter():
    run_file(__file__)


@pytest.fixture
def by_tma(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has every launch whose rows are aligned take a tile by TMA, two or more in a strip."""

    def switch(row: str = "small", strip: int = 2) -> None:
        from gcl_kernels.backends.triton import primitives

        tile = tiles.TILES["sm_80", row]
        tma = replace(tile, strip=strip, stats_warps=4, tma_warps=4)

        def pick(chip, ieee, dim, *arguments):
            return tma if dim % 16 == 0 else tile

        monkeypatch.setattr(primitives, "pick_tile", pick)

    return switch


def aligned(case: Case) -> Case:
    """The case in a dimension that TMA takes, and that ends within a slice of it."""
    return replace(case, dim=case.dim if case.dim % 16 == 0 else 80)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_block_functions(name, dtype, by_tma):
    if dtype != torch.float32 and name not in FEW:
        pytest.skip("as float32")
    by_tma()
    check_block_functions(TRITON, aligned(CASES[name]), dtype)


@runs
@pytest.mark.parametrize("name", RECTANGLES)
def test_rectangle(name, by_tma):
    by_tma()
    check_rectangle(TRITON, aligned(RECTANGLES[name]), torch.bfloat16)


@runs
@pytest.mark.parametrize("strip", [1, 3, 8])
def test_large_tiles_and_strips_of_any_number(strip, by_tma):
    by_tma("large", strip)
    check_block_functions(TRITON, Case(200, 48, 100.0, block_rows=592), torch.float32)


LEVELS = [
    (0, 39, 0, 41, 0, -79, 0, -81, 5),  # on either side of what one shift serves
    (0, 200, -200, 0, 200, 400, 0, -200, 0),
    (90, 0, 0, 0, 0, 0, 0, 0, 0),  # the first tile of a strip is the one far off
    (-150, -150, -100, -60, -20, 20, 60, 100, 150),
]


def noted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What launches of strips note of tiles that they leave out."""
    from gcl_kernels.backends.triton import strips

    start, notes = strips.start, []

    def noting(kernel, grid, named):
        start(kernel, grid, named)
        notes.append(named["left_out"].clone())

    monkeypatch.setattr(strips, "start", noting)
    return notes


@runs
@pytest.mark.parametrize("strip", [2, 8])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_tiles_far_from_their_strips_shift(levels, strip, by_tma, monkeypatch):
    """Rows of a tile each have logits about one level, with all columns."""
    by_tma(strip=strip)
    notes = noted(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    z_rows, z_cols = (torch.randn(n, 16, generator=generator) for n in (570, 70))
    z_rows[:, 0], z_cols[:, 0] = torch.tensor(levels).repeat_interleave(64)[:570], 1
    z_rows, z_cols = z_rows.to(DEVICE), z_cols.to(DEVICE)
    problem = Problem(z_rows, z_cols, None, None, torch.ones((), device=DEVICE), None, False)
    stats = [empty_stats(problem, side) for side in (z_rows, z_cols)]
    block = Block(0, 570, 0, 70, True, True, False, ())
    TRITON.backend.block_stats(problem, block, *stats, Workspace(z_rows.device, [block]))
    x = z_rows.double() @ z_cols.double().T
    for of_side, axis in zip(stats, (1, 0), strict=True):
        assert error(of_side.sum.log() + of_side.max, x.logsumexp(axis)) < 1e-6
    tiles_left_out = sum(int(note).bit_count() for note in notes[0])
    assert 0 < tiles_left_out < 9 * 2


@runs
@pytest.mark.parametrize("strip", [2, 8])
def test_tiles_far_from_their_strips_shift_on_the_diagonal(strip, by_tma, monkeypatch):
    """Levels multiply: those of two samples without a common id."""
    by_tma(strip=strip)
    notes = noted(monkeypatch)
    z = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    z[:, 0] = torch.tensor([1, 9, 8, 0, -12], device=DEVICE).repeat_interleave(64)[:300]
    ids = torch.arange(300, device=DEVICE) // 3
    ids[:70] = 0  # a tile without a negative
    problem = Problem(z, z, ids, ids, torch.ones((), device=DEVICE), None, False)
    stats = empty_stats(problem, z)
    block = Block(0, 300, 0, 300, True, True, True, (0,))
    TRITON.backend.block_stats(problem, block, stats, stats, Workspace(z.device, [block]))
    x = (z.double() @ z.double().T).masked_fill(ids[:, None] == ids, -torch.inf)
    assert error(stats.sum.log() + stats.max, x.logsumexp(1)) < 1e-6
    assert any(note.any() for note in notes)


@runs
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_a_number_reaches_every_row_that_meets_it(bad, by_tma):
    by_tma()
    case = Case(60, 16, 100.0, block_rows=176)
    problem = make_problem(TRITON, case, torch.float32)
    problem.z_rows[7, 3] = bad
    maxima, sums = run_stats(TRITON, problem, case.plan)
    lse = sums.log() + maxima
    if bad == torch.inf:
        assert lse[7].isnan(), "inf - inf"
        return
    meets = torch.ones(180, dtype=torch.bool)
    meets[[67, 127]] = False  # its sample's other views
    assert torch.equal(lse.isnan().cpu(), meets)


@watches_memory
@pytest.mark.parametrize("name", ["several tiles", "two views, off the diagonal", "ids"])
def test_no_access_out_of_bounds_and_no_race(name, by_tma):
    """Nor do results depend on the programs' order, or on what memory held before."""
    by_tma()
    case = aligned(CASES[name])
    expected = results(TRITON, case, torch.bfloat16)
    with checked_memory(reverse=True) as memory:
        checked = results(TRITON, case, torch.bfloat16)
    assert {"strips_kernel", "left_out_kernel", "fold_kernel", "weights_kernel"} <= set(
        memory.launches
    )
    for a, b in zip(expected, checked, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


@runs
def test_others_keep_the_kernels_of_today(monkeypatch):
    """Rows that are not aligned, and log weights and limits."""
    from gcl_kernels.backends.triton import primitives, strips

    tile = replace(tiles.TILES["sm_90", "large"], strip=8, tma_warps=4)
    table = {**tiles.TILES, ("sm_90", "large"): tile}
    monkeypatch.setattr(tiles, "TILES", table)
    picked = tiles.pick_tile(tiles.CHIPS["sm_90"], False, 67, 4096, 4096, True)
    assert not picked.strip and not picked.tma_warps
    monkeypatch.setattr(primitives, "pick_tile", lambda *arguments: tile)
    monkeypatch.setattr(strips, "start", lambda *arguments: pytest.fail("strips"))
    check_block_functions(TRITON, CASES["weights and limits"], torch.float32)
