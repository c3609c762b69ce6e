"""The benchmarks compute the same loss as what they are compared with, and the report runs."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import bench_loss, check, figures, gpu_report, record, table
from benchmarks.peers import NUM_VIEWS, dense_clip, errors, gpu_peers, peers
from gcl_kernels.backends import cpu


@pytest.fixture
def fast_compile(monkeypatch) -> None:
    """Without their own C++, which takes longer than all else here, and is PyTorch's."""
    fast = functools.partial(torch.compile, backend="aot_eager", dynamic=False)
    monkeypatch.setattr("benchmarks.peers.compiled", fast)


@pytest.mark.parametrize("task", NUM_VIEWS)
def test_peers_agree(task, fast_compile):
    """On loss and gradients, as far as float64 and the inputs go."""
    for name, function in peers(task).items():
        for converged in (False, True):
            found = errors(function, task, converged, torch.float64, (40, 16))
            assert max(found.values()) < 1e-9, (name, converged, found)


@pytest.mark.parametrize("task", gpu_report.TASKS)
def test_peers_of_the_gpu_report_agree(task, fast_compile):
    found = gpu_peers(task)
    assert {"own gradient torch.compile", "tuned torch.compile"} <= found.keys()
    for name, peer in found.items():
        if peer.bytes_per_logit or "chunk" in name:  # packages with kernels need a GPU
            worst = max(errors(peer.loss, task, False, torch.float64, (40, 16)).values())
            assert worst < 1e-9, name


def test_every_peer_has_a_column(fast_compile):
    for task in NUM_VIEWS:
        assert set(peers(task)) <= set(bench_loss.PEERS)


def test_errors_are_seen(fast_compile):
    """A loss that lacks a candidate, and one whose gradient is a little off."""
    off = errors(lambda a, b, s: dense_clip(a, b, 1.001 * s), "clip", True, torch.float64)
    assert off["loss"] > 1e-5 and off["gradients"] > 1e-5


def test_report_runs_and_refuses_without_a_gpu(tmp_path: Path, capsys):
    path = tmp_path / "report.json"
    arguments = ["--device", "cpu", "--quick", "--out", str(path)]
    assert gpu_report.main(arguments) == 0
    data = json.loads(path.read_text())
    assert data["parity"]["passed"] and data["environment"]["torch"] == torch.__version__
    assert {"floor_tflops", *gpu_report.PARTS, "targets", "forecast"} <= data.keys()
    assert list(data).index("headline") < list(data).index("changes") < list(data).index("speed")
    for row in data["headline"]:
        assert row["peers"]["tiled"]["both_ms"] > 0
        assert len(row["peers"]) > 1 or row["task"] == "clip"
    assert data["changes"] and all(row["differs_by"] == 0 for row in data["changes"])
    assert [row["measured"] for row in data["forecast"]] == [
        f"{row['measured']:.3f}" for row in data["changes"]
    ]
    assert "| change | predicted | measured |" in capsys.readouterr().out
    assert {row["task"] for row in data["speed"]} == set(gpu_report.TASKS)
    for row in data["speed"]:
        measured = row["peers"]["tiled"]
        assert measured["both_ms"] == measured["forward_ms"] + measured["backward_ms"] > 0
        assert measured["efficiency"] > 0
    assert all(row["two_runs_equal"] for row in data["graph"])
    dense, *backends = data["training"]
    for row in backends:
        assert row["losses"] == pytest.approx(dense["losses"], rel=0.02), row["backend"]
    assert "skipped" not in data
    if not torch.cuda.is_available():
        assert gpu_report.main(["--quick", "--out", str(path)]) == 2
        assert "expected a CUDA device" in capsys.readouterr().err


