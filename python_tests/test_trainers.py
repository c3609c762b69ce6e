"""gcl_kernels.integrations.sentence_transformers, and the snippets of docs/trainers.md."""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import os
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")

import transformers
from accelerate import Accelerator
from accelerate.state import GradientState
from datasets import Dataset
from oracle import dense_gcl
from PIL import Image
from processes import run_as_of_torchrun
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from test_docs import ROOT, code_blocks
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import gcl_kernels
from gcl_kernels.integrations import sentence_transformers as adapter
from gcl_kernels.integrations.sentence_transformers import GCLLoss

PACKAGES = ("accelerate", "datasets", "sentence_transformers", "transformers")
PAGE = ROOT / "docs/trainers.md"
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TEXT = TOWER | {
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
VISION = TOWER | {"image_size": 16, "patch_size": 8}
ONLY_ACROSS = {
    "pair_weights": ((0, 1, 0), (1, 0, 0), (0, 0, 0)),
    "candidates": ((False, True, False), (True, False, False), (False, False, False)),
}
"""Of GCL's options: CLIP's loss of image and text."""


def processor(kind: type, **parts) -> transformers.ProcessorMixin:
    """Sixty words and images of 16 x 16."""
    words = ["[pad]", "[unk]", "[bos]", "[eos]", *(f"w{i}" for i in range(60))]
    tokens = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[unk]")
    )
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        single="[bos] $A [eos]", special_tokens=[("[bos]", 2), ("[eos]", 3)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        model_max_length=16,
        **{f"{name}_token": f"[{name}]" for name in ("pad", "unk", "bos", "eos")},
    )
    return kind(tokenizer=tokenizer, **parts)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("clip"))
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    processor(transformers.CLIPProcessor, image_processor=images).save_pretrained(folder)
    return folder


@pytest.fixture
def model(clip_folder) -> SentenceTransformer:
    """A CLIP model, the same every time."""
    return SentenceTransformer(clip_folder, device="cpu")


def pairs(n: int, seed: int = 0) -> dict[str, list]:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    texts = [" ".join(f"w{j}" for j in rng.integers(0, 60, rng.integers(1, 6))) for _ in range(n)]
    return {"image": [Image.fromarray(p) for p in pixels], "text": texts}


def columns(model: SentenceTransformer, n: int = 10) -> list[dict]:
    return [model.preprocess(column) for column in pairs(n).values()]


def gradients(loss: torch.nn.Module, features: list[dict], labels=None, upstream: float = 1.0):
    """The loss and the gradients of all parameters that get one."""
    loss.model.zero_grad()
    value = loss(copy.deepcopy(features), labels)
    (upstream * value).backward()
    named = loss.model.named_parameters()
    return value.detach(), {k: p.grad.clone() for k, p in named if p.grad is not None}


def assert_same(got, expected, factor: float = 1.0, rtol: float = 1e-4) -> None:
    """Losses and gradients, the latter relative to the norm of all of them together."""
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=0)
    assert got[1].keys() == expected[1].keys() and got[1]
    norm = factor * torch.stack([g.norm() for g in expected[1].values()]).norm()
    for name, gradient in expected[1].items():
        assert (got[1][name] - factor * gradient).norm() <= rtol * norm, name


def dense(e, scale, **options) -> torch.Tensor:
    return dense_gcl([x.double() for x in e], scale, **options)


class Dense(torch.nn.Module):
    """What the adapter's loss must equal, through the model, by autograd over the dense matrix."""

    def __init__(self, model: SentenceTransformer, scale: float, **options) -> None:
        super().__init__()
        self.model, self.scale, self.options = model, scale, options

    def forward(self, sentence_features, labels):
        e = [self.model(column)["sentence_embedding"] for column in sentence_features]
        return dense(e, self.scale, sample_ids=labels, **self.options)


# The adapter


@pytest.mark.parametrize("mini_batch_size", [None, 4, 64])
@pytest.mark.parametrize("labels", [None, [0, 1, 2, 3, 3, 5, 1, 7, 8, 9]])
def test_loss_and_gradients_are_those_of_the_definition(model, mini_batch_size, labels):
    labels = None if labels is None else torch.tensor(labels)
    loss = GCLLoss(model, 12.0, mini_batch_size=mini_batch_size, other_positives="exclude")
    features = columns(model)
    got = gradients(loss, features, labels, upstream=0.25)
    assert got[0].dtype == torch.float32
    expected = gradients(Dense(model, 12.0, other_positives="exclude"), features, labels)
    assert_same((got[0].double(), got[1]), expected, 0.25)


