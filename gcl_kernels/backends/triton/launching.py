"""Launches, and compilations ahead of them.

For each launch Triton binds the arguments, works out what each is specialised for, and looks the
kernel up by all of it; of a small batch's host time that is most. :func:`start` looks up what was
compiled by what decides it, and calls that.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16
"""Triton asks of a pointer, in bytes, and of a number whether they are multiples of it."""

NUMBER_LIMIT = 1 << 31
"""AMD's compiler asks whether a tensor has fewer bytes."""

ON_AMD = torch.version.hip is not None

_PLAIN = frozenset({int, bool, str, type(None)})


class StandIn:
    """For a tensor of a launch that is not made: what Triton asks of one, without its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = tensor.data_ptr() % ALIGNMENT
        self._bytes = tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return self._bytes


def _stand_in(value: Any) -> Any:
    if type(value) is tuple:
        return tuple(map(_stand_in, value))
    if isinstance(value, TensorDescriptor):
        return dataclasses.replace(value, base=StandIn(value.base))
    return StandIn(value) if isinstance(value, Tensor) else value


class Compiled:
    """What became of a kernel so far.

    Args:
        kernel: what ``triton.jit`` made.
        named: arguments and options of a launch; all launches name the same.

    Attributes:
        count: of these.
        arguments: from such a dictionary, in the kernel's order.
        constants: from it those that are constants of a compilation, and the options.
        decide: which arguments decide what is compiled by more than their value (constants), or
            than their need of 64 bits.
        free: which are numbers that are specialised for nothing.
        kernels: by what decided them.
    """

    def __init__(self, kernel: Any, named: dict[str, Any]) -> None:
        names, params = kernel.arg_names, kernel.params
        constants = [of.name for of in params if of.is_constexpr]
        self.count = len(named)
        self.arguments = operator.itemgetter(*names)
        self.constants = operator.itemgetter(*constants, *(n for n in named if n not in names))
        self.free = [of.do_not_specialize for of in params]
        self.decide = [not (of.do_not_specialize or of.is_constexpr) for of in params]
        self.kernels: dict[tuple[Any, ...], CompiledKernel] = {}


_known: dict[Any, Compiled] = {}
"""By kernels, whose hash is that of their source."""

_written: dict[tuple[Any, ...], Callable[[], Any]] | None = None
"""How to compile for the launches that :func:`compile_ahead` writes down in place of making them.
Not of a thread or a context: autograd goes backward in threads of its own."""


def start(kernel: Any, grid: tuple[int, ...], named: dict[str, Any]) -> None:
    """``kernel[grid](**named)``.

    What was compiled before serves a launch of the same device, dtype and alignment of every
    tensor, and of the same other arguments and options but the numbers that are specialised for
    nothing, of which only whether they need 64 bits counts: a finer key than Triton's, which of a
    number asks whether it is 1 or a multiple of 16. Where something beside the arguments decides
    (hooks, instrumentation, debugging) Triton is asked.
    """
    if not isinstance(kernel, JITFunction):  # but the interpreter's
        kernel[grid](**named)
        return
    known = _known.get(kernel)
    if known is None:
        known = _known[kernel] = Compiled(kernel, named)
    values = known.arguments(named)
    key = (
        driver.active.get_current_device(),
        known.constants(named),
        *[
            (value.dtype, value.data_ptr() % ALIGNMENT)
            if type(value) is Tensor and not ON_AMD
            else _mark(value)
            for value in itertools.compress(values, known.decide)
        ],
        *[value >> 31 for value in itertools.compress(values, known.free)],
    )
    if _written is not None:
        arguments = {name: _stand_in(value) for name, value in named.items()}
        _written[(kernel, key)] = functools.partial(kernel.warmup, grid=grid, **arguments)
        return
    if len(named) != known.count or _is_watched(kernel):
        kernel[grid](**named)
        return
    compiled = known.kernels.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*values)
        return
    compiled = kernel[grid](**named)
    if isinstance(compiled, CompiledKernel):  # a hook may have kept it from being made
        known.kernels[key] = compiled


def _is_watched(kernel: Any) -> bool:
    """Whether something beside the arguments decides what is compiled, or is told of launches."""
    return bool(
        kernel.pre_run_hooks
        or knobs.runtime.debug
        or knobs.compilation.instrumentation_mode
        or getattr(knobs.runtime, "add_stages_inspection_hook", None)  # from Triton 3.7 on
    )


def _mark(value: Any) -> Any:
    """What of an argument decides which compilation serves it."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is tuple:
        return tuple(map(_mark, value))
    if kind is TensorDescriptor:
        return value.base.dtype, *value.block_shape
    if ON_AMD:
        in_reach = value.untyped_storage().nbytes() < NUMBER_LIMIT
        return value.dtype, value.data_ptr() % ALIGNMENT, in_reach
    return value.dtype, value.data_ptr() % ALIGNMENT


def compile_ahead(step: Callable[[], Any], like: Tensor) -> int:
    """As :meth:`Backend.compile_ahead`. In threads: a compilation holds Python's lock for some
    hundredths of the seconds that it takes."""
    global _written
    if _written is not None:
        raise RuntimeError("warmup: expected one at a time, another is running")
    _written = {}
    try:
        step()
        launches: Iterable[Callable[[], Any]] = _written.values()
    finally:
        _written = None
    with ThreadPoolExecutor(os.cpu_count()) as pool, torch.cuda.device_of(like):
        with triton.AsyncCompileMode(pool) as mode:
            for launch in launches:
                launch()
    return len(mode.raw_futures)
