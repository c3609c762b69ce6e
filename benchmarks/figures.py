"""Pictures of a record of ``make bench``: time a sample and memory over N, both axes logarithmic.

    python -m benchmarks.figures benchmarks/results/NAME.json [FOLDER]

writes ``bench_NAME.svg``, every loss and memory, and ``bench_NAME_overview.svg``, the loss that the
README begins with and memory. A picture has a ground of its own and is drawn for a light and for a
dark page.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median

from benchmarks.peers import JAX, NUM_VIEWS, OURS, OWN, product_flops
from benchmarks.record import RESULTS

IMAGES = RESULTS.parent.parent / "docs" / "images"

FASTEST = "fastest of all others"
FLOOR = "the products by torch.mm"

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Style:
    color: str
    mark: str = "circle"
    width: float = 1.8
    dash: str = ""


STYLES = {
    FASTEST: Style("#9aa0a6", "none", 7),
    FLOOR: Style("#80868b", "none", 1.5, "5 4"),
    "dense eager": Style("#3b82c4", "square"),
    "dense torch.compile": Style("#2f9e77", "triangle"),
    "chunked checkpoint": Style("#b07d2b", "diamond"),
    "chunks, gradient in forward": Style("#7d8f2f", "square"),
    "open_clip ClipLoss": Style("#a06cc9", "diamond"),
    JAX: Style("#14a3b8", "cross"),
    OURS: Style("#d6336c", "circle", 3),
}
"""What is drawn, and in which order: later ones lie on top."""

TITLES = {
    "gcl": "gcl_loss, three views given",
    "fused": "gcl_loss, fused by addition",
    "clip": "clip_loss",
    "nt_xent": "nt_xent_loss",
}

WIDTH, HEIGHT = 460, 338
LEFT, TOP, RIGHT, BOTTOM = 62, 40, 16, 52
COLUMNS, LEGEND_COLUMNS = 2, 3
LEGEND_ROW, CAPTION_ROW = 22, 17

LIGHT = {"ground": "#ffffff", "ink": "#24292f", "faint": "#57606a", "grid": "#e3e6ea"}
DARK = {"ground": "#161b22", "ink": "#e6edf3", "faint": "#9da7b1", "grid": "#30363d"}


def css(colors: dict[str, str]) -> str:
    return (
        f".ground {{ fill: {colors['ground']} }} .ink {{ fill: {colors['ink']} }} "
        f".faint {{ fill: {colors['faint']} }} .grid {{ stroke: {colors['grid']} }}"
    )


@dataclass(frozen=True)
class Panel:
    title: str
    dim: int
    series: dict[str, Points]

    def range(self, axis: int) -> tuple[float, float]:
        values = [point[axis] for points in self.series.values() for point in points]
        return min(values), max(values)


def times_of(row: dict) -> dict[str, float]:
    """The peers' times over ours; in records from before there were many, beside other entries."""
    return row.get("times") or {peer: row[peer] for peer in STYLES if peer in row}


def of_one_dimension(rows: Sequence[dict]) -> list[dict]:
    """Those of the D that has most sizes, of two such the one with the largest."""
    sizes = defaultdict(list)
    for row in rows:
        sizes[row["d"]].append(row["n"])
    if not sizes:
        return []
    dim = max(sizes, key=lambda d: (len(set(sizes[d])), max(sizes[d])))
    return sorted((row for row in rows if row["d"] == dim), key=lambda row: row["n"])