def test_report_gives_no_speed_while_parity_fails(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gpu_report, "QUICK_PARITY", ["no_such_test.py"])
    path = tmp_path / "report.json"
    arguments = ["--device", "cpu", "--quick", "--commit", "abc", "--out", str(path)]
    assert gpu_report.main(arguments) == 1
    data = json.loads(path.read_text())
    assert "speed" not in data and data["environment"]["commit"] == "abc"
    assert "no_such_test.py" in path.with_suffix(".parity.txt").read_text()

    # Asked to measure all the same, it says so, does not run the tests again, and goes on after an
    # error of one backend.
    def fail(*_, **__):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(gpu_report.BACKENDS["tiled"], "embed", fail)
    monkeypatch.setattr(gpu_report, "parity", fail)
    only = ["--unverified", "--only", "speed", "graph"]
    assert gpu_report.main([*arguments, *only]) == 0
    data = json.loads(path.read_text())
    assert not data["parity"]["passed"]
    for row in data["speed"]:
        assert row["peers"]["tiled"] == {"failed": "RuntimeError: no such kernel"}
        assert row["peers"]["dense eager"]["both_ms"] > 0
    assert {row["backend"] for row in data["graph"] if "failed" in row} == {"tiled"}


def make_report(path: Path, seconds: float, clock=lambda: 0.0) -> gpu_report.Report:
    return gpu_report.Report(path, "cpu", True, gpu_report.Deadline(seconds, clock))


def test_what_no_longer_fits_the_time_is_skipped_and_recorded(tmp_path: Path):
    report = make_report(tmp_path / "report.json", 100.0)
    report.data["floor_tflops"] = {"float32": 1.0, "bfloat16": 1.0}
    report.reserve = 90.0
    assert report.allows("speed", "small", 10.0)
    assert not report.allows("speed", "large", 10.5)
    assert report.data["skipped"] == ["speed: large (up to 10 s, 10 s left)"]
    report.reserve = 99.0
    assert gpu_report.speed(report)[0]["peers"] == {}
    skipped = json.loads(report.path.read_text())["skipped"]
    assert len(skipped) > 5 and any("tiled" in entry for entry in skipped)


def test_guesses_grow_with_the_work(tmp_path: Path):
    report = make_report(tmp_path / "report.json", 100.0)
    report.data["floor_tflops"] = {"bfloat16": 700.0}
    task = gpu_report.TASKS["gcl"]
    small, large = (
        gpu_report.expected_seconds(report, task, n, 768, "bfloat16", "ours") for n in (4096, 65536)
    )
    assert small < 5 < large < 60
    assert [gpu_report.repeats(first, 0.4) for first in (1e-4, 0.02, 5.0)] == [50, 20, 2]


def test_the_full_report_measures_every_size_once_and_the_targets_first():
    cases = gpu_report.speed_cases(quick=False)
    assert len(cases) == len(set(cases))
    for task in gpu_report.TASKS:
        for n in gpu_report.SIZES:
            for d in gpu_report.DIMS:
                assert (task, n, d, "bfloat16") in cases
        assert any(case[0] == task and case[3] == "float32" for case in cases)
    assert cases[0] == ("gcl", 32768, 768, "bfloat16")


def test_a_record_is_continued_for_the_same_commit_and_machine_only(tmp_path: Path):
    path = tmp_path / "report.json"
    here = {"environment": {"commit": "abc", "gpu": "x"}, "device": "cuda", "quick": False}
    assert gpu_report.continued(path, here) == here
    path.write_text(json.dumps({**here, "floor_tflops": {"bfloat16": 1.0}, "skipped": ["a"]}))
    assert gpu_report.continued(path, here) == {**here, "floor_tflops": {"bfloat16": 1.0}}
    other = {**here, "environment": {"commit": "abd", "gpu": "x"}}
    assert gpu_report.continued(path, other) == other
    changed = {**here, "environment": {"commit": "abc+", "gpu": "x"}}
    path.write_text(json.dumps(changed | {"speed": []}))
    assert gpu_report.continued(path, changed) == changed


