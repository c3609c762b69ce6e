"""The one rule by which results are judged.

The error of a result is the norm of its difference from the float64 oracle on the same (already
rounded) inputs. It may be twice that of the dense computation in the same dtype with float32
logits, plus the rounding of the output dtype, plus a floor for sums that cancel: a few units of
rounding of the terms that were summed, whose size the caller derives.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_accurate(
    name: str, result: Tensor, exact: Tensor, dense: Tensor, term_size: float
) -> None:
    """Raise AssertionError naming tensor, worst index, error and bound unless the rule holds.

    Args:
        result: what is judged, in its own dtype.
        exact: float64 oracle.
        dense: the dense computation with logits in the accumulation dtype.
        term_size: norm of the tensor made of the sizes of the terms that each entry sums.
    """
    assert result.shape == exact.shape, f"{name}: shape {result.shape}, expected {exact.shape}"
    difference = result.detach().double() - exact
    error = difference.norm().item()
    dense_error = (dense.detach().double() - exact).norm().item()
    accum_dtype = torch.promote_types(result.dtype, torch.float32)
    # Below the smallest normal number an entry's rounding is absolute.
    least = torch.finfo(result.dtype).tiny * result.numel() ** 0.5
    rounding = torch.finfo(result.dtype).eps * (exact.norm().item() + least)
    floor = 4 * torch.finfo(accum_dtype).eps * term_size
    bound = 2 * dense_error + rounding + floor
    if not error <= bound:
        worst = difference.abs().nan_to_num(nan=torch.inf).argmax().item()
        index = [int(i) for i in torch.unravel_index(torch.tensor(worst), result.shape or (1,))]
        raise AssertionError(
            f"{name}: error {error:.3e} exceeds bound {bound:.3e} (twice the dense error "
            f"{dense_error:.3e}, rounding {rounding:.1e}, floor {floor:.1e}); norm "
            f"{exact.norm().item():.3e}, worst at {index}: {result.flatten()[worst].item():.9g}, "
            f"expected {exact.flatten()[worst].item():.9g}"
        )
