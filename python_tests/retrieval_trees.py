"""Small trees in the formats of the benchmarks, with their edge cases, and what they hold.

A writer returns `Case`s: queries and candidates as they have to be encoded, written down beside
what the files say, so that a reader can be checked without another reader.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

Content = tuple[str | None, tuple[str, ...]]
"""A text, and paths of images (several: the frames of a clip)."""

DIM = 16


@dataclass
class Case:
    """One retrieval task: contents by id, positives, and what a query is searched in."""

    queries: dict[str, Content] = field(default_factory=dict)
    candidates: dict[str, Content] = field(default_factory=dict)
    positives: dict[str, set[str]] = field(default_factory=dict)
    within: dict[str, list[str]] = field(default_factory=dict)
    """Only of some queries: the others are searched in all."""


# An encoder whose embeddings are known without a model


def vector(seed: str) -> np.ndarray:
    """[DIM] float64, of any string."""
    digest = hashlib.sha256(seed.encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal(DIM)


def text_embedding(text: str) -> np.ndarray:
    """Every character counts a little, so that an untidied text is another one."""
    words = text.lower().strip('".?!').split()
    weights = [1.4 if word[0] == "c" and word[1:].isdigit() else 1 for word in words]
    return sum(w * vector(f"concept {word}") for w, word in zip(weights, words, strict=True)) + (
        0.5 * vector(text)
    )


def image_embedding(image: Image.Image) -> np.ndarray:
    """Of the picture of a concept (`write_image`): the concept's vector, and the drawing's."""
    concept, *drawing = image.getpixel((0, 0))
    return vector(f"concept c{concept}") + 2 * vector(f"drawing {concept} {drawing}")


def encode(items: list[dict[str, Any]]) -> torch.Tensor:
    """Raw sums of what is there, as CLIP-SF: an encoder for `evaluate` and the command line."""
    rows = []
    for item in items:
        assert item["image"] is None or item["image"].mode == "RGB"
        parts = [text_embedding(item["text"])] if item["text"] else []
        rows.append(sum(parts + ([image_embedding(item["image"])] if item["image"] else [])))
    return torch.tensor(np.stack(rows))


def unit_embedding(content: Content) -> np.ndarray:
    """What has to come out for an item, in float64."""
    text, images = content
    frames = []
    for path in images or (None,):
        parts = [text_embedding(text)] if text else []
        frames.append(sum(parts + ([image_embedding(Image.open(path))] if path else [])))
    units = [frame / np.linalg.norm(frame) for frame in frames]
    mean = np.mean(units, axis=0)
    return mean / np.linalg.norm(mean)


def write_image(path: Path, concept: int, drawing: int, series: int = 0) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (concept, drawing, series)).save(path, "PNG")
    return str(path)


# M-BEIR


MBEIR = {
    "mscoco_task0": (9, "text", "image"),
    "fashion200k_task0": (1, "text", "image"),
    "webqa_task1": (2, "text", "text"),
    "edis_task2": (3, "text", "image,text"),
    "mscoco_task3": (9, "image", "text"),
    "nights_task4": (4, "image", "image"),
    "oven_task6": (5, "image,text", "text"),
    "infoseek_task6": (6, "image,text", "text"),
    "cirr_task7": (8, "image,text", "image"),
    "oven_task8": (5, "image,text", "image,text"),
}
PROMPTS = ["find what this shows", "", "Which one is meant?", "look for it"]
TIDY_PROMPTS = ["Find what this shows.", "Which one is meant?", "Look for it."]


def untidy(text: str, number: int) -> str:
    """A text that M-BEIR's rule makes into this one (upper case first, a full stop at its end)."""
    return [
        text,
        text[:-1],
        text[0].lower() + text[1:],
        f' "{text[:-1]}"',
        text.replace(" ", "\r ", 1),
    ][number % 5]


