"""TinyCLIP's published sizes, as configurations of transformers and of open_clip.

Wu et al., "TinyCLIP: CLIP Distillation via Affinity Mimicking and Weight Inheritance" (ICCV 2023).
Names are those of its weights, without the data that these were trained on. Its "auto" models have
a mask of their own for every layer, which is no size, and are not here.

    transformers.CLIPModel(clip_config("TinyCLIP-ViT-8M-16-Text-3M"))
    open_clip.CLIP(**open_clip_config("TinyCLIP-ViT-8M-16-Text-3M"))
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["TINYCLIP", "TowerSizes", "clip_config", "open_clip_config"]

HEAD_WIDTH = 64
EMBED_DIM = 512
CONTEXT_LENGTH = 77
VOCAB_SIZE = 49408
"""CLIP's own; the last two ids are the start and the end of a text."""


class TowerSizes(NamedTuple):
    """What differs between the models. Images are square, widths multiples of 64."""

    patch_size: int
    vision_width: int
    vision_layers: int
    text_width: int
    text_layers: int
    image_size: int = 224


TINYCLIP: dict[str, TowerSizes] = {
    "TinyCLIP-ViT-8M-16-Text-3M": TowerSizes(16, 256, 10, 256, 3),
    "TinyCLIP-ViT-39M-16-Text-19M": TowerSizes(16, 512, 12, 512, 6),
    "TinyCLIP-ViT-40M-32-Text-19M": TowerSizes(32, 512, 12, 512, 6),
    "TinyCLIP-ViT-61M-32-Text-29M": TowerSizes(32, 640, 12, 512, 9),
}
"""In a name: parameters of the image tower, its patch size, parameters of the text tower without
the token embeddings."""


def clip_config(name: str) -> Any:
    """A `transformers.CLIPConfig`.

    Raises:
        ValueError: a name that is not in `TINYCLIP`.
        ImportError: transformers is not installed.
    """
    sizes = _sizes(name)
    try:
        from transformers import CLIPConfig
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise  # transformers is there, and something that it needs is not
        raise ImportError("clip_config needs transformers: pip install transformers") from error
    # CLIPConfig's own default is OpenAI's quick GELU.
    shared = {"hidden_act": "gelu", "projection_dim": EMBED_DIM}
    return CLIPConfig(
        projection_dim=EMBED_DIM,
        vision_config={
            **shared,
            **_transformer(sizes.vision_width, sizes.vision_layers),
            "image_size": sizes.image_size,
            "patch_size": sizes.patch_size,
        },
        text_config={
            **shared,
            **_transformer(sizes.text_width, sizes.text_layers),
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": CONTEXT_LENGTH,
            "bos_token_id": VOCAB_SIZE - 2,
            "eos_token_id": VOCAB_SIZE - 1,
        },
    )


def open_clip_config(name: str) -> dict[str, Any]:
    """Arguments of `open_clip.CLIP`; as JSON, a file for `open_clip.add_model_config`.

    Raises:
        ValueError: a name that is not in `TINYCLIP`.
    """
    sizes = _sizes(name)
    return {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {
            "image_size": sizes.image_size,
            "patch_size": sizes.patch_size,
            "width": sizes.vision_width,
            "layers": sizes.vision_layers,
            "head_width": HEAD_WIDTH,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": VOCAB_SIZE,
            "width": sizes.text_width,
            "heads": sizes.text_width // HEAD_WIDTH,
            "layers": sizes.text_layers,
        },
    }


def _transformer(width: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // HEAD_WIDTH,
        "num_hidden_layers": layers,
    }


def _sizes(name: str) -> TowerSizes:
    if name not in TINYCLIP:
        raise ValueError(f"name: expected one of {', '.join(TINYCLIP)}, got {name!r}")
    return TINYCLIP[name]
