"""Compilation before a run starts, so that none stalls it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gcl_kernels.dispatch import BACKENDS
from gcl_kernels.spec import FLOAT_DTYPES

_log = logging.getLogger("gcl_kernels")


class Warmup(NamedTuple):
    """What :func:`warmup` did.

    Attributes:
        kernels: how many were compiled, or read from Triton's cache on disk.
        seconds: that it took.
    """

    kernels: int
    seconds: float


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value}")
    return value


def warmup(
    loss: Callable[..., Tensor],
    num_samples: int | Sequence[int],
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    num_views: int = 3,
    device: torch.device | str = "cuda",
    sample_ids: bool = False,
    requires_grad: bool | Sequence[bool] = True,
) -> Warmup:
    """Compile what a run's calls of a loss will launch, all kernels at once on all cores; then make
    one such step for each batch size, which loads them.

        gcl_kernels.warmup(gcl_kernels.gcl_loss, [4096, 4096 - 17], 768, num_views=2)
        gcl_kernels.warmup(functools.partial(gcl_kernels.clip_loss, group="world"), 4096, 512,
                           num_views=2)

    Without it the first step compiles them one after the other, a smaller last batch perhaps some
    more in the middle of a run, seconds to tens of seconds each. Triton keeps what it compiled on
    disk: a second run reads it.

    Args:
        loss: what the run calls, as ``loss(*views, logit_scale=scale)``: a function of this package
            with its options in a ``functools.partial``, or a module such as :class:`GCLLoss`; with
            ``sample_ids=ids`` where these are asked for. A module that owns a scale is called
            without ``logit_scale``. Of a ``group``: called in all of its processes.
        num_samples: N, of one or several batch sizes: also of a smaller last batch.
        dim: D of the embeddings.
        dtype: of the embeddings. Call it under the run's autocast, if there is one.
        num_views: how many embeddings the loss is called with; with :func:`gcl_loss` three, or two
            for score fusion.
        device: of the embeddings.
        sample_ids: whether the run gives ids.
        requires_grad: whether embeddings get gradients: all, or each; without any only the forward
            pass is compiled.

    Returns:
        How many kernels, and the seconds it took, which the logger ``gcl_kernels`` is told too
        (INFO). Where nothing is compiled (a CPU, Triton's interpreter, a GPU without Triton) it
        returns at once. A loss with the option ``backend="tiled"`` or ``"cuda"`` makes its steps.

    Raises:
        ValueError, TypeError: malformed arguments, also those of the loss.
        RuntimeError: another is running in this process; CUDA is out of memory, as the run's own
            step would be.
    """
    started = time.perf_counter()
    sizes = [num_samples] if isinstance(num_samples, int) else list(num_samples)
    sizes = [_positive("num_samples", n) for n in sizes]
    _positive("dim", dim), _positive("num_views", num_views)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"dtype: expected torch.float64, float32, bfloat16 or float16, got {dtype!r}"
        )
    needs = [requires_grad] * num_views if isinstance(requires_grad, bool) else list(requires_grad)
    if len(needs) != num_views:
        raise ValueError(f"requires_grad: expected a bool or {num_views} of them, got {needs}")
    place = torch.device(device)
    compilers = [of for of in BACKENDS.values() if of.compiles(place)]
    if not compilers:
        return Warmup(0, time.perf_counter() - started)
    scale = torch.ones((), device=place, requires_grad=any(needs))

    def step() -> None:
        for n in sizes:
            views = [torch.ones(n, dim, dtype=dtype, device=place) for _ in needs]
            for view, needed in zip(views, needs, strict=True):
                view.requires_grad_(needed)
            named = {} if _owns_scale(loss) else {"logit_scale": scale}
            if sample_ids:
                named["sample_ids"] = torch.arange(n, device=place)
            with torch.set_grad_enabled(any(needs)):
                value = loss(*views, **named)
            if any(needs):
                # Of these alone: a module's parameters keep the gradients they have.
                value.sum().backward(inputs=[view for view in views if view.requires_grad])

    kernels = sum(backend.compile_ahead(step, scale) for backend in compilers)
    step()
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    found = Warmup(kernels, time.perf_counter() - started)
    _log.info("warmup: %d kernels in %.1f s", *found)
    return found


def _owns_scale(loss: Callable[..., Tensor]) -> bool:
    return getattr(loss, "log_logit_scale", None) is not None
