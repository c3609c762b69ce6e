"""Encoders of the usual models: raw embeddings of what an item has, fused as the model was trained.

An absent text or image is left out: the embedding of an empty text is not zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Fuse = Literal["sum_raw", "sum_unit"]
JointFuse = Literal["joint", "sum"]


class JointEncoder:
    """A model that embeds pairs too, such as VISTA.

    Args:
        encode_mm: [n, D] of a list of n images and one of n texts.
        encode_image: [n, D] of n images.
        encode_text: [n, D] of n texts.
        prepare: of a PIL image, by the workers that load it; None: images reach the model as PIL
            images.
        fuse: "joint": pairs by `encode_mm`. "sum": the image's and the text's embedding, each of
            unit length, added, as VISTA's own evaluation on M-BEIR does.
    """

    def __init__(
        self,
        encode_mm: Callable[[list[Any], list[str]], Tensor],
        encode_image: Callable[[list[Any]], Tensor],
        encode_text: Callable[[list[str]], Tensor],
        prepare: Callable[[Any], Any] | None = None,
        fuse: JointFuse = "joint",
    ) -> None:
        if fuse not in ("joint", "sum"):
            raise ValueError(f"fuse: expected 'joint' or 'sum', got {fuse!r}")
        self.encode_image, self.encode_text, self.prepare = encode_image, encode_text, prepare
        self.encode_pair = encode_mm if fuse == "joint" else self._added
        # A bound method's object: whose weights the embeddings depend on.
        owner = getattr(encode_image, "__self__", None)
        self.model = owner if isinstance(owner, nn.Module) else None

    def _added(self, images: list[Any], texts: list[str]) -> Tensor:
        sides = (self.encode_image(images).float(), self.encode_text(texts).float())
        return F.normalize(sides[0], dim=1) + F.normalize(sides[1], dim=1)

    @property
    def fingerprint(self) -> str:
        """Of the model's weights; "" where the functions given are no methods of one."""
        return "" if self.model is None else weights_digest(self.model)

    @torch.inference_mode()
    def __call__(self, items: list[dict[str, Any]]) -> Tensor:
        """[len(items), D] as the model gives them, in float32.

        Args:
            items: each with "text" and "image", one of them may be None. An image is a PIL image,
                or what `prepare` made of one.

        Raises:
            ValueError: an item with neither.
        """
        kinds: dict[str, list[int]] = {"image": [], "text": [], "pair": []}
        for number, item in enumerate(items):
            image, text = item["image"] is not None, bool(item["text"])
            if not (image or text):
                raise ValueError(f"item {number}: expected a text or an image, got neither")
            kinds["pair" if image and text else "image" if image else "text"].append(number)
        encode: dict[str, Callable[..., Tensor]] = {
            "image": lambda images, texts: self.encode_image(images),
            "text": lambda images, texts: self.encode_text(texts),
            "pair": self.encode_pair,
        }
        order, parts = [], []
        with _evaluating(self.model):
            for kind, numbers in kinds.items():
                if numbers:
                    sides = ([items[i][side] for i in numbers] for side in ("image", "text"))
                    parts.append(encode[kind](*sides).float())
                    order += numbers
        return torch.cat(parts)[torch.tensor(order).argsort()]


class _PixelEncoder(JointEncoder):
    """A model whose images are tensors of pixels."""

    model: nn.Module

    def __init__(self, model: nn.Module, prepare: Callable[[Any], Tensor], fuse: JointFuse) -> None:
        super().__init__(
            self._encode_mm, self._encode_image, self._encode_text, self._prepare, fuse
        )
        self.model = model
        self._prepare_image = prepare

    def _prepare(self, image: Any) -> Tensor:
        """[3, H, W] of a PIL image; what was prepared stays as it is."""
        return image if isinstance(image, Tensor) else self._prepare_image(image)

    def _pixels(self, images: list[Any]) -> Tensor:
        """[n, 3, H, W] as the model takes them."""
        parameter = next(self.model.parameters())
        pixels = torch.stack([self._prepare(image) for image in images])
        return pixels.to(parameter.device, parameter.dtype)

    def _encode_mm(self, images: list[Any], texts: list[str]) -> Tensor:
        raise NotImplementedError

    def _encode_image(self, images: list[Any]) -> Tensor:
        raise NotImplementedError

    def _encode_text(self, texts: list[str]) -> Tensor:
        raise NotImplementedError


