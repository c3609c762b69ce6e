"""The full record of a machine with a GPU: ``make gpu-report``.

Parts, in this order, each written to the JSON as soon as it is measured:

    parity     a core of the contract suite on the device, at most two minutes; nothing below runs
               while it fails, unless asked by ``--unverified``, which the record shows. A core that
               is not finished in time has not failed: the record says so, and the rest goes on
    floor      rate of torch.mm, 8192 cubed, in each dtype
    warmup     kernels compiled ahead for the sizes below, and the seconds it took
    headline   forward, backward and both, and peak memory, of the headline sizes: ours, and the
               best that can be written or installed
    changes    the default less one of its parts each, or with one that is off, in turns, and how
               far results differ
    graph      small batches: a step at logit scale 100 captured in a CUDA graph and not; equal bits
               in replay and two runs
    speed      as headline at all other sizes, for each backend, dense peers where they fit
    embeddings unit vectors and their gradients alone, O(M D): time, and bytes over time
    options    each option on the candidates: time over that of none, and peak memory
    training   steps of three linear towers from logit scale 100: losses beside dense float32
    limit      the largest problem, N = 131072, D = 768: time and peak memory
    contract   the whole contract suite, every backend
    sanitizer  compute-sanitizer (memcheck, racecheck) on a small step
    targets    what of the targets holds, from the parts above
    forecast   what was predicted, and what was measured

Nothing is chosen by a measurement: a change stays off until someone makes it the default.

The whole takes at most ``--seconds`` (540), compilation included: a step that no longer fits is
skipped, and the record says so under ``skipped``. What raises is recorded where it stands, and the
rest goes on. What pytest says of a failing parity is beside the record, in ``*.parity.txt``. A
record of the same commit and machine is continued, so that ``--only`` parts add to it; parity runs
once. A copy of the tree that has no git is told its ``--commit``.

    python -m benchmarks.gpu_report [--only floor speed] [--out FILE] [--seconds S] [--quick]
                                    [--commit HASH] [--unverified] [--device cpu]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import gcl_kernels
from benchmarks import options
from benchmarks.peers import checkpointed, dense, dense_clip, gpu_peers, on_sum
from benchmarks.record import RESULTS, environment
from gcl_kernels.backends import triton as triton_backend
from gcl_kernels.backends.base import Backend
from gcl_kernels.backends.triton import tiles
from gcl_kernels.dispatch import BACKENDS
from gcl_kernels.spec import NegativesSpec

ROOT = Path(__file__).parent.parent
CORE = ["test_kernels.py", "test_score_fusion.py"]
"""Block functions against float64, and the losses of both roads."""
CONTRACT = [
    "test_contract.py",
    "test_score_fusion.py",
    "test_kernels.py",
    "test_embeddings.py",
    "test_triton.py",
    "test_triton_fused.py",
    "test_cuda_host.py",
]
QUICK_PARITY = ["test_tolerance.py"]
CORE_SECONDS = 120
CONTRACT_SECONDS = 240
SANITIZER_SECONDS = 60
"""The most that the core, all tests, and one tool of the sanitizer may take."""

COMPILE_SECONDS = 40
"""What compiling the kernels of the sanitizer's step may take."""

DENSE_BYTES_PER_LOGIT = 24
"""What dense autograd holds at its peak per logit, with bfloat16 inputs; a peer is skipped where
this does not fit."""

SLOWEST = {"ours": 0.15, "peer": 0.05}
"""Share of the floor's rate that a first step is assumed to reach when it is asked whether it still
fits the time."""

SIZES = (256, 1024, 4096, 16384, 32768, 65536)
DIMS = (256, 512, 768, 1024)
LARGEST = 131072
STEP_SCALE = 100.0
MEMORY_TARGET = 2.3e9


@dataclass(frozen=True)
class Task:
    """A loss that is measured.

    Attributes:
        views: how many embeddings a sample has.
        logits: rows of its dense matrix, for each sample.
        flops: of the products of forward and backward, in units of N^2 D (docs/maths.md).
        loss: ours, of the views and the scale.
        dense, chunked: what could be used instead; None where there is nothing.
    """

    views: int
    logits: int
    flops: int
    loss: Callable[..., Tensor]
    dense: Callable[..., Tensor]
    chunked: Callable[..., Tensor] | None = None

    def function(self) -> Callable[..., Tensor]:
        """Ours with the scale by name, as ``gcl_kernels.warmup`` calls it."""
        return lambda *views, logit_scale: self.loss(*views, logit_scale, backend="auto")


def _fused(e_i: Tensor, e_t: Tensor, scale: Tensor, *, backend: str) -> Tensor:
    return gcl_kernels.gcl_loss(e_i, e_t, logit_scale=scale, backend=backend)


TASKS = {
    "gcl": Task(3, 3, 36, gcl_kernels.gcl_loss, dense, checkpointed),
    "clip": Task(2, 1, 8, gcl_kernels.clip_loss, dense_clip),
    "fused": Task(2, 3, 16, _fused, on_sum(dense), on_sum(checkpointed)),
}


