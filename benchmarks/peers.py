"""What users could write or pick instead, as well as it can be written.

GCL, NT-Xent and score fusion are one loss: over V N unit rows z of V views of N samples,

    mean over rows i of  log sum over j != i of exp(s <z_i, z_j>)  -  mean positive logit of i,

where the positives of a row are the other views of its sample (the supervised contrastive loss of
V views). Every function here takes its views, [N, D], and then the scale s.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gcl_kernels

Loss = Callable[..., Tensor]

compiled = functools.partial(torch.compile, dynamic=False)
"""For each size anew, as a training run has one."""

CHUNK_ROWS = 1024


def unit_rows(*views: Tensor) -> Tensor:
    return F.normalize(torch.cat(views), dim=-1)


def dense(*arguments: Tensor) -> Tensor:
    """As one writes it first: the matrix, scaled, its diagonal masked, one logsumexp a row."""
    *views, scale = arguments
    n, v = len(views[0]), len(views)
    z = unit_rows(*views)
    x = scale * (z @ z.T)
    x = x.masked_fill(torch.eye(v * n, dtype=torch.bool, device=x.device), -torch.inf)
    positives = torch.stack([x.diagonal(k * n).sum() for k in range(1, v)]).sum()
    return x.logsumexp(1).mean() - positives * 2 / (v * (v - 1) * n)


def tuned(*arguments: Tensor) -> Tensor:
    """The same with as few passes over the matrix as autograd allows: the rows are scaled in place
    of it, the diagonal is filled in place, positives come from the rows."""
    *views, scale = arguments
    z = unit_rows(*views)
    x = (z * scale) @ z.T
    with torch.no_grad():  # the gradient there is 0 as it is: exp(-inf)
        x.fill_diagonal_(-torch.inf)
    positives = (z * towards(z, len(views))).sum() * scale
    return x.logsumexp(1).mean() - positives / (len(z) * (len(views) - 1))


def towards(z: Tensor, views: int) -> Tensor:
    """For each row the sum of its positives."""
    by_view = z.unflatten(0, (views, -1))
    return (by_view.sum(0) - by_view).flatten(0, 1)


def _loss_and_gradients(z: Tensor, scale: Tensor, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and its gradients in z and scale: 4 M^2 D, by the symmetry of z z^T."""
    x = (z * scale) @ z.T
    x.fill_diagonal_(-torch.inf)
    lse = x.logsumexp(1)
    p = torch.exp(x - lse[:, None])
    return _finished(z, scale, views, lse, (p + p.T) @ z)


