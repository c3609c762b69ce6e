"""Which tile a launch uses: one table, plain Python, no Triton and no GPU needed to read it.

A tile of logits is square, ``size`` x ``size``, so that a diagonal block's triangle of tiles is
whole and one program serves the rows of one range and of its mirror. Operands arrive in slices of
``slice_bytes`` along D (128 bytes: 64 half or 32 float32 elements, one cache line a row).

Shared memory of the product, in bytes: ``buffers * 2 * bases * size * slice_bytes``. Triton keeps
``stages`` buffers where copies and products are both asynchronous (sm_90, sm_100; gfx950 at these
settings), else ``stages - 1``: one slice is always in registers. The epilogue reuses that memory.

Warps: a thread holds ``size^2 / (lanes * warps)`` float32 logits, 64 with 128 x 128 and 8 warps of
32. Fewer warps repeat less: with HGMMA a warp's threads hold 16 rows by all columns, so that each
column's sum is reduced across lanes once a warp. With 4 warps 128 of a thread's 255 registers are
logits; only ``stats`` on sm_90 has an epilogue that fits the others.

None of the rows was chosen by a measurement on a GPU: they are the largest that compile without a
spill, inside the memory of their chips. Register and memory counts:
benchmarks/results/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

KIB = 1024

STATS_KERNELS = ("stats", "strips", "left_out")
"""Those that share a number of warps."""


@dataclass(frozen=True)
class Chip:
    """A family of devices that share tiles.

    Attributes:
        shared_bytes: shared memory (LDS) that one program may use.
        multiprocessors: of its largest common member; fewer programs than this leave some idle.
        lanes: threads of a warp (wavefront).
        spare_buffer: whether Triton keeps ``stages`` buffers and not one fewer.
        fast_float32: whether IEEE float32 products run on matrix cores.
    """

    name: str
    shared_bytes: int
    multiprocessors: int
    lanes: int
    spare_buffer: bool
    fast_float32: bool


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", 163 * KIB, 108, 32, spare_buffer=False, fast_float32=False),
        Chip("sm_89", 99 * KIB, 128, 32, spare_buffer=False, fast_float32=False),
        Chip("sm_90", 227 * KIB, 132, 32, spare_buffer=True, fast_float32=False),
        Chip("sm_100", 227 * KIB, 148, 32, spare_buffer=True, fast_float32=False),
        Chip("sm_120", 99 * KIB, 170, 32, spare_buffer=False, fast_float32=False),
        Chip("gfx942", 64 * KIB, 304, 64, spare_buffer=False, fast_float32=True),
        Chip("gfx950", 160 * KIB, 256, 64, spare_buffer=True, fast_float32=True),
    )
}


@dataclass(frozen=True)
class Tile:
    """A row of the table.

    Attributes:
        size, slice_bytes, warps, stages: see above.
        reason: why they are what they are.
        bases: embeddings of a row and of a column: two where views are fused.
        stats_warps: of ``stats``, where it takes another number.
        strip: tiles that one program of ``stats`` computes, one below the other, from operands that
            arrive by TMA, at most 31; 0: a single one, by pointers.
        tma_warps: of ``weights`` whose operands arrive and whose results leave by TMA; 0: by
            pointers.
        dealt: whether one product of twice the rows serves both bases of a row, see ``primitives``.
    """

    size: int
    slice_bytes: int
    warps: int
    stages: int
    reason: str
    bases: int = 1
    stats_warps: int | None = None
    strip: int = 0
    tma_warps: int = 0
    dealt: bool = False

    def warps_of(self, kernel: str) -> int:
        """Warps of a program of this kernel."""
        return self.stats_warps or self.warps if kernel in STATS_KERNELS else self.warps

    def shared_bytes(self, chip: Chip) -> int:
        """Bytes of shared memory that the product takes on this chip."""
        buffers = self.stages if chip.spare_buffer else self.stages - 1
        return buffers * 2 * self.bases * self.size * self.slice_bytes

    def slice_elements(self, dtype: torch.dtype) -> int:
        return self.slice_bytes // dtype.itemsize


_SMALL = Tile(
    64, 128, 4, 3, "a quarter of the area: four times as many programs where the large are few; "
    "2 or 3 buffers of 16 KiB let three or four of them share a multiprocessor",
)  # fmt: skip
_FMA = Tile(
    64, 64, 8, 3, "IEEE float32 is multiplied by ordinary FMA instructions, unrolled over the "
    "slice: 16 elements of D and 16 sums a thread; with 4 warps (32 sums) the compiler spills",
)  # fmt: skip

TILES: dict[tuple[str, str], Tile] = {
    (chip, row): tile
    for chip, *tiles in (
        ("sm_80", Tile(128, 128, 8, 4, "3 buffers of 32 KiB are 96 of 163 KiB"), _SMALL, _FMA),
        ("sm_89", Tile(
            128, 128, 8, 3, "2 buffers of 32 KiB are 64 of 99 KiB; 3 leave 3 KiB",
        ), _SMALL, _FMA),
        ("sm_90", Tile(
            128, 128, 8, 3, "3 buffers of 32 KiB: room for two programs, so that one can multiply "
            "while the other exponentiates; with Triton 3.8 registers fit too. 3.6 takes up to "
            "208: one program, since a limit of 128 spills 264 bytes and tiles of 64 double the "
            "reads", stats_warps=4,
        ), _SMALL, _FMA),
        ("sm_100",
            Tile(128, 128, 8, 3, "as sm_90; sums live in tensor memory, 128 columns"),
            Tile(64, 128, 8, 3, "as elsewhere; with 4 warps weights spill 72 bytes"), _FMA),
        ("sm_120", Tile(128, 128, 8, 3, "as sm_89: 64 of 99 KiB"), _SMALL, _FMA),
        ("gfx942",
            Tile(128, 128, 8, 2, "1 buffer of 32 KiB; weights take all 64 KiB of LDS"),
            Tile(64, 128, 4, 2, "1 buffer of 16 KiB: four programs share the LDS")),
        ("gfx950",
            Tile(128, 128, 8, 2, "2 buffers of 32 KiB: two programs share 160 KiB"),
            Tile(64, 128, 4, 2, "as large, a quarter of the area")),
    )
    for row, tile in zip(("large", "small", "fma"), tiles, strict=False)
}  # fmt: skip

TMA_TILES = {
    ("sm_90", "large"): replace(TILES["sm_90", "large"], strip=8, tma_warps=4),
    ("sm_100", "large"): replace(TILES["sm_100", "large"], strip=8, tma_warps=8),
}
"""Rows with which statistics take strips, and weights TMA: off until a GPU has measured them.
Strips of 8 reduce columns an eighth as often; ``weights`` by TMA have no addresses to compute, so
that 4 warps suffice on sm_90, and two programs fit with ids too."""


def _fused(chip: str, row: str, tile: Tile) -> Tile:
    half = replace(
        tile, size=tile.size // 2, bases=2, stats_warps=None, strip=0, tma_warps=0
    )  # fmt: skip
    if row == "large":
        return replace(
            half, reason="64 x 64 samples are 128 x 128 products: operands, buffers and sums of a "
            "thread as in the large tile above; weights fill the registers, so that one program "
            "runs at a time",
        )  # fmt: skip
    if row == "fma":
        return replace(half, reason="64 x 64 products, as fma above")
    if chip.startswith("gfx"):
        return replace(
            half, warps=2, reason="a quarter of the area where the large are few; two 32 x 32 "
            "products of MFMA are two wavefronts' work, which more of them would repeat",
        )  # fmt: skip
    return replace(
        half, warps=4, reason="a quarter of the area where the large are few; too few rows for "
        "HGMMA and tcgen05: HMMA, which small batches and rows that are not aligned can afford",
    )  # fmt: skip


FUSED_TILES = {key: _fused(*key, tile) for key, tile in TILES.items()}
"""For the kernels of fused views, whose ``size`` counts samples: two embeddings each."""

DEALT_TILES = {("sm_90", "large"): replace(FUSED_TILES["sm_90", "large"], dealt=True)}
"""Off until a GPU has measured it: HGMMA of 64 x 128 in place of 64 x 64, which reads shared memory
as fast as that can; but columns' sums cross twice as many warps."""