def test_default_is_the_temperature_of_other_losses_there(model):
    assert GCLLoss(model).scale == losses.MultipleNegativesRankingLoss(model).scale


def test_of_image_and_text_alone_it_is_the_cached_ranking_loss(model):
    """The others are on the page."""
    theirs = losses.CachedMultipleNegativesRankingLoss(
        model,
        mini_batch_size=3,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    ours = GCLLoss(model, mini_batch_size=3, **ONLY_ACROSS)
    features = columns(model)
    assert_same(gradients(ours, features), gradients(theirs, features))


@pytest.mark.parametrize("mini_batch_size", [None, 4])
def test_hard_negatives_are_those_of_the_ranking_loss(model, mini_batch_size):
    """Two columns of them; all of a batch's are candidates of every image."""
    image, text = columns(model)
    negatives = [model.preprocess(pairs(10, seed)["text"]) for seed in (1, 2)]
    off = (0, 0, 0)
    ours = GCLLoss(
        model,
        columns=("negative", "image", "text", "negative"),
        mini_batch_size=mini_batch_size,
        pair_weights=((0, 1, 0), off, off),
        candidates=((0, 1, 0), off, off),
    )
    theirs = losses.MultipleNegativesRankingLoss(model)
    model.eval()
    got = gradients(ours, [negatives[0], image, text, negatives[1]])
    assert_same(got, gradients(theirs, [image, text, *negatives]))


@pytest.mark.parametrize("mini_batch_size", [None, 4])
def test_three_columns(tmp_path, mini_batch_size):
    """A model that embeds pairs, on a data set's third column."""
    torch.manual_seed(0)
    text = TEXT | {"sep_token_id": 3, "encoder_hidden_size": 32, "projection_dim": 24}
    config = transformers.BlipConfig(text_config=text, vision_config=VISION, projection_dim=24)
    transformers.BlipModel(config).save_pretrained(tmp_path)
    images = transformers.BlipImageProcessor(size={"height": 16, "width": 16})
    processor(transformers.BlipProcessor, image_processor=images).save_pretrained(tmp_path)
    model = SentenceTransformer(str(tmp_path), device="cpu")
    given = pairs(10)
    both = [{"image": i, "text": t} for i, t in zip(*given.values(), strict=True)]
    features = [model.preprocess(column) for column in (*given.values(), both)]
    model.eval()
    loss = GCLLoss(model, mini_batch_size=mini_batch_size)
    got = gradients(loss, features)
    expected = gradients(Dense(model, 20.0), features)
    assert_same((got[0].double(), got[1]), expected)


@pytest.mark.parametrize("mini_batch_size", [None, 4])
def test_a_third_column_that_is_no_pair(model, mini_batch_size):
    """It would be trained towards: a hard negative, of texts or of images."""
    image, text = columns(model)
    for third in (columns(model)[0], columns(model)[1]):
        loss = GCLLoss(model, mini_batch_size=mini_batch_size)
        with pytest.raises(ValueError, match=r"hard negative.*columns=\(\"image\", \"text\", "):
            loss([image, text, third])
    texts = [model.preprocess(pairs(10, seed)["text"]) for seed in range(3)]
    with pytest.raises(ValueError, match=r"\['text'\], \['text'\] and \['text'\]"):
        GCLLoss(model)(texts)
    model.eval()
    named = GCLLoss(model, columns=("fused", "text", "image"), mini_batch_size=mini_batch_size)
    got = gradients(named, texts)
    expected = gradients(Dense(model, 20.0), texts[::-1])
    assert_same((got[0].double(), got[1]), expected)
    for features in (texts, [{"sentence_embedding": torch.randn(4, 8)}] * 3):  # notes no modality
        with pytest.raises(ValueError, match="columns: expected a third"):
            GCLLoss(model)(features)


def test_a_triplet_data_set_stops_in_their_trainer(model, tmp_path):
    texts = [pairs(16, seed)["text"] for seed in range(3)]
    data = Dataset.from_dict(dict(zip(("anchor", "positive", "negative"), texts, strict=True)))
    with pytest.raises(ValueError, match="columns: expected a third input column"):
        train(SentenceTransformerTrainer, model, data, tmp_path, 1, loss=GCLLoss(model))
    named = GCLLoss(model, columns=("image", "text", "negative"))
    train(SentenceTransformerTrainer, model, data, tmp_path, 1, loss=named)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("score", [0.1 * i for i in range(16)]),
        ("label", [i % 2 == 0 for i in range(16)]),
        ("labels", [[i, i] for i in range(16)]),
    ],
)
def test_labels_that_are_no_ids(model, tmp_path, name, values):
    data = Dataset.from_dict(pairs(16) | {name: values})
    with pytest.raises(TypeError, match=rf'label column .*"{name}".*: expected one integer'):
        train(SentenceTransformerTrainer, model, data, tmp_path, 1, loss=GCLLoss(model))


