"""What an evaluation says: tables, JSON, a run file for trec_eval, a heat map."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gcl_kernels
from gcl_kernels.retrieval.datasets import MODALITIES
from gcl_kernels.retrieval.evaluation import Result


def report_tables(results: Sequence[Result]) -> str:
    """Markdown: the nine tasks for each pool, and a row for each data set. Figures in %."""
    parts = []
    for pool in _pools(results):
        parts.append(task_table([result for result in results if result.pool == pool], pool))
    parts.append(dataset_table(results))
    notes = [
        f"- {_title(result)}: left out {', '.join(f'{n} {what}' for what, n in counts)}"
        for result in results
        if (counts := [(what, n) for what, n in result.left_out.items() if n])
    ]
    return "\n\n".join(parts + (["\n".join(notes)] if notes else [])) + "\n"


def task_table(results: Sequence[Result], title: str = "") -> str:
    """The 3 x 3 table: rows are the query's modalities, columns the candidate's.

    A cell is the mean over its data sets of the figure that each benchmark reports.
    """
    cells = task_means(results)
    kinds = sorted(
        {result.main for result in results}, key=lambda main: int(main.partition("@")[2])
    )
    corner = " ".join(filter(None, (title, "/".join(kinds))))
    rows = [
        [f"{query} \u2192", *[_percent(cells.get(f"{query}->{c}")) for c in MODALITIES]]
        for query in MODALITIES
    ]
    return markdown_table([corner, *MODALITIES], rows)


def task_means(results: Iterable[Result]) -> dict[str, float]:
    """For each task that there is the mean of its data sets' main figures, from 0 to 1."""
    figures: dict[str, list[float]] = {}
    for result in results:
        figures.setdefault(result.task, []).append(result[result.main])
    return {task: sum(values) / len(values) for task, values in figures.items()}


def dataset_table(results: Sequence[Result]) -> str:
    """A row for each data set and, for each pool of several, the mean of the main figures."""
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    names.sort(key=lambda name: (name.partition("@")[0], int(name.partition("@")[2] or 0)))
    rows = [
        [
            *(_title(result), result.task, str(result.queries), str(result.candidates)),
            f"{result.main} {_percent(result[result.main])}",
            *(_percent(result.metrics.get(name)) for name in names),
        ]
        for result in results
    ]
    for pool in _pools(results):
        mains = [result[result.main] for result in results if result.pool == pool]
        if len(mains) > 1:
            title = f"mean ({pool})" if pool else "mean"
            rows.append([title, "", "", "", _percent(sum(mains) / len(mains))])
    header = ["data set", "task", "queries", "candidates", "reported", *names]
    return markdown_table(header, [row + [""] * (len(header) - len(row)) for row in rows])


def save_json(results: Sequence[Result], path: str | os.PathLike[str], **about: Any) -> None:
    """Figures from 0 to 1, and `about` what made them."""
    fields = ("name", "pool", "task", "queries", "candidates", "main")
    content = {
        "gcl_kernels": gcl_kernels.__version__,
        **about,
        "results": [
            {
                **{field: getattr(result, field) for field in fields},
                "metrics": dict(result.metrics),
                "left_out": dict(result.left_out),
            }
            for result in results
        ],
    }
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_runs(results: Sequence[Result], path: str | os.PathLike[str]) -> list[Path]:
    """Run files, and beside each one its `.qrels`: `trec_eval -m success.5 x.qrels x.trec`.

    Args:
        path: such as "x.trec"; of several results each file has its result's name in it,
            "x.cirr_task7.local.trec".

    Returns:
        Paths of the run files.
    """
    written = []
    for result in results:
        run = Path(path)
        if len(results) > 1:
            names = ".".join(filter(None, (result.name, result.pool))).replace(os.sep, "-")
            run = run.with_name(f"{run.stem}.{names}{run.suffix}")
        with open(run, "w", encoding="utf-8") as file:
            for qid, scores in result.run.items():
                for rank, (did, score) in enumerate(scores.items(), 1):
                    file.write(f"{qid} Q0 {did} {rank} {score:.0f} gcl_kernels\n")
        with open(run.with_suffix(".qrels"), "w", encoding="utf-8") as file:
            for qid, dids in result.qrels.items():
                file.writelines(f"{qid} 0 {did} {rel}\n" for did, rel in dids.items())
        written.append(run)
    return written


def save_heat_map(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """The 3 x 3 table of each pool as an image.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a heat map needs matplotlib: pip install matplotlib") from error
    pools = _pools(results)
    figure = Figure(figsize=(4 * len(pools), 3.6), layout="constrained")
    for number, pool in enumerate(pools):
        axes = figure.add_subplot(1, len(pools), number + 1)
        cells = task_means(result for result in results if result.pool == pool)
        values = [
            [100 * cells.get(f"{q}->{c}", float("nan")) for c in MODALITIES] for q in MODALITIES
        ]
        axes.imshow(values, cmap="Greens", vmin=0, vmax=100)
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if value == value:
                    color = "white" if value > 60 else "black"
                    axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=color)
        axes.set_xticks(range(3), MODALITIES)
        axes.set_yticks(range(3), MODALITIES)
        axes.set(xlabel="candidate", ylabel="query", title=f"{pool or 'tasks'}, %")
    figure.savefig(path)


def _pools(results: Iterable[Result]) -> list[str]:
    return list(dict.fromkeys(result.pool for result in results))


def _title(result: Result) -> str:
    return f"{result.name} ({result.pool})" if result.pool else result.name


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up as plain text too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (header, *rows)
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