def test_targets_are_judged_from_what_was_measured():
    def row(n, ours, compiled, eager=None, efficiency=0.75):
        peers = {"triton": {"both_ms": ours, "efficiency": efficiency}}
        peers["dense torch.compile"] = {"both_ms": compiled}
        if eager is not None:
            peers["dense eager"] = {"both_ms": eager}
        return {"task": "gcl", "n": n, "d": 768, "dtype": "bfloat16", "peers": peers}

    data = {
        "speed": [
            row(256, 1.0, 0.5),
            row(4096, 1.0, 3.0, 2.5),
            row(32768, 1.0, 2.1, efficiency=0.6),
        ],
        "limit": [{"backend": "triton", "task": "gcl", "n": 131072, "peak_bytes": 2_200_000_000}],
    }
    judged = {row["what"]: row["met"] for row in gpu_report.targets(data)}
    assert judged == {
        "gcl N=32768: efficiency": False,
        "gcl N=4096: efficiency": True,
        "gcl N=4096: times dense eager": False,
        "gcl N=32768: times dense torch.compile": True,
        "gcl N=256: times dense torch.compile": False,
        "gcl N=131072: peak bytes": True,
    }
    assert gpu_report.targets({}) == []


def test_sanitizer_is_found_beside_nvcc_or_reported_missing(tmp_path: Path, monkeypatch):
    def executable(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.chmod(0o755)

    assert gpu_report.find_sanitizer(str(tmp_path)) is None
    executable(tmp_path / "toolkit/bin/nvcc")
    executable(tmp_path / "toolkit/compute-sanitizer/compute-sanitizer")
    found = gpu_report.find_sanitizer(str(tmp_path / "toolkit/bin"))
    assert found == str(tmp_path / "toolkit/compute-sanitizer/compute-sanitizer")
    executable(tmp_path / "bin/compute-sanitizer")
    assert gpu_report.find_sanitizer(str(tmp_path / "bin")) == str(
        tmp_path / "bin/compute-sanitizer"
    )
    monkeypatch.setattr(gpu_report, "find_sanitizer", lambda: None)
    report = make_report(tmp_path / "report.json", 100.0)
    assert gpu_report.sanitizer(report) == "compute-sanitizer not found"


def test_the_sanitized_step_runs_every_task():
    gpu_report.small_step("tiled", "cpu")
    command = gpu_report.sanitizer_command("memcheck", "/bin/tool", "tiled", "cpu")
    assert command[:3] == ["/bin/tool", "--tool", "memcheck"]
    compile(command[-1], "command", "exec")


def test_table_takes_ratios_within_a_turn():
    times = {"matrix product": 0.5, "dense eager": 3.0, "backend tiled": 1.1, "gcl_kernels": 1.0}
    times["tuned eager"] = 2.0
    about = {"task": "gcl", "n": 2048, "d": 768, "dtype": "float32"}
    entries = [
        {
            "extra_info": {**about, "peer": peer, "turn": turn},
            "stats": {"median": slow * seconds},
        }
        for turn, slow in enumerate([1, 5, 1])
        for peer, seconds in times.items()
    ]
    (row,) = table.rows_of(entries)
    assert row["times"]["dense eager"] == pytest.approx(3.0)
    assert row["best"] == "tuned eager"  # not a backend of ours
    flops = 4 * (3 * 2048) ** 2 * 768
    assert row["efficiency"] == pytest.approx(flops / (2 * 4096**3 / 0.5))
    memory = [{"peer": "gcl_kernels", "n": 1, "d": 2, "megabytes": 3.0}]
    accuracy = [{"task": "clip", "dtype": "float32", "peer": "dense eager"}]
    accuracy[0] |= {kind: {"loss": 1e-8, "gradients": 2e-6} for kind in ("random", "converged")}
    text = table.markdown([row], memory, accuracy)
    assert "| tuned eager | 2.00 x | 3.00 x |" in text and "| gcl_kernels | 1 | 2 | 3 |" in text
    assert "| dense eager | 1.0e-08 | 2.0e-06 | 1.0e-08 | 2.0e-06 |" in text


def test_records_name_processor_instruction_set_and_products(tmp_path: Path, monkeypatch):
    """Figures depend on all three; a hypervisor's "AMD EPYC" is any of four generations."""
    path = tmp_path / "cpuinfo"
    core = "cpu family\t: 25\nmodel\t\t: {}\nmodel name\t: AMD EPYC\nflags\t: a b\n"
    path.write_text(core.format(1) + "\n" + core.format(2))
    assert record.processor(path) == "AMD EPYC (family 25, model 1)"
    path.write_text("processor\t: 0\n")  # as on a machine with ARM's
    assert record.processor(path) == record.processor(tmp_path / "none")
    machine = record.environment()
    text = record.caption(machine)
    assert machine["cpu"] in text and machine["commit"] in text
    if machine["instruction_set"] != "none: no extension":
        assert machine["instruction_set"] == cpu._cpu.instruction_set()
        before = cpu._cpu.products()
        try:
            cpu._cpu.use_products("own")
            assert "products the extension's own" in record.caption(record.environment())
        finally:
            cpu._cpu.use_products(before)
    monkeypatch.setattr(cpu, "_WHY_UNAVAILABLE", "not built")
    assert record.environment()["products"] == "PyTorch's"


def points_of(picture: Path, color: str) -> list[list[tuple[float, float]]]:
    """Lines of a color in a picture, without those of its legend."""
    lines = [
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        for line in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}polyline")
        if line.attrib["stroke"] == color
    ]
    return lines[:-1]


