"""Concepts: emoji that both drawing styles have, with two human-written texts each.

The *name* is the Unicode short name from ``emoji``; the *keywords* are the search words that people
wrote for the same emoji (``em-keyboard``, which packages emojilib). A keyword that begins like a
word of the name is dropped, so that no word matching can pair the two texts of a concept.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.resources import files

WORD = re.compile(r"[a-z]+")
STEM_LENGTH = 4
MIN_KEYWORDS = 2
MAX_KEYWORDS = 8
# They describe the encoding of a character and not what it shows.
ENCODING_WORDS = {"emoji", "symbol", "sign", "ideograph", "unified", "cjk", "squared", "glyphs"}


@dataclass(frozen=True)
class Concept:
    """One emoji: its file key (hexadecimal code points without U+FE0F), name and keywords."""

    key: str
    name: str
    keywords: tuple[str, ...]


def words(text: str) -> list[str]:
    """Split into lower-case words, without apostrophes, digits or punctuation."""
    return WORD.findall(text.lower().replace("\u2019", "").replace("'", ""))


def alike(first: str, second: str) -> bool:
    """Whether two words begin alike: *smile* and *smiling*, *sun* and *sunny*."""
    length = min(STEM_LENGTH, len(first), len(second))
    return first[:length] == second[:length]


def file_key(code_points: list[str]) -> str:
    """Normalise hexadecimal code points, so that both packages' file names agree."""
    padded = (point.lower().zfill(4) for point in code_points)
    return "-".join(point for point in padded if point != "fe0f")


def distinct_keywords(name: str, raw: list[str]) -> tuple[str, ...]:
    """Keep the keywords that add something: unlike each word of the name, and each other."""
    name_words = words(name)
    glued = "".join(name_words)
    kept: list[str] = []
    for keyword in raw:
        parts = words(keyword.replace("_", " "))
        # One-word keywords only: phrases repeat the name in another order.
        if len(parts) != 1 or len(parts[0]) < 3 or parts[0] in ENCODING_WORDS:
            continue
        word = parts[0]
        # *butterfly* in *butter fly* and *sun* in *sunflower* give the name away as well.
        if word in glued or any(alike(word, other) for other in name_words + kept):
            continue
        kept.append(word)
    return tuple(kept[:MAX_KEYWORDS])


def load_concepts(available: set[str]) -> list[Concept]:
    """Return every concept with art in both styles, a name and enough keywords of its own.

    Flags of countries and regions are left out: nothing in an unseen country's name says what its
    flag looks like, so they would test memory and not retrieval.

    Parameters
    ----------
    available
        File keys for which both styles have a drawing.
    """
    import emoji

    table = json.loads(files("em").joinpath("emojis.json").read_text(encoding="utf-8"))
    concepts = []
    for character, (label, *raw) in table.items():
        key = file_key([f"{ord(c):x}" for c in character])
        entry = emoji.EMOJI_DATA.get(character)
        if entry is None or key not in available or label.startswith("flag_"):
            continue
        name = " ".join(entry["en"].strip(":").replace("_", " ").lower().split())
        keywords = distinct_keywords(name, raw)
        if len(keywords) >= MIN_KEYWORDS:
            concepts.append(Concept(key, name, keywords))
    return sorted(concepts, key=lambda concept: concept.key)
