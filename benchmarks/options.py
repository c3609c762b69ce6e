"""What each option on the candidates costs: time and peak memory beside the loss without it.

``python -m benchmarks.options`` prints the table, ``--record FILE.json`` writes a record as well.
Calls run in turns; the time is the median of each turn's ratio. Memory is of a fresh process each.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gcl_kernels
from benchmarks.memory import resident
from benchmarks.record import environment
from gcl_kernels.retrieval.report import markdown_table

N, D = 1024, 512
TURNS, ROUNDS = 5, 2

Options = dict[str, Any]


def options(road: str, device: str, n: int = N, d: int = D) -> dict[str, Options]:
    """Keyword arguments of ``gcl_loss`` by name; of the first, none."""
    generator = torch.Generator().manual_seed(1)
    given = 3 if road == "views" else 2
    ids = (torch.arange(n) // 2).to(device)
    present = (torch.rand(given, n, generator=generator) < 0.8).to(device)
    weights = (torch.rand(3, n, generator=generator) + 0.5).to(device)
    queue = torch.randn(n, d, generator=generator).to(device)
    return {
        "no option": {},
        "sample_ids": {"sample_ids": ids},
        'same_id="positive"': {"sample_ids": ids, "same_id": "positive"},
        "present": {"present": present},
        "candidate_weights": {"candidate_weights": weights},
        "false_negative_margin": {"false_negative_margin": 0.1},
        "extra_negatives, K = N": {"extra_negatives": queue},
        'reduction="pairs"': {"reduction": "pairs"},
    }


def step(
    road: str, name: str, device: str = "cpu", n: int = N, d: int = D,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], None]:  # fmt: skip
    """Forward and backward of ``gcl_loss`` with an option."""
    generator = torch.Generator().manual_seed(0)
    views: Sequence[Tensor] = [
        torch.randn(n, d, generator=generator).to(device, dtype).requires_grad_()
        for _ in range(3 if road == "views" else 2)
    ]
    scale = torch.tensor(1 / 0.07, device=device, requires_grad=True)
    of = options(road, device, n, d)[name]

    def run() -> None:
        gcl_kernels.gcl_loss(*views, logit_scale=scale, **of).sum().backward()

    return run


def ratios(steps: dict[str, Callable[[], None]], device: str) -> dict[str, float]:
    """The time of each over that of the first, in one run."""
    turns: list[dict[str, float]] = []
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    names = list(steps)
    for turn in range(TURNS + 1):  # the first is warm-up
        taken = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wait()
            start = time.perf_counter()
            for _ in range(ROUNDS):
                steps[name]()
            wait()
            taken[name] = time.perf_counter() - start
        turns.append(taken)
    return {
        name: statistics.median(turn[name] / turn[names[0]] for turn in turns[1:]) for name in names
    }


def megabytes(road: str, name: str) -> float:
    """By which one step's peak exceeds what a process holds before it, inputs' gradients too."""
    step(road, name, n=100)()
    run = step(road, name)
    before = resident()
    run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (peak - before) * 2**20 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", nargs=2, metavar=("ROAD", "OPTION"), help="one measurement")
    parser.add_argument("--record", type=Path, help="JSON to write")
    given = parser.parse_args()
    if given.memory:
        print(megabytes(*given.memory))
        return
    rows: list[dict[str, Any]] = []
    # First: a process begins with the peak of the one that started it.
    for road in ("views", "fused"):
        for name in options(road, "cpu"):
            command = [sys.executable, "-m", "benchmarks.options", "--memory", road, name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append({"road": road, "option": name, "megabytes": float(output)})
    for road in ("views", "fused"):
        found = ratios({name: step(road, name) for name in options(road, "cpu")}, "cpu")
        for row in rows:
            if row["road"] == road:
                row["time"] = found[row["option"]]
    table = [
        [row["road"], row["option"], f"{row['time']:.2f}", f"{row['megabytes']:.0f}"]
        for row in rows
    ]
    print(f"N = {N}, D = {D}, float32, forward and backward\n")
    print(markdown_table(["views", "option", "time", "peak memory, MB"], table))
    if given.record:
        record = {"environment": environment(), "n": N, "d": D, "rows": rows}
        given.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