def test_pictures_show_a_record(tmp_path: Path):
    speed = [
        {
            "task": task,
            "n": n,
            "d": 512,
            "dtype": "float32",
            "milliseconds": n * n / 1e3,
            "times": {"dense eager": 4.0, "tuned eager": 2.0, "backend tiled": 1.5},
            **({"efficiency": 0.5} if n == 1024 else {}),
        }
        for task in ("gcl", "fused")
        for n in (32, 64, 128, 1024)
    ]
    speed.append({**speed[0], "d": 768, "n": 4096})
    speed.append({**speed[-1], "d": 512, "dtype": "bfloat16"})
    memory = [{"peer": "gcl_kernels", "n": n, "d": 512, "megabytes": n / 64} for n in (1024, 4096)]
    machine = {"cpu": "A & B", "threads": 2, "torch": "2", "commit": "abc"}
    path = tmp_path / "here.json"
    path.write_text(json.dumps({"environment": machine, "speed": speed, "memory": memory}))
    whole, overview = figures.draw(path, tmp_path)
    assert [of.name for of in (whole, overview)] == ["bench_here.svg", "bench_here_overview.svg"]
    assert "prefers-color-scheme: dark" in whole.read_text()

    *losses, used = points_of(whole, figures.STYLES["gcl_kernels"].color)
    assert [len(line) for line in (*losses, used)] == [4, 4, 2]
    dense = points_of(whole, figures.STYLES["dense eager"].color)
    fastest = points_of(whole, figures.STYLES[figures.FASTEST].color)
    assert len(dense) == len(fastest) == 2  # of both losses, not of memory
    for ours, slow, best in zip(losses, dense, fastest, strict=True):
        (x_0, y_0), (x_1, y_1), (x_2, y_2), (x_3, y_3) = ours
        assert x_2 - x_1 == pytest.approx(x_1 - x_0, abs=0.4)  # doubled
        assert x_3 - x_2 == pytest.approx(3 * (x_1 - x_0), abs=0.4)
        double = y_0 - y_1
        assert y_2 - y_3 == pytest.approx(3 * double, abs=0.4) and double > 10
        for (x, y), (x_slow, y_slow), (x_best, y_best) in zip(ours, slow, best, strict=True):
            assert x == x_slow == x_best
            assert y - y_slow == pytest.approx(2 * double, abs=0.4)
            assert y - y_best == pytest.approx(double, abs=0.4)  # no backend of ours
    # Half of 1024 us a sample, and less with N.
    floor = figures.speed_panel("gcl", speed).series[figures.FLOOR]
    assert floor[-1] == (1024, pytest.approx(512)) and floor[0] == (32, pytest.approx(16))
    assert len(points_of(overview, figures.STYLES["gcl_kernels"].color)) == 2


