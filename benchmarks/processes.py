"""Forward and backward of the losses in several processes that share a batch.

    python -m benchmarks.processes [--record benchmarks/results/cpu_processes.json]

Every process has one thread and an equal share of the samples; gloo carries what travels. Beside
it run what users write (embeddings gathered with their gradient, own rows against all, dense) and
the whole batch in one process with as many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import gcl_kernels
from benchmarks.peers import NUM_VIEWS, on_sum, peers
from benchmarks.record import caption, environment

TURNS = 7
SIZES = [("gcl", 2048, 768), ("fused", 2048, 768), ("clip", 4096, 512)]
"""Of the whole batch."""
GROUPS = (2, 4)
OURS, RING, DENSE, ALONE = "gcl_kernels", "around a ring", "dense, gathered", "one process"


def gathered_gcl(e_i: Tensor, e_t: Tensor, e_it: Tensor, scale: Tensor) -> Tensor:
    """This process's rows of the dense matrix against all processes' embeddings."""
    # Newer versions of PyTorch warn of this name; open_clip uses it, too.
    warnings.simplefilter("ignore", FutureWarning)
    from torch.distributed.nn.functional import all_gather

    n, world, rank = e_i.shape[0], dist.get_world_size(), dist.get_rank()
    z = F.normalize(torch.stack([e_i, e_t, e_it]), dim=-1)
    everyone = torch.cat(all_gather(z), 1)
    x = scale * (z.flatten(0, 1) @ everyone.flatten(0, 1).T)
    row, total = torch.arange(3 * n), world * n
    sample = rank * n + row % n
    x = x.scatter(1, (row // n * total + sample)[:, None], -torch.inf)
    others = torch.stack([(row // n + k) % 3 * total + sample for k in (1, 2)], 1)
    return x.logsumexp(1).mean() - x.gather(1, others).mean()


def gathered_clip(e_i: Tensor, e_t: Tensor, scale: Tensor) -> Tensor:
    """open_clip's ClipLoss with the flags that give the whole batch's gradient at least cost."""
    import open_clip

    loss = open_clip.ClipLoss(True, True, False, dist.get_rank(), dist.get_world_size())
    return loss(F.normalize(e_i, dim=-1), F.normalize(e_t, dim=-1), scale)


def losses(task: str) -> dict[str, Callable[..., Tensor]]:
    """Name to function of this process's views and the scale."""
    world: Any = dist.group.WORLD

    def ours(exchange: str) -> Callable[..., Tensor]:
        loss = gcl_kernels.clip_loss if task == "clip" else gcl_kernels.gcl_loss
        if task == "fused":
            return lambda i, t, s: loss(i, t, None, s, group=world, exchange=exchange)
        return lambda *views: loss(*views, group=world, exchange=exchange)

    dense = {"gcl": gathered_gcl, "fused": on_sum(gathered_gcl), "clip": gathered_clip}[task]
    return {OURS: ours("gather"), RING: ours("ring"), DENSE: dense}


def random_shards(task: str, n: int, d: int, world: int) -> list[list[Tensor]]:
    """The views of every process."""
    generator = torch.Generator().manual_seed(n + d)
    views = [torch.randn(n, d, generator=generator) for _ in range(NUM_VIEWS[task])]
    return [[view.chunk(world)[rank].clone() for view in views] for rank in range(world)]


def _serve(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/s", rank=rank, world_size=world)
    rows = []
    for task, n, d in SIZES:
        shards = random_shards(task, n, d, world)
        leaves = [view.requires_grad_() for view in shards[rank]]
        scale = torch.tensor(1 / 0.07, requires_grad=True)
        functions = losses(task)
        turns: list[dict[str, float]] = []
        for _ in range(TURNS + 1):
            times = {}
            for name, function in functions.items():
                dist.barrier()
                start = time.perf_counter()
                function(*leaves, scale).backward()
                dist.barrier()
                times[name] = time.perf_counter() - start
            if rank == 0:
                torch.set_num_threads(min(world, os.cpu_count() or 1))
                whole = [torch.cat(parts).detach() for parts in zip(*shards, strict=True)]
                whole = [view.requires_grad_() for view in whole]
                alone = peers(task)["gcl_kernels"]
                start = time.perf_counter()
                alone(*whole, scale).backward()
                times[ALONE] = time.perf_counter() - start
                torch.set_num_threads(1)
            dist.barrier()
            turns.append(times)
        if rank == 0:
            del turns[0]  # the first loads code
            row: dict[str, Any] = {"task": task, "n": n, "d": d, "processes": world}
            row["milliseconds"] = 1e3 * median(turn[OURS] for turn in turns)
            for name in (RING, DENSE, ALONE):
                row[name] = median(turn[name] / turn[OURS] for turn in turns)
            rows.append(row)
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure() -> list[dict[str, Any]]:
    """A row for each size and number of processes."""
    rows = []
    for world in GROUPS:
        with TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_serve, (world, folder), nprocs=world)
            rows += json.loads(Path(folder, "rows.json").read_text())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    rows, machine = measure(), environment()
    print(caption(machine))
    print("Times over ours (embeddings gathered).\n")
    print(f"| loss | N | D | processes | ours, ms | {RING} | {DENSE} | {ALONE} |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row[name]:.2f} x" for name in (RING, DENSE, ALONE)]
        print(
            f"| {row['task']} | {row['n']} | {row['d']} | {row['processes']} | "
            f"{row['milliseconds']:.0f} | {' | '.join(cells)} |"
        )
    if arguments.record:
        record = {"environment": machine, "speed": rows}
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