def _rows_loss_and_gradients(z: Tensor, scale: Tensor, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same in chunks of rows, no more of the matrix in memory: 6 M^2 D."""
    lse, pulls = z.new_empty(len(z)), torch.zeros_like(z)
    for start in range(0, len(z), CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, len(z)))
        x = (z[rows] * scale) @ z.T
        x.diagonal(start).fill_(-torch.inf)
        lse[rows] = x.logsumexp(1)
        p = x.sub_(lse[rows, None]).exp_()
        pulls[rows].addmm_(p, z)
        pulls.addmm_(p.T, z[rows])
    return _finished(z, scale, views, lse, pulls)


def _finished(
    z: Tensor, scale: Tensor, views: int, lse: Tensor, pulls: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From the rows' logsumexp and (P + P^T) z."""
    m, positives = len(z), towards(z, views)
    loss = lse.mean() - scale * (z * positives).sum() / (m * (views - 1))
    grad = (pulls - positives * (2 / (views - 1))) * (scale / m)
    return loss, grad, (z * grad).sum() / (2 * scale)


def _clip_loss_and_gradients(
    z_i: Tensor, z_t: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = len(z_i)
    x = (z_i * scale) @ z_t.T
    rows, columns = x.logsumexp(1), x.logsumexp(0)
    g = torch.exp(x - rows[:, None]) + torch.exp(x - columns)
    positives = (z_i * z_t).sum()
    loss = (rows.mean() + columns.mean()) / 2 - scale * positives / n
    share = scale / (2 * n)
    grad_i, grad_t = (g @ z_t - 2 * z_t) * share, (g.T @ z_i - 2 * z_i) * share
    return loss, grad_i, grad_t, (z_i * grad_i).sum() / scale


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients come out of its forward pass."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> Tensor:
        loss, *gradients = function(*inputs)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *(grad * of_input for of_input in ctx.saved_tensors)


def with_gradients(function: Callable[..., tuple[Tensor, ...]]) -> Loss:
    """A loss by what computes it and its gradients in the unit rows and the scale."""

    def loss(*arguments: Tensor) -> Tensor:
        *views, scale = arguments

        def of_rows(z: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
            return function(z, scale, len(views))

        return _WithGradients.apply(of_rows, unit_rows(*views), scale)

    return loss


def with_gradients_of_views(function: Callable[..., Sequence[Tensor]]) -> Loss:
    """The same by the gradients in the views themselves."""
    return lambda *arguments: _WithGradients.apply(function, *arguments)


def _clip_with_gradients(function: Callable[..., tuple[Tensor, ...]]) -> Loss:
    loss = with_gradients_of_views(function)
    return lambda e_i, e_t, scale: loss(unit_rows(e_i), unit_rows(e_t), scale)


def _rows(z: Tensor, rows: Tensor, start: int, scale: Tensor, views: int) -> Tensor:
    n = len(z) // views
    x = scale * (rows @ z.T)
    own = torch.arange(start, start + len(rows), device=z.device)
    x = x.scatter(1, own[:, None], -torch.inf)
    others = torch.stack([(own + k * n) % len(z) for k in range(1, views)], 1)
    return x.logsumexp(1).sum() - x.gather(1, others).sum() / (views - 1)


def checkpointed(*arguments: Tensor) -> Tensor:
    """In chunks of rows, each recomputed in the backward pass: the usual way to save memory."""
    *views, scale = arguments
    z = unit_rows(*views)
    total = z.new_zeros(())
    for start in range(0, len(z), CHUNK_ROWS):
        rows = z[start : start + CHUNK_ROWS]
        total = total + checkpoint(_rows, z, rows, start, scale, len(views), use_reentrant=False)
    return total / len(z)


def dense_clip(e_i: Tensor, e_t: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss over one dense N x N matrix."""
    x = scale * (unit_rows(e_i) @ unit_rows(e_t).T)
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(x, labels) + F.cross_entropy(x.T, labels)) / 2


def tuned_clip(e_i: Tensor, e_t: Tensor, scale: Tensor) -> Tensor:
    """The rows scaled in place of the matrix, positives from the rows."""
    z_i, z_t = unit_rows(e_i), unit_rows(e_t)
    x = (z_i * scale) @ z_t.T
    positives = (z_i * z_t).sum() * scale / len(x)
    return (x.logsumexp(1).mean() + x.logsumexp(0).mean()) / 2 - positives


def open_clip_clip(e_i: Tensor, e_t: Tensor, scale: Tensor) -> Tensor:
    """open_clip's ClipLoss, which multiplies the matrix out once per direction."""
    import open_clip

    return open_clip.ClipLoss()(unit_rows(e_i), unit_rows(e_t), scale)


def linear_cross_entropy_clip(e_i: Tensor, e_t: Tensor, scale: Tensor) -> Tensor:
    """PyTorch's own loss in chunks, once per direction."""
    z_i, z_t = unit_rows(e_i) * scale, unit_rows(e_t)
    labels, options = torch.arange(len(z_i)), torch.nn.LinearCrossEntropyOptions()
    return (
        F.linear_cross_entropy(z_i, z_t, labels, options=options)
        + F.linear_cross_entropy(z_t, z_i, labels, options=options)
    ) / 2


def cut_cross_entropy_clip(e_i: Tensor, e_t: Tensor, scale: Tensor) -> Tensor:
    """Apple's fused linear cross-entropy, once per direction; half types on a GPU."""
    from cut_cross_entropy import linear_cross_entropy

    z_i, z_t = unit_rows(e_i), unit_rows(e_t)
    labels = torch.arange(len(z_i), device=z_i.device)
    to_text = linear_cross_entropy((z_i * scale).to(e_i.dtype), z_t, labels)
    return (to_text + linear_cross_entropy((z_t * scale).to(e_t.dtype), z_i, labels)) / 2


def memeff_clip(e_i: Tensor, e_t: Tensor, scale: Tensor) -> Tensor:
    """memeff's loss in Triton, whose temperature is a number: that of :func:`inputs`."""
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=0.07, stable=False)(e_i, e_t)


def siglip(e_i: Tensor, e_t: Tensor, scale: Tensor) -> Tensor:
    """siglip-kernel's sigmoid loss in Triton: another loss, of as many products."""
    from siglip_kernel import fused_siglip_loss

    bias = torch.full((), -10.0, device=e_i.device)
    return fused_siglip_loss(unit_rows(e_i), unit_rows(e_t), scale.log(), bias)


def supcon(*arguments: Tensor) -> Tensor:
    """pytorch-metric-learning's SupConLoss."""
    from pytorch_metric_learning.losses import SupConLoss

    *views, scale = arguments
    labels = torch.arange(len(views[0])).repeat(len(views))
    return SupConLoss(temperature=1 / scale)(torch.cat(views), labels)


def lightly_nt_xent(e_1: Tensor, e_2: Tensor, scale: Tensor) -> Tensor:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss()
    loss.temperature = 1 / scale
    return loss(e_1, e_2)


def on_sum(loss: Loss) -> Loss:
    """A loss of three views as one of two, with their sum for the third."""
    return lambda e_i, e_t, scale: loss(e_i, e_t, e_i + e_t, scale)


def ours(loss: Loss, backend: str) -> Loss:
    return lambda *arguments: loss(*arguments, backend=backend)


OURS = "gcl_kernels"
TILED = "backend tiled"
"""Ours without the CPU's extension: what a machine without a compiler has."""
SUM_GIVEN = "sum given"
"""Ours on the general road where the loss could fuse."""
OWN = (OURS, TILED, SUM_GIVEN)


def peers(task: str, backend: str = "auto") -> dict[str, Loss]:
    """Name to function, for a task of ``NUM_VIEWS``; packages that are not installed are left out.

    ``"fused"`` is GCL of image, text and their sum.
    """
    if task == "clip":
        return dict(_clip_peers(backend))
    found = dict(_views_peers())
    if task == "fused":
        found = {name: on_sum(loss) for name, loss in found.items()}
    # Compiled with the sum, where there is one.
    for name in ("dense", "tuned"):
        found[f"{name} torch.compile"] = compiled(found[f"{name} eager"])
    if task == "nt_xent":
        if _installed("lightly"):
            found["lightly NTXentLoss"] = lightly_nt_xent
        return {**found, OURS: ours(gcl_kernels.nt_xent_loss, backend)}
    loss = ours(gcl_kernels.gcl_loss, backend)
    if task == "gcl":
        return {**found, OURS: loss}
    return {
        **found,
        SUM_GIVEN: on_sum(loss),
        OURS: lambda e_i, e_t, scale: loss(e_i, e_t, None, scale),
    }


def _views_peers() -> Iterator[tuple[str, Loss]]:
    yield "dense eager", dense
    yield "tuned eager", tuned
    yield "own gradient eager", with_gradients(_loss_and_gradients)
    yield "own gradient torch.compile", with_gradients(compiled(_loss_and_gradients))
    yield "chunks, gradient in forward", with_gradients(_rows_loss_and_gradients)
    yield "chunked checkpoint", checkpointed
    if _installed("pytorch_metric_learning"):
        yield "SupConLoss", supcon


def _clip_peers(backend: str) -> Iterator[tuple[str, Loss]]:
    yield "dense eager", dense_clip
    yield "dense torch.compile", compiled(dense_clip)
    yield "tuned eager", tuned_clip
    yield "tuned torch.compile", compiled(tuned_clip)
    yield "own gradient eager", _clip_with_gradients(_clip_loss_and_gradients)
    yield (
        "own gradient torch.compile",
        _clip_with_gradients(compiled(_clip_loss_and_gradients)),
    )
    if _installed("open_clip"):
        yield "open_clip ClipLoss", open_clip_clip
        yield "ClipLoss torch.compile", compiled(open_clip_clip)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        yield "linear_cross_entropy", linear_cross_entropy_clip
    yield OURS, ours(gcl_kernels.clip_loss, backend)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@dataclass(frozen=True)
class GpuPeer:
    """What a GPU's headline sizes are compared with.

    Attributes:
        loss: of the task's views and the scale.
        bytes_per_logit: that it holds at its peak, of bfloat16 inputs; 0 where it keeps no matrix.
    """

    loss: Loss
    bytes_per_logit: int = 0


def gpu_peers(task: str) -> dict[str, GpuPeer]:
    """Name to peer of ``"gcl"``, ``"fused"`` or ``"clip"``; those whose package is installed."""
    if task == "clip":
        own = _clip_with_gradients(compiled(_clip_loss_and_gradients))
        found = {
            "own gradient torch.compile": GpuPeer(own, 8),
            "tuned torch.compile": GpuPeer(compiled(tuned_clip), 14),
        }
        packages = (
            ("memeff", "memeff", memeff_clip),
            ("cut-cross-entropy", "cut_cross_entropy", cut_cross_entropy_clip),
            ("siglip-kernel (another loss)", "siglip_kernel", siglip),
        )
        found |= {name: GpuPeer(of) for name, package, of in packages if _installed(package)}
        return found
    form = on_sum if task == "fused" else lambda loss: loss
    return {
        "own gradient torch.compile": GpuPeer(
            form(with_gradients(compiled(_loss_and_gradients))), 8
        ),
        "tuned torch.compile": GpuPeer(compiled(form(tuned)), 14),
        "chunks, gradient in forward": GpuPeer(form(with_gradients(_rows_loss_and_gradients))),
        "chunked checkpoint": GpuPeer(form(checkpointed)),
    }


NUM_VIEWS = {"gcl": 3, "fused": 2, "clip": 2, "nt_xent": 2}


JAX = "JAX"
"""Not among the functions of `peers`: it has a step of its own, see `jax_peer`."""


def product_flops(task: str, n: int, d: int) -> float:
    """Floating-point operations of the matrix products of a forward and a backward pass."""
    return {"gcl": 36, "fused": 16, "clip": 8, "nt_xent": 16}[task] * n * n * d


def inputs(task: str, n: int, d: int, converged: bool = False) -> tuple[list[Tensor], Tensor]:
    """Random embeddings and the scale of an early CLIP, 1 / 0.07. Or as at the end of training:
    a late CLIP's scale of 100, a sample's views near each other, and three other samples nearly as
    near. In float64."""
    generator = torch.Generator().manual_seed(n + d)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, d, generator=generator, dtype=torch.float64)

    views = random(NUM_VIEWS[task], n)
    if converged:
        alike = random(-(-n // 4)).repeat_interleave(4, 0)[:n]
        views = alike + 0.2 * random(n) + 0.3 * views
    return list(views.unbind(0)), torch.tensor(100.0 if converged else 1 / 0.07).double()


def training_step(
    function: Loss,
    task: str,
    n: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    learnable_scale: bool = True,
) -> Callable[[], Tensor]:
    """Forward and backward on fixed random embeddings, with a scale of 1 / 0.07."""
    given, scale = inputs(task, n, d)
    views = [view.to(device, dtype).requires_grad_() for view in given]
    scale = scale.float().to(device).requires_grad_(learnable_scale)

    def step() -> Tensor:
        for leaf in (*views, scale):
            leaf.grad = None
        loss = function(*views, scale)
        loss.backward()
        return loss

    return step


def errors(
    function: Loss,
    task: str,
    converged: bool,
    dtype: torch.dtype,
    size: tuple[int, int] = (384, 128),
) -> dict[str, float]:
    """Of the loss, relatively, and of the gradients, over the largest of each input's, against
    float64 on the same inputs of N and D."""
    given, scale = inputs(task, *size, converged)
    given = [view.to(dtype).double() for view in given]
    exact = {"clip": dense_clip, "fused": on_sum(dense)}.get(task, dense)

    def run(loss_of: Loss, precision: torch.dtype) -> list[Tensor]:
        # The scale's own dtype is at least float32: that is what models have.
        leaves = [view.to(precision).requires_grad_() for view in given]
        s = scale.to(torch.promote_types(precision, torch.float32)).requires_grad_()
        loss = loss_of(*leaves, s)
        return [loss.detach().double(), *torch.autograd.grad(loss, [*leaves, s])]

    expected, *gradients = run(exact, torch.float64)
    found, *theirs = run(function, dtype)
    return {
        "loss": ((found - expected) / expected).abs().item(),
        "gradients": max(
            ((a.double() - b).abs().max() / b.abs().max()).item()
            for a, b in zip(theirs, gradients, strict=True)
        ),
    }