def write_mbeir(root: Path, seed: int = 0, queries: int = 7) -> dict[tuple[str, str], Case]:
    """All kinds of task; by name and pool ("local", "union") what they hold.

    Positives in several forms, in another data set, and lines of relevance 0; modalities in both
    spellings; a pool (Fashion200K's) of fewer than ten candidates.
    """
    random_ = random.Random(seed)
    cases: dict[tuple[str, str], Case] = {}
    pools: dict[str, list[dict[str, Any]]] = {}
    union = Case()
    counters: dict[tuple[int, str], int] = {}

    def new_id(dataset: int, side: str) -> str:
        counters[dataset, side] = counters.get((dataset, side), 0) + 1
        return f"{dataset}:{counters[dataset, side]}"

    def content(name: str, modality: str, concept: int, drawing: int) -> tuple[Content, dict]:
        words = ["seen", "drawn", "old", "bright", "small"]
        dataset = MBEIR[name][0]
        text = f"C{concept} {words[drawing % 5]} by {drawing} of {dataset}."
        has_text, has_image = "text" in modality, "image" in modality
        relative = f"mbeir_images/{name}/{concept}_{drawing}.png"
        if has_image:
            write_image(root / relative, concept, drawing, dataset)
        tidied = (text if has_text else None, (str(root / relative),) if has_image else ())
        raw = {
            "txt": untidy(text, concept + drawing) if has_text else None,
            "img_path": relative if has_image else None,
        }
        return tidied, raw

    records: dict[str, list[dict[str, Any]]] = {}
    for name, (dataset, query_modality, candidate_modality) in MBEIR.items():
        case = cases[name, "local"] = Case()
        pools[name], records[name] = [], []
        for concept in range(queries):
            for drawing in range(1 if name.startswith("fashion") else 3):
                did = new_id(dataset, "candidate")
                tidied, raw = content(name, candidate_modality, concept, drawing)
                case.candidates[did] = union.candidates[did] = tidied
                spelled = ",".join(sorted(candidate_modality.split(","), reverse=concept % 2 == 1))
                pools[name].append({"did": did, **raw, "modality": spelled, "src_content": None})
        by_concept = {
            concept: [did for did in case.candidates][concept * len(case.candidates) // queries :][
                : len(case.candidates) // queries
            ]
            for concept in range(queries)
        }
        for concept in range(queries):
            qid = new_id(dataset, "query")
            tidied, raw = content(name, query_modality, concept, 10 + concept)
            case.queries[qid] = tidied
            chosen = random_.sample(by_concept[concept], 1 + concept % len(by_concept[concept]))
            case.positives[qid] = set(chosen)
            as_object = concept % 2 == 0
            records[name].append(
                {
                    "qid": qid,
                    "query_txt": raw["txt"],
                    "query_img_path": raw["img_path"],
                    "query_modality": ",".join(
                        sorted(query_modality.split(","), reverse=concept % 3 == 1)
                    ),
                    "query_src_content": None,
                    "pos_cand_list": [{"did": d} for d in chosen] if as_object else chosen,
                    "neg_cand_list": [],
                    **({"task_id": int(name[-1])} if concept % 2 else {}),
                }
            )

    # OVEN and INFOSEEK ask for each other's candidates.
    elsewhere = {}
    for qid, did in zip(
        list(cases["oven_task6", "local"].queries)[:3],
        list(cases["infoseek_task6", "local"].candidates)[::4],
        strict=False,
    ):
        elsewhere[qid] = did
        record = next(r for r in records["oven_task6"] if r["qid"] == qid)
        form = {"did": did} if isinstance(record["pos_cand_list"][0], dict) else did
        record["pos_cand_list"].insert(0, form)

    for name in MBEIR:
        local = cases[name, "local"]
        cases[name, "union"] = Case(
            local.queries,
            union.candidates,
            {
                qid: dids | ({elsewhere[qid]} if qid in elsewhere else set())
                for qid, dids in local.positives.items()
            },
        )
        of_split = "_test" if name.startswith("mscoco") else ""
        _json_lines(
            root / "cand_pool" / "local" / f"mbeir_{name}{of_split}_cand_pool.jsonl", pools[name]
        )
        _json_lines(root / "query" / "test" / f"mbeir_{name}_test.jsonl", records[name])
        lines = []
        for number, (qid, dids) in enumerate(cases[name, "union"].positives.items()):
            wrong = next(did for did in local.candidates if did not in dids)
            lines.append(f"{qid} 0 {wrong} 0 {name[-1]}")
            space = "\t" if number % 2 else " "
            lines += [space.join((qid, "0", did, "1", name[-1])) for did in sorted(dids)]
        path = root / "qrels" / "test" / f"mbeir_{name}_test_qrels.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    _json_lines(
        root / "cand_pool" / "global" / "mbeir_union_test_cand_pool.jsonl",
        [record for records_ in pools.values() for record in records_],
    )
    table = [
        "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3\tprompt_4"
    ]
    table += [
        "\t".join((query, candidate, name.split("_")[0], str(dataset), *PROMPTS))
        for name, (dataset, query, candidate) in MBEIR.items()
    ]
    path = root / "instructions" / "query_instructions.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(table) + "\n")
    return cases


