"""The full record of a machine with a GPU: ``make gpu-report``.

Parity first: the contract suite on the device, for every backend there is. No speed is reported
while a parity test fails. Then the parts below, each written to the JSON as soon as it is measured:

    floor    rate of torch.mm, 8192 cubed, in each dtype
    speed    forward, forward + backward, and peak memory, for each backend and peer that fits
    graph    a step captured in a CUDA graph: replay time, and equal bits in replay and two runs
    limit    the largest problem: N = 131072, D = 768

    python -m benchmarks.gpu_report [--only floor speed] [--out FILE] [--quick] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import gcl_kernels
from benchmarks.peers import (
    NUM_VIEWS,
    chunked_gcl,
    dense_clip,
    dense_gcl,
    ours,
    product_flops,
    training_step,
)
from benchmarks.record import RESULTS, environment

PARITY = ["test_contract.py", "test_compile.py", "test_tolerance.py"]
LOSSES = {"gcl": gcl_kernels.gcl_loss, "clip": gcl_kernels.clip_loss}
DENSE = {"gcl": dense_gcl, "clip": dense_clip}
DENSE_BYTES_PER_LOGIT = 24
"""What dense autograd holds at its peak per logit, with bfloat16 inputs; a peer is skipped where
this does not fit."""


class Report:
    """A JSON file that holds whatever was measured so far."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        self.data: dict[str, Any] = {"environment": environment(), "device": device}
        path.parent.mkdir(parents=True, exist_ok=True)

    def put(self, part: str, value: Any) -> None:
        self.data[part] = value
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def backend_names() -> list[str]:
    """The backends that run in tiles here."""
    states = gcl_kernels.backends()
    return [name for name in states if name != "reference" and states[name] == "available"]


def seconds(step: Callable[[], Any], device: str, budget: float = 0.5) -> float:
    """Median of repeated runs within about ``budget`` seconds, after a warm-up."""
    for _ in range(2):
        step()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - started < budget and len(times) < 200):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            before = time.perf_counter()
            step()
            times.append(time.perf_counter() - before)
    return median(times)


def parity(quick: bool) -> dict[str, Any]:
    """Run the contract on every device and backend; the counts, or the failures."""
    tests = Path(__file__).parent.parent / "python_tests"
    chosen = PARITY[-1:] if quick else PARITY
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rf", *(str(tests / name) for name in chosen)],
        capture_output=True,
        text=True,
        cwd=tests.parent,
    )
    lines = result.stdout.strip().splitlines()
    return {
        "passed": result.returncode == 0,
        "summary": lines[-1] if lines else result.stderr.strip()[-500:],
        "failures": [line for line in lines if re.match(r"(FAILED|ERROR)", line)],
    }


def floor(device: str, quick: bool) -> dict[str, float]:
    """TFLOP/s of a plain large product, by dtype."""
    size = 512 if quick else 8192
    rates = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        rates[str(dtype).removeprefix("torch.")] = (
            2e-12 * size**3 / seconds(lambda a=a, b=b: a @ b, device)
        )
    return rates


def _peak_bytes(step: Callable[[], Any], device: str) -> int | None:
    if device != "cuda":
        return None
    torch.cuda.empty_cache()
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    # Gradients exist before and after; a step replaces them.
    return torch.cuda.max_memory_allocated() - before


def _fits(n: int, task: str, device: str) -> bool:
    rows = n * (NUM_VIEWS[task] if task == "gcl" else 1)
    memory = torch.cuda.mem_get_info()[1] if device == "cuda" else 4 << 30
    return DENSE_BYTES_PER_LOGIT * rows**2 < memory