class Deadline:
    """What is left of the time that the whole report may take."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()


@dataclass
class Report:
    """A JSON file that holds whatever was measured so far.

    Attributes:
        reserve: seconds to leave to the parts that follow.
        commit: what the record says where git does not.
    """

    path: Path
    device: str
    quick: bool
    deadline: Deadline
    reserve: float = 0.0
    commit: str | None = None
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        machine = environment()
        if self.commit is not None:
            machine["commit"] = self.commit
        here = {"environment": machine, "device": self.device, "quick": self.quick}
        self.data = continued(self.path, here)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def put(self, part: str, value: Any) -> None:
        self.data[part] = value
        # Whole or not at all: whoever ends this run finds the last record.
        written = self.path.with_suffix(".part")
        written.write_text(json.dumps(self.data, indent=1) + "\n")
        written.replace(self.path)

    def allows(self, part: str, what: str, seconds: float) -> bool:
        """Whether something that may take so long still fits; if not, that is recorded."""
        left = self.deadline.left() - self.reserve
        if seconds <= left:
            return True
        entry = f"{part}: {what} (up to {seconds:.0f} s, {max(left, 0):.0f} s left)"
        self.put("skipped", [*self.data.get("skipped", []), entry])
        print("skipped", entry, flush=True)
        return False


def continued(path: Path, here: dict[str, Any]) -> dict[str, Any]:
    """The record at ``path`` where it is of this commit and machine, else a new one."""
    commit = here["environment"]["commit"]
    if path.exists() and not commit.endswith("+") and commit != "unknown":
        data = json.loads(path.read_text())
        if all(data.get(key) == value for key, value in here.items()):
            data.pop("skipped", None)
            return data
    return here


def backend_names(device: str, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """The backends that run in tiles on this device."""
    return [
        name
        for name, row in BACKENDS.items()
        if name != "reference"
        and row.why_unavailable() is None
        and row.why_not(torch.device(device), dtype) is None
    ]


# --- Measuring -----------------------------------------------------------------------------------


def timed(steps: list[Callable[[], Any]], device: str) -> list[float]:
    """Seconds of each step, run one after the other."""
    if device == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        events[0].record()
        for step, event in zip(steps, events[1:], strict=True):
            step()
            event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:], strict=False)]
    times = []
    for step in steps:
        before = time.perf_counter()
        step()
        times.append(time.perf_counter() - before)
    return times


def repeats(first: float, budget: float) -> int:
    """How often a step is measured that took ``first`` seconds."""
    return max(2, min(50, int(budget / max(first, 1e-6))))


def medians(steps: list[Callable[[], Any]], device: str, budget: float = 0.4) -> list[float]:
    """Medians of repeated runs within about ``budget`` seconds, after two that warm up."""
    timed(steps, device)
    first = sum(timed(steps, device))
    runs = [timed(steps, device) for _ in range(repeats(first, budget))]
    return [median(times) for times in zip(*runs, strict=True)]


@dataclass
class Step:
    """Forward and backward of a loss on fixed random embeddings."""

    function: Callable[..., Tensor]
    leaves: list[Tensor]
    loss: Tensor | None = None

    def forward(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.loss = self.function(*self.leaves)

    def backward(self) -> None:
        assert self.loss is not None
        self.loss.backward()

    def both(self) -> Tensor:
        self.forward()
        self.backward()
        assert self.loss is not None
        return self.loss.detach()


def make_step(
    task: Task,
    function: Callable[..., Tensor],
    n: int,
    d: int,
    dtype: torch.dtype,
    device: str,
    scale: float = 1 / 0.07,
) -> Step:
    generator = torch.Generator(device=device).manual_seed(n + d)
    views = [
        torch.randn(n, d, generator=generator, dtype=dtype, device=device).requires_grad_()
        for _ in range(task.views)
    ]
    return Step(function, [*views, torch.tensor(scale, device=device, requires_grad=True)])


def ours(task: Task, backend: str) -> Callable[..., Tensor]:
    return lambda *arguments: task.loss(*arguments, backend=backend)


def peak_bytes(step: Step, device: str) -> int | None:
    """What a step holds at its peak beyond inputs and gradients, which exist before and after."""
    if device != "cuda":
        return None
    step.both()
    step.loss = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.both()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def attempt(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What was measured, or why not: a failure must not cost the rest of a rare machine's time."""
    try:
        return measure(*arguments)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        print("failed:", type(error).__name__, lines[0], flush=True)
        return {"failed": f"{type(error).__name__}: {lines[0]}"}


# --- Parts ---------------------------------------------------------------------------------------


