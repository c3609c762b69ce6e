"""Every Triton kernel with every tile, for a chip of each kind, which needs no GPU.

The compiler's resource report and the disassembly say whether a row of the table is sound: nothing
spilled, shared memory within the chip's, products on the matrix units. ``make kernels-report``
compiles what this leaves out: chips whose rows are much like those of ``COMPILED_FOR``, the small
tiles that chips share, and the kernels over samples, which have no tiles, on chips like those here.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import os
import re

import pytest
import torch

from benchmarks.kernels_report import (
    FOLDS,
    SAMPLE_KERNELS,
    TILE_KERNELS,
    TMA_KERNELS,
    Resources,
    Variant,
    inspect_all,
    programs,
    report,
    variants,
)
from gcl_kernels.backends.triton.tiles import CHIPS, KIB, TILES

HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(
    not HAS_TRITON or "TRITON_INTERPRET" in os.environ,
    reason="needs Triton's compiler",
)


COMPILED_FOR = ("sm_80", "sm_90", "sm_100", "gfx942")

SAMPLES = (
    ("sm_90", torch.bfloat16), ("sm_90", torch.float32), ("sm_100", torch.float32),
    ("gfx942", torch.bfloat16),
)  # fmt: skip
"""Chips and dtypes for which the kernels over samples are compiled here."""


def triton_version() -> tuple[int, ...]:
    if not HAS_TRITON:
        return (0,)
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def is_compiled_elsewhere(v: Variant) -> bool:
    """Whether sm_80 has the same code, far from the chip's own limits."""
    if v.chip in ("sm_80", "gfx942") or v.row == "large":
        return False
    if (v.chip, v.row) == ("sm_90", "small") and not v.kernel.startswith("fused"):
        return False  # HGMMA
    return v.tile == dataclasses.replace(v, chip="sm_80").tile


def is_looser(v: Variant) -> bool:
    """Whether fused weights with the same tile take more registers, and other chips show how."""
    return v.kernel == "fused_stats" and v.row != "fma" and v.chip not in ("sm_90", "gfx942")


def chosen() -> list[Variant]:
    """Every kernel with every tile on every chip, as it takes most registers: on the diagonal, the
    fused weights with ids. What a row is used for beside that, on the chip that has it all."""
    half, full = torch.bfloat16, torch.float32
    kept = []
    for v in variants(COMPILED_FOR):
        fused = v.kernel.startswith("fused")
        if v.kernel in SAMPLE_KERNELS:
            kept += [v] if (v.chip, v.dtype) in SAMPLES else []
        elif v.kernel in FOLDS:
            kept.append(v)
        elif (v.row, v.dtype) == ("small", full) or is_compiled_elsewhere(v):
            continue  # half types take as many bytes
        elif v.tma:
            whole = v.chip == "sm_90" and v.kernel != "left_out" and not v.diagonal
            kept += [v] if v.ids or whole else []
        elif v.options:
            kept += [v] if v.chip == "sm_90" else []
        elif fused:
            ids = (v.kernel, v.row) == ("fused_weights", "large")
            if v.diagonal and v.ids == ids and not is_looser(v):
                kept.append(v)
        elif v.ids and v.chip != "sm_90":
            continue
        elif (
            v.chip == "sm_90"
            or (v.diagonal and (v.dtype == half or v.row == "fma"))
            or (v.chip, v.row, v.dtype) == ("gfx942", "large", full)
        ):
            kept.append(v)
    for kernel in TILE_KERNELS:
        # A dimension whose rows are not aligned, and one that ends within a slice.
        kept.append(Variant(kernel, "sm_90", "small", half, ids=True, dim=67))
    for kernel in ("stats", "weights"):
        kept.append(Variant(kernel, "gfx942", "small", half, ids=True, dim=67))
        kept.append(Variant(kernel, "sm_90", "large", half, ids=True, dim=80))
        kept.append(Variant(kernel, "sm_90", "large", torch.float16, diagonal=False))
    kept.append(Variant("fused_weights", "sm_90", "large", full))
    return kept


CHOSEN = chosen()


@pytest.fixture(scope="module")
def resources() -> dict[Variant, Resources]:
    return dict(zip(CHOSEN, inspect_all(CHOSEN, jobs=2), strict=True))