class VISTAEncoder(_PixelEncoder):
    """A VISTA.

    Args:
        model: `gcl_kernels.integrations.vista.VISTA` or its like, on its device.
        preprocess: from a PIL image to [3, H, W]; default: the model's own.
        fuse: as in `JointEncoder`.

    Raises:
        ValueError: no `preprocess`, where the model has none.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Any], Tensor] | None = None,
        fuse: JointFuse = "joint",
    ) -> None:
        prepare = preprocess or getattr(model, "preprocess", None)
        if prepare is None:
            raise ValueError("preprocess: expected a transform, the model has none, got None")
        super().__init__(model, prepare, fuse)

    def _encode_mm(self, images: list[Any], texts: list[str]) -> Tensor:
        return self.model.encode_mm(self._pixels(images), texts)

    def _encode_image(self, images: list[Any]) -> Tensor:
        return self.model.encode_image(self._pixels(images))

    def _encode_text(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(texts)


class _TwoTowers(_PixelEncoder):
    """A model of images and one of texts, whose embeddings are added where an item has both."""

    def __init__(self, model: nn.Module, prepare: Callable[[Any], Tensor], fuse: Fuse) -> None:
        if fuse not in ("sum_raw", "sum_unit"):
            raise ValueError(f"fuse: expected 'sum_raw' or 'sum_unit', got {fuse!r}")
        super().__init__(model, prepare, "joint")
        self.fuse = fuse

    def _encode_mm(self, images: list[Any], texts: list[str]) -> Tensor:
        parts = [self._encode_image(images).float(), self._encode_text(texts).float()]
        if self.fuse == "sum_unit":
            parts = [F.normalize(part, dim=1) for part in parts]
        alpha, beta = getattr(self.model, "fusion_weights", (1.0, 1.0))
        return alpha * parts[0] + beta * parts[1]


class OpenCLIPEncoder(_TwoTowers):
    """An open_clip model.

    Args:
        model: `open_clip.CLIP` or its like, on its device, with `encode_image` and `encode_text`.
            `fusion_weights` that it has (`FusedCLIP` of `gcl_kernels.integrations.open_clip`) are
            factors of the sum.
        preprocess: the evaluation transform, from a PIL image to [3, H, W].
        tokenizer: from texts to [n, context] ids.
        fuse: "sum_raw": the embeddings as they are added, which is CLIP-SF (UniIR). "sum_unit":
            those of unit length, so that both count equally.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Any], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        fuse: Fuse = "sum_raw",
    ) -> None:
        super().__init__(model, preprocess, fuse)
        self.tokenizer = tokenizer

    def _encode_image(self, images: list[Any]) -> Tensor:
        return self.model.encode_image(self._pixels(images))

    def _encode_text(self, texts: list[str]) -> Tensor:
        ids = self.tokenizer(texts).to(next(self.model.parameters()).device)
        return self.model.encode_text(ids)


class CLIPModelEncoder(_TwoTowers):
    """A `transformers.CLIPModel`, such as OpenAI's CLIP and TinyCLIP.

    `CLIPModel` itself returns embeddings of unit length, of which no raw sum can be made: this
    takes `get_image_features` and `get_text_features`.

    Args:
        model: on its device.
        processor: its `CLIPProcessor`.
        fuse: as in `OpenCLIPEncoder`.
    """

    def __init__(self, model: nn.Module, processor: Any, fuse: Fuse = "sum_raw") -> None:
        super().__init__(model, self._process, fuse)
        self.processor = processor

    def _process(self, image: Any) -> Tensor:
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]

    def _encode_image(self, images: list[Any]) -> Tensor:
        return _tensor(self.model.get_image_features(pixel_values=self._pixels(images)))

    def _encode_text(self, texts: list[str]) -> Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(
            texts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(next(self.model.parameters()).device)
        return _tensor(self.model.get_text_features(**tokens))


def _tensor(output: Any) -> Tensor:
    """transformers 5 returns an object, 4 the tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output


@contextmanager
def _evaluating(model: nn.Module | None) -> Iterator[None]:
    """In evaluation mode, and then each module in its own."""
    modes = [(module, module.training) for module in model.modules()] if model else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def weights_digest(model: nn.Module) -> str:
    """A hash of all parameters and buffers, the same on every device."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
