"""The launches themselves, to the last step: Triton compiles for sm_90 and launches on a driver
that is not one (``stub_driver``). What that is given, grid, shared memory and every parameter, is
compared with what was meant, of kernels launched for the first time and of cached ones.
"""

from __future__ import annotations

import json
import re
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from calls import MIXED, add_product, run_backward, run_forward, spec_of, write_product
from interpreter import starts
from stub_driver import COMPILER, SCRATCH, Launch, activate, build, flat, run_on_stub

from gcl_kernels.backends import triton as triton_backend
from gcl_kernels.backends.triton.tiles import CHIPS, TILES, TMA_TILES, pick_tile
from gcl_kernels.dispatch import BACKENDS
from gcl_kernels.spec import BoolTable

ALL: BoolTable = ((True,) * 3,) * 3
CLIP: BoolTable = ((False, True), (True, False))
HALF, FULL = torch.bfloat16, torch.float32

CASES: dict[str, tuple[Any, ...]] = {
    # One sample and one dimension: Triton makes a constant of an argument that is 1.
    "one": (1, 1, HALF, False, ALL),
    "two views": (40, 64, torch.float16, True, CLIP),
    "not aligned": (37, 67, FULL, False, ALL),
    # As test_triton_compile has them, so that one of the two compiles.
    "ids": (48, 67, HALF, True, ALL),
    "log weights and limits": (40, 64, HALF, False, ALL, True),
    "large": (2080, 64, HALF, False, ALL),
    "large, ids": (1024, 80, HALF, True, ALL),
    "by TMA": (2080, 80, HALF, False, ALL),
}
ROADS = {"views": tuple(CASES), "fused": ("one", "ids", "log weights and limits", "large")}
BLOCK_ROWS, FUSED_BLOCK_ROWS = 3120, 1040
"""Smaller than those shipped: 2080 samples are two blocks a side, on either road."""

OPT_IN_BYTES = 227 * 1024
"""Shared memory of a program that asks for more than 48 KiB."""

KERNELS = {
    "views": {"embed_kernel", "stats_kernel", "fold_kernel", "weights_kernel", "gradients_kernel"},
    "fused": {
        "embed_kernel", "fused_stats_kernel", "fold_kernel", "fused_weights_kernel",
        "inner_kernel", "gradients_kernel",
    },
}  # fmt: skip


def passes(
    road: str, n: int, d: int, dtype: torch.dtype, ids: bool, candidates: BoolTable,
    options: bool = False,
) -> None:  # fmt: skip
    """Both passes, without a gradient of one view where that is not many blocks."""
    mixed = MIXED[: len(candidates)] if road == "fused" else None
    mixing = None if mixed is None else torch.zeros(len(mixed), 2)
    spec = spec_of(
        candidates=candidates, own_pairs=((0, 0), (0, 1)), mixed=mixed, compute_dtype=dtype,
        backend="triton",
    )  # fmt: skip
    num_given = len(candidates) - 1 if mixed is None else 1
    bases = [torch.zeros(n, d, dtype=dtype)] * num_given + [torch.zeros(d, n, dtype=dtype).t()]
    needs = [True] * num_given + [n > 1000, mixed is not None, True]
    sample_ids = torch.zeros(n, dtype=torch.int64) if ids else None
    lines = [torch.zeros(len(candidates), n) for _ in range(2 * options)]
    results = run_forward(bases, spec, needs, torch.ones(()), sample_ids, mixing, lines)
    run_backward(bases, spec, needs, torch.ones(()), results, sample_ids, lines)


def run_case(road: str, case: str) -> None:
    row = ("sm_90", "large")
    with patch.dict(TILES, {row: TMA_TILES[row]} if case == "by TMA" else {}):
        passes(road, *CASES[case])


def on_sm_90() -> None:
    """Tensors stay on the CPU, and are launched as if on that chip."""
    from gcl_kernels.backends.triton import primitives

    primitives.CHIPS = {**CHIPS, "sm_80": CHIPS["sm_90"]}
    backend: Any = BACKENDS["triton"]
    backend.why_not = lambda *arguments: None
    backend.write_product, backend.add_product = write_product, add_product
    triton_backend.BLOCK_ROWS = triton_backend.STATS_BLOCK_ROWS = BLOCK_ROWS
    triton_backend.FUSED_BLOCK_ROWS = triton_backend.FUSED_STATS_BLOCK_ROWS = FUSED_BLOCK_ROWS


