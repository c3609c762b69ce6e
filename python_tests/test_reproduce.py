"""docs/reproduce.md, from its first command to its last, on stand-ins of the data and the models.

What a command names is there under that name: small trees in the benchmarks' formats, small models
with random weights. Torchrun's processes are two instead of eight, batches and epochs small, and a
CPU is asked for where a program would look for a GPU.
"""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

for package in (
    "PIL", "accelerate", "open_clip", "open_clip_train.main", "pandas", "pyarrow", "pytrec_eval",
    "timm", "tqdm", "transformers",
):  # fmt: skip
    pytest.importorskip(package)

import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402
from processes import run_as_of_torchrun  # noqa: E402
from retrieval_trees import tree, write_image  # noqa: E402
from small_models import (  # noqa: E402
    SIDE,
    replace_released_eva,
    save_small_tinyclip,
    save_small_vista,
)
from test_docs import ROOT, code_blocks, table_rows  # noqa: E402
from torch.distributed.run import get_args_parser  # noqa: E402

import gcl_kernels  # noqa: E402
from gcl_kernels.retrieval.__main__ import main  # noqa: E402

PAGE = (ROOT / "docs/reproduce.md").read_text()
OPENAI = "ViT-L-14-quickgelu"
TINYCLIP = "wkcn/TinyCLIP-ViT-40M-32-Text-19M-LAION400M"
PAIRS = 16
CLIP_CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": SIDE, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}
IMPORTED_ONCE = [
    "gcl_kernels.integrations.open_clip",
    "gcl_kernels.integrations.vista",
    "open_clip_train.main",
    "timm.models.eva",
    "torch.nn.parallel",
    "transformers.models.bert.modeling_bert",
    "transformers.models.clip.modeling_clip",
    "transformers.trainer",
]


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def commands(text: str) -> list[str]:
    """Each on one line."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text.replace("\\\n", " "), re.S | re.M)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    return [" ".join(line.split()) for line in lines]


SCRIPTS = {
    "Data": "write_pairs.py",
    "CLIP-SF": "train_gcl.py",
    "TinyCLIP": "train_tinyclip.py",
    "VISTA": "train_vista.py",
}
"""By the section that shows it."""


# What lies around the commands


def know_small_models(patch: pytest.MonkeyPatch) -> None:
    """Those that are not in a folder of their name: OpenAI's, and VISTA's image model."""
    import open_clip

    for name in ("_MODEL_CONFIG_PATHS", "_MODEL_CONFIGS"):
        known = getattr(open_clip.factory, name)
        patch.setattr(open_clip.factory, name, type(known)(known))
    open_clip.add_model_config(Path(f"{OPENAI}.json").absolute())
    weights = str(Path("openai.pt").absolute())

    def download(tag: dict, cache_dir: Any = None) -> str:
        assert "openai" in tag["url"] and tag["quick_gelu"]
        return weights

    patch.setattr(open_clip.factory, "download_pretrained", download)
    replace_released_eva(patch)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """Downloads as they come, the page's scripts, and the directory that one is in."""
    root = tmp_path_factory.mktemp("place")
    for kind, name in (
        ("mbeir", "M-BEIR"),
        ("mmeb", "MMEB-eval"),
        ("covr", "WebVid-CoVR"),
        ("coco", "COCO"),
    ):
        tree(kind, root / name)
    for heading, name in SCRIPTS.items():
        (root / name).write_text(code_blocks(section(heading))[0])
    pack_images(root)
    write_mmeb_subsets(root / "MMEB-eval")
    write_validation_split(root / "M-BEIR")
    write_lcs(root / "LLaVA-Pretrain")
    (root / "COCO/captions.json").rename(root / "COCO/coco_karpathy_test.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # what a directory elsewhere would not find
        patch.chdir(root)
        write_models(patch)
        yield root


def pack_images(root: Path) -> None:
    """M-BEIR's archive in parts, MMEB's as one."""
    archive = root / "M-BEIR/mbeir_images.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(root / "M-BEIR/mbeir_images", "mbeir_images")
    shutil.rmtree(root / "M-BEIR/mbeir_images")
    content = archive.read_bytes()
    archive.unlink()
    for number in range(4):
        length = -(-len(content) // 4)
        part = content[number * length :][:length]
        archive.with_name(f"{archive.name}.part-0{number}").write_bytes(part)
    zipped = root / "MMEB-eval/images.zip"
    shutil.make_archive(str(zipped.with_suffix("")), "zip", root / "MMEB-eval", "images")
    shutil.rmtree(root / "MMEB-eval/images")


def write_mmeb_subsets(root: Path) -> None:
    """t->it, of the stand-ins' pairs."""
    rows = pyarrow.parquet.read_table(root / "Pairs/test/0000.parquet").to_pylist()
    for row in rows:
        row |= {"qry_inst": "Find it:", "qry_img_path": ""}
    for name in ("EDIS", "WebQA"):
        (root / name / "test").mkdir(parents=True)
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, root / name / "test/0000.parquet")


def write_validation_split(root: Path) -> None:
    for kind, ending in (("query", ".jsonl"), ("qrels", "_qrels.txt")):
        (root / kind / "val").mkdir()
        name = "mbeir_cirr_task7_{}" + ending
        shutil.copy(root / kind / "test" / name.format("test"), root / kind / "val")
        (root / kind / "val" / name.format("test")).rename(root / kind / "val" / name.format("val"))


def write_lcs(root: Path) -> None:
    """As it comes: captions among conversations, images in a zip."""
    root.mkdir()
    rows = []
    with zipfile.ZipFile(root / "images.zip", "w") as file:
        for number in range(PAIRS):
            name = f"{number % 4:05d}/{number:09d}.png"
            file.write(write_image(root / "image.png", 16 * number, 99, 7 * number), name)
            prompt = {"from": "human", "value": "Describe the image concisely.\n<image>"}
            caption = {"from": "gpt", "value": f'a "{chr(97 + number)}"\tthing,\n no. {number}'}
            record = {"id": name[6:15], "image": name, "conversations": [prompt, caption]}
            rows.append(record)
    (root / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(rows))


def write_models(patch: pytest.MonkeyPatch) -> None:
    import open_clip

    Path(f"{OPENAI}.json").write_text(json.dumps(CLIP_CONFIG))
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**json.loads(json.dumps(CLIP_CONFIG))).state_dict(), "openai.pt")
    know_small_models(patch)
    save_small_tinyclip(Path(TINYCLIP))
    save_small_vista(Path("VISTA"))
    config = Path("VISTA/config.json")  # no dropout: what differs is the loss
    without = re.sub(r'(_dropout_prob": )[\d.]+', r"\g<1>0.0", config.read_text())
    config.write_text(without)


