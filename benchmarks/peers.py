"""What users could write or pick instead, as well as it can be written."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gcl_kernels

CHUNK_ROWS = 1024


def dense_gcl(e_i: Tensor, e_t: Tensor, e_it: Tensor, scale: Tensor) -> Tensor:
    """The loss over one dense 3N x 3N matrix, one logsumexp a row."""
    n = e_i.shape[0]
    z = F.normalize(torch.cat([e_i, e_t, e_it]), dim=-1)
    x = scale * (z @ z.T)
    # Not in place: autograd needs no copy of x for it, and torch.compile fuses it.
    x = x.masked_fill(torch.eye(3 * n, dtype=torch.bool, device=x.device), -torch.inf)
    positives = x.diagonal(n).sum() + x.diagonal(2 * n).sum()
    return x.logsumexp(1).mean() - positives * 2 / (6 * n)


def _rows_gcl(z: Tensor, rows: Tensor, start: int, scale: Tensor, n: int) -> Tensor:
    x = scale * (rows @ z.T)
    own = torch.arange(start, start + rows.shape[0], device=z.device)
    x = x.scatter(1, own[:, None], -torch.inf)
    others = torch.stack([(own + n) % (3 * n), (own + 2 * n) % (3 * n)], 1)
    return x.logsumexp(1).sum() - x.gather(1, others).sum() / 2


def chunked_gcl(e_i: Tensor, e_t: Tensor, e_it: Tensor, scale: Tensor) -> Tensor:
    """The same in chunks of rows, each recomputed in the backward pass."""
    n = e_i.shape[0]
    z = F.normalize(torch.cat([e_i, e_t, e_it]), dim=-1)
    total = z.new_zeros(())
    for start in range(0, 3 * n, CHUNK_ROWS):
        rows = z[start : start + CHUNK_ROWS]
        total = total + checkpoint(_rows_gcl, z, rows, start, scale, n, use_reentrant=False)
    return total / (3 * n)


def dense_clip(e_i: Tensor, e_t: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss over one dense N x N matrix."""
    x = scale * (F.normalize(e_i, dim=-1) @ F.normalize(e_t, dim=-1).T)
    labels = torch.arange(x.shape[0], device=x.device)
    return (F.cross_entropy(x, labels) + F.cross_entropy(x.T, labels)) / 2


def open_clip_clip(e_i: Tensor, e_t: Tensor, scale: Tensor) -> Tensor:
    """open_clip's ClipLoss, which multiplies the matrix out once per direction."""
    import open_clip

    return open_clip.ClipLoss()(F.normalize(e_i, dim=-1), F.normalize(e_t, dim=-1), scale)


def on_sum(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of three views as one of two, with their sum for the third."""
    return lambda e_i, e_t, scale: loss(e_i, e_t, e_i + e_t, scale)


def ours(loss: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    return lambda *arguments: loss(*arguments, backend=backend)


def peers(task: str, backend: str = "auto") -> dict[str, Callable[..., Tensor]]:
    """Name to function of the views and the scale, for a task of ``NUM_VIEWS``.

    ``"fused"`` is GCL of image, text and their sum.
    """
    if task == "gcl":
        return {
            "dense eager": dense_gcl,
            "dense torch.compile": torch.compile(dense_gcl),
            "chunked checkpoint": chunked_gcl,
            "gcl_kernels": ours(gcl_kernels.gcl_loss, backend),
        }
    if task == "fused":
        loss = ours(gcl_kernels.gcl_loss, backend)
        return {
            "dense eager": on_sum(dense_gcl),
            "dense torch.compile": torch.compile(on_sum(dense_gcl)),
            "chunked checkpoint": on_sum(chunked_gcl),
            "sum given": on_sum(loss),
            "gcl_kernels": lambda e_i, e_t, scale: loss(e_i, e_t, None, scale),
        }
    return {
        "dense eager": dense_clip,
        "dense torch.compile": torch.compile(dense_clip),
        "open_clip ClipLoss": open_clip_clip,
        "gcl_kernels": ours(gcl_kernels.clip_loss, backend),
    }


NUM_VIEWS = {"gcl": 3, "fused": 2, "clip": 2}


def product_flops(task: str, n: int, d: int) -> float:
    """Floating-point operations of the matrix products of a forward and a backward pass."""
    return {"gcl": 36, "fused": 16, "clip": 8}[task] * n * n * d


def training_step(
    function: Callable[..., Tensor],
    task: str,
    n: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    learnable_scale: bool = True,
) -> Callable[[], Tensor]:
    """Forward and backward on fixed random embeddings, with the scale of an early CLIP (1/0.07)."""
    generator = torch.Generator().manual_seed(n + d)
    views = [
        torch.randn(n, d, generator=generator).to(device, dtype).requires_grad_()
        for _ in range(NUM_VIEWS[task])
    ]
    scale = torch.tensor(1 / 0.07, device=device, requires_grad=learnable_scale)

    def step() -> Tensor:
        for leaf in (*views, scale):
            leaf.grad = None
        loss = function(*views, scale)
        loss.backward()
        return loss

    return step
