"""The model, and the folder that it is saved in."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gcl_kernels.integrations.vista.eva import EVAPatchTokens
from gcl_kernels.integrations.vista.weights import check_state, own_names
from gcl_kernels.spec import check_positive

Pooling = Literal["cls", "mean"]

_OPTIONS = ("pooling", "temperature", "max_length")
"""Of the constructor, kept in `vista.json`."""


class VISTA(nn.Module):
    """A BERT-style text encoder that reads image tokens too.

    Image tokens take positions 1 to P behind [CLS] and have no token type; the text's other tokens
    follow them, so that P and the text share `max_position_embeddings`. An image alone comes with
    an empty text, which is [CLS] and [SEP].

    Args:
        text_model: a `transformers.BertModel` or its like, with `embeddings`, `encoder` and
            `config`; its pooler, if any, is left out.
        image_model: from pixels [B, 3, H, W] to tokens [B, P, image_width].
        image_width: of the image tokens, which `visual_proj`, a linear layer, takes to the text
            model's width.
        tokenizer: the text model's, of transformers, padding on the right.
        preprocess: the evaluation transform, from a PIL image to [3, H, W]; only kept, for
            those who evaluate the model; default: the image model's `preprocess`, if it has one.
        pooling: the embedding is the encoder's output at [CLS] ("cls"), or its mean over all
            tokens, those of the image among them ("mean").
        temperature: 1 / `logit_scale`, a constant, with which VISTA was trained.
        max_length: texts are cut to so many tokens; default: what the tokenizer and the text model
            take. Those with an image are cut to what its tokens leave, if that is less.

    Raises:
        ValueError: a `pooling` of another name, a `temperature` or `max_length` that is not
            positive, a tokenizer that pads on the left.
    """

    logit_scale: Tensor

    def __init__(
        self,
        text_model: nn.Module,
        image_model: nn.Module,
        image_width: int,
        tokenizer: Any,
        preprocess: Callable[[Any], Tensor] | None = None,
        pooling: Pooling = "cls",
        temperature: float = 0.02,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ValueError(f"pooling: expected 'cls' or 'mean', got {pooling!r}")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length: expected None or at least 2, got {max_length}")
        if tokenizer.padding_side != "right":
            raise ValueError(
                "tokenizer: expected padding_side='right', which leaves [CLS] first, got "
                f"{tokenizer.padding_side!r}"
            )
        # Not the model as a whole: DistributedDataParallel fails on a pooler that is not used.
        self.embeddings: Any = text_model.embeddings
        self.encoder: Any = text_model.encoder
        self.config: Any = text_model.config
        self.visual_proj = nn.Linear(image_width, self.config.hidden_size)
        self.image_model = image_model
        self.tokenizer = tokenizer
        self.preprocess = preprocess or getattr(image_model, "preprocess", None)
        self.pooling = pooling
        self.temperature = check_positive("temperature", temperature)
        positions = self.config.max_position_embeddings
        self.max_length = min(max_length or positions, tokenizer.model_max_length, positions)
        self.register_buffer("logit_scale", torch.tensor(1 / self.temperature), persistent=False)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """[B, D] of B texts, not normalised."""
        ids, mask = self._tokenize(texts, self.max_length)
        tokens = self.embeddings(input_ids=ids, token_type_ids=torch.zeros_like(ids))
        return self._encode(tokens, mask)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, D] of images [B, 3, H, W], not normalised."""
        return self._encode_mm(self._image_tokens(pixels), [""] * len(pixels))

    def encode_mm(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """[B, D] of images [B, 3, H, W] with a text each, not normalised.

        Raises:
            ValueError: another number of texts than of images; more image tokens than the text
                model has positions.
        """
        return self._encode_mm(self._image_tokens(pixels), texts)

    def forward(self, pixels: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
        """The three views of one batch; its images go through the image model once.

        Returns:
            `image_features`, `text_features` and `fused_features`, each [B, D] and not normalised,
            and `logit_scale`, shape [].
        """
        image_tokens = self._image_tokens(pixels)
        return {
            "image_features": self._encode_mm(image_tokens, [""] * len(pixels)),
            "text_features": self.encode_text(texts),
            "fused_features": self._encode_mm(image_tokens, texts),
            "logit_scale": self.logit_scale,
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `from_pretrained` reads: the text model's config and its tokenizer, the
        weights (`vista.pth`) and the other options (`vista.json`).

        Not the code of the image model, nor `preprocess`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        torch.save(self.state_dict(), folder / "vista.pth")
        options = {name: getattr(self, name) for name in _OPTIONS}
        (folder / "vista.json").write_text(json.dumps(options))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        image_model: nn.Module | None = None,
        preprocess: Callable[[Any], Tensor] | None = None,
    ) -> VISTA:
        """The model of a folder, on the CPU and in evaluation mode; nothing is downloaded.

        Args:
            folder: what `save_pretrained` wrote. Or weights that FlagEmbedding released, one `.pth`
                file (`Visualized_base_en_v1.5.pth`, `Visualized_m3.pth`), beside the config and the
                tokenizer of their text model (`BAAI/bge-base-en-v1.5`, `BAAI/bge-m3`).
            image_model: one of the shape that was saved, its weights are replaced; default: the
                released, EVA02-CLIP of timm.
            preprocess: as in the constructor.

        Raises:
            FileNotFoundError: a folder without config or tokenizer, or without one `.pth` file.
            ValueError: weights that are missing, unexpected, or of another shape; a text model of
                another width than those released, without an `image_model`.
            ImportError: transformers or, for the released image model, timm is not installed.
        """
        try:
            from transformers import AutoConfig, AutoModel, AutoTokenizer
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise  # transformers is there, and something that it needs is not
            raise ImportError(
                'VISTA.from_pretrained needs transformers: pip install "gcl_kernels[vista]"'
            ) from error
        folder = Path(folder)
        weights = _weights_file(folder)
        text_model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
        if image_model is None:
            image_model = EVAPatchTokens.released(text_model.config.hidden_size)
        state = own_names(torch.load(weights, map_location="cpu", weights_only=True), image_model)
        projection = state.get("visual_proj.weight")
        options = folder / "vista.json"
        model = cls(
            text_model,
            image_model,
            text_model.config.hidden_size if projection is None else projection.shape[1],
            AutoTokenizer.from_pretrained(folder),
            preprocess,
            **(json.loads(options.read_text()) if options.is_file() else {}),
        )
        check_state(state, model, weights)
        model.load_state_dict(state)
        return model.eval()

    def _tokenize(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, [B, T] with T at most `length`."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self.visual_proj.weight.device)
        return tokens["input_ids"], tokens["attention_mask"]

    def _image_tokens(self, pixels: Tensor) -> Tensor:
        """[B, P, D] as the encoder takes them."""
        tokens = self.visual_proj(self.image_model(pixels))
        most = self.config.max_position_embeddings - 2
        if tokens.shape[1] > most:
            raise ValueError(
                f"pixels: expected at most {most} image tokens, which leave [CLS] and [SEP] a "
                f"position each, got {tokens.shape[1]}"
            )
        positions = torch.arange(1, 1 + tokens.shape[1], device=tokens.device)
        # VISTA gives them neither a token type nor the text's dropout.
        return self.embeddings.LayerNorm(tokens + self.embeddings.position_embeddings(positions))

    def _encode_mm(self, image_tokens: Tensor, texts: Sequence[str]) -> Tensor:
        images, patches, _ = image_tokens.shape
        if len(texts) != images:
            raise ValueError(f"texts: expected {images}, one for each image, got {len(texts)}")
        left = self.config.max_position_embeddings - patches
        ids, mask = self._tokenize(texts, min(self.max_length, left))
        positions = torch.arange(ids.shape[1], device=ids.device)
        positions[1:] += patches
        text = self.embeddings(
            input_ids=ids, token_type_ids=torch.zeros_like(ids), position_ids=positions[None]
        )
        return self._encode(
            torch.cat([text[:, :1], image_tokens, text[:, 1:]], dim=1),
            torch.cat([mask.new_ones(images, patches), mask], dim=1),
        )

    def _encode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[B, D] of tokens [B, T, D] and their mask [B, T], 1 for those that are there."""
        absent = (1 - mask[:, None, None].to(tokens.dtype)) * torch.finfo(tokens.dtype).min
        hidden = self.encoder(tokens, attention_mask=absent)[0]
        if self.pooling == "cls":
            return hidden[:, 0]
        weights = mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


_TOKENIZERS = ("tokenizer.json", "vocab.txt", "sentencepiece.bpe.model")


def _weights_file(folder: Path) -> Path:
    """The one `.pth` of a folder that has the other files too."""
    names = sorted(path.name for path in folder.glob("*"))
    weights = [name for name in names if name.endswith(".pth")]
    # Without its files transformers makes a tokenizer that knows no words.
    if len(weights) != 1 or "config.json" not in names or not {*_TOKENIZERS} & {*names}:
        raise FileNotFoundError(
            f"{folder}: expected config.json, a tokenizer ({' or '.join(_TOKENIZERS)}) and one "
            f".pth file, got {', '.join(names) or 'nothing'}"
        )
    return folder / weights[0]
