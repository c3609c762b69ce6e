"""Registers, memory and instructions of every Triton kernel on every chip, without a GPU.

    python -m benchmarks.kernels_report [--chips sm_90 gfx942] [--jobs 2]

writes ``benchmarks/results/kernels.md``, which ``docs/kernels.md`` quotes; of some chips alone it
prints the same. Ends with an error where a kernel spills registers.

Triton compiles for a named chip; for NVIDIA, ``cuobjdump`` and ``nvdisasm``, which it ships, read
the result, for AMD the assembly text says the same. ``python_tests/test_triton_compile.py`` asserts
on most of the same numbers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, last_change
from gcl_kernels.backends.triton.tiles import CHIPS, FUSED_TILES, KIB, TILES, TMA_TILES, Tile
from gcl_kernels.spec import NegativesSpec

TILE_KERNELS = ("stats", "weights", "fused_stats", "fused_weights")
TMA_KERNELS = ("strips", "left_out", "weights")
"""Those of ``tiles.TMA_TILES``, which no launch takes by default."""

FOLDS = ("fold", "inner")
SAMPLE_KERNELS = ("embed", "gradients", "fused_embed", "fused_gradients")
GCL_VIEWS = {"BASES": (0, 1, None), "CANDIDATES": ((True,) * 3,) * 3}
"""What fused kernels are compiled for: image, text, and their sum."""

PAIRS = ((0, 1), (0, 2), (1, 2))
"""The own-sample similarities that ``gcl_loss`` asks for."""

RECORD = RESULTS / "kernels.md"
KERNELS = "../gcl_kernels/backends/triton"

TRITON_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel, a chip, a row of the tile table and the flags that shape code."""

    kernel: str
    chip: str
    row: str
    dtype: torch.dtype
    diagonal: bool = True
    ids: bool = False
    options: bool = False
    tma: bool = False
    dim: int = 1024

    @property
    def tile(self) -> Tile:
        table = FUSED_TILES if self.kernel.startswith("fused") else TILES
        table = TMA_TILES if self.tma else table
        return table[self.chip, self.row]

    @property
    def warps(self) -> int:
        if self.tma and self.kernel == "weights":
            return self.tile.tma_warps
        return self.tile.warps if self.options else self.tile.warps_of(self.kernel)

    @property
    def of_tiles(self) -> bool:
        """Whether a program computes tiles."""
        return self.kernel not in FOLDS and self.kernel not in SAMPLE_KERNELS

    @property
    def products(self) -> str:
        if self.kernel in FOLDS:
            return "none"
        if self.kernel in SAMPLE_KERNELS:
            return TRITON_DTYPES[self.dtype]
        if self.dtype != torch.float32:
            return TRITON_DTYPES[self.dtype]
        if self.row == "fma" or CHIPS[self.chip].fast_float32:
            return "fp32 ieee"
        return "tf32"

    def __str__(self) -> str:
        flags = [flag for flag in ("diagonal", "ids", "options", "tma") if getattr(self, flag)]
        products = self.products.replace(" ", "-")
        return "-".join([self.kernel, self.chip, self.row, products, str(self.dim), *flags])


