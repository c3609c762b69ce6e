"""Launches without a GPU: Triton's own launcher, on a driver that loads anything and runs nothing
(``libcuda_stub.c``), and what it was given. For a process of its own: the driver stays."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("libcuda_stub.c")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


class _Launch(ctypes.Structure):
    """``stub_launch``."""

    _fields_ = [
        ("sizes", ctypes.c_int * 128),
        ("num_parameters", ctypes.c_int),
        ("num_values", ctypes.c_int),
        ("values", ctypes.c_uint64 * 256),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("num_launches", ctypes.c_uint),
        ("opted_in", ctypes.c_int),
        ("name", ctypes.c_char * 256),
    ]


@dataclass
class Launch:
    """What the driver was given: of the parameters ``values``, eight of a tensor map, and their
    Triton ``types``."""

    name: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    opted_in: int
    types: list[str]
    values: list[int]


TENSOR_MAP = "nvTmaDesc"
"""What becomes of a descriptor."""

SCRATCH = ["*i8", "*i8"]
"""Parameters that Triton adds: memory of a launch and of a profiler, none here."""


def flat(signature: Any) -> list[str]:
    """Types of the parameters, of a compiled kernel's signature or part of it."""
    if isinstance(signature, tuple):
        return [of for part in signature for of in flat(part)]
    if signature.startswith("tensordesc"):  # of a matrix: its shape and strides follow
        return [TENSOR_MAP, "i32", "i32", "i64", "i64"]
    return [] if signature == "constexpr" else [signature]


def size_of(kind: str) -> int:
    if kind == TENSOR_MAP:
        return 128
    return 8 if kind.startswith("*") or kind.endswith("64") else 4


def build(folder: Path) -> None:
    """Compile the driver; :func:`activate` takes it from this folder."""
    flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([str(COMPILER), *flags, "-o", folder / "libcuda.so.1", SOURCE], check=True)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")


def activate(folder: Path) -> list[Launch]:
    """Make Triton launch on it, as on a device of compute capability 9.0; the list grows with each
    launch."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    given = _Launch.in_dll(library, "stub_launch")
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    stub: Any = nvidia.CudaDriver.__new__(nvidia.CudaDriver)
    stub.utils, stub.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
    stub.get_current_device = lambda: 0
    stub.get_current_stream = lambda device=0: 0
    stub.get_device_capability = lambda device=0: (9, 0)
    stub.set_current_device = lambda device: None
    driver.set_active(stub)

    launches: list[Launch] = []
    make, call = nvidia.CudaLauncher.__init__, nvidia.CudaLauncher.__call__

    def init(self: Any, source: Any, metadata: Any) -> None:
        make(self, source, metadata)
        self.types_of_parameters = [*flat(tuple(source.signature.values())), *SCRATCH]

    def launch(self: Any, *arguments: Any) -> None:
        types, before = self.types_of_parameters, given.num_launches
        given.num_parameters = len(types)
        given.sizes[: len(types)] = list(map(size_of, types))
        call(self, *arguments)
        assert given.num_launches == before + 1
        launches.append(
            Launch(
                given.name.decode(), tuple(given.grid), given.threads, given.shared,
                given.opted_in, types, given.values[: given.num_values],
            )
        )  # fmt: skip

    nvidia.CudaLauncher.__init__, nvidia.CudaLauncher.__call__ = init, launch
    return launches


def run_on_stub(folder: Path, module: str, function: str) -> str:
    """The output of ``module.function(folder)`` in a process of its own."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; import {module} as t; "
    code += f"t.{function}({str(folder)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout
