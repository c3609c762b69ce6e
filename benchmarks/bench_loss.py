"""Forward and backward of the losses beside what could be used instead: ``make bench``.

Peers of one size run in turn, and the turns repeat, each beginning with another peer: a drift of
the machine hits all of them. The plain matrix product that gives the floor runs in every turn too.
``table.py`` prints the result.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import pytest
import torch
import torch._dynamo

from benchmarks.peers import JAX, OURS, SUM_GIVEN, TILED, peers, training_step

TURNS = 5
SIZES = [
    *((task, n, 512, "float32") for task in ("gcl", "fused", "clip", "nt_xent")
      for n in (32, 64, 128, 256, 1024)),
    *((task, 2048, 768, "float32") for task in ("gcl", "fused")),
    *((task, 4096, 512, "float32") for task in ("gcl", "fused", "clip", "nt_xent")),
    # Elsewhere PyTorch multiplies bfloat16 one number at a time: minutes a step.
    *([("gcl", 1536, 768, "bfloat16"), ("clip", 1024, 512, "bfloat16")]
      if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []),
]  # fmt: skip

FLOOR = "matrix product"
PEERS = [
    FLOOR,
    "dense eager",
    "dense torch.compile",
    "tuned eager",
    "tuned torch.compile",
    "own gradient eager",
    "own gradient torch.compile",
    "chunks, gradient in forward",
    "chunked checkpoint",
    "open_clip ClipLoss",
    "ClipLoss torch.compile",
    "linear_cross_entropy",
    "SupConLoss",
    "lightly NTXentLoss",
    JAX,
    SUM_GIVEN,
    TILED,
    OURS,
]
FLOOR_SIZE = 4096
SMALL = ("SupConLoss", "lightly NTXentLoss")
"""Peers that hold the matrix, or indices of it, a dozen times: up to N = 1024."""


torch._dynamo.config.recompile_limit = 64
"""More than there are sizes: beyond it a function runs uncompiled."""


@cache
def functions(task: str):
    return {**peers(task), TILED: peers(task, "tiled")[OURS]}


@cache
def prepared(task: str, n: int, d: int, dtype: str, peer: str):
    precision = getattr(torch, dtype)
    if peer == FLOOR:
        a = torch.randn(FLOOR_SIZE, FLOOR_SIZE).to(precision)
        return lambda: a @ a
    if peer == JAX:
        from benchmarks.jax_peer import jax_step

        step = jax_step(task, n, d)
    else:
        step = training_step(functions(task)[peer], task, n, d, precision)
    step()
    return step


def exists(task: str, n: int, dtype: str, peer: str) -> bool:
    if peer == FLOOR:  # it counts where products dominate
        return n >= 1024
    if peer == JAX:
        return find_spec("jax") is not None and dtype == "float32"
    return peer in functions(task) and (n <= 1024 or peer not in SMALL)


@pytest.mark.parametrize("place", range(len(PEERS)))
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}-{s[1]}x{s[2]}-{s[3]}")
@pytest.mark.parametrize("turn", range(TURNS))
def test_forward_and_backward(benchmark, place, size, turn):
    task, n, d, dtype = size
    peer = PEERS[(place + turn * len(PEERS) // TURNS) % len(PEERS)]
    if not exists(task, n, dtype, peer):
        pytest.skip(f"no {peer} for {task}")
    rounds = 40 if n <= 256 else 5 if n <= 1024 else 1
    benchmark.extra_info.update(task=task, n=n, d=d, dtype=dtype, peer=peer, turn=turn)
    step = prepared(task, n, d, dtype, peer)
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=int(n <= 1024))