@pytest.mark.parametrize("name", ["cpu", "cpu_avx2"])
def test_committed_records_can_be_drawn(tmp_path: Path, name: str):
    for picture in figures.draw(record.RESULTS / f"{name}.json", tmp_path):
        assert points_of(picture, figures.STYLES["gcl_kernels"].color)


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """A folder of records, one of which is of this kind of machine, has yardsticks and a size that
    is soon measured."""
    kind = {key: record.environment()[key] for key in check.KIND}
    row = {"task": "clip", "n": 64, "d": 512, "dtype": "float32", "milliseconds": 1.0}
    row["times"] = dict.fromkeys(check.YARDSTICKS, 2.0)
    rows = [row, {**row, "n": 128}]
    for name, environment, speed in (
        ("other", {**kind, "products": "others"}, rows * 3),
        ("older", kind, [{**row, "times": {"dense eager": 2.0}}] * 3),
        ("large", kind, [{**row, "n": 4096}] * 3),
        ("right", {**kind, "threads": torch.get_num_threads()}, rows),
    ):
        data = {"environment": environment, "speed": speed}
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    return tmp_path


def test_check_takes_the_record_of_this_kind_of_machine(committed, monkeypatch, capsys):
    found = check.find_record(record.environment(), committed)
    assert found == committed / "right.json"
    found.unlink()
    assert check.find_record(record.environment(), committed) is None
    monkeypatch.setattr(check, "find_record", lambda _: None)
    assert check.main([]) == 2
    assert "expected a record of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ours", "lost"),
    [
        (lambda call: 1.1, []),
        (lambda call: 1.3 if call == 0 else 1.0, []),  # once in a turn, as on a busy machine
        (lambda call: 1.3 if call < check.TURNS else 1.0, []),  # not when measured again
        (lambda call: 1.3, [64]),
    ],
)
def test_check_fails_where_a_loss_is_slower(committed, monkeypatch, capsys, ours, lost):
    """Of two sizes one; all peers take twice what they took, as on a slower machine."""
    calls = 0

    def seconds(row: dict, peer: str) -> float:
        nonlocal calls
        if peer != "gcl_kernels":
            return 4.0
        if row["n"] == 128:
            return 2.0
        calls += 1
        return 2.0 * ours(calls - 1)

    monkeypatch.setattr(check, "seconds", seconds)
    code = check.main(["--record", str(committed / "right.json"), "--losses", "clip"])
    out, err = capsys.readouterr()
    assert code == (1 if lost else 0)
    assert (f"`clip_loss`, float32, N = {lost[0]}, D = 512" in err) if lost else not err
    assert out.count("held") == 2 - len(lost) and out.count("LOST") == len(lost)
    assert check.main(["--record", str(committed / "right.json"), "--losses", "gcl"]) == 0


def test_check_measures(monkeypatch):
    monkeypatch.setattr(check, "SECONDS", 0.001)
    row = {"task": "clip", "n": 8, "d": 4, "dtype": "float32"}
    now = check.measure(row)
    assert now.keys() == set(check.YARDSTICKS) and min(now.values()) > 0
    assert check.slower({**row, "times": {peer: 1e9 for peer in now}}) > 1


def test_a_killed_run_leaves_its_last_record(tmp_path: Path, monkeypatch):
    report = make_report(tmp_path / "report.json", 100.0)
    report.put("floor_tflops", {"float32": 1.0})

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        report.put("speed", [1.0] * 1000)
    assert "speed" not in json.loads(report.path.read_text())


def test_a_core_that_is_not_finished_has_not_failed(tmp_path: Path, monkeypatch):
    report = make_report(tmp_path / "report.json", 100.0)
    for out, passed in ((b"...ss.", None), (b"..F.", False)):

        def slow(*_, timeout, out=out, **__):
            raise subprocess.TimeoutExpired("pytest", timeout, output=out)

        monkeypatch.setattr(subprocess, "run", slow)
        assert gpu_report.run_tests(report, [], 120.0)["passed"] is passed


def test_changes_end_with_their_context():
    """Each alone: what one did is undone before the next."""

    def settings():
        triton = gpu_report.triton_backend
        return triton.wave_rows, triton.STATS_BLOCK_ROWS, dict(gpu_report.tiles.TILES)

    before = settings()
    for change in gpu_report.changes_known().values():
        with change.apply():
            pass
        assert settings() == before
    with gpu_report.changes_known()["statistics with 8 warps a tile"].apply():
        assert settings() != before