# Its commands


def in_shell(command: str) -> None:
    program = command.replace("python ", f"{sys.executable} ", 1)
    subprocess.run(program, shell=True, check=True, capture_output=True)


def evaluated(command: str, capsys) -> str:
    main([*command.removeprefix("python -m gcl_kernels.retrieval ").split(), "--quiet"])
    return capsys.readouterr().out


def run_program(name: str, as_module: bool, arguments: list[str]) -> list[tuple[str, float, Any]]:
    """In one of torchrun's processes; of each loss of `gcl_kernels` what it was, and its group."""
    called: list[tuple[str, float, Any]] = []

    def recorded(loss: Any) -> Any:
        def call(*embeddings: Any, **options: Any) -> Any:
            value = loss(*embeddings, **options)
            called.append((loss.__name__, value.item(), options["group"]))
            return value

        return call

    gcl_kernels.gcl_loss = recorded(gcl_kernels.gcl_loss)
    gcl_kernels.clip_loss = recorded(gcl_kernels.clip_loss)
    know_small_models(pytest.MonkeyPatch())
    if name not in ("train_tinyclip.py", "train_vista.py"):
        # On a CPU, too, open_clip names devices, which DistributedDataParallel then refuses.
        parallel = torch.nn.parallel.DistributedDataParallel
        torch.nn.parallel.DistributedDataParallel = lambda model, device_ids: parallel(model)
    sys.argv = [name, *arguments]
    torch.manual_seed(0)
    if as_module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")
    return called


SMALLER = {
    "train_gcl.py": "--device cpu --workers 0 --batch-size 4 --log-every-n-steps 1",
    "train_tinyclip.py": (
        "--use_cpu True --dataloader_num_workers 0 --per_device_train_batch_size 4"
        " --disable_tqdm True"
    ),
}
SMALLER["open_clip_train.main"] = SMALLER["train_gcl.py"]


