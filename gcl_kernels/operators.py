"""What the operators of this package share: their library, their conventions, and when their
bodies run directly."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gcl_kernels.spec import recordable

LIBRARY = torch.library.Library("gcl_kernels", "DEF")


def operator(name: str, body: Callable[..., Any], *tensors: Tensor | None) -> Callable[..., Any]:
    """``gcl_kernels::name``, or its body where nothing traces, counts or differentiates it.

    The dispatcher's way to a Python operator costs 25 us; a small batch's products take 50.
    """
    compiling = torch.compiler.is_compiling()
    watched = compiling or torch.is_grad_enabled() or is_in_torch_dispatch_mode()
    if not watched and all(type(t) in (Tensor, torch.nn.Parameter, type(None)) for t in tensors):
        return body
    if not compiling and "torch.utils.flop_counter" in sys.modules:
        import_module("gcl_kernels.flops").inform_counters()
    return getattr(torch.ops.gcl_kernels, name)


def refuse_transforms(*tensors: Tensor) -> None:
    """Raise NotImplementedError within a transform of ``torch.func`` or with a batch of gradients,
    whose tensors have no memory that a kernel could read, and where a tensor has a tangent."""
    if torch.compiler.is_compiling():
        return
    if (
        torch._C._are_functorch_transforms_active()
        or any(torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)
        or forward_ad._current_level >= 0
        and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    ):
        raise NotImplementedError(
            "gcl_kernels: torch.func's transforms (grad, vmap, jvp, ...), forward-mode gradients "
            "and batches of upstream gradients (is_grads_batched, vectorize=True) exist with "
            "backend='reference' only"
        )


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


def needed_views(views: Sequence[Tensor], z: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """Those that a backward pass reads beside ``z``: none where ``z`` holds them unrounded, whose
    rows then stand for them."""
    dtype = z.dtype
    if dtype == scale.dtype and all(view.dtype == dtype for view in views):
        return ()
    return tuple(map(recordable, views))


def finite_scale(scale: Tensor, max_scale: float | None) -> Tensor:
    """The scale; NaN for an infinite one, whose logits of -inf would pass for candidates of weight
    zero."""
    if max_scale is not None:
        return scale
    if scale.device.type == "cpu":
        return scale if math.isfinite(scale) else torch.full_like(scale, torch.nan)
    return torch.add(scale, scale, alpha=0)  # inf + 0 * inf


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
