"""The launches themselves, as far as the device: Triton binds the arguments of every kernel,
decides which become constants, and compiles, with a driver that has a chip's name but no chip. The
last step, machine code, is ``test_triton_compile``'s.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from typing import Any

import pytest
import torch
from calls import MIXED, add_product, run_backward, run_forward, spec_of, write_product
from interpreter import starts

from gcl_kernels.dispatch import BACKENDS
from gcl_kernels.spec import BoolTable

ALL: BoolTable = ((True,) * 3,) * 3
CLIP: BoolTable = ((False, True), (True, False))

CASES = {
    # One sample and one dimension: Triton makes a constant of an argument that is 1.
    "one": (1, 1, torch.bfloat16, False, ALL),
    "ids": (40, 64, torch.float16, True, CLIP),
    "not aligned": (37, 67, torch.float32, False, ALL),
}


KERNELS = {
    "views": {"embed_kernel", "stats_kernel", "fold_kernel", "weights_kernel", "gradients_kernel"},
    "fused": {
        "embed_kernel", "fused_stats_kernel", "fold_kernel", "fused_weights_kernel",
        "inner_kernel", "gradients_kernel",
    },
}  # fmt: skip


def passes(road: str, n: int, d: int, dtype: torch.dtype, ids: bool, candidates: BoolTable) -> None:
    """Both passes, without a gradient of one view."""
    mixed = MIXED[: len(candidates)] if road == "fused" else None
    mixing = None if mixed is None else torch.zeros(len(mixed), 2)
    spec = spec_of(
        candidates=candidates, own_pairs=((0, 0), (0, 1)), mixed=mixed, compute_dtype=dtype,
        backend="triton",
    )  # fmt: skip
    num_given = len(candidates) - 1 if mixed is None else 1
    bases = [torch.zeros(n, d, dtype=dtype)] * num_given + [torch.zeros(d, n, dtype=dtype).t()]
    needs = [True] * num_given + [False, mixed is not None, True]
    sample_ids = torch.zeros(n, dtype=torch.int64) if ids else None
    results = run_forward(bases, spec, needs, torch.ones(()), sample_ids, mixing)
    run_backward(bases, spec, needs, torch.ones(()), results, sample_ids)


def main() -> None:
    """In a process of its own: launch everything on a chip that is not there, and print for each
    road and case what was launched."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        utils = None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    driver.set_active(Driver())
    run, launched = JITFunction.run, []
    add_stages = CUDABackend.add_stages

    def no_code(module, metadata) -> bytes:
        metadata.update(name="", shared=0)
        return b""

    def add_stages_of_triton(self, stages, *arguments):
        add_stages(self, stages, *arguments)
        stages.update(dict.fromkeys(("llir", "ptx", "cubin"), no_code))

    CUDABackend.add_stages = add_stages_of_triton

    def only_compile(self, *arguments, grid, warmup, **named):
        launched.append(self.__name__)
        return run(self, *arguments, grid=grid, warmup=True, **named)

    JITFunction.run = only_compile
    backend: Any = BACKENDS["triton"]
    backend.why_not = lambda *arguments: None  # tensors stay on the CPU
    backend.write_product, backend.add_product = write_product, add_product
    for road in KERNELS:
        for case in CASES:
            launched.clear()
            try:
                passes(road, *CASES[case])
            except Exception:
                launched.append(traceback.format_exc())
            print(json.dumps([road, case, launched]))


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[str]]:
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_triton_launch as t; t.main()"
    # Kernels without machine code must not be found by others.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = map(json.loads, result.stdout.splitlines())
    return {(road, case): launched for road, case, launched in lines}


@starts
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("road", KERNELS)
def test_launches_compile(launches, road, case):
    dim = CASES[case][1]
    of_one_number = {"embed_kernel"} if dim == 1 else set()  # PyTorch's
    assert set(launches[road, case]) == KERNELS[road] - of_one_number