def run_tests(
    report: Report, files: list[str], seconds: float, backend: str = ""
) -> dict[str, Any]:
    """Tests of these files: the counts, or the failures. ``passed`` is None where time ran out
    before any failed."""
    tests = ROOT / "python_tests"
    # The project's own options have one -q; two leave out the counts.
    command = [sys.executable, "-m", "pytest", "--tb=short", "-rfE", "-p", "no:cacheprovider"]
    if report.device == "cuda":
        chosen = f"{backend} and " if backend else ""
        command += ["-k", f"{chosen}not cpu and not interpreter and not emulated"]
        if importlib.util.find_spec("xdist") is not None:
            # Each process compiles its share of the kernels.
            command += ["-n", str(min(12, os.cpu_count() or 1))]
    try:
        result = subprocess.run(
            [*command, *(str(tests / name) for name in files)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=seconds,
            env={**os.environ, "COLUMNS": "200"},  # pytest cuts what it says of a failure
        )
    except subprocess.TimeoutExpired as error:
        so_far = (error.stdout or b"").decode(errors="replace")
        failed = re.search(r"^[.sxX]*[FE]", so_far, re.MULTILINE) is not None
        report.path.with_suffix(".parity.txt").write_text(so_far)
        summary = f"not finished in {seconds:.0f} s, {'with' if failed else 'without'} a failure"
        return {"passed": False if failed else None, "summary": summary, "failures": []}
    lines = result.stdout.strip().splitlines()
    if result.returncode != 0:
        report.path.with_suffix(".parity.txt").write_text(result.stdout + result.stderr)
    return {
        "passed": result.returncode == 0,
        "summary": lines[-1] if lines else result.stderr.strip()[-500:],
        "failures": [line for line in lines if re.match(r"(FAILED|ERROR)", line)],
    }


def parity(report: Report) -> dict[str, Any]:
    """The core, on the backend that is measured first."""
    if report.quick:
        return run_tests(report, QUICK_PARITY, CORE_SECONDS)
    has_triton = "triton" in backend_names(report.device)
    return run_tests(report, CORE, CORE_SECONDS, "triton" if has_triton else "")


def contract(report: Report) -> dict[str, Any] | str:
    """All tests, in what time is left."""
    if report.quick:
        return run_tests(report, QUICK_PARITY, CORE_SECONDS)
    if not report.allows("contract", "all tests", CORE_SECONDS):
        return "no time"
    return run_tests(report, CONTRACT, min(CONTRACT_SECONDS, report.deadline.left()))


def floor(report: Report) -> dict[str, float]:
    """TFLOP/s of a plain large product, by dtype."""
    size = 512 if report.quick else 8192
    rates = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(size, size, device=report.device, dtype=dtype) for _ in range(2))
        (seconds,) = medians([lambda a=a, b=b: a @ b], report.device)
        rates[str(dtype).removeprefix("torch.")] = 2e-12 * size**3 / seconds
    return rates


def graph(report: Report) -> list[dict[str, Any]]:
    """Two runs, and a captured step replayed, at logit scale 100: equal bits, and times."""
    rows = []
    cases = [
        (task, n) for task in TASKS for n in ((64,) if report.quick else (32, 256, 1024, 4096))
    ]
    for backend in backend_names(report.device):
        for name, n in cases:
            if not report.allows("graph", f"{backend} {name} {n}", 5):
                continue
            task = TASKS[name]
            step = make_step(
                task, ours(task, backend), n, 768, torch.bfloat16, report.device, STEP_SCALE
            )
            row = {"backend": backend, "task": name, "n": n, "d": 768}
            measure = _captured if report.device == "cuda" else _repeated
            rows.append(row | attempt(measure, step))
            report.put("graph", rows)
    return rows


def _bits(step: Step) -> list[Tensor]:
    return [step.both().clone(), *(leaf.grad.clone() for leaf in step.leaves)]


def _repeated(step: Step) -> dict[str, Any]:
    return {"two_runs_equal": all(map(torch.equal, _bits(step), _bits(step)))}


