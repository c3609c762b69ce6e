"""The tables of ``make bench``: medians over turns of ratios taken within a turn.

    python -m benchmarks.table BENCHMARK.json [--record benchmarks/results/cpu.json]

reads what ``pytest --benchmark-json`` wrote for ``bench_loss.py``, measures memory and errors,
prints all, and with ``--record`` keeps them with machine, versions and commit, and draws the record
(``figures.py``).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

from benchmarks.bench_loss import FLOOR, FLOOR_SIZE, PEERS
from benchmarks.figures import draw
from benchmarks.memory import measure_all
from benchmarks.peers import JAX, NUM_VIEWS, OURS, OWN, errors, peers, product_flops
from benchmarks.record import caption, environment

NAMES = {
    "gcl": "`gcl_loss`",
    "fused": "`gcl_loss`, fused by addition",
    "clip": "`clip_loss`",
    "nt_xent": "`nt_xent_loss`",
}


def rows_of(benchmarks: list[dict]) -> list[dict]:
    """One row a size: our milliseconds, the peers' times over ours, the best of them that are not
    ours, and the efficiency."""
    times: dict = defaultdict(lambda: defaultdict(dict))
    for entry in benchmarks:
        info = entry["extra_info"]
        size = tuple(info[key] for key in ("task", "n", "d", "dtype"))
        times[size][info["turn"]][info["peer"]] = entry["stats"]["median"]
    rows = []
    for (task, n, d, dtype), turns in times.items():
        row: dict = {"task": task, "n": n, "d": d, "dtype": dtype, "turns": len(turns)}
        row["milliseconds"] = 1e3 * median(turn[OURS] for turn in turns.values())
        row["times"] = {
            peer: median(turn[peer] / turn[OURS] for turn in turns.values())
            for peer in PEERS
            if peer in turns[0] and peer not in (OURS, FLOOR)
        }
        others = {peer: time for peer, time in row["times"].items() if peer not in OWN}
        row["best"] = min(others, key=lambda peer: others[peer])
        if FLOOR in turns[0]:
            flops_per_second = [2 * FLOOR_SIZE**3 / turn[FLOOR] for turn in turns.values()]
            floors = [product_flops(task, n, d) / rate for rate in flops_per_second]
            row["efficiency"] = median(
                floor / turn[OURS] for floor, turn in zip(floors, turns.values(), strict=True)
            )
        rows.append(row)
    return rows


def error_rows() -> list[dict]:
    """Of every peer and task: see `peers.errors`, for random embeddings and converged ones. Not of
    what is compiled, which takes minutes and is the same arithmetic."""
    rows = []
    for task in NUM_VIEWS:
        functions = {n: f for n, f in peers(task).items() if not n.endswith("torch.compile")}
        if find_spec("jax") is not None:
            from benchmarks.jax_peer import jax_loss

            functions[JAX] = jax_loss(task)
        for name, function in functions.items():
            for dtype in ("float32", "bfloat16"):
                if name == JAX and dtype != "float32":
                    continue
                found = {
                    kind: errors(function, task, kind == "converged", getattr(torch, dtype))
                    for kind in ("random", "converged")
                }
                rows.append({"task": task, "dtype": dtype, "peer": name, **found})
    return rows


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _size(row: dict) -> list[str]:
    dtype = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    return [NAMES[row["task"]] + dtype, str(row["n"]), str(row["d"])]


def speed_table(rows: list[dict]) -> str:
    """A row for each size: the best peer, and what most would write."""
    shown = ("dense eager", "dense torch.compile")
    table = [
        [
            *_size(row),
            f"{row['milliseconds']:.1f}",
            row["best"],
            f"{row['times'][row['best']]:.2f} x",
            *(f"{row['times'][peer]:.2f} x" if peer in row["times"] else "" for peer in shown),
            f"{row['efficiency']:.2f}" if "efficiency" in row else "",
        ]
        for row in rows
    ]
    header = ["loss", "N", "D", "ours, ms", "best peer", "its time over ours", *shown, "efficiency"]
    return _table(header, table)


def all_peers_table(rows: list[dict]) -> str:
    names = [peer for peer in PEERS if any(peer in row["times"] for row in rows)]
    table = [
        [*_size(row), *(f"{row['times'][n]:.2f}" if n in row["times"] else "" for n in names)]
        for row in rows
    ]
    return _table(["loss", "N", "D", *names], table)


def error_table(rows: list[dict]) -> str:
    table = [
        [
            NAMES[row["task"]],
            row["dtype"],
            row["peer"],
            *(f"{row[kind][of]:.1e}" for kind in ("random", "converged")
              for of in ("loss", "gradients")),
        ]
        for row in rows
    ]  # fmt: skip
    header = ["loss", "dtype", "by", "random: loss", "gradients", "converged: loss", "gradients"]
    return _table(header, table)


def memory_table(rows: list[dict]) -> str:
    table = [[row["peer"], str(row["n"]), str(row["d"]), f"{row['megabytes']:.0f}"] for row in rows]
    return _table(["peak memory beyond inputs and gradients", "N", "D", "MB"], table)


def markdown(speed: list[dict], memory: list[dict], accuracy: list[dict]) -> str:
    """All tables."""
    return "\n\n".join(
        [
            "A peer's time over ours; efficiency: the matrix products' time alone over ours.",
            speed_table(speed),
            "Every peer's time over ours:",
            all_peers_table(speed),
            "Errors against float64 on the same inputs, N = 384, D = 128:",
            error_table(accuracy),
            memory_table(memory),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    speed = rows_of(json.loads(arguments.benchmark.read_text())["benchmarks"])
    memory, accuracy, machine = measure_all(), error_rows(), environment()
    print(f"\n{caption(machine)}\n\n{markdown(speed, memory, accuracy)}")
    if arguments.record:
        record = {"environment": machine, "speed": speed, "errors": accuracy, "memory": memory}
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")
        for picture in draw(arguments.record):
            print(picture)


if __name__ == "__main__":
    main()
