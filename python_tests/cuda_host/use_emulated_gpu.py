"""A plugin for pytest, ``-p cuda_host.use_emulated_gpu``: the extension is the emulated one."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys

from cuda_host.emulated_build import MODULE

_loader = importlib.machinery.ExtensionFileLoader("gcl_kernels._cuda", str(MODULE))
_spec = importlib.util.spec_from_loader("gcl_kernels._cuda", _loader)
assert _spec is not None
_module = importlib.util.module_from_spec(_spec)
_loader.exec_module(_module)
# Before gcl_kernels itself is imported, which would look for an installed one.
sys.modules["gcl_kernels._cuda"] = _module