def test_labels_that_leave_no_negatives(model):
    features = columns(model)
    loss = GCLLoss(model)
    equal = torch.ones(10, dtype=torch.int64)
    with pytest.warns(UserWarning, match="label column .* all 10 labels .* no negatives"):
        loss(copy.deepcopy(features), equal)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(copy.deepcopy(features), equal)  # once
        GCLLoss(model)(copy.deepcopy(features), torch.arange(10))
        alone = [{k: v[:1] if torch.is_tensor(v) else v for k, v in f.items()} for f in features]
        GCLLoss(model)(alone, equal[:1])


def test_shows_its_options(model):
    assert "scale=12.0, mini_batch_size=4, columns=None" in repr(
        GCLLoss(model, 12.0, mini_batch_size=4)
    )


@pytest.mark.parametrize("mini_batch_size", [None, 4])
def test_matryoshka(model, mini_batch_size):
    """Their wrapper's loss is the sum over its dimensions, of normalised prefixes."""
    features = columns(model)
    with torch.no_grad():
        e_i, e_t = (model(copy.deepcopy(f))["sentence_embedding"] for f in features)
        cut = [[F.normalize(e[:, :d], dim=-1) for e in (e_i, e_t)] for d in (24, 8)]
        expected = sum(gcl_kernels.gcl_loss(*both, logit_scale=20.0) for both in cut)
    loss = losses.MatryoshkaLoss(model, GCLLoss(model, mini_batch_size=mini_batch_size), [24, 8])
    got = gradients(loss, features)
    torch.testing.assert_close(got[0], expected, rtol=1e-5, atol=0)
    assert got[1]


ONE_STEP = {
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}
"""Arguments of either kind of trainer: the parameters move by the gradient."""


def in_order(dataset, batch_size, drop_last, **_):
    return DefaultBatchSampler(range(len(dataset)), batch_size, drop_last)


