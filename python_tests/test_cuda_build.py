"""The CUDA extension compiled for every default target, and what the compiler made of it.

This needs nvcc and no GPU. What nvcc is asked for is also tested without it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from build_extensions import ROOT, BuildError, build, cuda_archs, find_nvcc, gencode


@pytest.fixture
def fake_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A toolkit between Hopper and Blackwell, at CUDA_HOME."""
    if sys.platform == "win32":
        pytest.skip("writes a shell script")
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\nprintf 'sm_75\\nsm_80\\nsm_86\\nsm_89\\nsm_90\\nsm_90a\\n'\n")
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("GCL_KERNELS_CUDA_ARCHS", raising=False)
    return str(path)


def test_default_targets_are_those_that_nvcc_knows(fake_nvcc):
    assert find_nvcc() == fake_nvcc
    assert cuda_archs(fake_nvcc) == ["80", "86", "89", "90+PTX"]


def test_targets_of_the_environment(fake_nvcc, monkeypatch):
    monkeypatch.setenv("GCL_KERNELS_CUDA_ARCHS", "80+PTX;89;90a")
    assert [option for arch in cuda_archs(fake_nvcc) for option in gencode(arch)] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_80,code=sm_89",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]


@pytest.mark.parametrize(
    ("archs", "message"),
    [
        ("9.0", "write targets as in 80;90"),
        ("80,90", "write targets as in 80;90"),
        ("80;", "write targets as in 80;90"),
        ("75", "the oldest target is 80"),
        ("90;120", "does not know sm_120"),
    ],
)
def test_wrong_targets(fake_nvcc, monkeypatch, archs, message):
    monkeypatch.setenv("GCL_KERNELS_CUDA_ARCHS", archs)
    with pytest.raises(BuildError, match=message):
        cuda_archs(fake_nvcc)


def test_a_toolkit_without_nvcc(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BuildError, match=f"nvcc is not in CUDA_HOME={tmp_path}"):
        find_nvcc()


@pytest.fixture(scope="module")
def module() -> Iterator[Path]:
    """Three of the targets, warnings as errors, in a folder that stays: unchanged sources cost
    nothing. The others are compiled from the same lines."""
    try:
        nvcc = find_nvcc()
    except BuildError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("GCL_KERNELS_CUDA_ARCHS", raising=False)
        known = cuda_archs(nvcc)
        archs = [arch for arch in known[:-1] if arch in ("80", "90")] + known[-1:]
        environment.setenv("GCL_KERNELS_CUDA_ARCHS", ";".join(archs))
        yield build("_cuda", ROOT / "build" / "test_cuda", werror=True)


@pytest.fixture(scope="module")
def cuobjdump(module: Path) -> str:
    """The toolkit's, or the one that Triton brings."""
    folders = [str(Path(find_nvcc()).resolve().parent), os.environ.get("PATH", "")]
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        folders.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if found is None:
        pytest.skip("cuobjdump is neither beside nvcc, nor on PATH, nor in Triton")
    return found


def built() -> list[str]:
    """The module's targets, oldest first."""
    return [arch.removesuffix("+PTX") for arch in cuda_archs(find_nvcc())]


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def kernels_of(dump: str, header: str) -> dict[str, str]:
    """What ``cuobjdump`` says of each kernel, by its mangled name."""
    parts = re.split(rf"^\s*{header}\s*(\w+):?\s*$", dump, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def resources(module: Path, cuobjdump: str, arch: str) -> dict[str, str]:
    dump = output(cuobjdump, "--dump-resource-usage", "-arch", f"sm_{arch}", module)
    return kernels_of(dump, "Function")


@pytest.fixture(scope="module", params=["90", "120"])
def arch(request: pytest.FixtureRequest, module: Path) -> str:
    """Of each chip's PTX one: disassembling takes seconds."""
    if request.param not in built():
        pytest.skip(f"this nvcc does not know sm_{request.param}")
    return request.param


@pytest.fixture(scope="module")
def instructions(module: Path, cuobjdump: str, arch: str) -> dict[str, str]:
    return kernels_of(output(cuobjdump, "-sass", "-arch", f"sm_{arch}", module), "Function :")


def test_targets_in_the_module(module, cuobjdump):
    binaries = re.findall(r"\.sm_(\w+)\.cubin", output(cuobjdump, "-lelf", module))
    assert set(binaries) == set(built())
    ptx = re.findall(r"\.sm_(\w+)\.ptx", output(cuobjdump, "-lptx", module))
    assert set(ptx) == {built()[-1]}


def test_nothing_in_local_memory(module, cuobjdump):
    for arch in built():
        kernels = resources(module, cuobjdump, arch)
        assert kernels, arch
        for kernel, used in kernels.items():
            assert re.search(r"STACK:0 .*LOCAL:0 ", used), f"sm_{arch}, {kernel}: {used}"


def test_no_spill_and_no_atomic(module, cuobjdump, arch, instructions):
    assert set(instructions) == set(resources(module, cuobjdump, arch))
    for kernel, code in instructions.items():
        assert not re.findall(r"\b(?:LDL|STL|ATOM[GS]?|REDG?)\b[.\w]*", code), kernel


def test_products_on_tensor_cores(instructions):
    on_matrix_units = {"BFloat16": r"HMMA\.16816\.F32\.BF16", "Float16": r"HMMA\.16816\.F32\s"}
    on_matrix_units["TensorFloat32"] = r"HMMA\.1688\.F32\.TF32"
    for dtype, product in on_matrix_units.items():
        kernels = {k: code for k, code in instructions.items() if re.search(rf"\d{dtype}E", k)}
        assert len(kernels) == 4, f"statistics and weights in {dtype}, with options and without"
        for kernel, code in kernels.items():
            assert re.search(product, code), kernel
            # 16 bytes at a time, from memory to shared memory without a register between.
            assert "LDGSTS.E.BYPASS.128" in code, kernel
            assert dtype == "TensorFloat32" or "LDSM.16.M88.4" in code, kernel
    for kernel, code in instructions.items():
        assert "HMMA" not in code or not re.search(r"\dFloat32E", kernel), f"{kernel} is IEEE"


@pytest.mark.skipif(sys.platform != "linux", reason="uses ldd and nm")
def test_links_neither_pytorch_nor_the_cuda_runtime(module):
    assert not re.findall(r"lib(?:torch|c10|cud|cublas)\S*|not found", output("ldd", module))
    # Its own runtime stays inside: PyTorch loads one of another version with the same names.
    assert not re.findall(r"\bcu(?:da)?[A-Z]\w+", output("nm", "-D", module))


def test_imports_alone(module):
    """Without PyTorch and, where this machine has none, without a driver."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_cuda", {str(module)!r})
_cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_cuda)
assert "torch" not in sys.modules
print(_cuda.compiled_archs)
"""
    said = output(sys.executable, "-I", "-S", "-c", code)
    assert said.strip() == ";".join(cuda_archs(find_nvcc()))