def launched(command: str, processes: int = 2) -> list[list[tuple[str, float, Any]]]:
    """By process, as `run_program`."""
    given = get_args_parser().parse_args(command.split()[1:])
    assert given.nproc_per_node == "8"
    arguments = given.training_script_args + SMALLER.get(given.training_script, "").split()
    if given.training_script == "train_vista.py":
        assert arguments[4::3] == ["64", "8"]
        arguments[4], arguments[7] = str(8 // processes), "0"
    program = (given.training_script, given.module, arguments)
    return run_as_of_torchrun(processes, IMPORTED_ONCE, run_program, *program)


@pytest.fixture(scope="module")
def pairs(place) -> Path:
    for command in commands(section("Data")):
        in_shell(command)
    return place / "pairs.tsv"


@pytest.fixture(scope="module")
def clip_sf(pairs) -> None:
    for command in commands(section("CLIP-SF")):
        launched(command)


@pytest.fixture(scope="module")
def tinyclip(pairs) -> list:
    return [launched(command) for command in commands(section("TinyCLIP"))]


@pytest.fixture(scope="module")
def vista(pairs) -> list:
    return [launched(command) for command in commands(section("VISTA"))]


def test_every_command_is_run_here():
    run_by_section = {*SCRIPTS, "Evaluation", "What has to be equal", "Install"}
    assert set(re.findall(r"^## (.*)$", PAGE, re.M)) == run_by_section
    for heading in run_by_section:
        assert commands(section(heading)), heading
        assert len(code_blocks(section(heading))) == (heading in SCRIPTS)
    assert "```" not in PAGE.split("\n## ")[0]


def test_extras_are_the_packages():
    (command,) = commands(section("Install"))
    extras = re.search(r"gcl_kernels\[(.*?)\]", command)[1].split(",")
    known = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    assert {*extras} < {*re.findall(r"^(\w+) = \[", known, re.M)}


def test_pairs_are_captions_and_images(pairs):
    with open(pairs, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == PAIRS and rows[3]["title"] == 'a "d" thing, no. 3'
    assert all(Path(row["filepath"]).is_file() for row in rows)
    import pandas

    assert pandas.read_csv(pairs, sep="\t")["title"].tolist() == [row["title"] for row in rows]
    (pairs.parent / "LLaVA-Pretrain/images/00003/000000003.png").rename("away.png")
    with pytest.raises(subprocess.CalledProcessError) as error:
        in_shell("python write_pairs.py")
    assert b"FileNotFoundError" in error.value.stderr and b"000000003.png" in error.value.stderr
    os.renames("away.png", "LLaVA-Pretrain/images/00003/000000003.png")
    in_shell("python write_pairs.py")


def test_clip_sf_trains(clip_sf):
    before = torch.load("openai.pt")
    after = {}
    for name in ("clip_gcl", "clip_cl"):
        checkpoint = torch.load(f"logs/{name}/checkpoints/epoch_1.pt", weights_only=False)
        after[name] = {
            key.removeprefix("module."): tensor for key, tensor in checkpoint["state_dict"].items()
        }
        assert after[name].keys() == before.keys()
        assert not after[name]["visual.proj"].equal(before["visual.proj"])
        log = Path(f"logs/{name}/out.log").read_text()
        assert ("GCLLoss" in log) == (name == "clip_gcl")
        losses = [float(value) for value in re.findall(r"Contrastive_loss: ([\d.]+)", log)]
        assert len(losses) == PAIRS // 8
    assert not after["clip_gcl"]["visual.proj"].equal(after["clip_cl"]["visual.proj"])


@pytest.mark.parametrize("model", ["tinyclip", "vista"])
def test_scripts_train(model, request):
    for name, of_processes in zip(("gcl", "cl"), request.getfixturevalue(model), strict=True):
        loss = {"gcl": "gcl_loss", "cl": "clip_loss"}[name]
        for called in of_processes:
            assert [one[::2] for one in called] == [(loss, "world")] * (PAIRS // 8)


def test_vistas_processes_share_one_batch(vista):
    """Two halves of it have the loss that it has in one process."""
    command = commands(section("VISTA"))[0].replace("vista_gcl", "alone")
    (alone,) = launched(command, processes=1)
    whole, halves = alone[0][1], [called[0][1] for called in vista[0]]
    assert whole > 1
    assert sum(halves) / 2 == pytest.approx(whole, rel=0.02)


ROWS = table_rows(section("Evaluation"), "model")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model"])
def test_the_tables_models_are_evaluated(row, request, capsys):
    name = row["model"].partition(",")[0]
    request.getfixturevalue({"CLIP-SF": "clip_sf"}.get(name, name.lower()))
    command = commands(section("Evaluation"))[0]
    assert "--vista vista_gcl" in command and len(row) == 4
    embeddings = "".join(re.findall(r"\w", row["model"]))
    command = command.replace("--embeddings embeddings", f"--embeddings {embeddings}")
    for column in ("before", "CL", "GCL"):
        model = row[column].strip("`")
        given = command.replace("--vista vista_gcl", model).replace(
            "vista_gcl.json", "figures.json"
        )
        assert "mean (union)" in evaluated(f"{given} --datasets oven_task8 cirr_task7", capsys)
        results = json.loads(Path("figures.json").read_text())["results"]
        assert [result["name"] for result in results] == ["oven_task8", "cirr_task7"] * 2
    assert len([*Path(embeddings).iterdir()]) == 3  # three models


def test_the_evaluations_commands_run(vista, capsys):
    first, *others = commands(section("Evaluation"))
    printed = evaluated(first, capsys)
    assert printed.count("| mean (union)") == printed.count("| mean (local)") == 1
    assert Path("vista_gcl.json").is_file()
    mmeb, covr, coco = (evaluated(command, capsys) for command in others)
    assert mmeb.count("| t->it |") == 2 and "hit@1" in mmeb
    assert "webvid8m-covr_test" in covr and "coco_karpathy_test_t2i" in coco
    (validation,) = commands(section("What has to be equal"))
    assert "cirr_task7" in evaluated(validation, capsys)
    assert len([*Path("embeddings").iterdir()]) >= 1