def train(trainer: type, model, data, folder, steps: int, **changed):
    """A trainer of one kind or the other, at SGD's rate of 1, after its steps."""
    arguments = {
        "per_device_train_batch_size": 16 // steps,
        "gradient_accumulation_steps": steps,
        **ONE_STEP,
    }
    if trainer is SentenceTransformerTrainer:
        kind = SentenceTransformerTrainingArguments
        arguments["batch_sampler"] = in_order
    else:
        kind = transformers.TrainingArguments
    given = kind(str(folder), **arguments | changed.pop("arguments", {}))
    done = trainer(model=model, args=given, train_dataset=data, **changed)
    done.train()
    return done


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_a_step_of_their_trainer(model, tmp_path, mini_batch_size, steps):
    """With gradient accumulation the step follows the mean of the batches' gradients."""
    named = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    parts = [
        gradients(Dense(model, 20.0), [model.preprocess(column[rows]) for column in given])[1]
        for given in [list(pairs(16).values())]
        for rows in (slice(i, i + 16 // steps) for i in range(0, 16, 16 // steps))
    ]
    model.zero_grad()
    loss = GCLLoss(model, mini_batch_size=mini_batch_size)
    data = Dataset.from_dict(pairs(16))
    train(SentenceTransformerTrainer, model, data, tmp_path, steps, loss=loss)
    expected = {name: sum(part[name] for part in parts) / steps for name in parts[0]}
    found = {name: before[name] - named[name].detach() for name in expected}
    assert_same((torch.tensor(0), found), (torch.tensor(0), expected), rtol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast"])
@pytest.mark.parametrize("mini_batch_size", [None, 8])
def test_trains_in_their_trainer(model, tmp_path, mini_batch_size, precision):
    """It learns, also by its evaluation loss, and the model card names it."""
    data = Dataset.from_dict(pairs(64))
    arguments = {
        "max_steps": 24,
        "optim": "adamw_torch",
        "learning_rate": 3e-3,
        "bf16": precision != "float32",
        "logging_steps": 4,
        "eval_strategy": "steps",
        "save_strategy": "no",
    }
    loss = GCLLoss(model, mini_batch_size=mini_batch_size)
    done = train(
        SentenceTransformerTrainer,
        model,
        data,
        tmp_path,
        2,
        loss=loss,
        eval_dataset=data,
        arguments=arguments,
    )
    for key in ("loss", "eval_loss"):
        logged = [row[key] for row in done.state.log_history if key in row]
        assert logged[-1] < 2 < 2.5 < logged[0], key
    model.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved/README.md").read_text()
    assert "GCLLoss" in card and '"other_positives": "compete"' in card


def test_meets_other_processes_only_if_asked(model, tmp_path):
    features = columns(model)
    alone = gradients(GCLLoss(model), features)
    loss = GCLLoss(model, gather_across_devices=True, exchange="ring")
    assert_same(gradients(loss, features), alone)  # one process: nothing to meet
    assert loss.loss.group is None
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        assert_same(gradients(loss, features), alone)
        assert loss.loss.group == "world" and loss.loss.exchange == "ring"
        gradients(unmet := GCLLoss(model), features)
        assert unmet.loss.group is None
    finally:
        torch.distributed.destroy_process_group()


def test_copies_and_has_a_state(model):
    loss = copy.deepcopy(GCLLoss(model, mini_batch_size=4, compute_dtype=torch.bfloat16))
    assert set(loss.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    assert loss.get_config_dict()["mini_batch_size"] == 4


def test_errors(model):
    features = columns(model)
    with pytest.raises(ValueError, match=r"expected 2 input columns .* or 3 .*, got 1"):
        GCLLoss(model)(features[:1])
    with pytest.raises(ValueError, match="got 4"):
        GCLLoss(model, mini_batch_size=2)(features * 2)
    with pytest.raises(ValueError, match="scale: expected a finite number > 0, got 0"):
        GCLLoss(model, 0)
    with pytest.raises(
        ValueError, match="mini_batch_size: expected None or an integer of at least 1, got 0"
    ):
        GCLLoss(model, mini_batch_size=0)
    with pytest.raises(ValueError, match="other_positives"):
        GCLLoss(model, other_positives="ignore")
    for names in (
        ("image", "image"),
        ("image",),
        ("image", "negative"),
        ("image", "text", "other"),
        ("image", "fused"),
    ):
        with pytest.raises(ValueError, match='columns: expected "image", "text" and'):
            GCLLoss(model, columns=names)
    with pytest.raises(ValueError, match="columns: expected 2 names for as many input columns"):
        GCLLoss(model, columns=("image", "text", "fused"))(features)
    words = Tokenizer(models.WordLevel({"w": 0}, unk_token="w"))
    static = SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=4)], device="cpu")
    with pytest.raises(ValueError, match="mini_batch_size: expected None with a StaticEmbedding"):
        GCLLoss(static, mini_batch_size=2)


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers.base.losses", None)
    spec = importlib.util.spec_from_file_location("without", adapter.__file__)
    with pytest.raises(ImportError, match=r'pip install "sentence-transformers\[train\]>=6"'):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# The page


def run_snippet(heading: str, block: int = 0, change=lambda code: code, **given) -> dict:
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    code = change(code_blocks(section)[block])
    namespace = {"torch": torch, "gcl_kernels": gcl_kernels, "math": math, "group": None, **given}
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace


def trainer_arguments(kind: type, folder, **changed):
    """Two batches of 8 a step, at SGD's rate of 1, or as changed; the best of what it saved."""
    given = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 2,
        **ONE_STEP,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "logging_steps": 1,
    }
    if kind is SentenceTransformerTrainingArguments:
        given["batch_sampler"] = in_order
    return kind(str(folder), **given | changed)


