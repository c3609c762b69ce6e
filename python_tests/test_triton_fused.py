"""The Triton kernels of fused views: their tiles, and their accesses to memory. What they compute
is in ``test_kernels``.

Without a GPU they run in Triton's interpreter: ``test_in_the_interpreter``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from block_checks import FUSED_CASES, TRITON, check_fused_block_functions, error, fused_results
from interpreter import DEVICE, checked_memory, run_file, runs, starts, watches_memory

import gcl_kernels
from gcl_kernels.backends import triton as triton_backend
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


@runs
@pytest.mark.parametrize("row", ["large", "small"])
@pytest.mark.parametrize("name", ["rows not aligned", "ids", "one-sided candidates"])
def test_bases_dealt_to_rows_of_one_product(name, row, monkeypatch):
    """Off in the table of tiles."""
    from gcl_kernels.backends.triton import primitives

    tile = replace(tiles.FUSED_TILES["sm_80", row], dealt=True)
    monkeypatch.setattr(primitives, "pick_tile", lambda *arguments: tile)
    case = replace(FUSED_CASES[name], num_samples=100, block_rows=80)
    check_fused_block_functions(TRITON, case, torch.float32)


def fused_gradients(n: int, frozen: tuple[int, ...], ids: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, 16, generator=generator) for _ in range(2)]
    values += [torch.tensor(of) for of in (20.0, 1.0, 0.5)]
    leaves = [of.to(DEVICE).requires_grad_(i not in frozen) for i, of in enumerate(values)]
    e_i, e_t, scale, *weights = leaves
    sample_ids = torch.arange(n, device=DEVICE) // 2 if ids else None
    gcl_kernels.gcl_loss(
        e_i, e_t, logit_scale=scale, fusion_weights=weights, backend="triton", sample_ids=sample_ids
    ).backward()
    return [leaf.grad for leaf in leaves if leaf.requires_grad]


@runs
@pytest.mark.parametrize(
    ("n", "rows", "frozen"),
    [
        (64, 32, ()),
        (75, 32, (1,)),
        (75, 40, ()),
        (64, 4096, (0,)),
        (75, 4096, ()),
        (75, 32, (0, 1)),
    ],
)
def test_weights_of_both_bases_as_one_matrix(n, rows, frozen, monkeypatch):
    """Off. One block, several, the last of another width, and a width that is padded."""
    monkeypatch.setattr(triton_backend, "FUSED_BLOCK_ROWS", rows)
    expected = fused_gradients(n, frozen, n == 75)
    products = []
    add_product = TRITON.backend.add_product

    def counted(accumulator, a, b):
        products.append(a.dim())
        add_product(accumulator, a, b)

    monkeypatch.setattr(TRITON.backend, "joins_bases", True)
    monkeypatch.setattr(TRITON.backend, "add_product", counted)
    joined = fused_gradients(n, frozen, n == 75)
    for got, wanted in zip(joined, expected, strict=True):
        assert error(got, wanted) < 1e-6
    blocks = -(-n // rows)
    assert products == [3] * (blocks**2 if len(frozen) < 2 else 0)


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
