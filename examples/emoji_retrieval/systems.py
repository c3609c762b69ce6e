"""The three systems of the paper in small: CLIP-SF, TinyCLIP and VISTA.

Each is a module from a batch of pictures and texts to what `gcl_kernels.gcl_loss` takes, and has an
encoder for `gcl_kernels.retrieval`.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm

import gcl_kernels
from gcl_kernels.integrations.open_clip import FusedCLIP
from gcl_kernels.integrations.tinyclip import HEAD_WIDTH, TINYCLIP
from gcl_kernels.retrieval import CLIPModelEncoder, Encoder, OpenCLIPEncoder, VISTAEncoder

from .drawings import IMAGE_SIZE

PIXEL_MEAN, PIXEL_STD = 0.6, 0.3
CLIP_SF = json.loads(Path(__file__).with_name("tiny_emoji_clip.json").read_text(encoding="utf-8"))
CONTEXT = CLIP_SF["text_cfg"]["context_length"]
"""Tokens of a text; what is longer is cut."""
ALIGNMENT_RATE = 1e-3


class Model(Protocol):
    """What training and evaluation need of a system, besides that it is an `nn.Module`."""

    def __call__(self, images: Tensor, texts: list[str]) -> dict[str, Tensor]:
        """``image_features`` and ``text_features`` ``(B, D)``, ``logit_scale``, and from a joint
        encoder ``fused_features``, of images ``(B, 3, 64, 64)`` in [0, 1]."""
        ...

    def encoder(self, fuse: Any) -> Encoder:
        """For the harness; ``fuse`` is one of the system's ``fusions``."""
        ...

    def clamp_temperature(self) -> None:
        """Keep a learnt temperature in CLIP's range."""
        ...


def to_tensor(image: Image) -> Tensor:
    """``(3, H, W)`` in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def normalise(images: Tensor) -> Tensor:
    return (images - PIXEL_MEAN) / PIXEL_STD


class _CLIP(nn.Module):
    """Two towers, ``clip``, with a learnt temperature."""

    clip: nn.Module

    def clamp_temperature(self) -> None:
        self.clip.logit_scale.data.clamp_(0, math.log(100))


class ClipSF(_CLIP):
    """open_clip's towers from a small config of our own; score fusion in the loss."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.clip = FusedCLIP(**CLIP_SF, output_dict=True, fuse_in_loss=True)
        self.clip.logit_scale.data.fill_(math.log(1 / temperature))
        # oneDNN's convolutions are a third faster on this layout.
        self.clip.visual.to(memory_format=torch.channels_last)
        self.tokenizer = SimpleTokenizer(context_length=CONTEXT)

    def forward(self, images: Tensor, texts: list[str]) -> dict[str, Tensor]:
        return self.clip(normalise(images), self.tokenizer(texts).to(images.device))

    def encoder(self, fuse: Literal["sum_raw", "sum_unit"]) -> Encoder:
        prepare = lambda image: normalise(to_tensor(image))  # noqa: E731
        return OpenCLIPEncoder(self.clip, prepare, self.tokenizer, fuse)


