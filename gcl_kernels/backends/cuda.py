"""The block functions as CUDA C++ kernels, for NVIDIA sm_80 and later where Triton is missing.

The tensor side of ``csrc/cuda``, whose sources hold the definitions: the general road alone. What
the extension ``gcl_kernels._cuda`` takes are addresses, sizes and a stream, so that one build
serves every PyTorch. Memory comes from PyTorch's allocator, launches go to its current stream, and
nothing waits for the device.

Tables are float32 [2, slots, lines]: a tile's maxima and sums have a slot of their own, and
``fold`` adds the slots in their order. Nothing is atomic, so the same inputs give the same bits.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gcl_kernels.backends.base import Backend
from gcl_kernels.blocks import Block
from gcl_kernels.problem import Lines, Problem, RowStats, Workspace, allows_tf32

_cuda: Any = None
try:
    _cuda = import_module("gcl_kernels._cuda")
except ImportError as error:
    _WHY_UNAVAILABLE = (
        f"its extension is not built ({error}): install gcl_kernels where nvcc is found, "
        "see docs/building.md"
    )

BLOCK_ROWS = 8192
"""Largest rows of a block: its weights take 128 MiB (256 MiB in float32), the whole workspace, and
launches are few. Smaller blocks gain nothing, since logits stay on the chip at any size."""

_NOT_FOUND = "this PyTorch finds no NVIDIA GPU"


def _why_no_gpu() -> str | None:
    if _cuda is None:
        return _WHY_UNAVAILABLE
    if _cuda.device_type == "cpu":
        return None
    # torch.compile traces what asks; it knows what PyTorch's own functions return.
    if not torch.compiler.is_compiling() and _cuda.device_count() == 0:
        return _cuda.why_no_device()
    return None if torch.version.hip is None else _NOT_FOUND


def _why_not_device(device: torch.device) -> str | None:
    return _why_not_capability(torch.cuda.get_device_capability(device), _cuda.compiled_archs)


def _why_not_capability(capability: tuple[int, int], compiled_archs: str) -> str | None:
    """None where a device can run what was compiled for targets such as ``80;86;90a;120+PTX``."""
    major, minor = capability
    if major < 8:
        return f"needs a GPU of compute capability 8.0 or later, this one has {major}.{minor}"
    for arch in compiled_archs.split(";"):
        number = int(arch.removesuffix("+PTX").rstrip("af"))
        if arch.removesuffix("+PTX").endswith("a"):
            serves = number == 10 * major + minor
        elif arch.endswith("+PTX"):
            serves = number <= 10 * major + minor
        else:
            serves = number // 10 == major and number % 10 <= minor
        if serves:
            return None
    return (
        f"its extension was built for {compiled_archs}, not for compute capability "
        f"{major}.{minor}: see docs/building.md"
    )


def _product(dtype: torch.dtype) -> Any:
    if dtype == torch.float32:
        return _cuda.Product.tf32 if allows_tf32() else _cuda.Product.float32
    return _cuda.Product.bfloat16 if dtype == torch.bfloat16 else _cuda.Product.float16


def _side(problem: Problem, side: str, where: slice) -> Any:
    tables = {
        name: getattr(problem, f"{name}_{side}") for name in ("z", "ids", "log_weights", "limits")
    }
    return _cuda.Side(
        length=where.stop - where.start,
        **{name: 0 if of is None else of[where].data_ptr() for name, of in tables.items()},
    )


class _Call:
    """What the launches of one block share."""

    def __init__(self, problem: Problem, block: Block, *others: Tensor) -> None:
        z = problem.z_rows
        for tensor in (problem.z_cols, problem.scale, *others):
            if tensor.device != z.device:
                raise RuntimeError(
                    f"backend: 'cuda' was given tensors on {z.device} and on {tensor.device}"
                )
        self._z = z
        id_offset, id_period = block.id_diagonals
        self.block = _cuda.Block(
            rows=_side(problem, "rows", block.rows),
            cols=_side(problem, "cols", block.cols),
            scale=problem.scale.data_ptr(),
            dim=z.shape[-1],
            id_offset=id_offset,
            id_period=id_period,
            unit_rows=problem.unit_rows,
            diagonal=block.diagonal,
            serves_rows=block.serves_rows,
            serves_cols=block.serves_cols,
        )

    def start(self, kernel: Any, **arguments: Any) -> None:
        """Launch on the current stream of the tensors' device."""
        z = self._z
        stream = torch.cuda.current_stream(z.device).cuda_stream if z.is_cuda else 0
        # The extension's own CUDA runtime makes this device current, for PyTorch's as well.
        with torch.cuda.device_of(z):
            kernel(device=z.device.index or 0, stream=stream, **arguments)

    def over_tiles(self, kernel: Any, **arguments: Any) -> None:
        """Start a kernel of one program for each tile of the block."""
        product = _product(self._z.dtype)
        self.start(kernel, product=product, block=self.block, **arguments)


