"""What the documents show runs, and the losses that they build are what they say."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/own_losses.md"]


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def run_blocks(page: str) -> dict:
    namespace: dict = {}
    for block in code_blocks((ROOT / page).read_text()):
        exec(compile(block, page, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page):
    assert run_blocks(page)


def test_training_in_two_processes_runs(tmp_path):
    page = (ROOT / "docs/distributed.md").read_text()
    script = tmp_path / "train.py"
    # Leaves before Python takes itself apart: gloo's threads, which DistributedDataParallel keeps
    # alive, may then be releasing a tensor, and PyTorch aborts (seen; pytorch/pytorch#179291).
    script.write_text(code_blocks(page)[0] + "import os, sys\nsys.stdout.flush()\nos._exit(0)\n")
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2"
    done = subprocess.run(
        [sys.executable, *launch.split(), str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    # log(3 * 256 - 1) is the loss of a model that tells nothing apart.
    assert float(done.stdout.removeprefix("tensor(").rstrip(")\n")) < 2


def test_links_lead_somewhere():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_drawings_are_well_formed():
    # A browser shows nothing of one that is not.
    for path in (ROOT / "docs").rglob("*.svg"):
        ElementTree.parse(path)


def table_rows(text: str, first: str) -> list[dict[str, str]]:
    """Rows, by column, of the Markdown table whose head begins with this column."""
    lines = itertools.dropwhile(lambda line: not line.startswith(f"| {first} |"), text.splitlines())
    table = itertools.takewhile(lambda line: line.startswith("|"), lines)
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [dict(zip(split[0], row, strict=True)) for row in split[2:]]


def test_resources_are_quoted_from_the_record():
    record = table_rows((ROOT / "benchmarks/results/kernels.md").read_text(), "chip")
    quoted = table_rows((ROOT / "docs/kernels.md").read_text(), "kernel")
    assert len(quoted) >= 10
    for row in quoted:
        assert sum(row.items() <= entry.items() for entry in record) == 1, row
    assert all(entry["spilled bytes"] == "0" for entry in record)


def test_supervised_contrastive_loss():
    views = [torch.randn(12, 6, dtype=torch.float64) for _ in range(2)]
    labels = torch.arange(12) % 5
    z = F.normalize(torch.cat(views), dim=-1)
    x = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
    both = torch.cat([labels, labels])
    positive = (both[:, None] == both[None, :]).fill_diagonal_(False)
    log_p = x - x.logsumexp(1, keepdim=True)
    expected = -(log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()
    torch.testing.assert_close(
        run_blocks("docs/own_losses.md")["supcon_loss"](views, labels, 5), expected
    )


def test_debiased_and_decoupled_losses():
    e_1, e_2 = (torch.randn(9, 6, dtype=torch.float64) for _ in range(2))
    z = F.normalize(torch.cat([e_1, e_2]), dim=-1)
    namespace = run_blocks("docs/own_losses.md")
    sims = (z @ z.T / 0.5).exp()
    own = torch.eye(9, dtype=torch.bool).repeat(2, 2)
    positive = sims.diagonal(9).repeat(2)
    g = (sims.masked_fill(own, 0).sum(1) / 16 - 0.1 * positive) / 0.9
    g = g.clamp_min(torch.tensor(-2.0, dtype=torch.float64).exp())
    expected = -(positive / (positive + 16 * g)).log().mean()
    torch.testing.assert_close(namespace["debiased_loss"](e_1, e_2), expected)
    x = z[:9] @ z[9:].T / 0.07
    off = x.masked_fill(torch.eye(9, dtype=torch.bool), -torch.inf)
    expected = (off.logsumexp(1).mean() + off.logsumexp(0).mean()) / 2 - x.diagonal().mean()
    torch.testing.assert_close(namespace["decoupled_loss"](e_1, e_2), expected)
