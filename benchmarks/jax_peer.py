"""The same losses in JAX, jitted together with their gradients: a peer where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from benchmarks.peers import inputs, with_gradients_of_views


def _unit(rows: Any) -> Any:
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def _views_loss(views: list[Any], scale: Any) -> Any:
    z = _unit(jnp.concatenate(views))
    by_view = z.reshape(len(views), -1, z.shape[-1])
    positives = ((by_view.sum(0) - by_view).reshape(z.shape) * z).sum() * scale
    x = (z * scale) @ z.T
    x = jnp.where(jnp.eye(len(z), dtype=bool), -jnp.inf, x)
    lse = jax.nn.logsumexp(x, axis=1)
    return lse.mean() - positives / (len(z) * (len(views) - 1))


def _fused_loss(views: list[Any], scale: Any) -> Any:
    return _views_loss([*views, views[0] + views[1]], scale)


def _clip_loss(views: list[Any], scale: Any) -> Any:
    z_i, z_t = map(_unit, views)
    x = (z_i * scale) @ z_t.T
    lse = jax.nn.logsumexp(x, axis=1).mean() + jax.nn.logsumexp(x, axis=0).mean()
    return lse / 2 - (z_i * z_t).sum() * scale / len(x)


LOSSES = {"gcl": _views_loss, "nt_xent": _views_loss, "fused": _fused_loss, "clip": _clip_loss}


def _with_gradients(task: str) -> Callable[..., Any]:
    return jax.jit(jax.value_and_grad(LOSSES[task], argnums=(0, 1)))


def jax_step(task: str, n: int, d: int) -> Callable[[], Any]:
    """Loss and gradients of `peers.training_step`'s inputs in float32."""
    views, scale = inputs(task, n, d)
    arrays = [jnp.asarray(view.float().numpy()) for view in views]
    s = jnp.asarray(scale.float().item())
    both = _with_gradients(task)
    return lambda: jax.block_until_ready(both(arrays, s))


def jax_loss(task: str) -> Callable[..., Tensor]:
    """As a loss of tensors, to see that it is the same."""
    both = _with_gradients(task)

    def run(*arguments: Tensor) -> list[Tensor]:
        *views, scale = (jnp.asarray(tensor.numpy()) for tensor in arguments)
        loss, (of_views, of_scale) = both(views, scale)
        found = (loss, *of_views, of_scale)
        return [torch.tensor(jax.device_get(one)) for one in found]

    return with_gradients_of_views(run)
