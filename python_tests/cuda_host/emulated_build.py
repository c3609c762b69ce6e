"""The CUDA kernels compiled by a plain C++ compiler: ``gcl_kernels._cuda`` on an emulated GPU.

With the address and undefined-behaviour sanitizers where the compiler has them; a process that
loads the module then needs :func:`environment`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "cuda_host"
MODULE = FOLDER / "_cuda.so"

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = (
    "-std=c++17 -Wall -Wextra -Werror -Wno-unknown-pragmas -fPIC -fvisibility=hidden "
    f"-I{ROOT / 'csrc'} -I{HERE}"
)
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all"


def _library(name: str) -> Path | None:
    """A library of the compiler's own, or None."""
    command = [str(COMPILER), f"-print-file-name={name}"]
    path = Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    return path if path.is_absolute() and path.exists() else None


def sanitizers() -> list[Path]:
    """Libraries that must be loaded first; empty where the compiler has no sanitizers."""
    found = [_library("libasan.so"), _library("libubsan.so"), _library("libstdc++.so")]
    return [] if None in found else [path for path in found if path]


def environment() -> dict[str, str]:
    preload = " ".join(map(str, sanitizers()))
    # Python itself leaks; and kernels run on stacks of their own.
    return {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}


def build() -> None:
    """Compile what is new or changed into :data:`MODULE`."""
    import pybind11

    sanitize = SANITIZE if sanitizers() else ""
    kernels = [p for p in sorted((ROOT / "csrc/cuda").glob("*.cu")) if p.name != "runtime.cu"]
    includes = (pybind11.get_include(), sysconfig.get_paths()["include"])
    lines = [
        "rule compile",
        f"  command = {COMPILER} -x c++ {FLAGS} $flags -MMD -MF $out.d -c $in -o $out",
        "  deps = gcc\n  depfile = $out.d",
        f"rule link\n  command = {COMPILER} -shared {sanitize} $in -o $out",
    ]
    objects = []
    for source in [*kernels, HERE / "emulated_gpu.cpp", ROOT / "csrc/cuda/bindings.cpp"]:
        objects.append(f"{source.name}.o")
        flags = f"-O1 {sanitize}"
        if source.name == "emulated_gpu.cpp":
            flags = "-O3 -ffp-contract=off" + (" -DKERNELS_ARE_SANITIZED" if sanitize else "")
        if source.name == "bindings.cpp":
            # No kernel, and half a minute's work for the sanitizers.
            flags = "-DGCL_KERNELS_CUDA_ARCHS='\"emulated\"' "
            flags += " ".join(f"-isystem {path}" for path in includes)
        lines.append(f"build {objects[-1]}: compile {source}\n  flags = {flags}")
    lines.append(f"build {MODULE.name}: link {' '.join(objects)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run(["ninja", "-C", str(FOLDER)], check=True, capture_output=True, text=True)


def build_program(source: Path) -> Path:
    """Compile one file into a program."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    program = FOLDER / source.stem
    sanitize = SANITIZE if sanitizers() else ""
    command = f"{COMPILER} {FLAGS} -O1 {sanitize} {source} -o {program}"
    subprocess.run(command.split(), check=True, capture_output=True, text=True)
    return program