def speed_panel(task: str, rows: Sequence[dict]) -> Panel | None:
    """Microseconds a sample of a loss in float32; None where the record has no two sizes of it.

    A sample's, since a batch's grow a thousandfold from the smallest to the largest: between such
    lines a factor of two is hard to see.
    """
    rows = [r for r in rows if r["task"] == task and r.get("dtype", "float32") == "float32"]
    # A machine's rate is that of all its large products: operations a microsecond.
    rates = [
        product_flops(task, row["n"], row["d"]) / (row["efficiency"] * row["milliseconds"] * 1e3)
        for row in rows
        if "efficiency" in row
    ]
    rows = of_one_dimension(rows)
    if len(rows) < 2:
        return None
    series: dict[str, Points] = defaultdict(list)
    for row in rows:
        n, ours = row["n"], row["milliseconds"] * 1e3 / row["n"]
        series[OURS].append((n, ours))
        times = {peer: time for peer, time in times_of(row).items() if peer not in OWN}
        series[FASTEST].append((n, ours * min(times.values())))
        for peer, time in times.items():
            if peer in STYLES:
                series[peer].append((n, ours * time))
        if rates:
            series[FLOOR].append((n, product_flops(task, n, row["d"]) / median(rates) / n))
    return Panel(f"{TITLES[task]}: µs a sample", rows[0]["d"], dict(series))


def memory_panel(rows: Sequence[dict]) -> Panel | None:
    """Megabytes of ``gcl_loss``; None where the record has none."""
    rows = of_one_dimension(rows)
    if len(rows) < 2:
        return None
    series: dict[str, Points] = defaultdict(list)
    for row in rows:
        series[row["peer"]].append((row["n"], row["megabytes"]))
    return Panel("gcl_loss, three views given: MB", rows[0]["d"], dict(series))


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten, or where that is too many the powers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [f * 10.0**p for p in powers for f in (1, 2, 5) if low <= f * 10.0**p <= high]
    return found if len(found) <= 6 else [10.0**p for p in powers if low <= 10.0**p <= high]


def mark(kind: str, x: float, y: float, color: str) -> str:
    shapes = {
        "circle": "M{x:.1f},{y:.1f} m-4,0 a4,4 0 1,0 8,0 a4,4 0 1,0 -8,0",
        "square": "M{x:.1f},{y:.1f} m-3.5,-3.5 h7 v7 h-7 z",
        "triangle": "M{x:.1f},{y:.1f} m0,-4.5 l4.5,8 h-9 z",
        "diamond": "M{x:.1f},{y:.1f} m0,-5 l5,5 l-5,5 l-5,-5 z",
        "cross": "M{x:.1f},{y:.1f} m-4,-4 l8,8 m0,-8 l-8,8",
    }
    if kind == "none":
        return ""
    path = shapes[kind].format(x=x, y=y)
    return f'<path d="{path}" fill="{color}" stroke="{color}" stroke-width="1.5"/>'


