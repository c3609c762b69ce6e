"""The models that the loss is published with: VISTA, CLIP-SF and TinyCLIP, in small."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import run_fresh
from retrieval_trees import write_mbeir
from small_models import (
    SIDE,
    WIDTH,
    bert,
    bert_tokenizer,
    clip_processor,
    replace_released_eva,
    tiny_eva,
)
from torch import nn

import gcl_kernels

pytest.importorskip("pytrec_eval")
open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from gcl_kernels import retrieval  # noqa: E402
from gcl_kernels.integrations import tinyclip  # noqa: E402
from gcl_kernels.integrations.open_clip import FusedCLIP  # noqa: E402
from gcl_kernels.integrations.tinyclip import TINYCLIP, clip_config, open_clip_config  # noqa: E402
from gcl_kernels.integrations.vista import VISTA, EVAPatchTokens  # noqa: E402
from gcl_kernels.retrieval.__main__ import main  # noqa: E402


def preprocess(image) -> torch.Tensor:
    """[3, SIDE, SIDE] in [0, 1]."""
    from torchvision.transforms.functional import to_tensor

    return to_tensor(image.resize((SIDE, SIDE)))


class ConvTokens(nn.Module):
    """[B, 4, 8] of images."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, SIDE // 2, stride=SIDE // 2)

    def forward(self, pixels):
        return self.conv(pixels).flatten(2).transpose(1, 2)


@pytest.fixture(scope="module")
def tokenizer():
    return bert_tokenizer()


def vista(tokenizer, **options) -> VISTA:
    torch.manual_seed(0)
    return VISTA(bert(tokenizer), ConvTokens(), 8, tokenizer, preprocess, **options)


TEXTS = ["a cat.", "", "no more than a dog"]


def pixels_of(count: int) -> torch.Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def linear(weights: dict, name: str, rows: torch.Tensor) -> torch.Tensor:
    return F.linear(rows, weights[name + ".weight"], weights.get(name + ".bias"))


def norm(weights: dict, name: str, rows: torch.Tensor, eps: float) -> torch.Tensor:
    width = rows.shape[-1:]
    return F.layer_norm(rows, width, weights[name + ".weight"], weights[name + ".bias"], eps)


def by_hand(weights: dict, tokens: torch.Tensor, ids: list[int], pooling: str) -> torch.Tensor:
    """VISTA's embedding of one item, [D], from FlagEmbedding's names: tokens [P, width] as the
    image model gives them, P = 0 for none, and the ids of a text."""
    table = "bge_embeddings.{}_embeddings.weight".format
    text = weights[table("word")][ids] + weights[table("token_type")][0]
    rows = torch.cat([text[:1], linear(weights, "visual_proj", tokens), text[1:]])
    rows = rows + weights[table("position")][: len(rows)]
    rows = norm(weights, "bge_embeddings.LayerNorm", rows, 1e-12)
    for layer in ("bge_encoder.layer.0.", "bge_encoder.layer.1."):
        q, k, v = (
            linear(weights, f"{layer}attention.self.{name}", rows)
            .unflatten(1, (2, -1))
            .transpose(0, 1)
            for name in ("query", "key", "value")
        )
        mixed = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        mixed = linear(weights, layer + "attention.output.dense", mixed.transpose(0, 1).flatten(1))
        rows = norm(weights, layer + "attention.output.LayerNorm", rows + mixed, 1e-12)
        inner = F.gelu(linear(weights, layer + "intermediate.dense", rows))
        inner = linear(weights, layer + "output.dense", inner)
        rows = norm(weights, layer + "output.LayerNorm", rows + inner, 1e-12)
    return rows[0] if pooling == "cls" else rows.mean(0)


