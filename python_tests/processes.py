"""A pool of processes that run functions of test modules side by side, as ranks of a gloo group."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 60.0
"""Seconds for one call: a test that hangs fails."""

_START_METHOD = "spawn" if sys.platform == "win32" else "forkserver"
_IMPORTED_ONCE = [
    "gcl_kernels",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "open_clip",
]
"""By the server, for all: imports take seconds. It leaves out what is not installed."""


def _serve(rank: int, world: int, store: str, calls: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=PATIENCE / 2),
    )
    while (call := calls.recv()) is not None:
        function, arguments = call
        try:
            calls.send((True, function(*arguments)))
        except Exception:
            calls.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Pool:
    """``run`` calls a module's function in every process, with the same arguments."""

    def __init__(self, world: int, folder: Path) -> None:
        self._hangs = False
        context = multiprocessing.get_context(_START_METHOD)
        context.set_forkserver_preload(_IMPORTED_ONCE)
        pipes = [context.Pipe() for _ in range(world)]
        self._calls = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(
                target=_serve, args=(rank, world, str(folder / "store"), theirs), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returned, by rank.

        Raises:
            AssertionError: it raised in some process, with the traceback; or it did not return.
        """
        assert not self._hangs, "a call before this one did not return"
        for calls in self._calls:
            calls.send((function, arguments))
        results = []
        for rank, calls in enumerate(self._calls):
            self._hangs = not calls.poll(PATIENCE)
            assert not self._hangs, f"{function.__name__}: rank {rank} hangs"
            results.append(calls.recv())
        for rank, (succeeded, result) in enumerate(results):
            assert succeeded, f"{function.__name__}, rank {rank}:\n{result}"
        return [result for _, result in results]

    def close(self) -> None:
        for calls in self._calls:
            calls.send(None)
        for process in self._processes:
            process.join(5)
            process.kill()