TENSOR_MAP_TYPES = {torch.bfloat16: 9, torch.float16: 6, torch.float32: 7}
SWIZZLES = {32: 1, 64: 2, 128: 3}
"""CUDA's numbers."""


def values_meant(entry: Any, kind: Any) -> list[int]:
    """Of an argument, as many as it has parameters: an address, or a number's bits."""
    if isinstance(kind, tuple):
        return [of for pair in zip(entry, kind, strict=True) for of in values_meant(*pair)]
    if kind == "constexpr":
        return []
    if isinstance(entry, torch.Tensor):
        return [entry.data_ptr()]
    if kind.startswith("tensordesc"):
        item, (rows, width) = entry.base.dtype.itemsize, entry.block_shape
        swizzled = min(width * item, 128)  # bytes of a row of a box
        tensor_map = [
            entry.base.data_ptr(), *reversed(entry.shape), entry.strides[0] * item,
            swizzled // item, rows, TENSOR_MAP_TYPES[entry.base.dtype], SWIZZLES[swizzled],
        ]  # fmt: skip
        return [*tensor_map, *entry.shape, *entry.strides]
    return [entry % 2 ** (64 if kind.endswith("64") else 32)]


def meant(kernel: Any, compiled: Any, grid: tuple[int, ...], named: dict[str, Any]) -> Launch:
    """What the driver should be given."""
    signature, shared = compiled.src.signature, compiled.metadata.shared
    values = [of for name in kernel.arg_names for of in values_meant(named[name], signature[name])]
    return Launch(
        compiled.metadata.name,
        (*grid, 1, 1)[:3],
        32 * named["num_warps"],
        shared,
        OPT_IN_BYTES if shared > 48 * 1024 else 0,
        [*flat(tuple(signature.values())), *SCRATCH],
        [*values, 0, 0],
    )


def num_parameters(ptx: str) -> int:
    """Of a kernel's entry."""
    return len(re.findall(r"\.param \.\w+", ptx[ptx.index(".entry") :].split(")")[0]))


def main(folder: str) -> None:
    """In a process of its own: compile everything ahead, launch it twice with other memory, and
    print for each road and case what was launched."""
    launches = activate(Path(folder))
    on_sm_90()
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    from gcl_kernels.backends.triton import (
        embeddings,
        fused_weights,
        launching,
        slots,
        stats,
        strips,
        weights,
    )

    def everything() -> None:
        for road, cases in ROADS.items():
            for case in cases:
                run_case(road, case)

    compiled_ahead = launching.compile_ahead(everything, torch.zeros(()))
    assert not launches
    knobs.runtime.jit_post_compile_hook = lambda *_, **named: pytest.fail(f"compiled: {named}")
    run, launched = JITFunction.run, CompiledKernel.run.fget
    asked: list[str] = []
    last: list[Any] = []

    def counted_run(self: Any, *arguments: Any, **named: Any) -> Any:
        asked.append(self.__name__)
        return run(self, *arguments, **named)

    def noted_run(self: Any) -> Any:
        last[:] = [self]
        return launched(self)

    def checked_start(kernel: Any, grid: tuple[int, ...], named: dict[str, Any]) -> None:
        before = len(launches)
        launching.start(kernel, grid, named)
        (launch,), (compiled,) = launches[before:], last
        expected = meant(kernel, compiled, grid, named)
        assert asdict(launch) == asdict(expected), (launch, expected)
        assert num_parameters(compiled.asm["ptx"]) == len(launch.types)
        ids = named.get("ids_rows") is not None
        programs = programs_of(named) if "TILE" in named else grid[0]
        assert programs == grid[0], named
        seen.append([kernel.__name__, named.get("DIAGONAL"), ids, named.get("TILE")])

    JITFunction.run, CompiledKernel.run = counted_run, property(noted_run)
    for module in (embeddings, fused_weights, slots, stats, strips, weights):
        module.start = checked_start
    for road, cases in ROADS.items():
        for case in cases:
            seen: list[Any] = []
            try:
                run_case(road, case)
                count = len(asked)
                run_case(road, case)
                assert len(asked) == count, f"asked of Triton again: {asked[count:]}"
            except Exception:
                seen.append([traceback.format_exc()])
            print(json.dumps([road, case, seen]))
    print(json.dumps(["all", "compiled ahead", compiled_ahead]))
    print(json.dumps(["all", "asked", when_triton_is_asked(asked)]))