def assert_a_step(before: dict, after: dict, batches: list[dict]) -> None:
    """SGD at rate 1 takes off the mean of the batches' gradients."""
    expected = {name: sum(b[name] for b in batches) / len(batches) for name in batches[0]}
    found = {name: before[name] - after[name].detach() for name in expected}
    assert_same((torch.tensor(0), found), (torch.tensor(0), expected), rtol=1e-3)


def logged(trainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def test_page_sentence_transformers(model, tmp_path):
    """A step of two batches, an evaluation of two, and the best model at the end."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    given, held_out = pairs(16), pairs(16, seed=1)
    halves = slice(0, 8), slice(8, 16)
    losses, steps = zip(
        *(
            gradients(Dense(model, 20.0), [model.preprocess(c[rows]) for c in given.values()])
            for rows in halves
        ),
        strict=True,
    )
    model.zero_grad()
    got = run_snippet(
        "sentence-transformers",
        model=model,
        pairs=Dataset.from_dict(given),
        held_out_pairs=Dataset.from_dict(held_out),
        training_arguments=trainer_arguments(SentenceTransformerTrainingArguments, tmp_path),
    )["trainer"]
    after = dict(model.named_parameters())
    assert_a_step(before, after, steps)
    with torch.no_grad():
        model.eval()
        evaluated = [
            Dense(model, 20.0)([model.preprocess(c[rows]) for c in held_out.values()], None)
            for rows in halves
        ]
    assert logged(got, "loss") == [pytest.approx(float(sum(losses)) / 2, rel=1e-3)]
    assert logged(got, "eval_loss") == [pytest.approx(float(sum(evaluated)) / 2, rel=1e-3)]
    assert got.state.best_metric == logged(got, "eval_loss")[0]


@pytest.mark.parametrize("mini_batch_size", [None, 4])
def test_page_in_batch_retrieval_figures(model, caplog, mini_batch_size):
    """Of the embeddings that the loss was given, whether cached or not."""
    caplog.set_level(logging.INFO)
    loss = GCLLoss(model, mini_batch_size=mini_batch_size)
    run_snippet("In-batch retrieval figures", loss=loss)
    given = columns(model)
    with torch.no_grad():
        views = [model(copy.deepcopy(column))["sentence_embedding"] for column in given]
        loss(copy.deepcopy(given), None)
    assert not caplog.messages
    loss(copy.deepcopy(given), None).backward()
    ranks = gcl_kernels.positive_ranks(views, pool="union", fusion_weights=(1, 1))
    hit = gcl_kernels.hits(ranks).tolist()
    assert caplog.messages == [
        f"hit@1: image to text {hit[0][1]:.3f}, text to image {hit[1][0]:.3f}"
    ]


def test_page_ranking_losses(model):
    """The two tables are the two forms of sentence-transformers' loss."""
    ours = run_snippet("sentence-transformers", 1, model=model, GCLLoss=GCLLoss)
    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    features = columns(model)
    for name, options in (("one_way", {}), ("both_ways", both)):
        theirs = losses.MultipleNegativesRankingLoss(model, **options)
        assert_same(gradients(ours[name], features), gradients(theirs, features))


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory) -> str:
    """As a new one: at a scale of 1."""
    folder = str(tmp_path_factory.mktemp("siglip"))
    torch.manual_seed(0)
    text = TEXT | {"projection_size": 32}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    siglip = transformers.SiglipModel(config)
    assert siglip.logit_scale.exp() == 1  # what the page says
    siglip.save_pretrained(folder)
    return folder


def rows_for_trainer(folder: str, seed: int = 0) -> list[dict]:
    given = pairs(16, seed)
    preprocess = transformers.CLIPProcessor.from_pretrained(folder)
    rows = preprocess(
        images=given["image"], text=given["text"], return_tensors="pt", padding="max_length"
    )
    return [{key: value[i] for key, value in rows.items()} for i in range(16)]


