"""Peak resident memory of one forward and backward pass beyond inputs and their gradients.

Each measurement is a process of its own: ``python -m benchmarks.memory [peer n d]``.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

from benchmarks.peers import OURS, peers, training_step

CASES = [
    *((OURS, n, 512) for n in (1024, 2048, 4096, 8192)),
    *(("chunks, gradient in forward", n, 512) for n in (1024, 2048, 4096, 8192)),
    *(("chunked checkpoint", n, 512) for n in (1024, 2048, 4096, 8192)),
    *(("dense eager", n, 512) for n in (1024, 2048, 4096)),
]


def _measure(peer: str, n: int, d: int) -> float:
    """MB by which the peak exceeds what the process holds with inputs and gradients in place."""
    function = peers("gcl")[peer]
    # Loads code and thread pools that a first call would be charged with.
    training_step(function, "gcl", 700, d)()
    step = training_step(function, "gcl", n, d)
    before = resident()
    step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    gradients = 3 * n * d * 4 / 2**20
    return (peak - before - gradients) * 2**20 / 1e6


def resident() -> float:
    """What this process holds, in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def measure_all() -> list[dict]:
    """One record a case, each from a fresh process."""
    records = []
    for peer, n, d in CASES:
        output = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", peer, str(n), str(d)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        records.append(json.loads(output))
    return records


def main() -> None:
    if len(sys.argv) == 4:
        peer, n, d = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        print(json.dumps({"peer": peer, "n": n, "d": d, "megabytes": _measure(peer, n, d)}))
        return
    for record in measure_all():
        size = f"N = {record['n']:5}, D = {record['d']}"
        print(f"{record['peer']:28} {size}: {record['megabytes']:6.0f} MB")


if __name__ == "__main__":
    main()