def test_every_tile_is_compiled():
    compiled = {(v.chip, v.row, v.kernel) for v in CHOSEN}
    for (chip, row), kernel in itertools.product(TILES, TILE_KERNELS):
        variant = Variant(kernel, chip, row, torch.bfloat16)
        if is_compiled_elsewhere(variant):
            variant = dataclasses.replace(variant, chip="sm_80")
        if chip in COMPILED_FOR:
            assert (variant.chip, row, kernel) in compiled or is_looser(variant)
    for kernel in FOLDS:
        assert {v.chip for v in CHOSEN if v.kernel == kernel} == set(COMPILED_FOR)


@pytest.mark.parametrize("variant", CHOSEN, ids=str)
def test_resources(variant, resources):
    used, chip, tile = resources[variant], CHIPS[variant.chip], variant.tile
    assert used.spill_bytes == 0
    assert used.registers <= 255
    assert used.shared_bytes <= chip.shared_bytes
    assert (used.exponentials > 0) == (variant.kernel not in ("inner", *SAMPLE_KERNELS))
    if variant.kernel in SAMPLE_KERNELS:
        assert used.registers <= 128, "several programs at a time, to keep memory busy"
    if not variant.of_tiles:
        return
    assert (used.tma > 0) == variant.tma
    on_matrix_units = variant.row != "fma"
    if (variant.chip, variant.row) == ("sm_90", "large"):
        assert used.matrix <= 8, "few and wide: HGMMA, not HMMA"
    assert (used.matrix > 0) == on_matrix_units
    assert used.fma > 0 or on_matrix_units
    if variant.kernel in ("stats", "strips", "fused_stats") and variant.dim % 16 == 0:
        # The table's arithmetic, to which some chips add barriers or padding.
        assert used.shared_bytes <= tile.shared_bytes(chip) + 2 * KIB


@pytest.mark.skipif(triton_version() < (3, 8), reason="Triton 3.6 takes up to 208 registers here")
@pytest.mark.parametrize("kernel", TILE_KERNELS)
def test_how_many_large_programs_share_a_multiprocessor_of_sm_90(kernel, resources):
    """Of half types: one can multiply while the other exponentiates."""
    checked = [
        variant
        for variant in CHOSEN
        if (variant.kernel, variant.chip, variant.row) == (kernel, "sm_90", "large")
        and not variant.tma
        and variant.dtype != torch.float32
    ]
    assert len(checked) == {"stats": 6, "weights": 6, "fused_stats": 2, "fused_weights": 1}[kernel]
    for variant in checked:
        one = kernel.startswith("fused") or variant.options or (kernel == "weights" and variant.ids)
        assert programs(variant, resources[variant]) == (1 if one else 2), str(variant)


@pytest.mark.skipif(triton_version() < (3, 8), reason="as above")
def test_two_programs_by_tma_share_a_multiprocessor_of_sm_90(resources):
    checked = [variant for variant in CHOSEN if variant.tma and variant.chip == "sm_90"]
    assert {variant.kernel for variant in checked} == set(TMA_KERNELS)
    for variant in checked:
        assert programs(variant, resources[variant]) == 2, str(variant)


@pytest.mark.parametrize(
    ("chip", "row", "registers", "kib", "expected"),
    [
        ("sm_90", "large", 128, 96, 2),
        ("sm_90", "large", 129, 96, 1),
        ("sm_90", "small", 80, 48, 4),  # 4 * 49 KiB of 228
        ("sm_90", "small", 81, 16, 5),  # as 88 registers
        ("sm_89", "large", 128, 64, 1),
        ("gfx942", "small", 100, 16, 4),
        ("gfx950", "large", 128, 65, 2),
        ("gfx950", "large", 129, 65, 1),
        ("gfx950", "small", 100, 16, 4),  # as 104
        ("gfx950", "small", 40, 4, 8),
    ],
)
def test_programs_of_a_multiprocessor(chip, row, registers, kib, expected):
    used = Resources(registers, 0, kib * KIB, 0, 0, 0, 0, 0, 0)
    assert programs(Variant("weights", chip, row, torch.bfloat16), used) == expected


def test_the_report_has_a_row_for_each_and_says_what_was_compiled_with_what(resources):
    text = report(CHOSEN, [resources[variant] for variant in CHOSEN])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == len(CHOSEN) + 2
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert f"Triton {importlib.metadata.version('triton')}, PyTorch {torch.__version__}" in text
    assert f"Targets: {', '.join(COMPILED_FOR)}" in text
    assert re.search(r"Kernels of commit [0-9a-f]{7,}\+? ", text)