def dense_clip(model, rows: list[dict]) -> torch.Tensor:
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    e_i = model.get_image_features(batch["pixel_values"]).pooler_output
    e_t = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    return dense([e_i, e_t], model.logit_scale.double().exp())


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_page_transformers(clip_folder, siglip_folder, tmp_path, kind):
    """A step of two batches, an evaluation of two, and the best model at the end."""
    folder = clip_folder if kind == "CLIPModel" else siglip_folder
    plain = getattr(transformers, kind).from_pretrained(folder).train()
    data, held_out = rows_for_trainer(clip_folder), rows_for_trainer(clip_folder, seed=1)
    batch_losses, steps = [], []
    for rows in (data[:8], data[8:]):
        plain.zero_grad()
        batch_losses.append(float((loss := dense_clip(plain, rows)).detach()))
        loss.backward()
        steps.append({k: p.grad.clone() for k, p in plain.named_parameters() if p.grad is not None})
    got = run_snippet(
        "transformers' `Trainer`",
        change=lambda code: code.replace("CLIPModel", kind),
        checkpoint=folder,
        pairs=data,
        held_out_pairs=held_out,
        training_arguments=trainer_arguments(transformers.TrainingArguments, tmp_path),
    )
    trainer, model = got["trainer"], got["model"]
    assert "logit_scale" in steps[0]
    assert_a_step(dict(plain.named_parameters()), dict(model.named_parameters()), steps)
    with torch.no_grad():
        evaluated = [float(dense_clip(model.eval(), rows)) for rows in (held_out[:8], held_out[8:])]
    assert logged(trainer, "loss") == [pytest.approx(sum(batch_losses) / 2, rel=1e-4)]
    assert logged(trainer, "eval_loss") == [pytest.approx(sum(evaluated) / 2, rel=1e-4)]
    saved = getattr(transformers, kind).from_pretrained(trainer.state.best_model_checkpoint)
    for name, p in saved.named_parameters():  # it loads as what it was
        torch.testing.assert_close(p, dict(model.named_parameters())[name], rtol=0, atol=0)


def test_page_transformers_best_model(clip_folder, tmp_path):
    """It learns, and the best of four evaluations comes back, not the last."""
    trainer = run_snippet(
        "transformers' `Trainer`",
        checkpoint=clip_folder,
        pairs=rows_for_trainer(clip_folder),
        held_out_pairs=rows_for_trainer(clip_folder, seed=1),
        training_arguments=trainer_arguments(
            transformers.TrainingArguments,
            tmp_path,
            max_steps=12,
            eval_steps=3,
            save_steps=3,
            learning_rate=3e-3,
            optim="adamw_torch",
            bf16=True,
        ),
    )["trainer"]
    trained, evaluated = logged(trainer, "loss"), logged(trainer, "eval_loss")
    assert len(evaluated) == 4 and trained[-1] < 0.8 * trained[0]
    assert trainer.state.best_metric == min(evaluated)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-5)


def test_page_transformers_bounds_the_scale(clip_folder, tmp_path):
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    model.logit_scale.data.fill_(6.0)
    model.save_pretrained(tmp_path / "steep")
    got = run_snippet(
        "transformers' `Trainer`",
        checkpoint=str(tmp_path / "steep"),
        pairs=rows_for_trainer(clip_folder),
        held_out_pairs=rows_for_trainer(clip_folder),
        training_arguments=trainer_arguments(
            transformers.TrainingArguments, tmp_path, learning_rate=0.0
        ),
    )
    assert got["model"].logit_scale.item() == pytest.approx(math.log(100))


def towers() -> torch.nn.Module:
    """Two matrices that embed two vectors, and a scale."""

    class Towers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.image, self.text = torch.nn.Linear(12, 8), torch.nn.Linear(10, 8)
            self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))

        def forward(self, image, text):
            return self.image(image), self.text(text), self.logit_scale.exp()

    return Towers()


def vectors(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 12, generator=g), torch.randn(n, 10, generator=g)


