"""The CPU's extension with the address and undefined-behaviour sanitizers: ``make sanitize``.

As a program it builds the extension into a folder of its own and starts the tests of the CPU; in
that process it is a plugin of pytest, which puts this build in the place of the installed one.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from build_extensions import ROOT, SUFFIX, build, find_cxx

HERE = Path(__file__).resolve().parent
FOLDER = ROOT / "build" / "sanitize"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1"
TESTS = ("test_cpu.py", "test_bfloat16.py")


def loaded_first() -> list[str]:
    """The compiler's libraries that must be in the process before Python."""
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        command = [*find_cxx(), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not os.path.isabs(path):
            raise SystemExit(f"the compiler has no sanitizers: {name} is missing")
        found.append(path)
    return found


def main() -> int:
    for variable in ("CXXFLAGS", "LDFLAGS"):
        os.environ[variable] = f"{os.environ.get(variable, '')} {FLAGS}"
    build("_cpu", FOLDER)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", Path(__file__).stem]
    command += [*(str(HERE / name) for name in TESTS), *sys.argv[1:]]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(loaded_first()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(command, env=environment).returncode


def put_in_place() -> None:
    """Before ``gcl_kernels`` is imported, which would look for the installed one."""
    name = "gcl_kernels._cpu"
    loader = importlib.machinery.ExtensionFileLoader(name, str(FOLDER / f"_cpu{SUFFIX}"))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    extension = importlib.util.module_from_spec(spec)
    loader.exec_module(extension)
    sys.modules[name] = extension


if __name__ == "__main__":
    sys.exit(main())
put_in_place()