def _json_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


# MMEB


def write_mmeb(root: Path) -> dict[str, Case]:
    """By subset: text targets with the gold twice, image targets under one text, a later copy."""
    import pyarrow
    import pyarrow.parquet

    def image(concept: int, drawing: int) -> str:
        write_image(root / "images" / f"{concept}_{drawing}.png", concept, drawing)
        return f"images/{concept}_{drawing}.png"

    def save(subset: str, rows: list[dict[str, Any]]) -> None:
        path = root / subset / "test" / "0000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    def answer(concept: int) -> str:
        return f"c{concept} of {concept % 3} kinds"

    cases = {name: Case() for name in ("Answers", "Pictures", "Pairs")}

    def add(subset: str, query: Content, gold: Content, others: list[Content]) -> None:
        case = cases[subset]
        known = {content: did for did, content in case.candidates.items()}
        for content in (gold, *others):
            known.setdefault(content, f"c{len(known)}")
        case.candidates.update({did: content for content, did in known.items()})
        qid = f"q{len(case.queries) + 1}"
        case.queries[qid] = query
        case.positives[qid] = {known[gold]}
        case.within[qid] = list(dict.fromkeys(known[content] for content in (gold, *others)))

    rows = []
    for concept in range(8):
        asked = image(concept, 1)
        others = [answer((concept + step) % 8) for step in range(1, 5)]
        targets = [answer(concept), *others[:2], answer(concept), *others[2:]]  # the gold twice
        if concept == 7:
            targets = [answer(concept)] * 2  # and alone
        rows.append(
            {
                "qry_text": "<|image_1|>\nWhat is  shown?",
                "qry_img_path": asked,
                "tgt_text": targets,
                "tgt_img_path": [""] * len(targets),
            }
        )
        add(
            "Answers",
            ("What is shown?", (str(root / asked),)),
            (answer(concept), ()),
            [(text, ()) for text in targets[1:] if text != answer(concept)],
        )
    save("Answers", rows)

    rows = []
    for concept in range(6):
        targets = [image((concept + step) % 6, 2) for step in range(4)]
        rows.append(
            {
                "qry_text": f"the c{concept}",
                "qry_img_path": "",
                "tgt_text": [""],
                "tgt_img_path": targets,
            }
        )
        contents: list[Content] = [(None, (str(root / path),)) for path in targets]
        add("Pictures", (f"the c{concept}", ()), contents[0], contents[1:])
    save("Pictures", rows)

    rows = []
    for concept in range(6):
        targets = [image((concept + step) % 6, 3) for step in range(3)]
        rows.append(
            {
                "qry_inst": "Find it: <|image_1|>",
                "qry_text": f"c{concept}",
                "qry_img_path": image(concept, 4),
                "tgt_inst": "<|image_1|> Shown:",
                "tgt_text": "any",  # a scalar for all
                "tgt_img_path": targets,
            }
        )
        contents = [("Shown: any", (str(root / path),)) for path in targets]
        query: Content = (f"Find it: c{concept}", (str(root / image(concept, 4)),))
        add("Pairs", query, contents[0], contents[1:])
    save("Pairs", rows)
    return cases


# WebVid-CoVR


COVR_CSV = "webvid8m-covr_test.csv"