def flag_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of a text model, as FlagEmbedding names its parts."""
    parts = {"bge_embeddings": model.embeddings, "bge_encoder": model.encoder}
    parts["bge_pooler"] = model.pooler
    return {
        f"{part}.{name}": tensor.clone()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_vista_embeds_what_its_definition_says(tokenizer, pooling):
    torch.manual_seed(0)
    text_model = bert(tokenizer)
    model = VISTA(text_model, ConvTokens(), 8, tokenizer, pooling=pooling).eval()
    weights = flag_names(text_model)
    weights |= {f"visual_proj.{k}": v for k, v in model.visual_proj.state_dict().items()}
    pixels = pixels_of(3)
    with torch.no_grad():
        views = model(pixels, TEXTS)
        tokens = model.image_model(pixels)
        alone = model.encode_image(pixels), model.encode_text(TEXTS), model.encode_mm(pixels, TEXTS)
    for number, text in enumerate(TEXTS):
        ids, empty = tokenizer([text, ""])["input_ids"]
        for name, image, of in (
            ("image_features", tokens[number], empty),
            ("text_features", tokens[number][:0], ids),
            ("fused_features", tokens[number], ids),
        ):
            expected = by_hand(weights, image, of, pooling)
            torch.testing.assert_close(views[name][number], expected, rtol=1e-4, atol=1e-5)
    for view, same in zip(views.values(), alone, strict=False):
        torch.testing.assert_close(view, same)
    assert views["logit_scale"] == 50 and views["logit_scale"].shape == ()


def test_a_text_of_bge_m3s_kind_is_the_text_models_own(tokenizer):
    """XLM-RoBERTa counts positions from its padding's id on."""
    sizes = bert(tokenizer).config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    text_model = transformers.XLMRobertaModel(
        transformers.XLMRobertaConfig(
            **{name: sizes[name] for name in names}, num_hidden_layers=1, pad_token_id=0
        )
    ).eval()
    model = VISTA(text_model, ConvTokens(), 8, tokenizer).eval()
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    del tokens["token_type_ids"]
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_text(TEXTS), text_model(**tokens).last_hidden_state[:, 0]
        )


def test_vista_cuts_texts_to_what_fits(tokenizer):
    model = vista(tokenizer).eval()
    assert model.max_length == 24
    pixels, long = pixels_of(1), "abcdefgh " * 9
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_mm(pixels, [long]), model.encode_mm(pixels, [long[:20]])
        )
        assert not model.encode_text([long]).equal(model.encode_text([long[:20]]))
    assert vista(tokenizer, max_length=9).max_length == 9


