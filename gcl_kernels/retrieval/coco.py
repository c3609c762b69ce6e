"""COCO and Flickr30K: images and their captions, from Karpathy's or the official JSON.

[{"image": path, "caption": text or [text, ...]}, ...]
{"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gcl_kernels.retrieval.datasets import DataError, Items, RetrievalDataset
from gcl_kernels.retrieval.files import json_file

CAPTIONS = 5
DIRECTIONS = ("t->i", "i->t", "t->t", "t->it", "it->t")


def load_coco(
    json: str | os.PathLike[str],
    images: str | os.PathLike[str],
    direction: str = "t->i",
    skip_missing: bool = False,
) -> RetrievalDataset:
    """Image-caption retrieval, the first five captions of an image; R@1, 5 and 10.

    An image without captions is a distractor. Directions, with "t" a caption:

    - "t->i", "i->t": the benchmark's two;
    - "t->t": another caption of the same image; the query itself is left out of its candidates;
    - "t->it": candidates are images with their first caption, queries the other captions;
    - "it->t": queries are images with their first caption, which is left out of the candidates.

    "i->i" and its like have no answer but the query's own image.

    Args:
        json: path of either form.
        images: the folder that paths in it are relative to.
        skip_missing: leave out missing images and their captions, and count them in `left_out`.

    Raises:
        DataError: a file or image is missing, a malformed entry, or a caption of an unknown image.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
    path = Path(os.path.abspath(json))
    query_side, candidate_side = direction.split("->")
    queries, candidates = (Items(str(path), "entry", skip_missing) for _ in range(2))
    qrels: dict[str, dict[str, int]] = {}
    exclude: dict[str, list[str]] = {}
    for line, name, captions in _entries(path):
        id = "".join("%20" if letter.isspace() else letter for letter in name)
        texts = [(f"{id}#{number}", text) for number, text in enumerate(captions[:CAPTIONS])]
        first = texts[0][1] if texts else None
        file = [os.path.join(os.path.abspath(images), name)]
        forms: dict[str, list[tuple[str, str | None, list[str]]]] = {
            "t": [(caption_id, text, []) for caption_id, text in texts],
            "i": [(id, None, file)],
            "it": [(id, first, file)],
        }
        asked = forms[query_side] if texts else []
        if direction == "t->it":
            asked = asked[1:]  # the first is in the candidate
        elif candidate_side == "t" and query_side != "i" and len(texts) < 2:
            asked = []  # no other caption to find
        sides = [
            (query_side, queries, asked),
            (candidate_side, candidates, forms[candidate_side]),
        ]
        added: dict[Items, list[str]] = {queries: [], candidates: []}
        # The side that has the image first: without it the captions are left out too.
        for _, items, entries in sorted(sides, key=lambda side: side[0] == "t"):
            added[items] = [entry[0] for entry in entries if items.add(*entry, line)]
            if entries and not added[items]:
                break
        for qid in added[queries]:
            own = {"t->t": qid, "it->t": f"{id}#0"}.get(direction)
            qrels[qid] = {did: 1 for did in added[candidates] if did != own}
            if own:
                exclude[qid] = [own]
    return RetrievalDataset(
        f"{path.stem}_{direction.replace('->', '2')}",
        direction,
        queries,
        candidates,
        qrels,
        exclude=exclude,
        cutoffs=(1, 5, 10),
        main_cutoff=1,
        left_out={"images": queries.left_out + candidates.left_out},
    )


def _entries(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Number, image path and captions of every image, from either form."""
    content = json_file(path)
    if isinstance(content, dict):
        content = _official(path, content)
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list, or an object with images and annotations")
    for line, entry in enumerate(content, 1):
        image = entry.get("image") if isinstance(entry, dict) else None
        captions = (entry.get("caption") or []) if isinstance(entry, dict) else None
        captions = [captions] if isinstance(captions, str) else captions
        if (
            not image
            or not isinstance(image, str)
            or not isinstance(captions, list)
            or not all(isinstance(caption, str) and caption.strip() for caption in captions)
        ):
            raise DataError(
                f"{path}, entry {line}: expected an image's path and captions, got {entry!r}"
            )
        yield line, image, [caption.strip() for caption in captions]


def _official(path: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """The official form as Karpathy's."""
    try:
        entries = {
            image["id"]: {"image": image["file_name"], "caption": []} for image in content["images"]
        }
        for number, annotation in enumerate(content["annotations"], 1):
            if annotation["image_id"] not in entries:
                raise DataError(
                    f"{path}, annotation {number}: unknown image {annotation['image_id']!r}"
                )
            entries[annotation["image_id"]]["caption"].append(annotation["caption"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: expected images and annotations: {error!r}") from None
    return [*entries.values()]