@dataclass(frozen=True)
class Resources:
    """What one program takes. ``spill_bytes`` is local (private, scratch) memory of a thread."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix: int
    fma: int
    exponentials: int
    barriers: int
    tma: int
    instructions: int


def programs(variant: Variant, used: Resources) -> int:
    """How many programs over tiles run on a multiprocessor at a time: what fits its registers and
    its shared memory. (They are too large for other limits to count.)"""
    chip, warps = CHIPS[variant.chip], variant.warps
    registers = -(-used.registers // 8) * 8
    if variant.chip.startswith("gfx"):
        # Four SIMDs, each with 512 registers a lane and at most 8 wavefronts.
        by_registers = 4 * min(8, 512 // registers) // warps
        return min(by_registers, chip.shared_bytes // used.shared_bytes)
    # The driver keeps 1 KiB beside each program's own.
    by_shared = (chip.shared_bytes + KIB) // (used.shared_bytes + KIB)
    return min(65536 // (registers * chip.lanes * warps), by_shared)


def variants(chips: Iterable[str] = tuple(CHIPS)) -> Iterator[Variant]:
    """Every kernel with every row of the table and every kind of product it serves; of the fused
    kernels, which take longest to compile, float32 only where it has a row of its own. Blocks off
    the diagonal, given ids, and log weights and limits with the large tile in bfloat16 (of
    ``fused_weights`` the small one, which it then takes)."""
    for chip in chips:
        for name, row in TILES:
            if name != chip:
                continue
            for dtype in (torch.float32,) if row == "fma" else (torch.bfloat16, torch.float32):
                for kernel in TILE_KERNELS:
                    if kernel.startswith("fused") and dtype == torch.float32 and row != "fma":
                        continue
                    yield Variant(kernel, chip, row, dtype)
                    if row == "large" and dtype == torch.bfloat16:
                        yield Variant(kernel, chip, row, dtype, diagonal=False)
                        yield Variant(kernel, chip, row, dtype, ids=True)
                    of_options = "small" if kernel == "fused_weights" else "large"
                    if row == of_options and dtype == torch.bfloat16:
                        yield Variant(kernel, chip, row, dtype, options=True)
        if (chip, "large") in TMA_TILES:
            for kernel in TMA_KERNELS:
                for dtype in (torch.bfloat16, torch.float32):
                    yield Variant(kernel, chip, "large", dtype, tma=True)
                yield Variant(kernel, chip, "large", torch.bfloat16, tma=True, diagonal=False)
                yield Variant(kernel, chip, "large", torch.bfloat16, tma=True, ids=True)
        for kernel in FOLDS:
            yield Variant(kernel, chip, "large", torch.float32)
        for kernel in SAMPLE_KERNELS:
            for dtype in (torch.bfloat16, torch.float32):
                yield Variant(kernel, chip, "large", dtype)


def _signature(variant: Variant, kernel: Any) -> tuple[dict, dict, dict]:
    """Types, constants and alignments of a kernel's arguments, as a launch would give them."""
    from gcl_kernels.backends.triton import slots, strips

    if variant.kernel in SAMPLE_KERNELS:
        return _sample_signature(variant, kernel)
    tile = variant.tile
    tile_k = tile.slice_elements(variant.dtype)
    constants = {
        "ONE_SIDED": variant.options,
        "DIAGONAL": variant.diagonal,
        "SERVES_ROWS": True,
        "SERVES_COLS": True,
        "TILE": tile.size,
        "TILE_K": tile_k,
        "EVEN_K": variant.dim % tile_k == 0,
        "PRECISION": "tf32" if variant.products == "tf32" else "ieee",
        "TMA": variant.tma,
        "DEALT": tile.dealt,
        "kept": None,
        "STRIP": tile.strip,
        "STRIPS": strips.LEFT_OUT_STRIPS,
        "WARPS": variant.warps,
        "LINES": slots.FOLD_LINES,
        "SLOTS": slots.FOLD_SLOTS,
        **GCL_VIEWS,
    }
    if not variant.ids:
        constants.update(ids_rows=None, ids_cols=None)
    if not variant.options:
        tables = ("log_weights_rows", "log_weights_cols", "limits_rows", "limits_cols")
        constants.update(dict.fromkeys(tables))
    if not (variant.tma and variant.diagonal):
        constants["mirror"] = None
    of_dtype = TRITON_DTYPES[variant.dtype]
    types = dict.fromkeys(("z_rows", "z_cols", "out"), f"*{of_dtype}")
    if variant.tma:
        size, quarter = tile.size, tile.size // 4
        types = dict.fromkeys(("z_rows", "z_cols"), f"tensordesc<{of_dtype}[{size}, {tile_k}]>")
        types["out"] = f"tensordesc<{of_dtype}[{size}, {quarter}]>"
        types["mirror"] = f"tensordesc<{of_dtype}[{quarter}, {size}]>"
    types["left_out"] = "*i32"
    types.update(dict.fromkeys(("ids_rows", "ids_cols"), "*i64"))
    types.update(dict.fromkeys(("dim", "num_rows", "num_cols", "pitch", "width"), "i32"))
    types.update(dict.fromkeys(("row_start", "col_start", "id_offset", "id_period"), "i32"))
    types.update(dict.fromkeys(("row_slots", "col_slots", "row_programs"), "i32"))
    types.update(dict.fromkeys(("row_samples", "col_samples"), "i32"))
    types.update(dict.fromkeys(("of_base", "of_other_base"), "i32"))
    signature, values, alignments = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[index,] = "constexpr", constants[name]
            alignments[index,] = []  # as a launch has it, whose cache is then this one's
            continue
        signature[name] = types.get(name, "*fp32")
        fixed = name in [kernel.arg_names[p.num] for p in kernel.params if p.do_not_specialize]
        aligned = signature[name].startswith("*") or (name != "dim" or variant.dim % 16 == 0)
        if not fixed:
            alignments[index,] = [["tt.divisibility", 16]] if aligned else []
    return signature, values, alignments


