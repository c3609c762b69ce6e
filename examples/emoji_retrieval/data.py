"""The data of the demo: concepts, drawings and split together, and training batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gcl_kernels.retrieval.text import tidy

from .drawings import BACKGROUND, DEFAULT_CACHE, drawing_paths, load_drawings
from .inventory import Concept, load_concepts
from .split import Split, split_concepts

STYLES = ("openmoji", "twemoji")
TEXTS = ("name", "keywords")
KEYWORD_KEPT = 0.7


@dataclass(frozen=True)
class EmojiData:
    """``images`` is ``(concepts, 2 styles, 3, 64, 64)`` float32 in [0, 1]."""

    concepts: list[Concept]
    images: Tensor
    split: Split


def load_data(cache: Path = DEFAULT_CACHE) -> EmojiData:
    """Load the concepts, draw them (or read the drawings from the cache) and split them."""
    concepts = load_concepts(set(drawing_paths()))
    drawings = load_drawings([concept.key for concept in concepts], cache)
    images = torch.from_numpy(drawings).permute(0, 1, 4, 2, 3).float() / 255
    return EmojiData(concepts, images.contiguous(), split_concepts(concepts, drawings))


def full_text(concept: Concept, text: str) -> str:
    """One of a concept's two texts as it is used for evaluation, in M-BEIR's form of a sentence."""
    return tidy(concept.name if text == "name" else " ".join(concept.keywords))


class TrainingBatches:
    """Image-text pairs of the training groups, the same sequence for the same seed.

    A batch has no group twice, so that no negative is a variant of the positive. Of a group it
    takes a random member, of the member a random style and one of its two texts, as a pair of the
    wild has one picture and one caption.
    """

    def __init__(self, data: EmojiData, batch_size: int, steps: int, seed: int) -> None:
        groups = len(data.split.train)
        if not 2 <= batch_size <= groups:
            raise ValueError(f"expected a batch size from 2 to {groups} groups, got {batch_size}")
        self.data, self.batch_size, self.steps, self.seed = data, batch_size, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        """Images ``(B, 3, 64, 64)`` in [0, 1], and as many texts."""
        choose = np.random.default_rng(self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        groups = self.data.split.train
        waiting: list[int] = []
        for _ in range(self.steps):
            if len(waiting) < self.batch_size:
                waiting = choose.permutation(len(groups)).tolist()
            batch, waiting = waiting[: self.batch_size], waiting[self.batch_size :]
            chosen = np.array([choose.choice(groups[group]) for group in batch])
            styles = choose.integers(0, 2, self.batch_size)
            texts = [random_text(self.data.concepts[index], choose) for index in chosen]
            images = augment(
                self.data.images[torch.from_numpy(chosen), torch.from_numpy(styles)], generator
            )
            yield images, texts


def random_text(concept: Concept, choose: np.random.Generator) -> str:
    """Return the name, or as often some of the keywords in a random order."""
    if choose.random() < 0.5:
        return tidy(concept.name)
    kept = [word for word in concept.keywords if choose.random() < KEYWORD_KEPT]
    kept = kept or list(concept.keywords[:1])
    choose.shuffle(kept)
    return tidy(" ".join(kept))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, shift and mirror each image, tint it, and make some grey."""
    count = len(images)

    def uniform(limit: float, *shape: int) -> Tensor:
        return limit * (2 * torch.rand(count, *shape, generator=generator) - 1)

    scale, shift = 1 + uniform(0.15), uniform(0.12, 2)
    angle = uniform(math.pi / 16)
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack(
        [
            torch.stack([mirror * cos, -sin, shift[:, 0]], 1),
            torch.stack([mirror * sin, cos, shift[:, 1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    # Zero is what lies outside the picture: it must be the background.
    background = BACKGROUND[0] / 255
    moved = F.grid_sample(images - background, grid, align_corners=False) + background
    tinted = moved * (1 + uniform(0.15, 3, 1, 1))
    grey = torch.rand(count, 1, 1, 1, generator=generator) < 0.15
    return torch.where(grey, tinted.mean(1, keepdim=True), tinted)
