"""The distributions: what they hold, the build's switches, and a wheel that works elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import build_extensions
from build_extensions import ROOT, SUFFIX, BuildError

pytest.importorskip("setuptools")
pytest.importorskip("pybind11")


def has_cxx() -> bool:
    try:
        return bool(build_extensions.find_cxx())
    except BuildError:
        return False


def environment(**changes: str) -> dict[str, str]:
    """The process's environment with these changes, and otherwise no word on the build."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GCL_KERNELS", "PYTHON"))}
    return {**kept, "GCL_KERNELS_CUDA": "0", **changes}


def run(*command: str | Path, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=environment(**changes), capture_output=True, text=True
    )


def succeed(*command: str | Path, cwd: Path, **changes: str) -> str:
    done = run(*command, cwd=cwd, **changes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    # An egg-info of its own: one in the tree may list files that MANIFEST.in does not.
    setup = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder]
    succeed(*setup, "sdist", "--formats", "tar", "--dist-dir", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar")
    shutil.unpack_archive(archive, folder)
    return folder / archive.stem


def test_sdist_holds_what_a_build_reads(unpacked):
    wanted = {ROOT / "setup.py", ROOT / "build_extensions.py", ROOT / "LICENSE"}
    wanted |= {path for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    wanted |= set((ROOT / "gcl_kernels").rglob("*.py"))
    assert {path for path in wanted if not (unpacked / path.relative_to(ROOT)).is_file()} == set()
    assert not list(unpacked.rglob("*" + SUFFIX))


BUILD_IN_PLACE = (sys.executable, "setup.py", "build_ext", "--inplace")
MISSING = {"_cpu": {"CXX": "no-such-compiler"}, "_cuda": {"CUDA_HOME": "/no-such-toolkit"}}


@pytest.fixture(params=build_extensions.EXTENSIONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def stale(unpacked: Path, name: str) -> Path:
    """What an older build of the extension left in the tree."""
    path = unpacked / "gcl_kernels" / (name + SUFFIX)
    path.touch()
    return path


def without_compiler(name: str, value: str) -> dict[str, str]:
    """This value for the extension's switch, the other extension off, nothing to build with."""
    switches = {f"GCL_KERNELS{other.upper()}": "0" for other in build_extensions.EXTENSIONS}
    return {**switches, f"GCL_KERNELS{name.upper()}": value, **MISSING[name]}


def test_switched_off(unpacked, name, stale):
    succeed(*BUILD_IN_PLACE, cwd=unpacked, **without_compiler(name, "0"))
    assert not stale.exists()


def test_left_out_without_a_compiler(unpacked, name, stale):
    done = run(*BUILD_IN_PLACE, cwd=unpacked, **without_compiler(name, ""))
    assert done.returncode == 0, done.stderr
    assert f"going on without gcl_kernels.{name}: no " in done.stdout + done.stderr
    assert not stale.exists()


def test_demanded_without_a_compiler(unpacked, name):
    done = run(*BUILD_IN_PLACE, cwd=unpacked, **without_compiler(name, "1"))
    assert done.returncode != 0
    switch = f"GCL_KERNELS{name.upper()}"
    assert f"{switch}=1, but gcl_kernels.{name}: no " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="uses the program false")
def test_left_out_where_the_compiler_fails(unpacked):
    done = run(*BUILD_IN_PLACE, cwd=unpacked, CXX="false")
    assert done.returncode == 0, done.stderr
    assert "going on without gcl_kernels._cpu: compilation failed" in done.stdout + done.stderr


def test_a_switch_is_0_or_1(unpacked):
    done = run(*BUILD_IN_PLACE, cwd=unpacked, GCL_KERNELS_CPU="yes")
    assert done.returncode != 0
    assert "GCL_KERNELS_CPU must be 0 or 1, not 'yes'" in done.stderr


def test_an_old_setuptools_is_told_what_to_do(unpacked):
    """Before it rejects pyproject.toml: a virtual environment of Python 3.11 holds 65."""
    old = "import runpy, setuptools; setuptools.__version__ = '65.5.0'; "
    done = run(sys.executable, "-c", old + "runpy.run_path('setup.py')", cwd=unpacked)
    assert done.returncode != 0
    assert "setuptools: expected at least 77, got 65.5.0: pip install --upgrade" in done.stderr
    assert "Traceback" not in done.stderr
    required = (unpacked / "pyproject.toml").read_text()
    assert required.count('"setuptools>=77"') == 2


SMOKE = """
import os, sys
import torch
import gcl_kernels

assert gcl_kernels.__file__.startswith(sys.prefix), gcl_kernels.__file__
print(gcl_kernels.backends())
assert gcl_kernels.backends()["tiled"] == "available"

def loss_and_gradients(backend):
    torch.manual_seed(0)
    e_i, e_t = (torch.randn(300, 64, requires_grad=True) for _ in range(2))
    loss = gcl_kernels.gcl_loss(e_i, e_t, None, 20.0, backend=backend)
    return loss, *torch.autograd.grad(loss, (e_i, e_t))

torch.set_num_threads(3)
torch.randn(1 << 20).exp()
threads = os.path.isdir("/proc/self/task") and len(os.listdir("/proc/self/task"))
for ours, dense in zip(loss_and_gradients("auto"), loss_and_gradients("reference")):
    torch.testing.assert_close(ours, dense)
if threads:
    # Two OpenMP runtimes would keep a pool of threads each.
    assert len(os.listdir("/proc/self/task")) == threads
"""


def test_wheel_works_in_a_fresh_environment(tmp_path):
    """Built in the tree, whose objects serve again; installed beside this PyTorch alone."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", tmp_path]
    # A folder of its own for the package: one in the tree may hold modules of older versions.
    base = ["--config-settings", f"--global-option=build --build-base={tmp_path / 'build'}"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    changes = {"GCL_KERNELS_CPU": "1"} if has_cxx() else {}
    succeed(*pip, "wheel", *options, *base, ROOT, cwd=tmp_path, **changes)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} - {"gcl_kernels"} == {
        f"gcl_kernels-{wheel.stem.split('-')[1]}.dist-info"
    }
    native = [name for name in names if name.endswith(SUFFIX)]
    assert native == ([f"gcl_kernels/_cpu{SUFFIX}"] if has_cxx() else [])

    venv.create(tmp_path / "venv", symlinks=os.name != "nt")
    (python,) = (tmp_path / "venv").glob("[bS]*/python" + (".exe" if os.name == "nt" else ""))
    succeed(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (site,) = (tmp_path / "venv").rglob("site-packages")
    (site / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    succeed(python, "-I", "-c", SMOKE, cwd=tmp_path)
