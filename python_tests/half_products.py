"""The arithmetic of a GPU's half types on a CPU."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gcl_kernels import negatives
from gcl_kernels.backends import tiled
from gcl_kernels.dispatch import BACKENDS


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    accumulator.addmm_(a.to(accumulator.dtype), b.to(accumulator.dtype))


def emulate_half_products(patch: pytest.MonkeyPatch) -> None:
    """On a CPU half types compute in float32; this gives ``tiled`` the arithmetic of a GPU: half
    operands, float32 accumulation and results."""
    row = dataclasses.replace(BACKENDS["tiled"], product=product, add_product=add_product)
    patch.setitem(BACKENDS, "tiled", row)
    patch.setattr(tiled, "product", product)
    patch.setattr(negatives, "resolve_dtypes", resolve_dtypes)


def resolve_dtypes(
    compute_dtype: torch.dtype | None, views: Sequence[Tensor]
) -> tuple[torch.dtype, torch.dtype]:
    """As ``spec.resolve_dtypes`` for tensors on a GPU."""
    if compute_dtype is None:
        compute_dtype = functools.reduce(torch.promote_types, (view.dtype for view in views))
    return compute_dtype, torch.promote_types(compute_dtype, torch.float32)