def _captured(step: Step) -> dict[str, Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step.both()
        row = _repeated(step)
        eager = _bits(step)
        step.loss = None  # its graph belongs to this stream
    torch.cuda.current_stream().wait_stream(side)
    (eager_seconds,) = medians([step.both], "cuda", 0.2)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        outputs = [step.both(), *(leaf.grad for leaf in step.leaves)]
    captured.replay()
    torch.cuda.synchronize()
    row["replay_equals_eager"] = all(map(torch.equal, eager, outputs))
    (replay_seconds,) = medians([captured.replay], "cuda", 0.2)
    return row | {"eager_ms": 1e3 * eager_seconds, "replay_ms": 1e3 * replay_seconds}


def training(report: Report) -> list[dict[str, Any]]:
    """AdamW on three linear towers in bfloat16 autocast: losses beside dense float32's."""
    n, d, steps = (32, 16, 3) if report.quick else (4096, 768, 5)

    def run(function: Callable[..., Tensor], autocast: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        towers = [torch.nn.Linear(d, d, device=report.device) for _ in range(3)]
        log_scale = torch.nn.Parameter(torch.tensor(STEP_SCALE, device=report.device).log())
        parameters = [p for tower in towers for p in tower.parameters()] + [log_scale]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        common = torch.randn(n, d, device=report.device)
        inputs = [common + torch.randn(n, d, device=report.device) for _ in towers]
        losses, times = [], []

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(report.device, torch.bfloat16, enabled=autocast):
                views = [tower(x) for tower, x in zip(towers, inputs, strict=True)]
                loss = function(*views, log_scale.exp())
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())

        for _ in range(steps):
            times += timed([step], report.device)
        return {"losses": [loss.item() for loss in losses], "step_ms": 1e3 * median(times)}

    rows = [{"backend": "dense float32", **attempt(run, dense, False)}]
    for backend in backend_names(report.device):
        if report.allows("training", backend, 10):
            found = attempt(run, ours(TASKS["gcl"], backend), True)
            rows.append({"backend": backend, **found})
            report.put("training", rows)
    return rows


def _once(step: Step, device: str) -> dict[str, Any]:
    peak = peak_bytes(step, device)
    (seconds,) = timed([step.both], device)
    return {"peak_bytes": peak, "seconds": seconds, "loss": step.both().item()}


def _embedding(own: Backend, n: int, d: int, device: str) -> dict[str, Any]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    candidates, pairs = ((True,) * 3,) * 3, ((0, 1), (0, 2), (1, 2))
    spec = NegativesSpec(candidates, pairs, None, True, dtype, None, "tiled")
    views = [torch.randn(n, d, device=device, dtype=dtype) for _ in range(3)]
    scale = torch.tensor(1 / 0.07, device=device)
    hz, grad_own = torch.randn(3, n, d, device=device), torch.randn(3, 3, n, device=device)
    needs, nothing = [True, True, True, False, True], scale.new_empty(0)

    def step() -> None:
        embedded, _ = own.embed(views, None, scale, spec)
        own.gradients(views, scale, embedded, hz, nothing, grad_own, spec, needs)

    (seconds,) = medians([step], device)
    # Read e, write z; read e and H z, write the gradient.
    moved = 3 * n * d * (4 * dtype.itemsize + 4)
    return {"ms": 1e3 * seconds, "gb_per_s": 1e-9 * moved / seconds}


def embeddings_alone(report: Report) -> list[dict[str, Any]]:
    """``embed`` and ``gradients`` of three views, PyTorch's calls and each backend's own."""
    functions = {"PyTorch": Backend()}
    for name in backend_names(report.device):
        if type(BACKENDS[name]).embed is not Backend.embed:
            functions[name] = BACKENDS[name]
    rows = []
    for n in (64,) if report.quick else (1024, 8192, 32768):
        for name, own in functions.items():
            if report.allows("embeddings", f"{name} {n}", 3):
                row = {"functions": name, "n": n, "d": 768}
                rows.append(row | attempt(_embedding, own, n, 768, report.device))
    return rows


def options_alone(report: Report) -> list[dict[str, Any]]:
    """Time of each option on the candidates over that of none, and peak memory."""
    n, d = (64, 16) if report.quick else (4096, 768)
    rows = []
    for road in ("views", "fused"):
        if not report.allows("options", road, 15):
            continue
        steps = {
            name: options.step(road, name, report.device, n, d, torch.bfloat16)
            for name in options.options(road, report.device, n, d)
        }
        for name, ratio in options.ratios(steps, report.device).items():
            row = {"road": road, "option": name, "n": n, "d": d, "time": ratio}
            if report.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                steps[name]()
                row["bytes"] = torch.cuda.max_memory_allocated() - before
            rows.append(row)
    return rows


def limit(report: Report) -> list[dict[str, Any]]:
    """Time and peak memory of the largest problem."""
    n = 256 if report.quick else LARGEST
    rows = []
    for name, task in TASKS.items():
        for backend in backend_names(report.device):
            guess = expected_seconds(report, task, n, 768, "bfloat16", "ours")
            if not report.allows("limit", f"{backend} {name}", guess):
                continue
            step = make_step(task, ours(task, backend), n, 768, torch.bfloat16, report.device)
            row = {"backend": backend, "task": name, "n": n, "d": 768}
            rows.append(row | attempt(_once, step, report.device))
            report.put("limit", rows)
    return rows


def speed_cases(quick: bool) -> list[tuple[str, int, int, str]]:
    """(task, N, D, dtype), those that the targets speak of first."""
    if quick:
        return [
            ("gcl", 64, 32, "float32"),
            ("clip", 64, 32, "bfloat16"),
            ("fused", 64, 32, "float32"),
        ]
    cases = [(task, n, 768, "bfloat16") for n in (32768, 4096) for task in TASKS]
    cases += [(task, n, 768, "bfloat16") for n in (256, 1024, 16384) for task in TASKS]
    cases += [(task, n, 512, "bfloat16") for n in (256, 1024, 4096, 32768) for task in TASKS]
    cases += [(task, n, 768, "float32") for n in (1024, 4096) for task in TASKS]
    cases += [(task, n, d, "bfloat16") for n in SIZES for d in DIMS for task in TASKS]
    return list(dict.fromkeys(cases))


def expected_seconds(report: Report, task: Task, n: int, d: int, dtype: str, kind: str) -> float:
    """An upper guess of what measuring one entry takes: six steps, and what is compiled."""
    rate = report.data["floor_tflops"][dtype] * 1e12
    return 6 * task.flops * n * n * d / (SLOWEST[kind] * rate) + (10 if kind == "peer" else 4)


def fits(task: Task, n: int, device: str) -> bool:
    """Whether a dense matrix of the task fits the device."""
    memory = torch.cuda.mem_get_info()[1] if device == "cuda" else 4 << 30
    return DENSE_BYTES_PER_LOGIT * (task.logits * n) ** 2 < memory


def entries(
    task: Task, n: int, d: int, dtype: torch.dtype, device: str, quick: bool
) -> Iterator[tuple[str, str, Callable[..., Tensor]]]:
    """(name, kind, function) of what is measured at one size.

    Peers and ``tiled`` run at one dimension: their times follow the same products.
    """
    for backend in backend_names(device, dtype):
        if backend != "tiled" or d == 768 or quick:
            yield backend, "ours", ours(task, backend)
    if d != 768 and not quick:
        return
    if fits(task, n, device):
        yield "dense eager", "peer", task.dense
        if not quick:
            torch._dynamo.reset()
            yield "dense torch.compile", "peer", torch.compile(task.dense, dynamic=False)
    if task.chunked is not None and n <= 16384:
        yield "chunked checkpoint", "peer", task.chunked


def _passes(step: Step, device: str, floor_seconds: float) -> dict[str, Any]:
    forward, backward = medians([step.forward, step.backward], device)
    return {
        "forward_ms": 1e3 * forward,
        "backward_ms": 1e3 * backward,
        "both_ms": 1e3 * (forward + backward),
        "efficiency": floor_seconds / (forward + backward),
        "peak_bytes": peak_bytes(step, device),
    }


def headline_cases(quick: bool) -> list[tuple[str, int, int, str]]:
    """(task, N, D, dtype) of the sizes that count most."""
    if quick:
        return [(task, 48, 32, "float32") for task in TASKS]
    return [(task, n, 768, "bfloat16") for n in (32768, 4096) for task in TASKS]


def _warmed(report: Report, task: Task, cases: list[tuple[str, int, int, str]]) -> dict[str, Any]:
    (d,), (dtype,) = {case[2] for case in cases}, {case[3] for case in cases}
    sizes = [case[1] for case in cases]
    options = {"num_views": task.views, "device": report.device}
    found = gcl_kernels.warmup(task.function(), sizes, d, getattr(torch, dtype), **options)
    return found._asdict()


def warmup(report: Report) -> list[dict[str, Any]]:
    """Compile what the headline sizes launch."""
    rows = []
    for name, task in TASKS.items():
        if report.allows("warmup", name, COMPILE_SECONDS):
            cases = [case for case in headline_cases(report.quick) if case[0] == name]
            rows.append({"task": name, **attempt(_warmed, report, task, cases)})
            report.put("warmup", rows)
    return rows


def headline_entries(
    report: Report, task: Task, case: tuple[str, int, int, str]
) -> Iterator[tuple[str, str, Callable[..., Tensor]]]:
    """As :func:`entries`, of a headline size: ours, and the best of other losses that fit."""
    name, n, _, dtype = case
    memory = torch.cuda.mem_get_info()[1] if report.device == "cuda" else 4 << 30
    for backend in backend_names(report.device, getattr(torch, dtype)):
        yield backend, "ours", ours(task, backend)
    for peer_name, peer in gpu_peers(name).items():
        fits = peer.bytes_per_logit * (task.logits * n) ** 2 < memory
        if fits and not (report.quick and "compile" in peer_name):
            yield peer_name, "peer", peer.loss


def headline(report: Report) -> list[dict[str, Any]]:
    """Times and memory of the headline sizes, beside the best of other losses."""
    rows: list[dict[str, Any]] = []
    for case in headline_cases(report.quick):
        measure_case(report, "headline", rows, case, headline_entries(report, TASKS[case[0]], case))
    return rows


@dataclass(frozen=True)
class Change:
    """A change of the default, alone: a part less, or one that is off.

    Attributes:
        predicted: time with it over time without, as forecast before any measurement.
        apply: makes it, for as long as the context lasts.
        cases: (task, N, D) where it is measured.
    """

    predicted: str
    apply: Callable[[], AbstractContextManager[Any]]
    cases: tuple[tuple[str, int, int], ...]


LARGE_CASES = (("gcl", 32768, 768), ("clip", 32768, 768))
FUSED_CASES = (("fused", 32768, 768),)


def _stats_with_the_tiles_warps() -> AbstractContextManager[Any]:
    row = ("sm_90", "large")
    return patch.dict(tiles.TILES, {row: replace(tiles.TILES[row], stats_warps=None)})


def _by_tma(*fields: str) -> AbstractContextManager[Any]:
    """The large rows with these fields of ``TMA_TILES``."""
    rows = {
        row: replace(tiles.TILES[row], **{name: getattr(tile, name) for name in fields})
        for row, tile in tiles.TMA_TILES.items()
    }
    return patch.dict(tiles.TILES, rows)


def _rows_without_waves(chip: Any, dim: int, most: int, tile_cols: int) -> int:
    return most


def _launches_of_triton() -> AbstractContextManager[Any]:
    """Every launch bound and specialised by Triton itself."""
    from gcl_kernels.backends.triton import launching

    return patch.object(launching, "_is_watched", lambda kernel: True)


def changes_known() -> dict[str, Change]:
    """The default less one of its parts each, as far as a switch exists, and what is off."""
    return {
        "weights in blocks of 8192 rows, fused 4096": Change(
            "1.06 (products that end with part of a wave)",
            partial(patch.object, triton_backend, "wave_rows", _rows_without_waves),
            (*LARGE_CASES, *FUSED_CASES),
        ),
        "statistics in blocks of 8192 rows": Change(
            "1.05 (each block's last programs alone)",
            partial(patch.object, triton_backend, "STATS_BLOCK_ROWS", 8192),
            LARGE_CASES,
        ),
        "statistics with 8 warps a tile": Change(
            "1.1 (more instructions issued)", _stats_with_the_tiles_warps, LARGE_CASES
        ),
        "statistics in strips by TMA": Change(
            "0.95 to 1 (3997 issue slots a tile become 2488)",
            partial(_by_tma, "strip"),
            LARGE_CASES,
        ),
        "weights by TMA": Change(
            "0.97 to 1 (5066 issue slots a tile become 3087)",
            partial(_by_tma, "tma_warps"),
            LARGE_CASES,
        ),
        "score fusion's bases in one product of the tile": Change(
            "0.95 to 1.05 (HGMMA 64x128, and 2 to 5 % more issued)",
            lambda: patch.dict(tiles.FUSED_TILES, tiles.DEALT_TILES),
            FUSED_CASES,
        ),
        "score fusion's weights as one matrix": Change(
            "0.95 (two products a block in place of eight)",
            lambda: patch.object(BACKENDS["triton"], "joins_bases", True),
            FUSED_CASES,
        ),
        "tiles kept between the passes, 128 MiB": Change(
            "0.9 to 1 (a product in four, for 8 bytes a logit)",
            lambda: patch.object(BACKENDS["triton"], "keeps_tiles", True),
            (("gcl", 1024, 768), ("clip", 4096, 768), ("fused", 1024, 768)),
        ),
        "launches by Triton itself": Change(
            "1.1 or more in small batches",
            _launches_of_triton,
            (("gcl", 256, 768), ("clip", 256, 768)),
        ),
    }


def _compared(report: Report, change: Change, task: Task, n: int, d: int) -> dict[str, Any]:
    """Medians of a step with and without the change, in turns."""
    dtype = torch.float32 if report.device == "cpu" else torch.bfloat16
    backend = "triton" if "triton" in backend_names(report.device) else "tiled"
    step = make_step(task, ours(task, backend), n, d, dtype, report.device)

    def changed() -> Tensor:
        with change.apply():
            return step.both()

    without = _bits(step)
    with change.apply():
        differs = max(
            ((a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-30)).item()
            for a, b in zip(without, _bits(step), strict=True)
        )
    default_s, changed_s = medians([step.both, changed], report.device, 1.0)
    return {
        "default_ms": 1e3 * default_s,
        "changed_ms": 1e3 * changed_s,
        "measured": changed_s / default_s,
        "differs_by": differs,
    }


def changes(report: Report) -> list[dict[str, Any]]:
    """Each change alone against the default."""
    rows: list[dict[str, Any]] = []
    for what, change in changes_known().items():
        cases = [(task, 48, 32) for task, *_ in change.cases] if report.quick else change.cases
        for name, n, d in cases:
            task = TASKS[name]
            guess = 2 * expected_seconds(report, task, n, d, "bfloat16", "ours")
            if not report.allows("changes", f"{what}, {name} {n}", guess):
                continue
            row = {"what": what, "predicted": change.predicted, "task": name, "n": n, "d": d}
            rows.append(row | attempt(_compared, report, change, task, n, d))
            report.put("changes", rows)
    return rows


def speed(report: Report) -> list[dict[str, Any]]:
    """Times and memory of our backends and the peers that fit, at every size."""
    rows: list[dict[str, Any]] = []
    for case in speed_cases(report.quick):
        name, n, d, dtype_name = case
        found = entries(TASKS[name], n, d, getattr(torch, dtype_name), report.device, report.quick)
        measure_case(report, "speed", rows, case, found)
    return rows


def measure_case(
    report: Report,
    part: str,
    rows: list[dict[str, Any]],
    case: tuple[str, int, int, str],
    candidates: Iterator[tuple[str, str, Callable[..., Tensor]]],
) -> None:
    """Add a row of one size to a part, with whatever of (name, kind, function) fits the time."""
    name, n, d, dtype_name = case
    task, dtype = TASKS[name], getattr(torch, dtype_name)
    row: dict[str, Any] = {"task": name, "n": n, "d": d, "dtype": dtype_name, "peers": {}}
    rows.append(row)
    for peer, kind, function in candidates:
        label = f"{name} {n} {d} {dtype_name} {peer}"
        guess = expected_seconds(report, task, n, d, dtype_name, kind)
        if not report.allows(part, label, guess):
            continue
        step = make_step(task, function, n, d, dtype, report.device)
        rate = report.data["floor_tflops"][dtype_name] * 1e12
        found = attempt(_passes, step, report.device, task.flops * n * n * d / rate)
        row["peers"][peer] = found
        print(f"{label:60} {found.get('both_ms', 0):10.3f} ms", flush=True)
        report.put(part, rows)
        del step
        if report.device == "cuda":
            torch.cuda.empty_cache()


def small_step(backend: str, device: str) -> dict[str, Any]:
    """What the sanitizer watches: every kernel of a backend, ragged, on both sides of the bound.
    It measures nothing."""
    for task in TASKS.values():
        for n, d, dtype in ((300, 80, torch.bfloat16), (70, 67, torch.float32)):
            for scale in (20.0, STEP_SCALE):
                make_step(task, ours(task, backend), n, d, dtype, device, scale).both()
    if device == "cuda":
        torch.cuda.synchronize()
    return {}


def find_sanitizer(path: str | None = None) -> str | None:
    """compute-sanitizer on the path, beside nvcc, or in the toolkit that nvcc belongs to."""
    found = shutil.which("compute-sanitizer", path=path)
    if found is not None:
        return found
    nvcc = shutil.which("nvcc", path=path)
    for folder in (Path(nvcc).resolve().parent,) if nvcc else ():
        for place in (folder, folder.parent / "compute-sanitizer"):
            if (place / "compute-sanitizer").is_file():
                return str(place / "compute-sanitizer")
    return None


def sanitizer_command(tool: str, program: str, backend: str, device: str) -> list[str]:
    code = f"from benchmarks.gpu_report import small_step; small_step({backend!r}, {device!r})"
    return [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]


def sanitizer(report: Report) -> list[dict[str, Any]] | str:
    """memcheck and racecheck of :func:`small_step`; compiled once before, outside of the tool."""
    program = find_sanitizer()
    if program is None:
        return "compute-sanitizer not found"
    rows: list[dict[str, Any]] = []
    for backend in backend_names(report.device):
        if backend == "tiled":
            continue  # PyTorch's own kernels
        needed = COMPILE_SECONDS + SANITIZER_SECONDS
        if not report.allows("sanitizer", backend, needed):
            continue
        compiled = attempt(small_step, backend, report.device)
        if "failed" in compiled:
            rows.append({"backend": backend, "clean": None, **compiled})
            continue
        for tool in ("memcheck", "racecheck"):
            if not report.allows("sanitizer", f"{backend} {tool}", SANITIZER_SECONDS):
                continue
            row: dict[str, Any] = {"backend": backend, "tool": tool}
            try:
                result = subprocess.run(
                    sanitizer_command(tool, program, backend, report.device),
                    capture_output=True,
                    text=True,
                    cwd=ROOT,
                    timeout=SANITIZER_SECONDS,
                    # Each tensor an allocation of its own, so that its bounds are known.
                    env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                )
                summary = [line for line in result.stdout.splitlines() if "SUMMARY" in line]
                # Without a summary the tool did not run: some machines refuse it.
                row["clean"] = result.returncode == 0 if summary else None
                row["summary"] = summary[-1].strip("= ") if summary else result.stdout[-300:]
            except subprocess.TimeoutExpired:
                row |= {"clean": None, "summary": f"not finished in {SANITIZER_SECONDS} s"}
            rows.append(row)
            report.put("sanitizer", rows)
    return rows


def targets(data: dict[str, Any], backend: str = "triton") -> list[dict[str, Any]]:
    """Each target with its value and whether it is met; only what was measured."""
    rows: list[dict[str, Any]] = []

    def judge(what: str, value: float, target: float, at_least: bool = True) -> None:
        met = value >= target if at_least else value <= target
        rows.append({"what": what, "value": value, "target": target, "met": met})

    speeds: dict[tuple[str, int], dict[str, Any]] = {}
    for row in [*data.get("headline", []), *data.get("speed", [])]:
        if (row["d"], row["dtype"]) == (768, "bfloat16"):
            speeds.setdefault((row["task"], row["n"]), {}).update(row["peers"])
    wanted = (
        ("gcl", 32768, 0.70),
        ("gcl", 4096, 0.5),
        ("clip", 32768, 0.70),
        ("fused", 32768, 0.55),
    )
    for task, n, efficiency in wanted:
        own = speeds.get((task, n), {}).get(backend, {})
        if "efficiency" in own:
            judge(f"{task} N={n}: efficiency", own["efficiency"], efficiency)
    for task in TASKS:
        for peer, factor in (("dense eager", 3.0), ("dense torch.compile", 2.0)):
            sizes = [
                n
                for (name, n), peers in speeds.items()
                if name == task and all("both_ms" in peers.get(who, {}) for who in (peer, backend))
            ]
            for n in sorted(sizes):
                ratio = speeds[task, n][peer]["both_ms"] / speeds[task, n][backend]["both_ms"]
                if n == max(sizes):
                    judge(f"{task} N={n}: times {peer}", ratio, factor)
                elif n <= 1024 and peer == "dense torch.compile":
                    judge(f"{task} N={n}: times {peer}", ratio, 1.0)
    for row in data.get("limit", []):
        if row["backend"] == backend and row["task"] == "gcl" and row.get("peak_bytes"):
            judge(f"gcl N={row['n']}: peak bytes", row["peak_bytes"], MEMORY_TARGET, False)
    return rows


FORECAST = {
    ("gcl", 32768): "51 to 59 ms",
    ("fused", 32768): "34 ms",
}
"""Of ours, forward and backward on an H200 in bfloat16 with D = 768, from instruction counts and
data-sheet rates; nothing was measured."""


def forecast(data: dict[str, Any]) -> list[dict[str, str]]:
    """Rows (what, predicted, measured) of what was measured."""
    rows = []
    for row in data.get("headline", []):
        predicted = FORECAST.get((row["task"], row["n"]))
        took = row["peers"].get("triton", {}).get("both_ms")
        if predicted is not None and took is not None:
            what = f"{row['task']} N={row['n']}, forward and backward"
            rows.append({"what": what, "predicted": predicted, "measured": f"{took:.1f} ms"})
    for row in data.get("changes", []):
        what = f"{row['what']}: {row['task']} N={row['n']}"
        measured = f"{row['measured']:.3f}" if "measured" in row else row["failed"]
        rows.append({"what": what, "predicted": row["predicted"], "measured": measured})
    return rows


PARTS: dict[str, tuple[Callable[[Report], Any], float]] = {
    "warmup": (warmup, 240.0),
    "headline": (headline, 150.0),
    "changes": (changes, 60.0),
    "graph": (graph, 20.0),
    "speed": (speed, 0.0),
    "embeddings": (embeddings_alone, 0.0),
    "options": (options_alone, 0.0),
    "training": (training, 0.0),
    "limit": (limit, 0.0),
    "contract": (contract, 0.0),
    "sanitizer": (sanitizer, 0.0),
}
"""Each part, and the seconds that it leaves to those after it."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=["parity", "floor", *PARTS])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--commit", help="of this tree, where there is no git to ask")
    parser.add_argument("--unverified", action="store_true", help="measure though parity fails")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tries the script itself")
    arguments = parser.parse_args(argv)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu_report: expected a CUDA device, found none", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    default = RESULTS / (re.sub(r"\W+", "-", name.lower()).strip("-") + ".json")
    deadline = Deadline(arguments.seconds)
    path = arguments.out or default
    report = Report(path, device, arguments.quick, deadline, commit=arguments.commit)
    wanted = arguments.only or ["parity", "floor", *PARTS]
    known = report.data.get("parity")
    known_good = known is not None and known["passed"] is not False
    if "parity" in wanted or known is None or not (known_good or arguments.unverified):
        report.put("parity", parity(report))
    outcome = report.data["parity"]
    print("parity:", outcome["summary"], flush=True)
    if outcome["passed"] is False:
        print(*outcome["failures"], sep="\n")
        if not arguments.unverified:
            print("nothing else is reported while parity fails")
            return 1
        print("figures below are of code whose parity fails")
    if "floor" in wanted or "floor_tflops" not in report.data:
        report.put("floor_tflops", floor(report))
        print("floor, TFLOP/s:", report.data["floor_tflops"], flush=True)
    for part, (function, reserve) in PARTS.items():
        if part in wanted:
            report.reserve = 0.0 if arguments.only else reserve
            report.put(part, function(report))
            print(part, "done,", f"{deadline.left():.0f} s left", flush=True)
    report.put("targets", targets(report.data))
    report.put("forecast", forecast(report.data))
    for row in report.data["targets"]:
        print("met " if row["met"] else "MISS", row["what"], row["value"], "of", row["target"])
    print("| change | predicted | measured |\n|---|---|---|")
    for row in report.data["forecast"]:
        print(f"| {row['what']} | {row['predicted']} | {row['measured']} |")
    print("written to", report.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