def chip_of(capability: tuple[int, int] | None, gcn_arch: str | None) -> Chip | None:
    """The chip of a CUDA compute capability or an AMD architecture name; None: not supported."""
    if gcn_arch is not None:
        return CHIPS.get(gcn_arch.split(":")[0])
    if capability is None or capability < (8, 0):
        return None
    if capability in ((8, 0), (8, 7)):
        return CHIPS["sm_80"]
    name = {9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}.get(capability[0], "sm_89")
    return CHIPS[name]


def find_chip(index: int) -> Chip | None:
    """The chip of the CUDA or ROCm device of this number; ``device_chip`` remembers it."""
    if torch.version.hip is not None:
        return chip_of(None, torch.cuda.get_device_properties(index).gcnArchName)
    return chip_of(torch.cuda.get_device_capability(index), None)


device_chip = lru_cache(maxsize=64)(find_chip)


def num_tiles(rows: int, cols: int, diagonal: bool, size: int) -> int:
    """Programs of a block: all its tiles, or those on and above its diagonal."""
    row_tiles, col_tiles = -(-rows // size), -(-cols // size)
    return row_tiles * (row_tiles + 1) // 2 if diagonal else row_tiles * col_tiles


def wave_rows(chip: Chip, dim: int, most: int, tile_cols: int) -> int:
    """Rows ``P`` of a block, about ``most`` at most, for which the product [P, P] x [P, dim] fills
    whole waves of the chip's multiprocessors best; the largest of equally good ones.

    Counted with tiles of 128 x ``tile_cols``, one a multiprocessor, as cuBLAS has them for half
    types; where it chooses others, nothing is lost but a little of a block's size. AMD's library
    has no such shape to count with: ``most``.
    """
    # A 32nd more than most, so that 66 row tiles, half of the 132 of an H100, are among them.
    row_tiles = range(1, most * 33 // (32 * 128) + 1)
    if chip.lanes != 32 or not row_tiles:
        return most
    cols = -(-dim // tile_cols)

    def fill(row_tiles: int) -> float:
        tiles = row_tiles * cols
        return tiles / (-(-tiles // chip.multiprocessors) * chip.multiprocessors)

    return 128 * max(row_tiles, key=lambda count: (fill(count), count))


def pick_tile(
    chip: Chip,
    ieee_float32: bool,
    dim: int,
    rows: int,
    cols: int,
    diagonal: bool,
    fused: bool = False,
) -> Tile:
    """The tile for one block. Depends on shapes and the chip's row only, never on a measurement."""
    table = FUSED_TILES if fused else TILES
    if ieee_float32 and not chip.fast_float32:
        return table[chip.name, "fma"]
    large = table[chip.name, "large"]
    # Rows that are not aligned arrive element by element through registers, and large tiles spill.
    aligned = dim % 16 == 0
    if not aligned or num_tiles(rows, cols, diagonal, large.size) < chip.multiprocessors:
        return table[chip.name, "small"]
    return large
