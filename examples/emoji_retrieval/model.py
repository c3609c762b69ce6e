"""The model: open_clip's own towers from a small custom config, with fused embeddings added."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from open_clip.tokenizer import SimpleTokenizer

from gcl_kernels.integrations.open_clip import FusedCLIP

from .data import Tokenizer

CONFIG = json.loads(Path(__file__).with_name("tiny_emoji_clip.json").read_text(encoding="utf-8"))


def create_model(
    seed: int, temperature: float, learn_temperature: bool = True, fuse_in_loss: bool = False
) -> FusedCLIP:
    """Build the model; the same seed gives the same initial weights.

    Parameters
    ----------
    seed
        Seeds PyTorch's generators and with them the initial weights.
    temperature
        Initial temperature of the loss, ``1 / exp(logit_scale)``.
    learn_temperature
        Whether ``logit_scale`` is trained, as CLIP does.
    fuse_in_loss
        Whether the loss makes the fused embeddings in training, or the model.
    """
    torch.manual_seed(seed)
    model = FusedCLIP(**CONFIG, output_dict=True, fuse_in_loss=fuse_in_loss)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(1 / temperature))
    model.logit_scale.requires_grad_(learn_temperature)
    # oneDNN's convolutions are a third faster on this layout.
    model.visual.to(memory_format=torch.channels_last)
    return model


def create_tokenizer() -> Tokenizer:
    """Return open_clip's tokenizer, which packages its vocabulary."""
    return SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
