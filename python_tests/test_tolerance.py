"""The rule must reject a wrong gradient."""

import pytest
import torch
from oracle import dense_loss
from tolerance import assert_accurate

import gcl_kernels


def test_planted_error_fails():
    views = [torch.randn(40, 16, dtype=torch.float64) for _ in range(3)]

    def gradient(function, dtype):
        leaves = [v.to(dtype).clone().requires_grad_() for v in views]
        function(leaves, torch.tensor(20.0, dtype=dtype)).backward()
        return leaves[0].grad

    rounded = [v.float().double() for v in views]
    views[:] = rounded
    exact = gradient(dense_loss, torch.float64)
    dense = gradient(dense_loss, torch.float32)
    result = gradient(lambda e, s: gcl_kernels.gcl_loss(*e, s), torch.float32)
    size = (4 * 20.0 / 40 / rounded[0].norm(dim=-1)).norm().item()
    assert_accurate("e_i.grad", result, exact, dense, size)
    planted = result.clone()
    planted[7, 3] += 1e-4 * exact.norm()
    with pytest.raises(AssertionError, match=r"e_i.grad: .* worst at \[7, 3\]"):
        assert_accurate("e_i.grad", planted, exact, dense, size)
    planted[7, 3] = torch.nan
    with pytest.raises(AssertionError, match=r"worst at \[7, 3\]"):
        assert_accurate("e_i.grad", planted, exact, dense, size)
    with pytest.raises(AssertionError, match="e_i.grad"):
        assert_accurate("e_i.grad", 1.00001 * result, exact, dense, size)
