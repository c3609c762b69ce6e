"""The table of ``make bench``: medians over turns of ratios taken within a turn.

    python -m benchmarks.table BENCHMARK.json [--record benchmarks/results/cpu.json]

reads what ``pytest --benchmark-json`` wrote for ``bench_loss.py``, measures memory, prints both,
and with ``--record`` keeps them with machine, versions and commit.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import median

from benchmarks.bench_loss import FLOOR_SIZE, PEERS
from benchmarks.memory import measure_all
from benchmarks.peers import product_flops
from benchmarks.record import caption, environment

OURS, FLOOR = "gcl_kernels", "matrix product"

NAMES = {"gcl": "`gcl_loss`", "fused": "`gcl_loss`, fused by addition", "clip": "`clip_loss`"}


def rows_of(benchmarks: list[dict]) -> list[dict]:
    """One row a size: our milliseconds, the peers' times over ours, and the efficiency."""
    times: dict = defaultdict(lambda: defaultdict(dict))
    for entry in benchmarks:
        info = entry["extra_info"]
        size = (info["task"], info["n"], info["d"])
        times[size][info["turn"]][info["peer"]] = entry["stats"]["median"]
    rows = []
    for (task, n, d), turns in times.items():
        row: dict = {"task": task, "n": n, "d": d, "turns": len(turns)}
        row["milliseconds"] = 1e3 * median(turn[OURS] for turn in turns.values())
        for peer in next(iter(turns.values())):
            if peer not in (OURS, FLOOR):
                row[peer] = median(turn[peer] / turn[OURS] for turn in turns.values())
        if FLOOR in turns[0]:
            flops_per_second = [2 * FLOOR_SIZE**3 / turn[FLOOR] for turn in turns.values()]
            floors = [product_flops(task, n, d) / rate for rate in flops_per_second]
            row["efficiency"] = median(
                floor / turn[OURS] for floor, turn in zip(floors, turns.values(), strict=True)
            )
        rows.append(row)
    return rows


def markdown(rows: list[dict], memory: list[dict]) -> str:
    """Both tables as Markdown."""
    peers = [peer for peer in PEERS if peer not in (OURS, FLOOR)]
    lines = [
        "| loss | N | D | ours, ms | " + " | ".join(peers) + " | efficiency |",
        "|---|---|---|---|" + "---|" * (len(peers) + 1),
    ]
    for row in rows:
        cells = [f"{row[peer]:.2f} x" if peer in row else "" for peer in peers]
        cells.append(f"{row['efficiency']:.2f}" if "efficiency" in row else "")
        lines.append(
            f"| {NAMES[row['task']]} | {row['n']} | {row['d']} | {row['milliseconds']:.1f} | "
            + " | ".join(cells) + " |"
        )  # fmt: skip
    lines += ["", "| peak memory beyond inputs and gradients | N | D | MB |", "|---|---|---|---|"]
    for record in memory:
        size = f"{record['n']} | {record['d']}"
        lines.append(f"| {record['peer']} | {size} | {record['megabytes']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    rows = rows_of(json.loads(arguments.benchmark.read_text())["benchmarks"])
    memory, machine = measure_all(), environment()
    print(f"\n{caption(machine)}")
    print("A peer's time over ours; efficiency: the matrix products' time alone over ours.\n")
    print(markdown(rows, memory))
    if arguments.record:
        record = {"environment": machine, "speed": rows, "memory": memory}
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