def test_vistas_options_are_checked(tokenizer):
    for options, message in (
        ({"pooling": "max"}, "pooling: expected 'cls' or 'mean', got 'max'"),
        ({"temperature": 0}, "temperature: expected"),
        ({"max_length": 1}, "max_length: expected None or at least 2, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            vista(tokenizer, **options)
    model = vista(tokenizer)
    with pytest.raises(ValueError, match="texts: expected 3, one for each image, got 2"):
        model(pixels_of(3), ["a", "b"])
    with pytest.raises(ValueError, match="pixels: expected at most 22 image tokens, .* got 64"):
        model.encode_image(torch.rand(1, 3, 4 * SIDE, 4 * SIDE))
    left = transformers.BertTokenizer(tokenizer.get_vocab(), padding_side="left")
    with pytest.raises(ValueError, match="padding_side='right', .* got 'left'"):
        vista(left)
    with pytest.raises(ValueError, match="preprocess: expected a transform"):
        retrieval.VISTAEncoder(VISTA(bert(tokenizer), ConvTokens(), 8, tokenizer))


# Weights of VISTA in a folder


def eva_clip_state() -> dict[str, torch.Tensor]:
    """Random weights of that shape by eva_clip's names, and what else lies beside them."""
    hidden = WIDTH * 8 // 3
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 17, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 8, 8),
        "patch_embed.proj.bias": (WIDTH,),
        "head.weight": (4, WIDTH),
        "head.bias": (4,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "rope.freqs_cos": (16, 8),
        "rope.freqs_sin": (16, 8),
    }
    for block in ("blocks.0.", "blocks.1."):
        for name in ("q_proj", "k_proj", "v_proj", "proj"):
            shapes[f"{block}attn.{name}.weight"] = (WIDTH, WIDTH)
        for name in ("attn.q_bias", "attn.v_bias", "attn.proj.bias", "mlp.w3.bias"):
            shapes[block + name] = (WIDTH,)
        for name, width in (("norm1", WIDTH), ("norm2", WIDTH), ("attn.inner_attn_ln", WIDTH),
                            ("mlp.ffn_ln", hidden)):  # fmt: skip
            shapes |= {f"{block}{name}.weight": (width,), f"{block}{name}.bias": (width,)}
        for name in ("mlp.w1", "mlp.w2"):
            shapes |= {f"{block}{name}.weight": (hidden, WIDTH), f"{block}{name}.bias": (hidden,)}
        shapes[block + "mlp.w3.weight"] = (WIDTH, hidden)
        shapes |= {block + "attn.rope.freqs_cos": (16, 8), block + "attn.rope.freqs_sin": (16, 8)}
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def eva_clip_tokens(weights: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
    """[16, WIDTH] of one image, by eva_clip's definition."""
    # Axial rotation: half of a head's width turns by the row, half by the column, the grid of four
    # scaled to the sixteen of the pretraining.
    speeds = 10000 ** -(torch.arange(0, 4, 2) / 4)
    angles = (torch.arange(4) / 4 * 16)[:, None] * speeds
    angles = torch.cat([angles[:, None].expand(4, 4, 2), angles[None].expand(4, 4, 2)], -1)
    turn = torch.polar(torch.ones(16, 4), angles.reshape(16, 4))

    def turned(rows):
        """[heads, 17, 8]; [CLS] stays."""
        pairs = torch.view_as_complex(rows[:, 1:].unflatten(2, (-1, 2)).contiguous())
        return torch.cat([rows[:, :1], torch.view_as_real(pairs * turn).flatten(2)], 1)

    stem = [weights[f"patch_embed.proj.{name}"] for name in ("weight", "bias")]
    patches = F.conv2d(image[None], *stem, stride=8)[0].flatten(1).T
    rows = torch.cat([weights["cls_token"][0], patches]) + weights["pos_embed"][0]
    for block in ("blocks.0.", "blocks.1."):
        inner = norm(weights, block + "norm1", rows, 1e-6)
        q, k, v = (
            F.linear(
                inner,
                weights[f"{block}attn.{name}_proj.weight"],
                weights.get(f"{block}attn.{name}_bias"),
            )
            .unflatten(1, (2, 8))
            .transpose(0, 1)
            for name in "qkv"
        )
        mixed = (turned(q) @ turned(k).mT / math.sqrt(8)).softmax(-1) @ v
        mixed = mixed.transpose(0, 1).flatten(1)
        mixed = norm(weights, block + "attn.inner_attn_ln", mixed, 1e-6)
        rows = rows + linear(weights, block + "attn.proj", mixed)
        inner = norm(weights, block + "norm2", rows, 1e-6)
        gate, value = (linear(weights, block + f"mlp.w{n}", inner) for n in (1, 2))
        inner = norm(weights, block + "mlp.ffn_ln", F.silu(gate) * value, 1e-6)
        rows = rows + linear(weights, block + "mlp.w3", inner)
    return rows[1:]


@pytest.fixture(scope="module")
def released(tokenizer, tmp_path_factory):
    """A folder as one makes it of the released weights, and these weights."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    text_model = bert(tokenizer)
    weights = flag_names(text_model)
    weights["bge_embeddings.position_ids"] = torch.arange(24)[None]
    weights["visual_proj.weight"] = torch.randn(WIDTH, WIDTH)
    weights["visual_proj.bias"] = torch.randn(WIDTH)
    weights |= {f"model_visual.visual.{name}": tensor for name, tensor in eva_clip_state().items()}
    weights["model_visual.logit_scale"] = torch.tensor(2.6)
    torch.save(weights, folder / "Visualized_tiny.pth")
    text_model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, weights


@pytest.fixture
def small_eva(monkeypatch):
    replace_released_eva(monkeypatch)


def test_vista_loads_the_released_weights(released, tokenizer, small_eva):
    folder, weights = released
    model = VISTA.from_pretrained(folder)
    assert not model.training
    image = pixels_of(1)
    name = "model_visual.visual."
    tower = {key.removeprefix(name): w for key, w in weights.items() if key.startswith(name)}
    tokens = eva_clip_tokens(tower, image[0])
    ids = tokenizer(TEXTS[0])["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model.image_model(image)[0], tokens, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            model.encode_mm(image, TEXTS[:1])[0], by_hand(weights, tokens, ids, "cls"),
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip
    assert model.preprocess(Image.new("RGB", (50, 40))).shape == (3, 32, 32)


def test_vista_comes_back_from_its_folder(released, small_eva, tokenizer, tmp_path):
    of_eva = VISTA.from_pretrained(released[0])
    of_eva.save_pretrained(tmp_path / "eva")
    other = vista(tokenizer, pooling="mean", temperature=0.05, max_length=9)
    other.save_pretrained(tmp_path / "conv")
    for model, back in (
        (of_eva, VISTA.from_pretrained(tmp_path / "eva")),
        (other.eval(), VISTA.from_pretrained(tmp_path / "conv", ConvTokens(), preprocess)),
    ):
        for one, same in zip(
            model(pixels_of(3), TEXTS).values(), back(pixels_of(3), TEXTS).values(), strict=True
        ):
            torch.testing.assert_close(same, one)
        assert back.max_length == model.max_length and back.pooling == model.pooling
    assert back.preprocess is preprocess


def test_a_folder_that_is_no_vistas_is_an_error(released, small_eva, tmp_path):
    folder, weights = released

    def folder_of(name: str, change) -> Path:
        made = tmp_path / name
        made.mkdir()
        for path in folder.iterdir():
            if path.suffix != ".pth":
                (made / path.name).write_bytes(path.read_bytes())
        state = dict(weights)
        change(state)
        torch.save(state, made / "v.pth")
        return made

    key = "model_visual.visual.blocks.1.attn.q_bias"
    for name, change, message in (
        ("missing", lambda s: s.pop(key), "image_model.trunk.blocks.1.attn.q_proj.bias is missing"),
        ("projection", lambda s: s.pop("visual_proj.weight"), "visual_proj.weight is missing"),
        ("extra", lambda s: s.update(more=s[key]), "v.pth: more is unexpected"),
        (
            "shape",
            lambda s: s.update({"visual_proj.bias": torch.ones(3)}),
            r"visual_proj.bias is of shape \[3\], expected \[16\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            VISTA.from_pretrained(folder_of(name, change))
    (tmp_path / "extra/tokenizer.json").unlink()
    for name, found in (
        ("none", "nothing"),
        ("extra", "config.json, tokenizer_config.json, v.pth"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{name}: expected .* .pth file, got {found}"):
            VISTA.from_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"image_model.conv.weight is missing, .*, and \d+ more"):
        VISTA.from_pretrained(folder, ConvTokens())


def test_the_released_image_models_are_known(monkeypatch):
    made = []
    monkeypatch.setattr(timm, "create_model", lambda name, **_: made.append(name) or tiny_eva())
    EVAPatchTokens.released(768), EVAPatchTokens.released(1024)
    assert made == ["eva02_base_patch16_clip_224", "eva02_large_patch14_clip_224"]
    assert all(timm.is_model(name) for name in made)
    with pytest.raises(ValueError, match="another width than 768 and 1024, got None for 16"):
        EVAPatchTokens.released(16)


def test_what_vista_needs_is_named(released, monkeypatch):
    for package, use in (
        ("transformers", lambda: VISTA.from_pretrained(released[0])),
        ("timm", lambda: EVAPatchTokens.released(768)),
        ("transformers", lambda: clip_config("TinyCLIP-ViT-8M-16-Text-3M")),
    ):
        with monkeypatch.context() as context, pytest.raises(ImportError) as error:
            context.setitem(sys.modules, package, None)
            use()
        assert re.search(rf"needs {package}: pip install ", str(error.value))
    code = "import sys; import gcl_kernels.integrations.vista, gcl_kernels.integrations.tinyclip\n"
    code += "print({'timm', 'transformers', 'PIL'} & set(sys.modules))"
    assert run_fresh(code).split("\n")[0] == "set()"


# TinyCLIP

MILLIONS = re.compile(r"-(\d+)M")


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("name", TINYCLIP)
def test_tinyclips_sizes_are_the_published(name):
    with torch.device("meta"):
        ours = transformers.CLIPModel(clip_config(name))
        theirs = open_clip.CLIP(**open_clip_config(name))
    assert count(ours.parameters()) == count(theirs.parameters())
    image = count(ours.vision_model.parameters()) + count(ours.visual_projection.parameters())
    words = ours.text_model.get_input_embeddings()
    text = count(ours.text_model.parameters()) + count(ours.text_projection.parameters())
    text -= count(words.parameters())
    of_image, of_text = map(int, MILLIONS.findall(name))
    assert round(image / 1e6) == of_image and math.ceil(text / 1e6 - 0.5) == of_text
    if name == "TinyCLIP-ViT-8M-16-Text-3M":
        assert round(count(ours.parameters()) / 1e6, 2) == 23.45  # what its users report


def test_a_tinyclip_of_another_name_is_an_error():
    for config in (clip_config, open_clip_config):
        with pytest.raises(ValueError, match="name: expected one of TinyCLIP-ViT-8M-16-Text-3M, "):
            config("TinyCLIP")


@pytest.fixture(scope="module")
def small():
    """Name of a TinyCLIP of one layer a tower, small widths and four patches."""
    with pytest.MonkeyPatch.context() as context:
        sizes = tinyclip.TowerSizes(SIDE // 2, 64, 1, 64, 1, image_size=SIDE)
        context.setitem(TINYCLIP, "small", sizes)
        yield "small"


def test_both_forms_of_tinyclip_are_one_model(small):
    """With the weights of the one in the other."""
    torch.manual_seed(0)
    ours = transformers.CLIPModel(clip_config(small)).eval()
    theirs = open_clip.CLIP(**open_clip_config(small)).eval()
    state = ours.state_dict()
    names = {
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding": "text_model.embeddings.token_embedding",
        "ln_final": "text_model.final_layer_norm",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1": "vision_model.embeddings.patch_embedding",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "logit_scale": "logit_scale",
    }
    for there, here in (("", "text_model."), ("visual.", "vision_model.")):
        layer = f"{here}encoder.layers.0."
        for part, own in (("attn.out_proj", "self_attn.out_proj"), ("mlp.c_fc", "mlp.fc1"),
                          ("mlp.c_proj", "mlp.fc2"), ("ln_1", "layer_norm1"),
                          ("ln_2", "layer_norm2")):  # fmt: skip
            names[f"{there}transformer.resblocks.0.{part}"] = layer + own
        for kind in ("weight", "bias"):
            parts = [state[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{there}transformer.resblocks.0.attn.in_proj_{kind}"] = torch.cat(parts)
    renamed = {"text_projection": state["text_projection.weight"].T}
    renamed["visual.proj"] = state["visual_projection.weight"].T
    for name in theirs.state_dict().keys() - renamed.keys():
        stem, _, kind = name.rpartition(".")
        own = names.get(name) or (f"{names[stem]}.{kind}" if stem in names else name)
        renamed[name] = state[own]
    theirs.load_state_dict(renamed)
    ids = open_clip.SimpleTokenizer()(["a cat", "no more than a dog"])
    with torch.no_grad():
        text = ours.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(text, theirs.encode_text(ids), rtol=1e-4, atol=1e-5)
        image = ours.get_image_features(pixel_values=pixels_of(2)).pooler_output
        torch.testing.assert_close(image, theirs.encode_image(pixels_of(2)), rtol=1e-4, atol=1e-5)


# Each of them trained a little, then evaluated


class CLIPSum(nn.Module):
    """CLIP-SF of a `transformers.CLIPModel`: the loss adds raw embeddings."""

    def __init__(self, clip: nn.Module, processor):
        super().__init__()
        self.clip, self.processor = clip, processor

    def forward(self, pixels, texts):
        tokens = self.processor.tokenizer(texts, padding=True, return_tensors="pt")
        return {
            "image_features": self.clip.get_image_features(pixel_values=pixels).pooler_output,
            "text_features": self.clip.get_text_features(**tokens).pooler_output,
            "fused_features": None,
            "logit_scale": self.clip.logit_scale.exp(),
        }


class OpenCLIPSum(nn.Module):
    """CLIP-SF of open_clip, whose model adds them."""

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.clip, self.tokenizer = clip, open_clip.SimpleTokenizer()

    def forward(self, pixels, texts):
        return self.clip(pixels, self.tokenizer(texts))


def made(kind: str, small: str, tokenizer):
    """A model that returns views, and its encoder."""
    torch.manual_seed(0)
    if kind == "CLIP-SF by open_clip":
        clip = FusedCLIP(**open_clip_config(small), output_dict=True)
        return OpenCLIPSum(clip), retrieval.OpenCLIPEncoder(
            clip, preprocess, open_clip.SimpleTokenizer()
        )
    if kind == "CLIP-SF by transformers":
        processor = clip_processor()
        config = clip_config(small)
        config.text_config.eos_token_id = processor.tokenizer.eos_token_id
        clip = transformers.CLIPModel(config)
        return CLIPSum(clip, processor), retrieval.CLIPModelEncoder(clip, processor)
    fuse = kind.removeprefix("VISTA, ")
    model = vista(tokenizer)
    return model, retrieval.VISTAEncoder(model, fuse=fuse)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mbeir")
    write_mbeir(folder)
    return folder


def loss_of(views: dict, **options) -> torch.Tensor:
    names = ("image_features", "text_features", "fused_features")
    return gcl_kernels.gcl_loss(*(views[name] for name in names), views["logit_scale"], **options)


@pytest.mark.parametrize(
    "kind",
    ["CLIP-SF by open_clip", "CLIP-SF by transformers", "VISTA, joint", "VISTA, sum"],
)
def test_a_model_is_trained_and_evaluated(kind, small, tokenizer, root):
    model, encoder = made(kind, small, tokenizer)
    texts = ["a red cat.", "dogs", "5 ships", "no tree?", "x", "a blue cat.", "why", "old stones"]
    pixels = pixels_of(len(texts))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    losses = []
    for _ in range(6):
        loss = loss_of(model(pixels, texts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = [p for p in model.parameters() if p.grad is not None]
    assert len(trained) == len([*model.parameters()])
    assert all(p.grad.isfinite().all() for p in trained)

    dataset = retrieval.load_mbeir(root, "oven_task8")
    result = retrieval.evaluate(encoder, dataset, progress=False)
    assert result.queries == len(dataset.queries) and 0 <= result["hit@5"] <= 1
    pairs = [{"text": texts[0], "image": Image.new("RGB", (40, 50), "red")}]
    parts = [{**pairs[0], side: None} for side in ("text", "image")]
    fused, image, text = encoder(pairs + parts)
    if "VISTA" in kind:
        image, text = F.normalize(image, dim=0), F.normalize(text, dim=0)
    assert torch.allclose(fused, image + text, atol=1e-5) == (kind != "VISTA, joint")


@pytest.mark.parametrize(
    "kind", ["CLIP-SF by open_clip", "CLIP-SF by transformers", "VISTA, joint"]
)
def test_gradients_of_a_models_views_are_exact(kind, small, tokenizer):
    model, _ = made(kind, small, tokenizer)
    with torch.no_grad():
        views = model.double().eval()(pixels_of(3).double(), TEXTS)
    gradients = {}
    for backend in ("auto", "reference"):
        leaves = {
            name: None if view is None else view.detach().clone().requires_grad_()
            for name, view in views.items()
        }
        loss_of(leaves, backend=backend).backward()
        gradients[backend] = [leaf.grad for leaf in leaves.values() if leaf is not None]
    for ours, dense in zip(*gradients.values(), strict=True):
        assert ours.isfinite().all() and dense.abs().max() > 0
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-12)


def test_command_line_of_vista(released, small_eva, root, tmp_path, capsys):
    arguments = ["mbeir", root, "--vista", released[0], "--datasets", "oven_task8", "--quiet"]
    found = {}
    for fuse in (None, "joint", "sum"):
        given = ["--fuse", fuse] if fuse else []
        main([str(one) for one in (*arguments, *given, "--output", tmp_path / "figures.json")])
        found[fuse] = json.loads((tmp_path / "figures.json").read_text())["results"][0]["metrics"]
        encoder = retrieval.VISTAEncoder(VISTA.from_pretrained(released[0]), fuse=fuse or "joint")
        expected = retrieval.evaluate(
            encoder, retrieval.load_mbeir(root, "oven_task8"), progress=False
        )
        assert found[fuse] == dict(expected.metrics)
    assert found[None] == found["joint"] != found["sum"]
    for model, fuse, message in (
        (["--vista", "x"], "sum_raw", "--fuse: expected joint or sum with --vista, got sum_raw"),
        (["--clip", "x"], "joint", "--fuse: expected sum_raw or sum_unit with --clip, got joint"),
        (["--open-clip", "x"], "sum", "expected sum_raw or sum_unit with --open-clip, got sum"),
        (["--encoder", "x:y"], "sum", "--fuse: expected none with --encoder, got sum"),
    ):
        with pytest.raises(SystemExit):
            main(["mbeir", str(root), *model, "--fuse", fuse])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="error: .*none: expected config.json"):
        main(["mbeir", str(root), "--vista", str(tmp_path / "none"), "--quiet"])
