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

import pytest
import torch
from interpreter import starts

from gcl_kernels.backends import triton as backend
from gcl_kernels.blocks import plan_blocks
from gcl_kernels.problem import FusedProblem, Problem, Workspace, empty_stats
from gcl_kernels.spec import BoolTable

ALL: BoolTable = ((True,) * 3,) * 3
CLIP: BoolTable = ((False, True), (True, False))

CASES = {
    # One sample and one dimension: Triton makes a constant of an argument that is 1.
    "one": (1, 1, torch.bfloat16, None, ALL),
    "ids": (40, 64, torch.float16, torch.int32, CLIP),
    "not aligned": (37, 67, torch.float32, None, ALL),
}


def general(n: int, d: int, dtype: torch.dtype, ids_dtype, candidates: BoolTable) -> None:
    views, scale = [torch.zeros(n, d, dtype=dtype) for _ in candidates], torch.ones(())
    pairs, needs = [(0, 0), (0, 1)], [True] * (len(views) - 1) + [False]
    embedded = backend.embed(views, pairs, True, dtype, scale)
    of_z, of_own = (embedded[k].new_zeros(embedded[k].shape, dtype=torch.float32) for k in (0, 4))
    backend.embed_backward(views, True, *embedded[:4], of_z, of_own, scale, needs)
    z = embedded[0].flatten(0, 1)
    ids = None if ids_dtype is None else torch.zeros(z.shape[0], dtype=ids_dtype)
    problem = Problem(z, z, ids, ids, torch.ones(()), None, True)
    plan = plan_blocks(n, candidates, backend.block_rows(z))
    workspace, rows = Workspace(z.device, plan), torch.zeros(z.shape[0])
    stats = empty_stats(problem, problem.z_rows)
    for block in plan:
        backend.block_stats(problem, block, stats, stats, workspace)
        backend.block_weights(problem, block, rows, rows, rows, rows, workspace)


def fused(n: int, d: int, dtype: torch.dtype, ids_dtype, candidates: BoolTable) -> None:
    bases = (0, 1, None)[: len(candidates)]
    views = [torch.zeros(n, d, dtype=dtype), torch.zeros(d, n, dtype=dtype).t()]
    mixing, needs = torch.zeros(len(bases), 2), [False, True, True]
    made_of, pairs, scale = [0, 1, -1][: len(bases)], [(0, 0), (0, 1)], torch.ones(())
    *embedded, own_logits = backend.embed_fused(views, mixing, made_of, pairs, True, dtype, scale)
    z, _, _, coefficients, _ = embedded
    r, inner = torch.zeros(z.shape), torch.zeros_like(coefficients)
    backend.fused_gradients(
        views, made_of, pairs, True, *embedded, r, inner, own_logits, scale, needs
    )
    ids = None if ids_dtype is None else torch.zeros(n, dtype=ids_dtype)
    problem = FusedProblem(
        z, z, coefficients, coefficients, bases, candidates, ids, ids, torch.ones(()), None, True
    )
    plan = plan_blocks(n, ((True,),), backend.fused_block_rows(z, 3))
    workspace, rows = Workspace(z.device, plan), torch.zeros(len(bases), n)
    stats = empty_stats(problem, problem.z_rows)
    for block in plan:
        backend.fused_block_stats(problem, block, stats, stats, workspace)
        backend.fused_block_weights(
            problem, block, rows, rows, rows, rows, coefficients, coefficients, workspace
        )


def main() -> None:
    """In a process of its own: launch everything on a chip that is not there, and print for each
    function and case what was launched."""
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
    backend.why_not = lambda *arguments: None  # tensors stay on the CPU
    for function in (general, fused):
        for case in CASES:
            launched.clear()
            try:
                function(*CASES[case])
            except Exception:
                launched.append(traceback.format_exc())
            print(json.dumps([function.__name__, case, launched]))


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
    return {(function, case): launched for function, case, launched in lines}


@starts
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", ["general", "fused"])
def test_launches_compile(launches, function, case):
    kernels = {
        "general": {
            "embed_kernel",
            "stats_kernel",
            "fold_kernel",
            "weights_kernel",
            "embed_backward_kernel",
        },
        "fused": {
            "embed_fused_kernel",
            "fused_stats_kernel",
            "fold_kernel",
            "fused_weights_kernel",
            "inner_kernel",
            "fused_gradients_kernel",
        },
    }
    dim = CASES[case][1]
    of_one_number = {"embed_kernel", "embed_fused_kernel"} if dim == 1 else set()  # PyTorch's
    assert set(launches[function, case]) == kernels[function] - of_one_number