def line(points: Points, style: Style) -> Iterator[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = f' stroke-dasharray="{style.dash}"' if style.dash else ""
    see_through = ' stroke-opacity="0.45"' if style.width > 5 else ""
    yield (
        f'<polyline points="{path}" fill="none" stroke="{style.color}" '
        f'stroke-width="{style.width}" stroke-linecap="round" stroke-linejoin="round"'
        f"{dash}{see_through}/>"
    )
    for x, y in points:
        yield mark(style.mark, x, y, style.color)


def text(x: float, y: float, words: str, kind: str = "ink", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def panel_lines(panel: Panel, left: float, top: float) -> Iterator[str]:
    (n_low, n_high), (low, high) = panel.range(0), panel.range(1)
    low, high = low / 1.3, high * 1.3
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    inset = 14

    def place(n: float, value: float) -> tuple[float, float]:
        along = math.log(n / n_low) / math.log(n_high / n_low)
        up = math.log(value / low) / math.log(high / low)
        return (
            left + LEFT + inset + along * (width - 2 * inset),
            top + TOP + (1 - up) * height,
        )

    yield text(left + LEFT, top + 24, escape(panel.title), "ink title")
    right, floor = left + WIDTH - RIGHT, top + HEIGHT - BOTTOM
    for value in ticks(low, high):
        y = place(n_low, value)[1]
        yield f'<path d="M{left + LEFT},{y:.1f} H{right}" class="grid"/>'
        yield text(left + LEFT - 8, y + 4.5, f"{value:g}", "faint", "end")
    for n in sorted({n for points in panel.series.values() for n, _ in points}):
        x = place(n, low)[0]
        yield f'<path d="M{x:.1f},{floor} v5" class="grid"/>'
        yield text(x, floor + 20, f"{n:g}", "faint", "middle")
    yield f'<path d="M{left + LEFT},{floor} H{right}" class="grid"/>'
    below = f"N, samples in the batch; D = {panel.dim}"
    yield text((left + LEFT + right) / 2, floor + 38, below, "faint", "middle")
    for name, style in STYLES.items():
        if name in panel.series:
            yield from line([place(*point) for point in panel.series[name]], style)


def legend_lines(names: Sequence[str], top: float) -> Iterator[str]:
    for index, name in enumerate(names):
        x = LEFT + index % LEGEND_COLUMNS * (COLUMNS * WIDTH - LEFT) / LEGEND_COLUMNS
        y = top + index // LEGEND_COLUMNS * LEGEND_ROW
        yield from line([(x, y), (x + 36, y)], STYLES[name])
        yield text(x + 46, y + 4.5, escape(name))


def svg(panels: Sequence[Panel], caption: Sequence[str]) -> str:
    """All panels, two in a row, with one legend and what was measured where."""
    rows = math.ceil(len(panels) / COLUMNS)
    names = [name for name in reversed(STYLES) if any(name in p.series for p in panels)]
    legend_top = rows * HEIGHT + 16
    caption_top = legend_top + math.ceil(len(names) / LEGEND_COLUMNS) * LEGEND_ROW + 6
    width, height = COLUMNS * WIDTH, caption_top + CAPTION_ROW * len(caption)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">',
        f"<title>{escape('; '.join(panel.title for panel in panels))}</title>",
        f"<style>{css(LIGHT)} .title {{ font-size: 15px; font-weight: bold }} "
        ".small { font-size: 11px }",
        f"@media (prefers-color-scheme: dark) {{ {css(DARK)} }}</style>",
        f'<rect width="{width}" height="{height}" rx="8" class="ground"/>',
    ]
    for index, panel in enumerate(panels):
        lines += panel_lines(panel, index % COLUMNS * WIDTH, index // COLUMNS * HEIGHT)
    lines += legend_lines(names, legend_top)
    for index, words in enumerate(caption):
        y = caption_top + 4 + index * CAPTION_ROW
        lines.append(text(LEFT, y, escape(words), "faint small"))
    return "\n".join(filter(None, [*lines, "</svg>"])) + "\n"


def caption_of(machine: dict) -> list[str]:
    """Two lines, as far as the record says: the first did not name the instruction set."""
    words = [
        machine["cpu"],
        f"{machine['threads']} threads",
        *(machine[key] for key in ("instruction_set", "products") if key in machine),
        f"PyTorch {machine['torch']}",
        f"commit {machine['commit']}",
    ]
    return [
        "Forward and backward, float32; memory: the peak beyond inputs and gradients.",
        f"{', '.join(words)}.",
    ]


def draw(path: Path, folder: Path = IMAGES) -> list[Path]:
    """Both pictures of a record, and where they are."""
    record = json.loads(path.read_text())
    speed = {task: speed_panel(task, record["speed"]) for task in NUM_VIEWS}
    memory = memory_panel(record.get("memory", []))
    written = []
    for suffix, panels in (
        ("", [*speed.values(), memory]),
        ("_overview", [speed["fused"], memory]),
    ):
        shown = [panel for panel in panels if panel is not None]
        picture = folder / f"bench_{path.stem}{suffix}.svg"
        picture.write_text(svg(shown, caption_of(record["environment"])))
        written.append(picture)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=IMAGES)
    arguments = parser.parse_args()
    for picture in draw(arguments.record, arguments.folder):
        print(picture)


if __name__ == "__main__":
    main()