def _sample_signature(variant: Variant, kernel: Any) -> tuple[dict, dict, dict]:
    """The same for a kernel over samples, of contiguous bases whose rows are aligned."""
    from gcl_kernels.backends.triton import embeddings

    candidates, bases = GCL_VIEWS["CANDIDATES"], range(3)
    mixed = None
    if variant.kernel.startswith("fused"):
        mixed, bases = GCL_VIEWS["BASES"], range(2)
    spec = NegativesSpec(candidates, PAIRS, mixed, True, variant.dtype, None, "triton")
    tables = [torch.empty(1, variant.dim, dtype=variant.dtype, device="meta") for _ in bases]
    arguments = embeddings.over_samples(tables, spec)[1]
    constants = {name: value for name, value in arguments.items() if name.isupper()}
    constants["ROUNDED"] = variant.dtype != torch.float32
    if mixed is None:
        constants.update(mixing=None, inner=None)
    of_base = "*" + TRITON_DTYPES[variant.dtype]
    types = {
        **dict.fromkeys(("tables", "grads"), (of_base,) * len(bases)),
        "strides": (("i32", "constexpr"),) * len(bases),
        "z": of_base,
        "num_samples": "i32",
        "dim": "i32",
    }
    signature, values, alignments = {}, {}, {}
    divisible = [["tt.divisibility", 16]]
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "*fp32")
        if name in constants:
            values[index,], alignments[index,] = constants[name], []
        elif name == "strides":
            values.update(((index, base, 1), 1) for base in bases)
            alignments.update(((index, base, 1), []) for base in bases)
            alignments.update(((index, base, 0), divisible) for base in bases)
        elif isinstance(signature[name], tuple):
            alignments.update(((index, base), divisible) for base in bases)
        elif name != "num_samples":
            alignments[index,] = divisible
    return signature, values, alignments


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.MULTILINE))