def when_triton_is_asked(asked: list[str]) -> dict[str, bool]:
    """For launches of one kernel that was launched before, with one thing changed."""
    from triton import knobs
    from triton.runtime import driver

    from gcl_kernels.backends.triton import launching, slots

    sums, found = torch.zeros(80), {}
    table = torch.zeros(1, 2, 3, 64)
    knobs.runtime.jit_cache_hook = lambda **_: True  # neither compiled nor launched

    def asks(change: str, sums: torch.Tensor = sums[:64], **options: Any) -> None:
        numbers = (3, 3, 0, 0, 64, 64, 64, 64, 2)
        values = (table, table, *[sums] * 4, *numbers)
        named = dict(zip(slots.fold_kernel.arg_names, values, strict=False))
        named |= {"LINES": slots.FOLD_LINES, "SLOTS": slots.FOLD_SLOTS, "num_warps": 4, **options}
        count = len(asked)
        launching.start(slots.fold_kernel, (2, 1), named)
        found[change] = len(asked) > count

    asks("nothing")
    asks("alignment", sums[1:65])
    asks("dtype", sums[:64].half())
    asks("constant", SLOTS=32)
    asks("option", num_warps=8)
    asks("another option", num_stages=2)
    stub: Any = driver.active
    stub.get_current_device = lambda: 1
    asks("device")
    stub.get_current_device = lambda: 0
    knobs.runtime.debug = True
    asks("debugging")
    knobs.runtime.debug = False
    slots.fold_kernel.pre_run_hooks.append(lambda *_, **__: None)
    asks("hook")
    slots.fold_kernel.pre_run_hooks.clear()
    asks("nothing any more")
    return found


def programs_of(named: dict[str, Any]) -> int:
    """Tiles of a block: all, or those on and above its diagonal; or strips of them, and those that
    look after strips."""
    rows, cols = (-(-named[of] // named["TILE"]) for of in ("num_rows", "num_cols"))
    if "STRIP" in named:
        strips = -(-rows // named["STRIP"]) * cols
        return -(-strips // named["STRIPS"]) if "STRIPS" in named else strips
    return sum(rows - row if named["DIAGONAL"] else cols for row in range(rows))


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the driver."""
    if COMPILER is None:
        pytest.skip("no C compiler to make the driver with: cc, gcc or clang")
    folder = tmp_path_factory.mktemp("driver")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def launches(stub: Path) -> dict[tuple[str, str], list[Any]]:
    lines = map(json.loads, run_on_stub(stub, "test_triton_launch", "main").splitlines())
    return {(road, case): launched for road, case, launched in lines}


@starts
@pytest.mark.parametrize(("road", "case"), [(road, case) for road in ROADS for case in ROADS[road]])
def test_the_driver_is_given_what_was_meant(launches, road, case):
    of_one_number = {"embed_kernel"} if CASES[case][1] == 1 else set()  # PyTorch's
    expected = KERNELS[road] - of_one_number
    if case == "by TMA":
        expected = expected - {"stats_kernel"} | {"strips_kernel", "left_out_kernel"}
    assert {name for name, *_ in launches[road, case]} == expected


@starts
def test_triton_is_asked_where_something_changed(launches):
    found = launches["all", "asked"]
    assert len(found) == 10
    assert [change for change, asks in found.items() if not asks] == ["nothing", "nothing any more"]


@starts
@pytest.mark.parametrize("fused", [False, True])
def test_variants_with_ids_and_off_the_diagonal_are_launched(launches, fused):
    chip = CHIPS["sm_90"]
    large, small = (
        pick_tile(chip, False, 64, rows, rows, False, fused).size for rows in (8192, 64)
    )
    wanted = {(True, False, large), (False, False, large), (True, False, small)}
    wanted.add((True, True, small if fused else large))
    for kernel in ("stats", "weights"):
        name = f"fused_{kernel}_kernel" if fused else f"{kernel}_kernel"
        assert wanted <= {
            tuple(flags)
            for launched in launches.values()
            if isinstance(launched, list)
            for of_kernel, *flags in launched
            if of_kernel == name
        }
