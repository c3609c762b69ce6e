"""Whether the losses are still as fast as their record says: ``make bench-check``.

    python -m benchmarks.check [--record benchmarks/results/NAME.json] [--losses gcl clip]

Times alone say nothing on a machine that is shared, or on another of its kind: what is compared is
the time of peers in plain PyTorch over ours, with that in a record of the same processor,
instruction set and products. A loss of ours that lost more than `TOLERANCE`, by the median of these
peers, is measured once more, and the command fails where it lost both times. On a busy machine,
where times of two threads vary by half, it shows large losses only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.bench_loss import TURNS, prepared
from benchmarks.peers import NUM_VIEWS, OURS
from benchmarks.record import RESULTS, environment
from benchmarks.table import NAMES

TOLERANCE = 0.15
YARDSTICKS = ("dense eager", "tuned eager", "own gradient eager")
"""Peers whose time no change of this package moves, and which need no compiler."""
LARGEST = 1024
"""N, for the check to take minutes."""
SECONDS = 0.2
"""For the repetitions of one peer within a turn, one at least."""

KIND = ("cpu", "instruction_set", "products")


def find_record(machine: dict, folder: Path = RESULTS) -> Path | None:
    """Of the records of this kind of machine that have yardsticks the one with most rows."""
    found = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        of = record.get("environment", {})
        if all(of.get(key) == machine[key] for key in KIND) and comparable(record):
            found.append((len(comparable(record)), path))
    return max(found)[1] if found else None


def comparable(record: dict) -> list[dict]:
    """Rows of a record that can be measured again soon."""
    return [
        row
        for row in record.get("speed", [])
        if row["n"] <= LARGEST and set(YARDSTICKS) <= row.get("times", {}).keys()
    ]


def seconds(row: dict, peer: str) -> float:
    """The least time of a step."""
    step = prepared(row["task"], row["n"], row["d"], row["dtype"], peer)
    times: list[float] = []
    while sum(times) < SECONDS:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(row: dict) -> dict[str, float]:
    """The yardsticks' times over ours, as ``row["times"]``. The least of all turns: what else runs
    on the machine only adds to a time."""
    order = (*YARDSTICKS, OURS)
    best = dict.fromkeys(order, math.inf)
    for turn in range(TURNS):
        first = turn % len(order)
        for peer in (*order[first:], *order[:first]):
            best[peer] = min(best[peer], seconds(row, peer))
    return {peer: best[peer] / best[OURS] for peer in YARDSTICKS}


def slower(row: dict) -> float:
    """How much longer ours takes than by the record, beside the yardsticks: 0.1 is a tenth."""
    now = measure(row)
    return median(row["times"][peer] / now[peer] for peer in YARDSTICKS) - 1


def report(rows: Sequence[dict]) -> list[str]:
    """Measure and print; returns the rows that were lost."""
    lost = []
    for row in rows:
        name = f"{NAMES[row['task']]}, {row['dtype']}, N = {row['n']}, D = {row['d']}"
        change = slower(row)
        again = ""
        if change > TOLERANCE:
            again = f", before: {change:+.0%}"
            change = min(change, slower(row))
        verdict = "LOST" if change > TOLERANCE else "held"
        print(f"{verdict}  {change:+6.0%}  {name}{again}", flush=True)
        if change > TOLERANCE:
            lost.append(name)
    return lost


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="default: the one of this kind of processor")
    parser.add_argument("--losses", nargs="+", choices=list(NUM_VIEWS), default=list(NUM_VIEWS))
    options = parser.parse_args(arguments)
    machine = environment()
    path = options.record or find_record(machine)
    if path is None:
        kind = ", ".join(str(machine[key]) for key in KIND)
        print(
            f"benchmarks/results: expected a record of {kind}, found none; "
            "make one of the commit to compare with: make bench ARGS='--record FILE'",
            file=sys.stderr,
        )
        return 2
    record = json.loads(path.read_text())
    torch.set_num_threads(record["environment"]["threads"])
    print(f"Our time beside {', '.join(YARDSTICKS)}, against {path}:")
    if hasattr(os, "getloadavg"):
        print(f"(load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)")
    lost = report([row for row in comparable(record) if row["task"] in options.losses])
    if lost:
        print(f"slower by more than {TOLERANCE:.0%}: {'; '.join(lost)}", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