def dense_towers(model, image, text) -> dict[str, torch.Tensor]:
    """The gradients of one batch."""
    model.zero_grad()
    *e, scale = model(image, text)
    dense(e, scale.double()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("steps", [1, 2])
def test_page_accelerate(steps):
    model, batch = towers(), vectors(16)
    batches = list(zip(*(x.chunk(steps) for x in batch), strict=True))
    expected = [dense_towers(model, *part) for part in batches]
    model.zero_grad()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    GradientState._reset_state()  # of a trainer before, which stopped within its data
    run_snippet(
        "accelerate",
        accelerator=Accelerator(cpu=True, gradient_accumulation_steps=steps),
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        loader=batches,
    )
    assert model.logit_scale != before["logit_scale"]
    assert_a_step(before, dict(model.named_parameters()), expected)


def test_page_accelerate_bounds_the_scale():
    model = towers()
    model.logit_scale.data.fill_(6.0)
    run_snippet(
        "accelerate",
        accelerator=Accelerator(cpu=True),
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        loader=[vectors(16)],
    )
    assert model.logit_scale.item() == pytest.approx(math.log(100))


def test_page_gradient_caching():
    model, (image, text) = towers(), vectors(16)
    expected = dense_towers(model, image, text)
    model.zero_grad()
    batches = list(zip(image.split(5), text.split(5), strict=True))
    run_snippet("GradCache and loops of your own", model=model, batches=batches)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_page_queue():
    """The second batch meets the first's embeddings, and so on; the oldest leave."""
    model = towers()
    image, text = vectors(16)
    loader = list(zip(image.split(4), text.split(4), strict=True))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    dim = model(*loader[0])[0].shape[1]
    found = run_snippet(
        "A queue of negatives",
        change=lambda code: code.replace("[:4096]", "[:20]"),
        model=model,
        loader=loader,
        dim=dim,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
    )
    copy_of = towers()
    copy_of.load_state_dict(before)
    queue = torch.empty(0, dim)
    for images, texts in loader:
        e_i, e_t, scale = copy_of(images, texts)
        more = {"extra_negatives": queue} if len(queue) else {}
        loss = dense_gcl([e_i, e_t], scale, **more)
        copy_of.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in copy_of.parameters():
                parameter -= parameter.grad
        last = torch.nn.functional.normalize(torch.cat([e_i, e_t, e_i + e_t]).detach(), dim=1)
        queue = torch.cat([last, queue])[:20]
    torch.testing.assert_close(found["queue"], queue, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["loss"], loss, rtol=1e-4, atol=1e-5)


def on_half_of_the_batch(clip_folder: str, folder: str) -> dict:
    """What came of each snippet in one of two processes."""
    rank = int(os.environ["RANK"])
    trained = run_snippet(
        "transformers' `Trainer`",
        checkpoint=clip_folder,
        pairs=rows_for_trainer(clip_folder),
        held_out_pairs=rows_for_trainer(clip_folder, seed=1),
        training_arguments=trainer_arguments(
            transformers.TrainingArguments, folder, gradient_accumulation_steps=1
        ),
        group="world",
    )
    half = slice(8 * rank, 8 * rank + 8)
    image, text = (x[half] for x in vectors(16))
    model = towers()
    run_snippet(
        "accelerate",
        accelerator=Accelerator(cpu=True),
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        loader=[(image, text)],
        group="world",
    )
    caching = torch.nn.parallel.DistributedDataParallel(towers())
    run_snippet(
        "GradCache and loops of your own",
        model=caching,
        batches=list(zip(image.split(3), text.split(3), strict=True)),
        group="world",
    )
    return {
        "trainer": {k: p.detach() for k, p in trained["model"].named_parameters()},
        "eval_loss": logged(trained["trainer"], "eval_loss"),
        "accelerate": {k: p.detach() for k, p in model.named_parameters()},
        "caching": {k: p.grad for k, p in caching.module.named_parameters()},
    }


def test_page_in_two_processes(clip_folder, tmp_path):
    """A batch in two halves trains the snippets' models as the whole does."""
    found = run_as_of_torchrun(2, PACKAGES, on_half_of_the_batch, clip_folder, str(tmp_path))
    model = towers()
    gradient = dense_towers(model, *vectors(16))
    clip = transformers.CLIPModel.from_pretrained(clip_folder).train()
    dense_clip(clip, rows_for_trainer(clip_folder)).backward()
    of_clip = {name: p.grad for name, p in clip.named_parameters()}
    for of_rank in found:
        assert_a_step(dict(clip.named_parameters()), of_rank["trainer"], [of_clip])
        assert_a_step(dict(model.named_parameters()), of_rank["accelerate"], [gradient])
        for name, expected in gradient.items():
            torch.testing.assert_close(of_rank["caching"][name], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(of_rank["trainer"], found[0]["trainer"], rtol=0, atol=0)
    clip.load_state_dict(found[0]["trainer"])
    with torch.no_grad():
        evaluated = float(dense_clip(clip.eval(), rows_for_trainer(clip_folder, seed=1)))
    assert found[0]["eval_loss"] == [pytest.approx(evaluated, rel=1e-4)]
