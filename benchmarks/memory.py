"""Peak resident memory of one forward and backward pass beyond inputs and their gradients.

Each measurement is a process of its own: ``python -m benchmarks.memory [peer n d]``.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

from benchmarks.peers import checkpointed, dense, ours, training_step

CASES = [
    ("gcl_kernels", 2048, 512),
    ("gcl_kernels", 4096, 512),
    ("gcl_kernels", 8192, 512),
    ("chunked checkpoint", 8192, 512),
    ("dense eager", 4096, 512),
]


def _measure(peer: str, n: int, d: int) -> float:
    """MB by which the peak exceeds what the process holds with inputs and gradients in place."""
    import gcl_kernels

    function = {
        "gcl_kernels": ours(gcl_kernels.gcl_loss, "auto"),
        "dense eager": dense,
        "chunked checkpoint": checkpointed,
    }[peer]
    # Loads code and thread pools that a first call would be charged with.
    training_step(function, "gcl", 700, d)()
    step = training_step(function, "gcl", n, d)
    before = _resident()
    step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    gradients = 3 * n * d * 4 / 2**20
    return (peak - before - gradients) * 2**20 / 1e6


def _resident() -> float:
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
        print(f"{record['peer']:20} {size}: {record['megabytes']:6.0f} MB")


if __name__ == "__main__":
    main()
