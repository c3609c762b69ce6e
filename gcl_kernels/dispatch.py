"""The table of backends: what is available, and which one serves a call."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from gcl_kernels.backends import reference, tiled
from gcl_kernels.spec import check_choice

ENVIRONMENT_VARIABLE = "GCL_KERNELS_BACKEND"
"""Names the backend that ``backend="auto"`` stands for. An explicit argument wins over it."""


@dataclass(frozen=True)
class Backend:
    """A row of the table.

    Attributes:
        module: its block functions (``reference`` has none: it is dense).
        why_unavailable: None where it can run on this machine, else the reason.
    """

    module: ModuleType
    why_unavailable: Callable[[], str | None]


BACKENDS: dict[str, Backend] = {
    "reference": Backend(reference, reference.why_unavailable),
    "tiled": Backend(tiled, tiled.why_unavailable),
}

_PREFERENCE = ("tiled",)
"""What ``auto`` tries, in this order."""


def backends() -> dict[str, str]:
    """Every backend's name with ``"available"`` or the reason why it is not."""
    return {name: row.why_unavailable() or "available" for name, row in BACKENDS.items()}


def resolve_backend(name: str) -> str:
    """The backend that serves a call with ``backend=name``.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend asked for by name is not available here; there is no fallback.
    """
    origin = "backend"
    if name == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        origin = ENVIRONMENT_VARIABLE
    check_choice(origin, name, ("auto", *BACKENDS))
    if name == "auto":
        return next(n for n in _PREFERENCE if BACKENDS[n].why_unavailable() is None)
    reason = BACKENDS[name].why_unavailable()
    if reason is not None:
        raise RuntimeError(f"{origin}: {name!r} is not available: {reason}")
    return name
