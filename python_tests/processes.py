"""Other processes: fresh ones, and pools that run functions of test modules side by side."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
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


def join_gloo(store: Path, world: int, rank: int) -> None:
    """Be a rank of a gloo group that meets in this file."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=PATIENCE / 2),
    )


def as_of_torchrun(port: int, world: int, rank: int) -> None:
    """See what ``torchrun --standalone`` shows a process that it starts."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    numbers |= {"MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": 0, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")


def _serve(prepare: Callable[[int], None], rank: int, calls: Connection) -> None:
    torch.set_num_threads(1)
    prepare(rank)
    while (call := calls.recv()) is not None:
        function, arguments = call
        try:
            calls.send((True, function(*arguments)))
        except Exception:
            calls.send((False, traceback.format_exc()))
    if dist.is_initialized():
        dist.destroy_process_group()


class Pool:
    """``run`` calls a module's function in every process, with the same arguments.

    Args:
        prepare: called first, with the rank.
        patience: seconds for one call.
    """

    def __init__(
        self,
        world: int,
        prepare: Callable[[int], None],
        imported_once: Sequence[str] = _IMPORTED_ONCE,
        patience: float = PATIENCE,
    ) -> None:
        self._hangs, self._patience = False, patience
        context = multiprocessing.get_context(_START_METHOD)
        context.set_forkserver_preload(list(imported_once))
        pipes = [context.Pipe() for _ in range(world)]
        self._calls = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(prepare, rank, theirs), daemon=True)
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
            self._hangs = not calls.poll(self._patience)
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


def run_as_of_torchrun(
    world: int, imported_once: Sequence[str], function: Callable[..., Any], *arguments: Any
) -> list[Any]:
    """What a function returns in each of ``torchrun``'s processes, but for the imports, which are
    made once for all and take longer than what is tested."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    prepare = partial(as_of_torchrun, store.port, world)
    pool = Pool(world, prepare, imported_once, patience=240)
    try:
        return pool.run(function, *arguments)
    finally:
        pool.close()


def run_fresh(code: str, **environment: str) -> str:
    """What the code prints in a Python process of its own, told nothing that tests are told."""
    of_tests = ("GCL_KERNELS_BACKEND", "TRITON_INTERPRET")
    given = {name: value for name, value in os.environ.items() if name not in of_tests}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**given, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
