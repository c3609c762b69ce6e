"""Triton kernels without a GPU: in Triton's interpreter, with every access to memory checked.

The interpreter has to be switched on before Triton is imported, so a test file starts itself once
more in a process of its own: ``run_file``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

runs = pytest.mark.skipif(
    not HAS_TRITON or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs Triton and a GPU; test_in_the_interpreter runs it without one",
)
starts = pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="is the one that starts it")
watches_memory = pytest.mark.skipif(not INTERPRETED, reason="watches the interpreter's memory")


def run_file(path: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.fixture(scope="session", autouse=True)
def mended_interpreter() -> Iterator[None]:
    """What Triton 3.6 to 3.9 interpret wrongly or slowly, for all tests of a process.

    A product of bfloat16 is interpreted as one of the integers with its bits, and rounding to it as
    cutting bits off. And each call from one kernel function to another looks through all of
    ``triton.language`` for what to replace: half of the interpreter's time with kernels such as
    these. What a launch does not replace stays replaced after a call, so one call into each module
    is enough. A tenth goes into a table of dtypes that is made anew for each look into it, and as
    much into working out anew, for each value, what follows from its type.

    Triton 3.6 besides takes a scalar, an array of one element here, for a number without asking for
    its element, which NumPy 2.5 refuses.
    """
    if not INTERPRETED:
        yield
        return
    from triton import language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    create_dot, call = InterpreterBuilder.create_dot, InterpretedFunction.__call__
    convert = interpreter._convert_float
    called: set[str] = set()

    def widened(operand: TensorHandle) -> TensorHandle:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_widened_dot(self, a, b, *others):
        return create_dot(self, widened(a), widened(b), *others)

    def rounded(data, source, target, *others):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, *others)
        nearest = torch.from_numpy(np.array(data)).bfloat16()
        return nearest.view(torch.int16).numpy().view(np.uint16)

    def quick_call(self, *arguments, **named):
        if self.fn.__module__ in called:
            return self.rewrite()(*arguments, **named)
        called.add(self.fn.__module__)
        return call(self, *arguments, **named)

    np_dtype = interpreter._get_np_dtype
    np_dtype_of_scalar = functools.cache(np_dtype)

    def quick_np_dtype(of):
        return np_dtype(of) if of.scalar.is_ptr() else np_dtype_of_scalar(of.scalar)

    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    of_types: dict[tuple[Any, ...], dict[str, Any]] = {}
    of_tensors: dict[str, dict[str, Any]] = {}

    def quick_type(self, element_ty, shape):
        key = (element_ty.name, *shape)
        if key not in of_types:
            make_type(self, element_ty, shape)
            of_types[key] = dict(vars(self))
        vars(self).update(of_types[key], element_ty=element_ty)

    def quick_tensor(self, handle, type):
        if type.name not in of_tensors:
            make_tensor(self, handle, type)
            of_tensors[type.name] = dict(vars(self))
        vars(self).update(of_tensors[type.name], handle=handle, type=type, dtype=type.scalar)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_with_index(tensor, scope):
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tl.block_type, "__init__", quick_type)
        patch.setattr(tl.tensor, "__init__", quick_tensor)
        patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_with_index)
        patch.setattr(InterpreterBuilder, "create_dot", create_widened_dot)
        patch.setattr(interpreter, "_convert_float", rounded)
        patch.setattr(InterpretedFunction, "__call__", quick_call)
        patch.setattr(interpreter, "_get_np_dtype", quick_np_dtype)
        yield


@dataclass
class Memory:
    """What the launches inside :func:`checked_memory` did.

    Attributes:
        launches: names of the kernels launched, in order.
    """

    launches: list[str] = field(default_factory=list)
    _starts: Any = None
    _stops: Any = None
    _reads: list[Any] = field(default_factory=list)
    _writes: list[Any] = field(default_factory=list)

    def begin(self, arguments: list[Any]) -> None:
        """Note which bytes the tensors of a launch own."""
        leaves = torch.utils._pytree.tree_leaves(arguments)
        leaves = [getattr(leaf, "base", leaf) for leaf in leaves]  # of descriptors
        storages = [a.untyped_storage() for a in leaves if isinstance(a, torch.Tensor)]
        owned = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages})
        self._starts, self._stops = (np.array(ends, np.uint64) for ends in zip(*owned, strict=True))
        self._reads, self._writes = [], []

    def access(self, pointers: Any, mask: Any, program: int, writes: bool) -> None:
        addresses = pointers.data[mask.data].ravel()
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        at = np.searchsorted(self._starts, addresses, side="right") - 1
        outside = (at < 0) | (addresses + size > self._stops[np.maximum(at, 0)])
        assert not outside.any(), f"{self.launches[-1]}: access outside of every tensor"
        record = self._writes if writes else self._reads
        record.append(np.stack([addresses, np.full_like(addresses, program)]))

    def end(self) -> None:
        """No address written by two programs, none read by another than its writer."""
        if not self._writes:
            return
        writes = np.unique(np.concatenate(self._writes, 1), axis=1)
        assert len(np.unique(writes[0])) == writes.shape[1], (
            f"{self.launches[-1]}: two programs write one address"
        )
        if self._reads:
            reads = np.concatenate(self._reads, 1)
            at = np.minimum(np.searchsorted(writes[0], reads[0]), writes.shape[1] - 1)
            races = (writes[0, at] == reads[0]) & (writes[1, at] != reads[1])
            assert not races.any(), f"{self.launches[-1]}: reads what another program writes"


@contextmanager
def checked_memory(reverse: bool = False) -> Iterator[Memory]:
    """In the interpreter: fail on accesses outside of a launch's tensors and on races between its
    programs; uninitialised tables hold NaN.

    Args:
        reverse: run the programs of a launch from the last to the first.
    """
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    memory = Memory()
    call = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    set_grid_idx = InterpreterBuilder.set_grid_idx
    new_empty = torch.Tensor.new_empty

    def program(builder: Any) -> int:
        (x, y, _), (_, height, _) = builder.grid_idx, builder.grid_dim
        return x * height + y

    def checked_call(self, *arguments, **named):
        memory.launches.append(self.fn.__name__)
        memory.begin([*arguments, *named.values()])
        call(self, *arguments, **named)
        memory.end()

    def checked_load(self, pointers, mask, *others, **named):
        memory.access(pointers, mask, program(self), writes=False)
        return load(self, pointers, mask, *others, **named)

    def checked_store(self, pointers, value, mask, *others, **named):
        memory.access(pointers, mask, program(self), writes=True)
        return store(self, pointers, value, mask, *others, **named)

    def reversed_grid_idx(self, x, *others):
        set_grid_idx(self, self.grid_dim[0] - 1 - x, *others)

    def poisoned(self, *arguments, **named):
        result = new_empty(self, *arguments, **named)
        return result.fill_(torch.nan) if result.is_floating_point() else result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", checked_call)
        patch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        if reverse:
            patch.setattr(InterpreterBuilder, "set_grid_idx", reversed_grid_idx)
        yield memory