def _fold(table: Tensor, stats: RowStats, where: slice, served: bool) -> Any:
    """A fold of ``table`` [2, slots, lines] into these lines of the statistics."""
    return _cuda.Fold(
        table=table.data_ptr(),
        slots=table.shape[1],
        length=table.shape[2] if served else 0,
        max=stats.max[where].data_ptr(),
        sum=stats.sum[where].data_ptr(),
    )


def _tables(problem: Problem, block: Block) -> tuple[Tensor, Tensor]:
    """Of rows and columns. Those of a diagonal block are the same lines, and share their slots."""
    num_rows, num_cols = block.shape
    rows = problem.scale.new_empty(2, -(-num_cols // _cuda.TILE), num_rows)
    if block.diagonal:
        return rows, rows
    return rows, problem.scale.new_empty(2, -(-num_rows // _cuda.TILE), num_cols)


def _lines(lines: Lines, where: slice) -> Any:
    return _cuda.Lines(lse=lines.lse[where].data_ptr(), grad=lines.grad[where].data_ptr())


class Cuda(Backend):
    """The backend ``cuda``."""

    fuses_scores = False

    def why_unavailable(self) -> str | None:
        reason = _why_no_gpu()
        if reason is not None or _cuda.device_type == "cpu":  # kernels built for an emulated GPU
            return reason
        if not torch.cuda.is_available():
            return _NOT_FOUND
        devices = range(torch.cuda.device_count())
        reasons = [_why_not_device(torch.device("cuda", index)) for index in devices]
        return None if None in reasons else reasons[0]

    def why_not(self, device: torch.device, compute_dtype: torch.dtype) -> str | None:
        if compute_dtype == torch.float64:
            return "no float64: use backend='tiled'"
        reason = _why_no_gpu()
        if reason is not None:
            return reason
        if device.type != _cuda.device_type:
            return f"needs tensors on a {_cuda.device_type.upper()} device, got {device}"
        return _why_not_device(device) if device.type == "cuda" else None

    def block_rows(self, z: Tensor) -> int:
        reason = self.why_not(z.device, z.dtype)
        if reason is not None:
            raise RuntimeError(f"backend: 'cuda' cannot serve this call: {reason}")
        return BLOCK_ROWS

    def block_stats(
        self, problem: Problem, block: Block, rows: RowStats, cols: RowStats, workspace: Workspace
    ) -> None:
        call = _Call(problem, block, rows.sum, cols.sum)
        row_table, col_table = _tables(problem, block)
        call.over_tiles(
            _cuda.block_stats, row_table=row_table.data_ptr(), col_table=col_table.data_ptr()
        )
        call.start(
            _cuda.fold,
            rows=_fold(row_table, rows, block.rows, block.serves_rows),
            cols=_fold(col_table, cols, block.cols, block.serves_cols and not block.diagonal),
        )

    def block_weights(
        self, problem: Problem, block: Block, rows: Lines, cols: Lines, workspace: Workspace
    ) -> Tensor:
        out = workspace.tile(0, block.shape, problem.compute_dtype)
        _Call(problem, block, rows.lse, cols.lse, rows.grad, cols.grad, out).over_tiles(
            _cuda.block_weights,
            rows=_lines(rows, block.rows),
            cols=_lines(cols, block.cols),
            out=out.data_ptr(),
            pitch=out.stride(0),
        )
        return out