def speed(
    device: str, quick: bool, rates: dict[str, float], put: Callable[[list], None]
) -> list[dict[str, Any]]:
    """Times of forward and of both passes, for our backends and the peers that fit."""
    sizes = [256, 1024, 4096, 16384, 32768, 65536]
    dims = [256, 512, 768, 1024]
    cases = [("gcl", n, 768, "bfloat16") for n in sizes]
    cases += [("gcl", n, d, "bfloat16") for n in (4096, 32768) for d in dims if d != 768]
    cases += [("clip", n, 768, "bfloat16") for n in sizes]
    cases += [("gcl", n, 768, "float32") for n in (1024, 4096)]
    if quick:
        cases = [("gcl", 64, 32, "float32"), ("clip", 64, 32, "bfloat16")]
    rows = []
    for task, n, d, dtype_name in cases:
        dtype = getattr(torch, dtype_name)
        peers = {name: ours(LOSSES[task], name) for name in backend_names()}
        if _fits(n, task, device):
            peers["dense eager"] = DENSE[task]
            if not quick:
                torch._dynamo.reset()
                peers["dense torch.compile"] = torch.compile(DENSE[task])
        if task == "gcl" and n <= 16384:
            peers["chunked checkpoint"] = chunked_gcl
        row: dict[str, Any] = {"task": task, "n": n, "d": d, "dtype": dtype_name, "peers": {}}
        for name, function in peers.items():
            step = training_step(function, task, n, d, dtype, device)
            views = [torch.randn(n, d, device=device, dtype=dtype) for _ in range(NUM_VIEWS[task])]
            scale = torch.tensor(1 / 0.07, device=device)

            def forward(function=function, views=views, scale=scale):
                with torch.no_grad():
                    return function(*views, scale)

            both = seconds(step, device)
            row["peers"][name] = {
                "forward_ms": 1e3 * seconds(forward, device, 0.25),
                "forward_backward_ms": 1e3 * both,
                "efficiency": product_flops(task, n, d) / (rates[dtype_name] * 1e12) / both,
                "peak_bytes": _peak_bytes(step, device),
            }
        rows.append(row)
        put(rows)
    return rows


def graph(device: str, quick: bool) -> list[dict[str, Any]]:
    """Capture a step at logit scale 100, replay it, and compare bits (CUDA only)."""
    rows = []
    for backend in backend_names() if device == "cuda" else []:
        for n in (256, 1024, 4096):
            views = [
                torch.randn(n, 768, device=device, dtype=torch.bfloat16).requires_grad_()
                for _ in range(3)
            ]
            scale = torch.tensor(100.0, device=device, requires_grad=True)

            def step(views=views, scale=scale, backend=backend):
                for leaf in (*views, scale):
                    leaf.grad = None
                gcl_kernels.gcl_loss(*views, scale, backend=backend).backward()
                return [leaf.grad for leaf in (*views, scale)]

            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    eager = [grad.clone() for grad in step()]
                again = [grad.clone() for grad in step()]
            torch.cuda.current_stream().wait_stream(side)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                grads = step()
            captured.replay()
            rows.append(
                {
                    "backend": backend,
                    "n": n,
                    "d": 768,
                    "replay_ms": 1e3 * seconds(captured.replay, device),
                    "eager_ms": 1e3 * seconds(step, device),
                    "two_runs_equal": all(map(torch.equal, eager, again)),
                    "replay_equals_eager": all(map(torch.equal, eager, grads)),
                }
            )
    return rows


def limit(device: str, quick: bool) -> list[dict[str, Any]]:
    """Time and peak memory of the largest problem."""
    n = 256 if quick else 131072
    rows = []
    for backend in backend_names():
        step = training_step(ours(LOSSES["gcl"], backend), "gcl", n, 768, torch.bfloat16, device)
        peak = _peak_bytes(step, device)
        before = time.perf_counter()
        loss = step().item()
        rows.append(
            {
                "backend": backend,
                "n": n,
                "d": 768,
                "peak_bytes": peak,
                "seconds": time.perf_counter() - before,
                "loss": loss,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=["floor", "speed", "graph", "limit"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tries the script itself")
    arguments = parser.parse_args(argv)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu_report: expected a CUDA device, found none", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    default = RESULTS / (re.sub(r"\W+", "-", name.lower()).strip("-") + ".json")
    report = Report(arguments.out or default, device)
    outcome = parity(arguments.quick)
    report.put("parity", outcome)
    print("parity:", outcome["summary"], flush=True)
    if not outcome["passed"]:
        print("no speed is reported while parity fails:", *outcome["failures"], sep="\n")
        return 1
    wanted = arguments.only or ["floor", "speed", "graph", "limit"]
    rates = floor(device, arguments.quick)
    report.put("floor_tflops", rates)
    print("floor, TFLOP/s:", rates, flush=True)
    if "speed" in wanted:
        rows = speed(device, arguments.quick, rates, lambda value: report.put("speed", value))
        for row in rows:
            print(row["task"], row["n"], row["d"], row["dtype"], flush=True)
            for peer, figures in row["peers"].items():
                print(f"    {peer:22} {figures['forward_backward_ms']:10.3f} ms  "
                      f"efficiency {figures['efficiency']:.2f}")  # fmt: skip
    for part, function in (("graph", graph), ("limit", limit)):
        if part in wanted:
            report.put(part, function(device, arguments.quick))
            print(part, json.dumps(report.data[part]), flush=True)
    print("written to", report.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
