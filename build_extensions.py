"""Compiles the native extensions `gcl_kernels._cpu` and `gcl_kernels._cuda` with ninja.

`setup.py` builds through here into the package, the tests into folders of their own. It needs
neither setuptools nor PyTorch, and what it compiles links no PyTorch: one build serves every
version. docs/building.md says what is built when.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "native"
SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")
WINDOWS = sys.platform == "win32"
MACOS = sys.platform == "darwin"

EXTENSIONS = ("_cpu", "_cuda")
ARCHS_VARIABLE = "GCL_KERNELS_CUDA_ARCHS"
DEFAULT_ARCHS = ("80", "86", "89", "90", "100", "120")
"""Those that the toolkit knows are built, and PTX of the newest of them for later GPUs."""
ONE_PTX = ("80", "86", "89", "90")
"""Targets assembled from sm_80's PTX: from their own comes the same machine code (nvcc 13.0), and
writing PTX is most of the compiler's work. From 100 on it is other code."""


class BuildError(Exception):
    """Why an extension is not built."""


@dataclass(frozen=True)
class Recipe:
    """How ninja compiles each source and links the objects: command lines with $in and $out.

    Attributes:
        version: asks the compiler for its version.
    """

    version: Sequence[str]
    sources: Sequence[Path]
    compile: str
    link: str


def build(name: str, folder: Path | None = None, werror: bool = False) -> Path:
    """Compile an extension, or what has changed of it, and return the module's path.

    Args:
        name: one of ``EXTENSIONS``.
        folder: keeps the objects and ninja's state; by default one per extension and Python.
        werror: the compilers' warnings are errors, and a spilled register is a warning.

    Raises:
        BuildError: no compiler is found, or it failed, and its messages are on stderr.
    """
    folder = folder or BUILD / SUFFIX.split(".")[1] / name
    folder.mkdir(parents=True, exist_ok=True)
    module = name + SUFFIX
    recipe = {"_cpu": cpu_recipe, "_cuda": cuda_recipe}[name](werror)
    (folder / "build.ninja").write_text(ninja_file(recipe, module))
    # An input of every object: an updated compiler compiles again.
    compiler = subprocess.run(recipe.version, capture_output=True)
    said = compiler.stdout + compiler.stderr
    if not (stamp := folder / "compiler").exists() or stamp.read_bytes() != said:
        stamp.write_bytes(said)
    if subprocess.run([find_ninja(), "-C", str(folder)], stdout=sys.stderr).returncode:
        raise BuildError("compilation failed; the compiler's messages are above")
    return folder / module


