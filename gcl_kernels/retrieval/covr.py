"""WebVid-CoVR (Ventura et al., 2024): an image and an edit find a clip.

{csv}           columns pth1, pth2 and edit
{pth}/          for each clip a folder of its frames, whose names are in order by their numbers
"""

from __future__ import annotations

import csv as csv_module
import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from gcl_kernels.retrieval.datasets import DataError, Items, RetrievalDataset
from gcl_kernels.retrieval.files import text_file
from gcl_kernels.retrieval.text import covr_edit

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def load_covr(
    root: str | os.PathLike[str],
    csv: str | os.PathLike[str] = "webvid8m-covr_test.csv",
    frames: Literal["mean", "middle"] = "mean",
    skip_missing: bool = False,
) -> RetrievalDataset:
    """The test set of WebVid-CoVR: R@1, 5, 10 and 50.

    A query is the middle frame (`n // 2` of n) of the clip `pth1` with the edit; its positive is
    the clip `pth2`, embedded frame by frame: unit frames, their mean, unit. The query's own clip is
    left out of its candidates. The public code pairs rows with targets by their order, which leaves
    out the wrong clips where the file is not sorted by `pth1`; here the order does not matter.

    Args:
        root: the folder of the clips.
        csv: path of the triplets, absolute or relative to `root`.
        frames: "mean", or "middle": a target is its middle frame alone.
        skip_missing: leave out rows whose clips are missing, and count them in `left_out`.

    Raises:
        DataError: a file, column, clip or frame is missing, a malformed row, or a row whose target
            is the query's own clip.
    """
    if frames not in ("mean", "middle"):
        raise ValueError(f"frames: expected 'mean' or 'middle', got {frames!r}")
    base = Path(os.path.abspath(root))
    path = base / csv
    queries = Items(str(path), skip_missing=skip_missing)
    candidates = Items(str(path), skip_missing=skip_missing)
    left_out: Counter[str] = Counter()
    qrels = {}
    own = {}
    for line, source, target, edit in _triplets(path):
        where = queries.place(line)
        if source == target:
            raise DataError(f"{where}: clip {source} is its own target")
        clips = [_frames(base / clip) for clip in (source, target)]
        for clip, found in zip((source, target), clips, strict=True):
            if not found and not skip_missing:
                raise DataError(f"{where}: no frames in {base / clip}")
        if not all(clips):
            left_out["rows"] += 1
            continue
        image = clips[0][len(clips[0]) // 2]
        shown = clips[1] if frames == "mean" else [clips[1][len(clips[1]) // 2]]
        if candidates.position(target) is None and not candidates.add(target, None, shown, line):
            left_out["rows"] += 1
        elif queries.add(qid := f"row{line}", covr_edit(edit), [image], line):
            qrels[qid] = {target: 1}
            own[qid] = source
    left_out += Counter({"queries": queries.left_out, "candidates": candidates.left_out})
    return RetrievalDataset(
        path.stem,
        "it->i",
        queries,
        candidates,
        qrels,
        exclude={qid: [clip] for qid, clip in own.items() if candidates.position(clip) is not None},
        cutoffs=(1, 5, 10, 50),
        main_cutoff=1,
        left_out=left_out,
    )


def _triplets(path: Path) -> Iterator[tuple[int, str, str, str]]:
    """Line, pth1, pth2 and edit of every row."""
    rows = csv_module.DictReader(io.StringIO(text_file(path), newline=""))
    missing = {"pth1", "pth2", "edit"} - {*(rows.fieldnames or ())}
    if missing:
        raise DataError(f"{path}:1: no column {', '.join(sorted(missing))}")
    for row in rows:
        source, target, edit = (row[column] for column in ("pth1", "pth2", "edit"))
        if None in row or not (source and target and edit):
            raise DataError(f"{path}:{rows.line_num}: expected one value a column, got {row}")
        yield rows.line_num, source.strip(), target.strip(), edit


def _frames(folder: Path) -> list[str]:
    """Paths of a clip's frames, in the order of the numbers in their names."""
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES)]
    except OSError:
        return []
    names.sort(key=lambda name: ([int(part) for part in re.findall(r"\d+", name)], name))
    return [os.path.join(folder, name) for name in names]