def write_covr(root: Path, shuffle: int | None = None, name: str = COVR_CSV) -> Case:
    """Clips of 1 to 12 frames; the same case in whatever order the rows are."""
    rows = []
    case = Case()
    clips: dict[str, tuple[str, ...]] = {}
    for concept in range(9):
        clip = f"{concept:03d}/{1000 - concept}"
        # Of twelve frames frame_10 comes after frame_9.
        clips[clip] = tuple(
            write_image(root / clip / f"frame_{number}.png", concept, number)
            for number in range(1, 2 + concept if concept != 8 else 13)
        )
    folders = list(clips)
    for concept in range(9):
        source, target = folders[concept], folders[(concept * 2 + 1) % 9]
        if source == target:  # a clip is never its own answer
            target = folders[(concept + 3) % 9]
        rows.append((source, target, f'Make it: "c{(concept * 2 + 1) % 9}" (Now!)', concept))
    if shuffle is not None:
        random.Random(shuffle).shuffle(rows)
    with open(root / name, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["idx", "pth1", "pth2", "edit", "scores"])
        writer.writerows([(row[3], *row[:3], "[0.5, 0.5]") for row in rows])
    for line, (source, target, _, concept) in enumerate(rows, 2):
        frames = clips[source]
        middle = frames[len(frames) // 2]
        case.queries[f"row{line}"] = (f"make it c{(concept * 2 + 1) % 9} now", (middle,))
        case.positives[f"row{line}"] = {target}
        case.candidates[target] = (None, clips[target])
    for line, (source, *_) in enumerate(rows, 2):
        case.within[f"row{line}"] = [clip for clip in case.candidates if clip != source]
    return case


# COCO


def write_coco(root: Path, official: bool = False) -> dict[str, Case]:
    """By direction: images with six captions, one, and none."""
    captions = {
        concept: [f"c{concept} shown {number} times" for number in range((6, 1, 2, 0)[concept % 4])]
        for concept in range(8)
    }
    names = {concept: f"val/image {concept}.png" for concept in captions}
    for concept, name in names.items():
        write_image(root / name, concept, 5)
    if official:
        content: Any = {
            "images": [{"id": 100 + c, "file_name": name} for c, name in names.items()],
            "annotations": [
                {"id": 9 * c + n, "image_id": 100 + c, "caption": text}
                for c, texts in captions.items()
                for n, text in enumerate(texts)
            ],
        }
    else:
        content = [
            {
                "image": names[c],
                **({"caption": texts[0] if len(texts) == 1 else texts} if texts else {}),
            }
            for c, texts in captions.items()
        ]
    (root / "captions.json").write_text(json.dumps(content))
    cases = {direction: Case() for direction in ("t->i", "i->t", "t->t", "t->it", "it->t")}
    for concept, texts in captions.items():
        image_id, path = f"val/image%20{concept}.png", (str(root / names[concept]),)
        ids = {f"{image_id}#{n}": text for n, text in enumerate(texts[:5])}
        cases["t->i"].candidates[image_id] = (None, path)
        cases["t->it"].candidates[image_id] = (texts[0] if texts else None, path)
        for direction in ("i->t", "t->t", "it->t"):
            cases[direction].candidates.update({id: (text, ()) for id, text in ids.items()})
        for id, text in ids.items():
            for direction, asked in (("t->i", True), ("t->it", not id.endswith("#0"))):
                if asked:
                    cases[direction].queries[id] = (text, ())
                    cases[direction].positives[id] = {image_id}
            if len(ids) > 1:
                cases["t->t"].queries[id] = (text, ())
                cases["t->t"].positives[id] = {*ids} - {id}
        if texts:
            cases["i->t"].queries[image_id] = (None, path)
            cases["i->t"].positives[image_id] = {*ids}
        if len(ids) > 1:
            cases["it->t"].queries[image_id] = (texts[0], path)
            cases["it->t"].positives[image_id] = {*ids} - {f"{image_id}#0"}
    for direction, left_out in (("t->t", "{}"), ("it->t", "{}#0")):
        case = cases[direction]
        for qid in case.queries:
            case.within[qid] = [d for d in case.candidates if d != left_out.format(qid)]
    return cases


def tree(kind: str, root: Path) -> Any:
    """The writer of a format, by the command line's word for it."""
    root.mkdir(parents=True, exist_ok=True)
    writers = {"mbeir": write_mbeir, "mmeb": write_mmeb, "covr": write_covr, "coco": write_coco}
    return writers[kind](root)


if __name__ == "__main__":  # for the docs: python python_tests/retrieval_trees.py mbeir FOLDER
    import sys

    tree(sys.argv[1], Path(os.path.abspath(sys.argv[2])))
