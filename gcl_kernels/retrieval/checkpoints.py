"""Encoders from files, for the command line."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from gcl_kernels.retrieval.datasets import DataError
from gcl_kernels.retrieval.encode import Encoder
from gcl_kernels.retrieval.encoders import (
    CLIPModelEncoder,
    Fuse,
    JointFuse,
    OpenCLIPEncoder,
    VISTAEncoder,
)


def named_encoder(name: str) -> Encoder:
    """The callable `module:attribute`.

    Raises:
        ImportError: there is no such module, or nothing callable of that name in it.
    """
    module, _, attribute = name.partition(":")
    encoder = getattr(importlib.import_module(module), attribute, None) if attribute else None
    if not callable(encoder):
        raise ImportError(f"expected an encoder as module:function, got {name!r}")
    return encoder


def open_clip_encoder(name: str, weights: str | None, fuse: Fuse, device: torch.device) -> Encoder:
    """An open_clip model by its name, or by the path of its config, with the weights of a file."""
    import open_clip

    from gcl_kernels.integrations.open_clip import create_model_and_transforms

    if name.endswith(".json"):
        open_clip.add_model_config(name)
        name = Path(name).stem
    # It loads what open_clip saves, and `FusedCLIP`s with fusion weights.
    model, _, preprocess = create_model_and_transforms(name, weights, device=device)
    return OpenCLIPEncoder(model, preprocess, open_clip.get_tokenizer(name), fuse)


def clip_model_encoder(folder: str, fuse: Fuse, device: torch.device) -> Encoder:
    """What `CLIPModel.save_pretrained` and `CLIPProcessor.save_pretrained` wrote into a folder."""
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(folder).to(device)
    return CLIPModelEncoder(model, CLIPProcessor.from_pretrained(folder), fuse)


def vista_encoder(folder: str, fuse: JointFuse, device: torch.device) -> Encoder:
    """A folder that `VISTA.from_pretrained` reads, with the released image model.

    Raises:
        DataError: a folder that it does not take.
    """
    from gcl_kernels.integrations.vista import VISTA

    try:
        model = VISTA.from_pretrained(folder)
    except (FileNotFoundError, ValueError) as error:
        raise DataError(str(error)) from error
    return VISTAEncoder(model.to(device), fuse=fuse)
