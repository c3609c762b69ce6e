"""The Triton kernels of fused views: their tiles, and their accesses to memory. What they compute
is in ``test_kernels``.

Without a GPU they run in Triton's interpreter: ``test_in_the_interpreter``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from block_checks import FUSED_CASES, TRITON, check_fused_block_functions, fused_results
from interpreter import checked_memory, run_file, runs, starts, watches_memory

from gcl_kernels.backends.triton import tiles


@starts
def test_in_the_interpreter():
    run_file(__file__)


# --- Without Triton ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(tiles.FUSED_TILES), ids="-".join)
def test_every_row_of_the_table_fits_its_chip(key):
    chip, tile = tiles.CHIPS[key[0]], tiles.FUSED_TILES[key]
    assert tile.bases == 2
    assert tile.shared_bytes(chip) <= chip.shared_bytes
    assert (2 * tile.size) ** 2 / (chip.lanes * tile.warps) <= 64, "sums of a thread"
    assert tile.size // 4 >= 8, "places of a quarter of the columns"
    assert len(tile.reason) > 10


def test_the_tables_have_the_same_rows():
    assert tiles.FUSED_TILES.keys() == tiles.TILES.keys()


def test_tile_choice():
    chip = tiles.CHIPS["sm_90"]
    assert tiles.pick_tile(chip, False, 512, 4096, 4096, False, fused=True).size == 64
    assert tiles.pick_tile(chip, False, 512, 256, 256, True, fused=True).size == 32
    assert tiles.pick_tile(chip, True, 512, 4096, 4096, False, fused=True).slice_bytes == 64


# --- On a GPU or in the interpreter ---------------------------------------------------------------


@runs
@pytest.mark.parametrize("row", ["large", "small", "fma"])
@pytest.mark.parametrize("name", ["rows not aligned", "ids", "one-sided candidates"])
def test_every_tile_size(name, row, monkeypatch):
    from gcl_kernels.backends.triton import primitives

    tile = tiles.FUSED_TILES["sm_80", row]
    monkeypatch.setattr(primitives, "pick_tile", lambda *arguments: tile)
    case = replace(FUSED_CASES[name], num_samples=100, block_rows=80)
    check_fused_block_functions(TRITON, case, torch.float32)


SAME_ACCESSES = {
    "bounded at the limit", "ids, bounded", "no view is a base", "not normalised", "two samples",
    "views in another order",
}  # fmt: skip
"""Cases whose numbers are others and whose addresses are another case's."""


@watches_memory
@pytest.mark.parametrize("name", [name for name in FUSED_CASES if name not in SAME_ACCESSES])
def test_no_access_out_of_bounds_and_no_race(name):
    """Nor do results depend on the programs' order, or on what memory held before."""
    expected = fused_results(TRITON, FUSED_CASES[name], torch.bfloat16)
    with checked_memory(reverse=True) as memory:
        checked = fused_results(TRITON, FUSED_CASES[name], torch.bfloat16)
    assert len(set(memory.launches)) == 4
    for a, b in zip(expected, checked, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)