class TinyClip(_CLIP):
    """A `transformers.CLIPModel` of TinyCLIP's shape: ViT-8M-16-Text-3M's depths, heads of 64 and
    patches of 16 x 16 pixels, at half its width."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

        sizes = TINYCLIP["TinyCLIP-ViT-8M-16-Text-3M"]
        width = sizes.vision_width // 2  # the text tower's too
        tower = {
            "hidden_size": width, "intermediate_size": 4 * width,
            "num_attention_heads": width // HEAD_WIDTH,
            "hidden_act": "gelu",  # as TinyCLIP, where transformers' CLIP has quick GELU
        }  # fmt: skip
        self.clip = CLIPModel(
            CLIPConfig(
                text_config={
                    **tower, "num_hidden_layers": sizes.text_layers,
                    "max_position_embeddings": CONTEXT,
                },
                vision_config={
                    **tower, "num_hidden_layers": sizes.vision_layers, "image_size": IMAGE_SIZE,
                    "patch_size": sizes.patch_size,
                },
                projection_dim=256,
                logit_scale_init_value=math.log(1 / temperature),
            )
        )  # fmt: skip
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        self.processor = CLIPProcessor(
            CLIPImageProcessor(
                size={"shortest_edge": IMAGE_SIZE}, crop_size=size,
                image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3,
            ),
            clip_tokenizer(),
        )  # fmt: skip

    def forward(self, images: Tensor, texts: list[str]) -> dict[str, Tensor]:
        tokens = self.processor.tokenizer(
            texts, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
        ).to(images.device)
        return {
            "image_features": self.clip.get_image_features(
                pixel_values=normalise(images)
            ).pooler_output,
            "text_features": self.clip.get_text_features(**tokens).pooler_output,
            "logit_scale": self.clip.logit_scale.exp(),
        }

    def encoder(self, fuse: Literal["sum_raw", "sum_unit"]) -> Encoder:
        return CLIPModelEncoder(self.clip, self.processor, fuse)


class Vista(nn.Module):
    """A joint encoder of VISTA's shape, of pretrained MiniLM and EfficientNet-lite0.

    What joins them is a new linear layer: `align` trains it alone, as VISTA's first stage freezes
    the text encoder. Then the text encoder learns too; EfficientNet, whose backward pass takes half
    of a step on a CPU, and the token embeddings stay as they were pretrained.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        from .pretrained import create_pretrained_vista

        self.joint = create_pretrained_vista(temperature, IMAGE_SIZE)
        self.joint.image_model.requires_grad_(False)
        self.joint.embeddings.word_embeddings.requires_grad_(False)

    def train(self, mode: bool = True) -> Vista:
        super().train(mode)
        self.joint.image_model.eval()  # its batch statistics
        return self

    def forward(self, images: Tensor, texts: list[str]) -> dict[str, Tensor]:
        return self.joint(self._pixels(images), texts)

    def align(self, batches: Iterable[tuple[Tensor, list[str]]], steps: int) -> None:
        """CLIP's loss on the linear layer alone, all else as it was pretrained."""
        self.eval()
        layer = self.joint.visual_proj
        optimizer = torch.optim.AdamW(layer.parameters(), ALIGNMENT_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for images, texts in tqdm(batches, total=steps, desc="VISTA's first stage", unit="step"):
            e_i = self.joint.encode_image(self._pixels(images.to(layer.weight.device)))
            with torch.no_grad():
                e_t = self.joint.encode_text(texts)
            loss = gcl_kernels.clip_loss(e_i, e_t, self.joint.logit_scale)
            layer.weight.grad, layer.bias.grad = torch.autograd.grad(loss, [*layer.parameters()])
            optimizer.step()
            schedule.step()

    def _pixels(self, images: Tensor) -> Tensor:
        tokens = self.joint.image_model
        return (images - tokens.pixel_mean) / tokens.pixel_std

    def encoder(self, fuse: Literal["joint", "sum"]) -> Encoder:
        return VISTAEncoder(self.joint, lambda image: self._pixels(to_tensor(image)), fuse)

    def clamp_temperature(self) -> None:
        pass  # a constant


def clip_tokenizer() -> Any:
    """transformers' tokenizer of CLIP's vocabulary, from the file that open_clip packages."""
    from transformers import CLIPTokenizer

    source = files("open_clip").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(source).decode().split("\n")
    vocabulary = SimpleTokenizer().encoder
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    return CLIPTokenizer(
        {word.replace("<start_of_text>", "<|startoftext|>")
             .replace("<end_of_text>", "<|endoftext|>"): number
         for word, number in vocabulary.items()},
        merges,
    )  # fmt: skip


@dataclass(frozen=True)
class System:
    """How one of the systems is trained; all but the learning rate is the same for all losses.

    Args:
        create: from an initial temperature.
        title: in tables.
        steps, batch_size, temperature: of a run.
        rates: peak learning rate by loss, the best on validation concepts (tune.py).
        fusions: how its encoder makes an embedding of an image with its text, and another way.
        alignment_steps: of `Vista.align`, before either loss.
    """

    create: Callable[[float], Model]
    title: str
    steps: int
    batch_size: int
    temperature: float
    rates: Mapping[str, float]
    fusions: tuple[str, str] = ("sum_raw", "sum_unit")
    alignment_steps: int = 0


SYSTEMS = {
    "clip_sf": System(ClipSF, "CLIP-SF", 300, 128, 0.07, {"CL": 2e-3, "GCL": 2e-3}),
    "tinyclip": System(TinyClip, "TinyCLIP", 120, 128, 0.07, {"CL": 1e-3, "GCL": 2e-3}),
    "vista": System(
        Vista, "VISTA", 50, 64, 0.02, {"CL": 6e-5, "GCL": 2.5e-4}, ("joint", "sum"), 150
    ),
}
