"""Parts of small models of text and images, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?!"
WIDTH = 16
SIDE = 32
"""Of images, in pixels."""


def bert_tokenizer() -> Any:
    """A token for each letter, and one for each that is not its word's first."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
    return BertTokenizer({word: number for number, word in enumerate(words)})


def bert(tokenizer: Any) -> nn.Module:
    """Two layers, and 24 positions."""
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
        )
    )


def tiny_eva() -> nn.Module:
    """EVA02-CLIP's shape: two blocks of two heads, and sixteen patches of 8 x 8 pixels."""
    from timm.models.eva import Eva

    return Eva(
        img_size=SIDE,
        patch_size=8,
        embed_dim=WIDTH,
        depth=2,
        num_heads=2,
        qkv_fused=False,
        mlp_ratio=8 / 3,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(16, 16),
        global_pool="token",
        num_classes=0,
    )


def replace_released_eva(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small one in place of EVA02-CLIP-B-16."""
    from gcl_kernels.integrations.vista import EVAPatchTokens

    made = classmethod(lambda cls, text_width: cls(tiny_eva()))
    monkeypatch.setattr(EVAPatchTokens, "released", made)


def save_small_vista(folder: Path) -> None:
    """With random weights, as `VISTA.save_pretrained` does."""
    from gcl_kernels.integrations.vista import VISTA, EVAPatchTokens

    tokenizer = bert_tokenizer()
    VISTA(bert(tokenizer), EVAPatchTokens(tiny_eva()), WIDTH, tokenizer).save_pretrained(folder)


def clip_processor() -> Any:
    """A token for each letter, and one for each that ends a word."""
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    size = {"height": SIDE, "width": SIDE}
    return CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size),
        CLIPTokenizer({word: number for number, word in enumerate(words)}, []),
    )


def save_small_tinyclip(folder: Path) -> None:
    """A layer a tower, random weights and CLIP's 77 positions, as `save_pretrained` leaves it."""
    from transformers import CLIPModel

    from gcl_kernels.integrations import tinyclip

    processor = clip_processor()
    with pytest.MonkeyPatch.context() as context:
        sizes = tinyclip.TowerSizes(SIDE // 2, 64, 1, 64, 1, image_size=SIDE)
        context.setitem(tinyclip.TINYCLIP, "small", sizes)
        config = tinyclip.clip_config("small")
    config.text_config.vocab_size = len(processor.tokenizer)
    config.text_config.eos_token_id = processor.tokenizer.eos_token_id
    CLIPModel(config).save_pretrained(folder)
    processor.save_pretrained(folder)
