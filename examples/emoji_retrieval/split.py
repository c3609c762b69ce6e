"""Groups of concepts that must stay together, and the split of groups into train, val and test.

Two concepts share a group when a rule on their names says so (genders, hair, directions, colours,
clock faces, keycaps, families, ...) or when their drawings are near-duplicates in either style.
Training uses every member of a group; validation and test use one, so that no candidate is another
drawing of a query's concept under a slightly different name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .inventory import Concept, words

# RMS difference of two drawings at 32 x 32, in units of the full intensity range.
NEAR_DUPLICATE = 0.06
NEAR_DUPLICATE_SIZE = 32
SHARES = {"train": 0.65, "val": 0.10, "test": 0.25}

FAMILIES = [
    ("clock face", r"oclock|thirty"),
    ("keycap", r"^keycap"),
    ("family", r"^family|^couple|^kiss\b(?! mark)|holding hands|\bbride\b|tuxedo|with veil"),
    ("japanese button", r"^japanese .*button"),
    ("button", r"\bbutton( blood type)?$|^(left|right|up|down)\b.*\barrow\b|arrow$"),
    ("moon", r"\bmoon\b(?! cake)"),
    ("shape", r"(square|circle|diamond|triangle)$"),
    ("heart", r"^(?!smiling).*\bhearts?\b(?!-eyes)"),
    (
        "zodiac",
        r"^(aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|sagittarius|capricorn|aquarius"
        r"|pisces|ophiuchus)$",
    ),
    ("person", r"^(older |old )?(man|woman|person)\b.*(hair|bald|beard)"),
    ("person", r"^(man|woman|person|older person|old man|old woman|child|boy|girl|adult)$"),
    ("pointing", r"\bpointing\b"),
]
COLOURS = "red orange yellow green blue purple brown black white grey gray pink"
DIRECTIONS = "left right up down leftwards rightwards upwards downwards facing tilted"
STATES = "open closed raised lowered"
SIZES = "small medium large big heavy hollow light dark"
PEOPLE = "man woman person men women people boy girl child male female mr mrs mother claus"
LITTLE_WORDS = "with of a an the in and at"
IGNORED = set(" ".join((COLOURS, DIRECTIONS, STATES, SIZES, PEOPLE, LITTLE_WORDS)).split())


@dataclass(frozen=True)
class Split:
    """Indices into the list of concepts.

    ``train`` holds every member of the training groups, one array per group; ``val`` and ``test``
    hold one concept per group. ``group`` is the group number of every concept.
    """

    group: np.ndarray
    train: tuple[np.ndarray, ...]
    val: np.ndarray
    test: np.ndarray
    part: np.ndarray


def name_rule(name: str) -> str:
    """Return what is left of a name without gender, colour, size and direction, or its family."""
    plain = " ".join(words(name))
    for family, pattern in FAMILIES:
        if re.search(pattern, plain):
            return f"family: {family}"
    return " ".join(word for word in words(name) if word not in IGNORED) or plain


def drawing_distances(drawings: np.ndarray) -> np.ndarray:
    """Return the smaller of the two styles' RMS differences, for every pair: ``(N, N)``."""
    count, styles, size = drawings.shape[:3]
    step = size // NEAR_DUPLICATE_SIZE
    shape = (count, styles, NEAR_DUPLICATE_SIZE, step, NEAR_DUPLICATE_SIZE, step, 3)
    pooled = (drawings.reshape(shape).astype(np.float32) / 255).mean((3, 5))
    closest = np.full((count, count), np.inf)
    for style in range(styles):
        flat = pooled[:, style].reshape(count, -1).astype(np.float64)
        square = (flat**2).sum(1)
        squared = np.maximum(square[:, None] + square[None] - 2 * flat @ flat.T, 0)
        closest = np.minimum(closest, np.sqrt(squared / flat.shape[1]))
    return closest


def group_concepts(concepts: Sequence[Concept], drawings: np.ndarray) -> np.ndarray:
    """Number the groups: name rules first, then near-duplicate drawings join groups."""
    by_rule: dict[str, int] = {}
    group = np.array([by_rule.setdefault(name_rule(c.name), len(by_rule)) for c in concepts])
    close = np.triu(drawing_distances(drawings) < NEAR_DUPLICATE, 1)
    for first, second in np.argwhere(close):
        if group[first] != group[second]:
            group[group == group[second]] = group[first]
    return np.unique(group, return_inverse=True)[1]


def split_concepts(concepts: Sequence[Concept], drawings: np.ndarray, seed: int = 0) -> Split:
    """Draw train, val and test groups at random; the same seed gives the same split."""
    group = group_concepts(concepts, drawings)
    members: dict[int, list[int]] = defaultdict(list)
    for index, number in enumerate(group):
        members[int(number)].append(index)
    order = np.random.default_rng(seed).permutation(len(members))
    bounds = np.cumsum([round(share * len(members)) for share in SHARES.values()])[:-1]
    train, val, test = np.split(order, bounds)
    part: np.ndarray = np.empty(len(concepts), dtype="<U5")
    for label, numbers in zip(SHARES, (train, val, test), strict=True):
        part[np.isin(group, numbers)] = label

    def first(numbers: np.ndarray) -> np.ndarray:
        # The shortest name is the plainest member: *firefighter*, not *woman firefighter*.
        plainest = (min(members[n], key=lambda i: (len(concepts[i].name), i)) for n in numbers)
        return np.array(sorted(plainest))

    return Split(
        group=group,
        train=tuple(np.array(members[number]) for number in sorted(train)),
        val=first(val),
        test=first(test),
        part=part,
    )
