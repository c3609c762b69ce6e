"""Evaluates a model on a benchmark: `python -m gcl_kernels.retrieval mbeir ROOT --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from gcl_kernels.retrieval import checkpoints
from gcl_kernels.retrieval.coco import DIRECTIONS, load_coco
from gcl_kernels.retrieval.covr import load_covr
from gcl_kernels.retrieval.datasets import DataError, RetrievalDataset
from gcl_kernels.retrieval.encode import Encoder
from gcl_kernels.retrieval.evaluation import evaluate
from gcl_kernels.retrieval.mbeir import Instructions, load_mbeir, mbeir_names
from gcl_kernels.retrieval.mmeb import load_mmeb, mmeb_subsets
from gcl_kernels.retrieval.report import report_tables, save_heat_map, save_json, save_runs

FUSIONS = {
    "encoder": (),
    "open_clip": ("sum_raw", "sum_unit"),
    "clip": ("sum_raw", "sum_unit"),
    "vista": ("joint", "sum"),
}
"""By the option that names the model, its default first."""


def parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("root", metavar="ROOT", help="folder of the data")
    model = shared.add_argument_group("model, one of")
    one = model.add_mutually_exclusive_group(required=True)
    one.add_argument("--encoder", metavar="MODULE:FUNCTION", help="any callable, see docs")
    one.add_argument("--open-clip", metavar="NAME", help="open_clip model, or path of its config")
    one.add_argument("--clip", metavar="DIR", help="transformers.CLIPModel and its processor")
    one.add_argument("--vista", metavar="DIR", help="VISTA: its weights and its text model's files")
    model.add_argument("--weights", metavar="FILE", help="of --open-clip")
    model.add_argument(
        "--fuse",
        choices=("sum_raw", "sum_unit", "joint", "sum"),
        help="image and text: sum_raw (default, CLIP-SF) or sum_unit with --open-clip and --clip, "
        "joint (default) or sum with --vista",
    )
    run = shared.add_argument_group("evaluation")
    run.add_argument("--k", type=int, nargs="+", default=[1, 5, 10, 20, 50])
    run.add_argument("--batch-size", type=int, default=64)
    run.add_argument("--workers", type=int, default=4, help="threads that load images")
    run.add_argument("--device", help="default: a GPU if there is one")
    run.add_argument("--half", action="store_true", help="embeddings in float16, at half the size")
    run.add_argument("--search", choices=("torch", "faiss"), default="torch")
    run.add_argument("--embeddings", metavar="DIR", help="keep embeddings, and go on from them")
    run.add_argument("--skip-missing", action="store_true", help="leave out and count, no error")
    run.add_argument("--quiet", action="store_true", help="no progress bars")
    out = shared.add_argument_group("output, besides the tables on standard output")
    out.add_argument("--output", metavar="FILE", help="figures as JSON")
    out.add_argument("--run", metavar="FILE", help="TREC run; of several data sets one each")
    out.add_argument("--heat-map", metavar="FILE", help="the nine tasks as an image")

    top = argparse.ArgumentParser(prog="python -m gcl_kernels.retrieval", description=__doc__)
    formats = top.add_subparsers(dest="format", required=True)
    mbeir = formats.add_parser("mbeir", parents=[shared])
    mbeir.add_argument("--pool", nargs="+", choices=("local", "union"), default=["local"])
    mbeir.add_argument("--datasets", nargs="+", metavar="NAME", help="default: all under ROOT")
    mbeir.add_argument("--split", default="test")
    mbeir.add_argument(
        "--instructions", type=_instructions, metavar="none|first|SEED", help="default: none"
    )
    mmeb = formats.add_parser("mmeb", parents=[shared])
    mmeb.add_argument("--datasets", nargs="+", metavar="SUBSET", help="default: all under ROOT")
    mmeb.add_argument("--split", default="test")
    mmeb.add_argument("--images", metavar="DIR", help="default: ROOT")
    covr = formats.add_parser("covr", parents=[shared])
    covr.add_argument("--csv", default="webvid8m-covr_test.csv", help="relative to ROOT")
    covr.add_argument("--frames", choices=("mean", "middle"), default="mean")
    coco = formats.add_parser("coco", parents=[shared])
    coco.add_argument(
        "--json", required=True, metavar="FILE", help="captions; ROOT holds the images"
    )
    coco.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=["t->i", "i->t"])
    return top


def _instructions(text: str) -> Instructions:
    if text in ("none", "first"):
        return None if text == "none" else "first"
    return int(text)


def datasets(options: argparse.Namespace) -> list[RetrievalDataset]:
    root, skip = options.root, options.skip_missing
    if options.format == "mbeir":
        return [
            load_mbeir(root, name, pool, options.instructions, options.split, skip)
            for pool in options.pool
            for name in options.datasets or mbeir_names(root, options.split)
        ]
    if options.format == "mmeb":
        return [
            load_mmeb(root, subset, options.split, options.images, skip)
            for subset in options.datasets or mmeb_subsets(root, options.split)
        ]
    if options.format == "covr":
        return [load_covr(root, options.csv, options.frames, skip)]
    return [load_coco(options.json, root, direction, skip) for direction in options.directions]


def check_fuse(options: argparse.Namespace) -> None:
    """Put the model's default where nothing was said.

    Raises:
        ValueError: a fusion that the model does not have.
    """
    model = next(name for name in FUSIONS if getattr(options, name))
    choices = FUSIONS[model]
    if options.fuse is None:
        options.fuse = choices[0] if choices else None
    elif options.fuse not in choices:
        expected = " or ".join(choices) or "none"
        option = model.replace("_", "-")
        raise ValueError(f"--fuse: expected {expected} with --{option}, got {options.fuse}")


def encoder(options: argparse.Namespace, device: torch.device) -> Encoder:
    if options.encoder:
        return checkpoints.named_encoder(options.encoder)
    if options.open_clip:
        return checkpoints.open_clip_encoder(
            options.open_clip, options.weights, options.fuse, device
        )
    if options.vista:
        return checkpoints.vista_encoder(options.vista, options.fuse, device)
    return checkpoints.clip_model_encoder(options.clip, options.fuse, device)


def main(arguments: Sequence[str] | None = None) -> None:
    top = parser()
    options = top.parse_args(arguments)
    try:
        check_fuse(options)
    except ValueError as error:
        top.error(str(error))
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        chosen = datasets(options)
        if not chosen:
            raise DataError(f"{options.root}: no data sets of {options.format}")
        results = evaluate(
            encoder(options, device),
            chosen,
            options.k,
            options.batch_size,
            device,
            not options.quiet,
            embeddings=options.embeddings,
            dtype=torch.float16 if options.half else torch.float32,
            workers=options.workers,
            search=options.search,
        )
    except (DataError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(report_tables(results))
    about = {name: value for name, value in vars(options).items() if value is not None}
    if options.output:
        save_json(results, options.output, arguments=about)
    if options.run:
        save_runs(results, options.run)
    if options.heat_map:
        save_heat_map(results, options.heat_map)


if __name__ == "__main__":
    main()