def _nvidia(compiled: Any) -> Resources:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])

        def run(*command: str) -> str:
            tool, *arguments = command
            return subprocess.run(
                [tools / tool, *arguments, cubin], capture_output=True, text=True, check=True
            ).stdout

        usage = run("cuobjdump", "-res-usage")
        sass = run("nvdisasm", "-c")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    local = int(found[2]) + int(found[3]) + 4 * _count(r"\b(?:STL|LDL)\b", sass)
    return Resources(
        registers=int(found[1]),
        spill_bytes=local,
        shared_bytes=compiled.metadata.shared,
        matrix=_count(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", sass),
        fma=_count(r"\bFFMA2?\b", sass),
        exponentials=_count(r"\bMUFU\.EX2\b", sass),
        barriers=_count(r"\bBAR\.", sass),
        tma=_count(r"\bUTMA(?:LDG|STG)\b", sass),
        instructions=_count(r"^\s*/\*[0-9a-f]{4,}\*/", sass),
    )


def _amd(compiled: Any) -> Resources:
    assembly = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, name
        return int(found[1])

    return Resources(
        registers=field("vgpr_count"),
        spill_bytes=field("private_segment_fixed_size") + 4 * field("vgpr_spill_count"),
        shared_bytes=compiled.metadata.shared,
        matrix=_count(r"^\s+v_mfma", assembly),
        fma=_count(r"^\s+v_(?:pk_)?fmac?_", assembly),
        exponentials=_count(r"^\s+v_exp_f32", assembly),
        barriers=_count(r"^\s+s_barrier", assembly),
        tma=0,
        instructions=_count(r"^\s+(?:[vs]|ds|buffer|global)_\w+", assembly),
    )


def inspect(variant: Variant) -> Resources:
    """Compile one variant and read off what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gcl_kernels.backends.triton import (
        embeddings,
        fused_stats,
        fused_weights,
        slots,
        stats,
        strips,
        weights,
    )

    kernel = {
        "stats": stats.stats_kernel,
        "strips": strips.strips_kernel,
        "left_out": strips.left_out_kernel,
        "weights": weights.weights_kernel,
        "fold": slots.fold_kernel,
        "fused_stats": fused_stats.fused_stats_kernel,
        "fused_weights": fused_weights.fused_weights_kernel,
        "inner": fused_weights.inner_kernel,
        "embed": embeddings.embed_kernel,
        "gradients": embeddings.gradients_kernel,
        "fused_embed": embeddings.embed_kernel,
        "fused_gradients": embeddings.gradients_kernel,
    }[variant.kernel]
    amd = variant.chip.startswith("gfx")
    target = (
        GPUTarget("hip", variant.chip, 64)
        if amd
        else GPUTarget("cuda", int(variant.chip.removeprefix("sm_")), 32)
    )
    options = {}
    if variant.kernel in SAMPLE_KERNELS:
        options = {"num_warps": embeddings.WARPS}
    if variant.of_tiles:
        options = {"num_warps": variant.warps, "num_stages": variant.tile.stages}
    source = ASTSource(kernel, *_signature(variant, kernel))
    compiled = triton.compile(source, target=target, options=options)
    return _amd(compiled) if amd else _nvidia(compiled)


def inspect_all(chosen: list[Variant], jobs: int) -> list[Resources]:
    """Results in the order of ``chosen``, from fresh processes: Triton reads its switches once."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(pool.map(inspect, chosen))


def table(chosen: list[Variant], results: list[Resources]) -> Iterator[str]:
    """A row for each variant, as lines of Markdown."""
    columns = (
        "chip", "kernel", "tile", "warps", "products", "block", "registers", "spilled bytes",
        "shared KiB", "programs", "matrix", "fma", "ex2", "barriers", "tma", "instructions",
    )  # fmt: skip
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for variant, r in zip(chosen, results, strict=True):
        tile, warps, block, fit = "-", "-", "any", "-"
        if variant.of_tiles:
            tile = f"{variant.tile.size} x {variant.tile.size}"
            warps = str(variant.warps)
            block = "diagonal" if variant.diagonal else "off diagonal"
            block += ", ids" if variant.ids else ""
            block += ", options" if variant.options else ""
            block += ", TMA" if variant.tma else ""
            fit = str(programs(variant, r))
        row = (
            variant.chip, variant.kernel, tile, warps, variant.products, block, r.registers,
            r.spill_bytes, f"{r.shared_bytes / KIB:.1f}", fit, r.matrix, r.fma, r.exponentials,
            r.barriers, r.tma, r.instructions,
        )  # fmt: skip
        yield "| " + " | ".join(map(str, row)) + " |"


def report(chosen: list[Variant], results: list[Resources]) -> str:
    """The record: what was compiled with what, and the table."""
    import triton

    chips = ", ".join(dict.fromkeys(variant.chip for variant in chosen))
    head = f"""# What the compiler makes of the Triton kernels

Written by `make kernels-report`. Compiled, not run: no GPU is needed, and nothing here is a time.

- Targets: {chips}
- Triton {triton.__version__}, PyTorch {torch.__version__}
- Kernels of commit {last_change(KERNELS)} (`gcl_kernels/backends/triton`)

D = 1024. Tiles are in rows, of fused kernels in samples; these, and kernels over samples, are
compiled for `gcl_loss`: image, text and their sum; three views and three pairs. Registers and
spilled bytes (local memory) are a thread's, shared memory a program's. `programs`: how many fit a
multiprocessor at a time. `options`: log weights and limits. `TMA`: off by default. `matrix`, `fma`,
`ex2`, `barriers`, `tma` and `instructions` count the code, not executions.

"""
    return head + "\n".join(table(chosen, results)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=list(CHIPS), help="print these alone")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    chosen = list(variants(options.chips or CHIPS))
    results = inspect_all(chosen, options.jobs)
    text = report(chosen, results)
    if options.chips:
        print(text, end="")
    else:
        RECORD.write_text(text)
        print(f"{len(chosen)} variants: {RECORD}")
    spilled = [str(v) for v, used in zip(chosen, results, strict=True) if used.spill_bytes]
    if spilled:
        raise SystemExit(f"spilled: {', '.join(spilled)}")


if __name__ == "__main__":
    main()
