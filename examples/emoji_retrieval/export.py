"""Held-out concepts as trees of M-BEIR's and MMEB's formats, which `gcl_kernels.retrieval` reads.

A query and its candidates never share a drawing style or a text: a query *side* has one style and
one text, its candidates the other style and the other text. So no query is among its candidates,
and i->i asks for the other artist's drawing, t->t for the other text, and so on. There is a tree
for each of the four sides, and a data set for each of the nine tasks in it.

    images/{style}/{key}.png                 shared by all sides
    mbeir/{style}-{text}/query, cand_pool, qrels
    mmeb/task{n}/test/0000.parquet           of the first side
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gcl_kernels.retrieval.datasets import MODALITIES
from gcl_kernels.retrieval.mbeir import TASKS

from .data import STYLES, TEXTS, EmojiData, full_text

SPELLED = {"i": "image", "t": "text", "it": "image,text"}
SIDES = tuple(product(STYLES, TEXTS))

Side = tuple[str, str]


def other_side(side: Side) -> Side:
    """The style and the text of the candidates."""
    style, text = side
    return STYLES[1 - STYLES.index(style)], TEXTS[1 - TEXTS.index(text)]


def content(data: EmojiData, index: int, side: Side, modality: str) -> tuple[str, str]:
    """Text, and image relative to the folder of all trees; "" where the modality has none."""
    style, text = side
    concept = data.concepts[index]
    return (
        full_text(concept, text) if "t" in modality else "",
        f"images/{style}/{concept.key}.png" if "i" in modality else "",
    )


def candidate_id(number: int, modality: str) -> str:
    """Of concept `number` in one of its three forms."""
    return f"1:{3 * number + MODALITIES.index(modality)}"


def drawing(data: EmojiData, index: int, style: int) -> Image.Image:
    pixels = (255 * data.images[int(index), style]).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())


def export(data: EmojiData, indices: np.ndarray, root: Path) -> None:
    """Write the concepts as trees under `root`."""
    for number, style in enumerate(STYLES):
        folder = root / "images" / style
        folder.mkdir(parents=True, exist_ok=True)
        for index in indices:
            path = folder / f"{data.concepts[index].key}.png"
            drawing(data, index, number).save(path)
    for side in SIDES:
        _export_mbeir(data, indices, side, root / "mbeir" / "-".join(side))
    _export_mmeb(data, indices, SIDES[0], root / "mmeb")


def _export_mbeir(data: EmojiData, indices: np.ndarray, side: Side, tree: Path) -> None:
    pools = {
        modality: [
            _mbeir_item(
                {"did": candidate_id(number, modality)},
                ("txt", "img_path", "modality"),
                content(data, index, other_side(side), modality),
                modality,
            )
            for number, index in enumerate(indices)
        ]
        for modality in MODALITIES
    }
    union = [item for pool in pools.values() for item in pool]
    _write_lines(tree / "cand_pool" / "global" / "mbeir_union_test_cand_pool.jsonl", union)
    for task, (query, candidate) in {n: t.split("->") for n, t in TASKS.items()}.items():
        name = f"mbeir_emoji_task{task}"
        _write_lines(tree / "cand_pool" / "local" / f"{name}_cand_pool.jsonl", pools[candidate])
        queries = [
            _mbeir_item(
                {"qid": f"1:{number}", "pos_cand_list": [candidate_id(number, candidate)]},
                ("query_txt", "query_img_path", "query_modality"),
                content(data, index, side, query),
                query,
            )
            for number, index in enumerate(indices)
        ]
        _write_lines(tree / "query" / "test" / f"{name}_test.jsonl", queries)
        qrels = tree / "qrels" / "test" / f"{name}_test_qrels.txt"
        qrels.parent.mkdir(parents=True, exist_ok=True)
        qrels.write_text(
            "".join(f"{q['qid']} 0 {q['pos_cand_list'][0]} 1 {task}\n" for q in queries)
        )


def _mbeir_item(
    item: dict[str, Any], columns: Sequence[str], parts: tuple[str, str], modality: str
) -> dict[str, Any]:
    text, image = parts
    path = f"../../{image}" if image else None
    return {**item, **dict(zip(columns, (text or None, path, SPELLED[modality]), strict=True))}


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(r)}\n" for r in records), encoding="utf-8")


def _export_mmeb(data: EmojiData, indices: np.ndarray, side: Side, root: Path) -> None:
    """A row's candidates are all of its modality, its own first. Images are relative to `root`."""
    import pyarrow
    import pyarrow.parquet

    def columns(side: Side, modality: str) -> list[list[str]]:
        parts = [content(data, index, side, modality) for index in indices]
        return [[text for text, _ in parts], [f"../{image}" if image else "" for _, image in parts]]

    for task, (query, candidate) in {n: t.split("->") for n, t in TASKS.items()}.items():
        texts, images = columns(side, query)
        targets = columns(other_side(side), candidate)
        own_first = [
            [[values[n], *values[:n], *values[n + 1 :]] for n in range(len(values))]
            for values in targets
        ]
        path = root / f"task{task}" / "test" / "0000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {"qry_text": texts, "qry_img_path": images, "tgt_text": own_first[0],
                 "tgt_img_path": own_first[1]}  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.table(table), path)
