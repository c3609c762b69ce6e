"""What the benchmarks do to a text before it is encoded: each rule moves figures."""

from __future__ import annotations

import re

IMAGE_TOKEN = "<|image_1|>"
COVR_WORDS = 30


def tidy(text: str | None) -> str:
    """M-BEIR's rule, for queries, prompts and candidates (UniIR, `format_string`).

    Carriage returns out, white space and then double quotes off the ends, the first letter in upper
    case, and a full stop where none of `.?!` ends it.
    """
    text = (text or "").replace("\r", "").strip().strip('"')
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."


def without_image_token(text: str | None) -> str:
    """MMEB's text for a model that takes the image apart from the text.

    White space is joined: the token stands on a line of its own in some subsets.
    """
    return " ".join((text or "").replace(IMAGE_TOKEN, " ").split())


def covr_edit(text: str) -> str:
    """WebVid-CoVR's rule for the edit (`pre_caption`): lower case, 30 words, signs as spaces."""
    text = re.sub(r'[.!"()*#:;~]', " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:COVR_WORDS])
