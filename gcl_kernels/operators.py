"""What the operators of this package share: their library, their conventions, and when their
bodies run directly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

LIBRARY = torch.library.Library("gcl_kernels", "DEF")


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether an operator's body may be called directly: nothing traces or differentiates it.

    The dispatcher's way to a Python operator costs 25 us; a small batch's products take 50.
    """
    return not (
        torch.compiler.is_compiling() or torch.is_grad_enabled() or is_in_torch_dispatch_mode()
    ) and all(type(t) in (Tensor, torch.nn.Parameter, type(None)) for t in tensors)


def needing_grad(*tensors: Tensor) -> list[bool]:
    """Which of them autograd would ask a gradient of, were it to record this moment."""
    recorded = torch.is_grad_enabled()
    return [recorded and tensor.requires_grad for tensor in tensors]


def distinct(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """A view in place of each tensor that came before: while ``torch.compile`` traces, an
    ``autograd.Function`` takes none twice."""
    if not torch.compiler.is_compiling():
        return tensors
    return [
        tensor.view_as(tensor) if any(tensor is other for other in tensors[:index]) else tensor
        for index, tensor in enumerate(tensors)
    ]


def refuse_backward(name: str, reason: str) -> None:
    """Make differentiating the operator ``gcl_kernels::name`` an error: PyTorch would warn, and
    leave the gradient out."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"gcl_kernels: {reason}")

    torch.library.register_autograd(f"gcl_kernels::{name}", refuse, lib=LIBRARY)


NO_OWN_GRADIENT = (
    "the gradient belongs to the loss functions; their operators alone, as a program of "
    "torch.export holds them, have none"
)
NO_DOUBLE_BACKWARD = "the gradient of the gradient exists with backend='reference' only"


OwnPairs = tuple[tuple[int, int], ...]


def unflatten(flat: Sequence[Any], width: int) -> tuple[tuple[Any, ...], ...]:
    """Rows of ``width`` entries: an operator's arguments are flat."""
    return tuple(tuple(flat[i : i + width]) for i in range(0, len(flat), width))


def known_scale(scale: Tensor, max_scale: float | None) -> float | None:
    """The scale's value where the host has it without waiting for a device."""
    if max_scale is None and scale.device.type == "cpu":
        # An operator's body runs on the CPU here: it reads an operand where it lies.
        return float(scale)
    return max_scale


def subtractable(neg_lse: Tensor) -> Tensor:
    """``neg_lse`` with +inf for -inf: exp(x - inf) = 0, so that a row without a negative has no
    weights, whatever its masked x are."""
    return neg_lse.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=torch.inf)


def weight_unit(grad: Tensor, compute_dtype: torch.dtype) -> Tensor | None:
    """The unit in which weights made from ``grad`` are stored; None: 1.

    Weights are about 1 / M^2; below 6e-8 float16 has no numbers. At most 2 * 2^10 is far below its
    largest.
    """
    if compute_dtype != torch.float16:
        return None
    unit = grad.abs().amax().mul_(2**-10)
    return torch.where(unit > 0, unit, 1.0)
