"""The benchmarks compute the same loss as what they are compared with, and the report runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report, table
from benchmarks.peers import peers, training_step


@pytest.mark.parametrize("task", ["gcl", "clip"])
def test_peers_agree(task):
    losses = {}
    for name, function in peers(task).items():
        if name == "open_clip ClipLoss":
            pytest.importorskip("open_clip")
        step = training_step(function, task, 40, 16, torch.float64)
        losses[name] = step().item()
    assert losses["gcl_kernels"] > 0
    for name, loss in losses.items():
        assert loss == pytest.approx(losses["gcl_kernels"], rel=1e-6), name


def test_report_runs_and_refuses_without_a_gpu(tmp_path: Path, capsys):
    path = tmp_path / "report.json"
    assert gpu_report.main(["--device", "cpu", "--quick", "--out", str(path)]) == 0
    data = json.loads(path.read_text())
    assert data["parity"]["passed"] and data["environment"]["torch"] == torch.__version__
    assert {"floor_tflops", "speed", "graph", "limit"} <= data.keys()
    assert "tiled" in data["speed"][0]["peers"]
    if not torch.cuda.is_available():
        assert gpu_report.main(["--quick", "--out", str(path)]) == 2
        assert "expected a CUDA device" in capsys.readouterr().err


def test_report_gives_no_speed_while_parity_fails(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gpu_report, "PARITY", ["no_such_test.py"])
    path = tmp_path / "report.json"
    assert gpu_report.main(["--device", "cpu", "--quick", "--out", str(path)]) == 1
    assert "speed" not in json.loads(path.read_text())


def test_table_takes_ratios_within_a_turn():
    entries = [
        {
            "extra_info": {"task": "gcl", "n": 2048, "d": 768, "peer": peer, "turn": turn},
            "stats": {"median": slow * seconds},
        }
        for turn, slow in enumerate([1, 5, 1])
        for peer, seconds in (("matrix product", 0.5), ("dense eager", 3.0), ("gcl_kernels", 1.0))
    ]
    (row,) = table.rows_of(entries)
    assert row["dense eager"] == pytest.approx(3.0)
    flops = 4 * (3 * 2048) ** 2 * 768
    assert row["efficiency"] == pytest.approx(flops / (2 * 4096**3 / 0.5))
    text = table.markdown([row], [{"peer": "gcl_kernels", "n": 1, "d": 2, "megabytes": 3.0}])
    assert "3.00 x" in text and "| gcl_kernels | 1 | 2 | 3 |" in text
