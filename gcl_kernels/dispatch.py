"""The table of backends: which there are, and which one serves a call."""

from __future__ import annotations

import os

import torch

from gcl_kernels.backends.base import Backend
from gcl_kernels.backends.cpu import Cpu
from gcl_kernels.backends.cuda import Cuda
from gcl_kernels.backends.reference import Reference
from gcl_kernels.backends.tiled import Tiled
from gcl_kernels.backends.triton import Triton
from gcl_kernels.spec import HALF_DTYPES, check_choice

ENVIRONMENT_VARIABLE = "GCL_KERNELS_BACKEND"
"""Names the backend that ``backend="auto"`` stands for. An explicit argument wins over it."""

BACKENDS: dict[str, Backend] = {
    "reference": Reference(),
    "tiled": Tiled(),
    "cpu": Cpu(),
    "triton": Triton(),
    "cuda": Cuda(),
}

_PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
"""What ``auto`` tries on a type of device, in this order, before ``tiled``, which serves all."""


def backends() -> dict[str, str]:
    """Every backend's name with ``"available"`` or the reason why it is not."""
    return {name: of.why_unavailable() or "available" for name, of in BACKENDS.items()}


def check_backend(name: str, origin: str = "backend") -> None:
    """Raise ValueError unless it is ``"auto"`` or a backend's name."""
    check_choice(origin, name, ("auto", *BACKENDS))


def _chosen(name: str) -> tuple[str, str]:
    """What ``backend=name`` stands for, and who says so."""
    if name == "auto":
        return os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE
    return name, "backend"


def half_dtypes(name: str, device: torch.device) -> tuple[torch.dtype, ...]:
    """The half types that a call with ``backend=name`` on this device multiplies as such."""
    name, origin = _chosen(name)
    check_backend(name, origin)
    if device.type == "cuda":  # whichever it will be
        return HALF_DTYPES
    names = _PREFERENCE.get(device.type, ()) if name == "auto" else (name,)
    return tuple(dtype for of in names for dtype in BACKENDS[of].half_dtypes(device))


def resolve_backend(name: str, device: torch.device, compute_dtype: torch.dtype) -> str:
    """The backend that serves a call with ``backend=name`` on this device in this dtype.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend asked for by name cannot serve the call; there is no fallback.
    """
    name, origin = _chosen(name)
    check_backend(name, origin)
    if name != "auto":
        reason = BACKENDS[name].why_not(device, compute_dtype)
        if reason is not None:
            reason = BACKENDS[name].why_unavailable() or reason
            raise RuntimeError(f"{origin}: {name!r} is not available: {reason}")
        return name
    for name in _PREFERENCE.get(device.type, ()):
        if BACKENDS[name].why_not(device, compute_dtype) is None:
            return name
    return "tiled"
