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
from torch import Tensor

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/own_losses.md"]


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def run_blocks(page: str, change: tuple[str, str] = ("", "")) -> dict:
    namespace: dict = {}
    for block in code_blocks((ROOT / page).read_text()):
        exec(compile(block.replace(*change), page, "exec"), namespace)
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


N = 11
LABELS = torch.arange(N) * 7 % 4


def cosines(e_1: Tensor, e_2: Tensor) -> Tensor:
    return F.normalize(e_1, dim=-1) @ F.normalize(e_2, dim=-1).T


def both_ways(x: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of both directions with symmetric targets."""
    losses = [-(target * rows.log_softmax(1)).sum(1).mean() for rows in (x, x.T)]
    return (losses[0] + losses[1]) / 2


def dense_unicl(e_i: Tensor, e_t: Tensor) -> Tensor:
    same = (LABELS[:, None] == LABELS).double()
    return both_ways(cosines(e_i, e_t) / 0.07, same / same.sum(1, keepdim=True))


def dense_smoothed(e_i: Tensor, e_t: Tensor) -> Tensor:
    eye = torch.eye(N, dtype=torch.float64)
    return both_ways(cosines(e_i, e_t) / 0.07, 0.9 * eye + 0.1 / N)


def dense_margin(e_i: Tensor, e_t: Tensor) -> Tensor:
    eye = torch.eye(N, dtype=torch.float64)
    return both_ways((cosines(e_i, e_t) - 0.3 * eye) / 0.07, eye)


def dense_hard_negatives(e_1: Tensor, e_2: Tensor) -> Tensor:
    x = cosines(torch.cat([e_1, e_2]), torch.cat([e_1, e_2])) / 0.5
    losses = []
    for row in range(2 * N):
        negatives = torch.stack([x[row, k] for k in range(2 * N) if (k - row) % N])
        weights = negatives.exp() / negatives.exp().mean()
        positive = x[row, (row + N) % (2 * N)].exp()
        losses.append(-(positive / (positive + (weights * negatives.exp()).sum())).log())
    return torch.stack(losses).mean()


def dense_triplet(query: Tensor, document: Tensor, hard: Tensor) -> Tensor:
    x = cosines(query, torch.cat([document, hard])) / 0.05
    return F.cross_entropy(x, torch.arange(N))


RECIPES = {
    "unicl_loss": (dense_unicl, 2, (LABELS, 4), ("sums.flip(0)", "sums")),
    "smoothed_clip_loss": (dense_smoothed, 2, (), ("keepdim=True).flip(0)", "keepdim=True)")),
    "margin_loss": (dense_margin, 2, (), ("margin=0.3", "margin=0.301")),
    "hard_negatives_loss": (dense_hard_negatives, 2, (), ("n = 2 * e_1.shape[0] - 2", "n = 22")),
    "triplet_loss": (dense_triplet, 3, (), ("[0, 1, 1]", "[0, 1, 0]")),
}
"""By name: the definition, its embeddings, what else the page's function takes, a planted error."""


def loss_and_gradients(function, views: list[Tensor], *rest) -> list[Tensor]:
    views = [view.clone().requires_grad_() for view in views]
    loss = function(*views, *rest)
    return [loss, *torch.autograd.grad(loss, views)]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_their_definitions(name):
    dense, count, rest, error = RECIPES[name]
    generator = torch.Generator().manual_seed(1)
    views = list(torch.randn(count, N, 6, dtype=torch.float64, generator=generator))
    expected = loss_and_gradients(dense, views)
    found = loss_and_gradients(run_blocks("docs/own_losses.md")[name], views, *rest)
    torch.testing.assert_close(found, expected)
    planted = run_blocks("docs/own_losses.md", error)[name]
    for wrong, right in zip(loss_and_gradients(planted, views, *rest), expected, strict=True):
        # Of a margin's thousandth the gradient sees as little as the loss.
        assert (wrong - right).norm() > 1e-4 * right.norm()