def ninja_file(recipe: Recipe, module: str) -> str:
    def escaped(path: Path | str) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    lines = [
        "rule compile",
        f"  command = {recipe.compile}",
        "  description = compile $in",
        "  deps = gcc\n  depfile = $out.d",
        "rule link",
        f"  command = {recipe.link}",
        "  description = link $out",
    ]
    objects = []
    for source in recipe.sources:
        objects.append(escaped(source.name + ".o"))
        lines.append(f"build {objects[-1]}: compile {escaped(source)} | compiler")
    lines.append(f"build {escaped(module)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def find_ninja() -> str:
    """The Python package's, which a build environment puts on PATH, or the system's."""
    scripts = sysconfig.get_path("scripts")
    found = shutil.which("ninja", path=scripts) or shutil.which("ninja")
    if found is None:
        raise BuildError("ninja is missing: pip install ninja")
    return found


def cpu_recipe(werror: bool) -> Recipe:
    """One C++ compiler; the sources choose their own instruction sets at run time."""
    if WINDOWS:
        raise BuildError("its sources need the vector extensions of GCC and Clang; cl has none")
    sources = _sources("cpu", "*.cpp")
    cxx = find_cxx()
    openmp = ["-fopenmp"] if has_openmp(cxx) else []
    # The user's flags last, where they win.
    compile = [*cxx, "-std=c++17", "-O3", *openmp, *_flags("CPPFLAGS"), *_flags("CXXFLAGS")]
    # psabi: the vectors of csrc/cpu cross no function that is not inlined.
    compile += ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", *_headers()]
    compile += ["-Werror"] if werror else []
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if MACOS else ["-shared"]
    link = [*cxx, *shared, *_flags("LDFLAGS"), *openmp]
    return Recipe(
        [*cxx, "--version"],
        sources,
        f"{_line(compile)} -MMD -MF $out.d -c $in -o $out",
        f"{_line(link)} $in -o $out",
    )


def find_cxx() -> list[str]:
    """$CXX, else the usual names."""
    if _flags("CXX"):
        candidates = [_flags("CXX")]
    else:
        candidates = [["c++"], ["g++"], ["clang++"]]
    for name, *options in candidates:
        if found := shutil.which(name):
            return [found, *options]
    names = ", ".join(name for name, *_ in candidates)
    raise BuildError(f"no C++ compiler: {names} not found")


def has_openmp(cxx: list[str]) -> bool:
    """Whether a program with OpenMP compiles and links.

    Not on macOS, where a second libomp beside the one in PyTorch's wheel ends the process.
    """
    if MACOS:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "openmp.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*cxx, "-fopenmp", str(source), "-o", str(source.with_suffix(""))]
        return subprocess.run(command, capture_output=True).returncode == 0


def cuda_recipe(werror: bool) -> Recipe:
    """nvcc for every source and for the link: it knows its headers and its host compiler."""
    nvcc = find_nvcc()
    # nvcc works at several targets of a .cu file at once, hence the others start first.
    sources = _sources("cuda", "*.cpp") + _sources("cuda", "*.cu")
    archs = cuda_archs(nvcc)
    targets = [option for arch in archs for option in gencode(arch)]
    compile = [nvcc, "-std=c++17", "-O3", "--threads=0", *targets, *_headers()]
    # Read by bindings.cpp; every object names its targets, so that a new list rebuilds all.
    compile.append(f'-D{ARCHS_VARIABLE}="{";".join(archs)}"')
    if WINDOWS:
        host, host_werror = ["/EHsc", "/MD", "/W3"], "/WX"
        library = ["-Xlinker=" + option for option in _python_library()]
    else:
        host, host_werror = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"], "-Werror"
        library = []
    if werror:
        host.append(host_werror)
        compile += ["-Werror=all-warnings"]
        compile += ["-Xptxas=--warn-on-spills,--warn-on-local-memory-usage"]
    compile.append("-Xcompiler=" + ",".join(host))
    link = [nvcc, "-shared", "-cudart=static", *targets, *library]
    return Recipe(
        [nvcc, "--version"],
        sources,
        f"{_line(compile)} -MMD -MF $out.d -c $in -o $out",
        f"{_line(link)} $in -o $out",
    )


def find_nvcc() -> str:
    """The toolkit of CUDA_HOME (CUDA_PATH on Windows), else nvcc on PATH, else of /usr/local."""
    variable = "CUDA_PATH" if WINDOWS and "CUDA_HOME" not in os.environ else "CUDA_HOME"
    home = os.environ.get(variable)
    if home:
        folders, where = [Path(home) / "bin"], f"in {variable}={home}"
    else:
        folders = [Path("/usr/local/cuda/bin"), Path("/opt/cuda/bin")]
        where = "on PATH, and CUDA_HOME is not set"
    path = os.pathsep.join(map(str, folders))
    found = (None if home else shutil.which("nvcc")) or shutil.which("nvcc", path=path)
    if found is None:
        raise BuildError(f"no CUDA toolkit: nvcc is not {where}")
    return found


def cuda_archs(nvcc: str) -> list[str]:
    """The targets, such as ``["80", "90+PTX"]``: GCL_KERNELS_CUDA_ARCHS or the default ones."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    if listed.returncode:
        raise BuildError(f"{nvcc} --list-gpu-code failed: {listed.stderr.strip()}")
    known = set(re.findall(r"sm_(\w+)", listed.stdout))
    wanted = os.environ.get(ARCHS_VARIABLE, "")
    if not wanted:
        archs = [arch for arch in DEFAULT_ARCHS if arch in known]
        if not archs:
            raise BuildError(f"{nvcc} knows none of sm_{', sm_'.join(DEFAULT_ARCHS)}")
        return [*archs[:-1], f"{archs[-1]}+PTX"]
    archs = wanted.split(";")
    for arch in archs:
        number = re.fullmatch(r"(\d+)[af]?(\+PTX)?", arch)
        if number is None:
            raise BuildError(f"{ARCHS_VARIABLE}={wanted}: write targets as in 80;90+PTX")
        if int(number[1]) < int(DEFAULT_ARCHS[0]):
            raise BuildError(f"{ARCHS_VARIABLE}={wanted}: the oldest target is {DEFAULT_ARCHS[0]}")
        if arch.removesuffix("+PTX").rstrip("af") not in known:
            raise BuildError(f"{ARCHS_VARIABLE}={wanted}: {nvcc} does not know sm_{arch}")
    return archs


def gencode(arch: str) -> list[str]:
    """nvcc's options for one of :func:`cuda_archs`."""
    number = arch.removesuffix("+PTX")
    virtual = ONE_PTX[0] if number in ONE_PTX else number
    options = [f"-gencode=arch=compute_{virtual},code=sm_{number}"]
    if arch.endswith("+PTX"):
        options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def _sources(folder: str, pattern: str) -> list[Path]:
    found = sorted((CSRC / folder).glob(pattern))
    if not found:
        raise BuildError(f"csrc/{folder} holds no {pattern}")
    return found


def _headers() -> list[str]:
    python = [word for folder in _python_headers() for word in ("-isystem", str(folder))]
    return [f"-I{CSRC}", *python]


def _python_headers() -> list[Path]:
    """Python's and pybind11's headers, the latter copied.

    pip's build environment is a new folder each time; ninja would rebuild for the new path.
    """
    try:
        import pybind11
    except ModuleNotFoundError:
        raise BuildError("pybind11 is missing: pip install pybind11") from None
    copy = BUILD / f"pybind11-{pybind11.__version__}"
    if not copy.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            whole = Path(shutil.copytree(pybind11.get_include(), Path(folder) / "include"))
            try:
                whole.rename(copy)
            except OSError:
                # Another build was first.
                if not copy.exists():
                    raise
    paths = sysconfig.get_paths()
    return [copy, *(Path(path) for path in dict.fromkeys((paths["include"], paths["platinclude"])))]


def _python_library() -> list[str]:
    """Where Windows' linker finds python3XX.lib, which Python.h asks for."""
    return [f"/LIBPATH:{Path(sys.base_prefix) / 'libs'}"]


def _flags(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def _line(words: Sequence[str]) -> str:
    """Words as the shell (Windows: the process) takes them, with ninja's dollar signs doubled."""
    line = subprocess.list2cmdline(words) if WINDOWS else shlex.join(words)
    return line.replace("$", "$$")
