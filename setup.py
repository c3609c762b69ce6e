"""What cannot be static, hence is not in pyproject.toml: the native extensions."""

import os
import sys
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext

# Whoever runs this file need not have put its folder there.
sys.path.insert(0, str(Path(__file__).resolve().parent))
from build_extensions import EXTENSIONS, BuildError, build

if int(__version__.partition(".")[0]) < 77:
    # It would find fault with pyproject.toml, whose license is written as newer ones want it.
    raise SystemExit(
        f"setuptools: expected at least 77, got {__version__}: pip install --upgrade setuptools, "
        "or leave out --no-build-isolation"
    )


class BuildNative(build_ext):
    """Builds what is asked for or possible, and leaves no older build of the rest behind.

    GCL_KERNELS_CPU and GCL_KERNELS_CUDA: 0 leaves the extension out, 1 makes it an error that it
    cannot be built.
    """

    def run(self) -> None:
        self.extensions = [extension for extension in self.extensions if self._placed(extension)]

    def _placed(self, extension: Extension) -> bool:
        name = extension.name.rpartition(".")[2]
        switch = f"GCL_KERNELS{name.upper()}"
        value = os.environ.get(switch, "")
        if value not in ("", "0", "1"):
            raise SystemExit(f"{switch} must be 0 or 1, not {value!r}")
        target = Path(self.get_ext_fullpath(extension.name))
        target.unlink(missing_ok=True)
        if value == "0":
            return False
        try:
            module = build(name)
        except BuildError as error:
            if value == "1":
                raise SystemExit(f"{switch}=1, but {extension.name}: {error}") from None
            self.warn(f"going on without {extension.name}: {error}")
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(module), str(target))
        return True


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[Extension(f"gcl_kernels.{name}", sources=[]) for name in EXTENSIONS],
)
