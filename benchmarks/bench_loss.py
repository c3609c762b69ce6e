"""Forward and backward of the losses beside what could be used instead: ``make bench``.

Peers of one size run in turn, and the turns repeat: a drift of the machine hits all of them. The
plain matrix product that gives the floor runs in every turn too. ``table.py`` prints the result.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks.peers import peers, training_step

TURNS = 5
SIZES = [
    ("gcl", 32, 512),
    ("gcl", 64, 512),
    ("gcl", 128, 512),
    ("gcl", 256, 768),
    ("gcl", 1024, 768),
    ("gcl", 2048, 768),
    ("fused", 128, 512),
    ("fused", 2048, 768),
    ("clip", 32, 512),
    ("clip", 64, 512),
    ("clip", 128, 512),
    ("clip", 256, 512),
    ("clip", 1024, 512),
    ("clip", 4096, 512),
]
TILED = "backend tiled"
"""Ours without the CPU's extension: what a machine without a compiler has."""

PEERS = [
    "matrix product",
    "dense eager",
    "dense torch.compile",
    "chunked checkpoint",
    "open_clip ClipLoss",
    "sum given",
    TILED,
    "gcl_kernels",
]
FLOOR_SIZE = 4096


@cache
def functions(task: str):
    return {**peers(task), TILED: peers(task, "tiled")["gcl_kernels"]}


@cache
def prepared(task: str, n: int, d: int, peer: str):
    if peer == "matrix product":
        a = torch.randn(FLOOR_SIZE, FLOOR_SIZE)
        return lambda: a @ a
    step = training_step(functions(task)[peer], task, n, d)
    step()
    return step


def exists(task: str, peer: str) -> bool:
    return peer == "matrix product" or peer in functions(task)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}-{s[1]}x{s[2]}")
@pytest.mark.parametrize("turn", range(TURNS))
def test_forward_and_backward(benchmark, peer, size, turn):
    task, n, d = size
    if not exists(task, peer):
        pytest.skip(f"no {peer} for {task}")
    if peer == "matrix product" and n < 1024:
        pytest.skip("the floor counts where products dominate")
    rounds = 40 if n <= 256 else 5 if n <= 1024 else 2
    benchmark.extra_info.update(task=task, n=n, d=d, peer=peer, turn=turn)
    benchmark.pedantic(prepared(task, n, d, peer), rounds=rounds, warmup_rounds=1)
