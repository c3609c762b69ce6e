"""gcl_kernels.integrations.sentence_transformers, and the snippets of docs/trainers.md."""

from __future__ import annotations

import copy
import importlib.util
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")

import transformers
from accelerate import Accelerator
from datasets import Dataset
from oracle import dense_loss
from PIL import Image
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
    """By definition, in float64; of two embeddings their sum is the third."""
    e = [x.double() for x in e]
    return dense_loss([*e, e[0] + e[1]] if len(e) == 2 else e, scale, **options)


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


@pytest.mark.parametrize("cached", [False, True])
def test_of_image_and_text_alone_it_is_the_symmetric_ranking_loss(model, cached):
    both_ways = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    theirs = (
        losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3, **both_ways)
        if cached
        else losses.MultipleNegativesRankingLoss(model, **both_ways)
    )
    ours = GCLLoss(model, mini_batch_size=3 if cached else None, **ONLY_ACROSS)
    features = columns(model)
    assert_same(gradients(ours, features), gradients(theirs, features))


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


def in_order(dataset, batch_size, drop_last, **_):
    return DefaultBatchSampler(range(len(dataset)), batch_size, drop_last)


def train(trainer: type, model, data, folder, steps: int, **changed):
    """A trainer of one kind or the other, at SGD's rate of 1, after its steps."""
    arguments = {
        "per_device_train_batch_size": 16 // steps,
        "gradient_accumulation_steps": steps,
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
    with pytest.raises((TypeError, ValueError), match="sample_ids"):
        GCLLoss(model)(features, torch.rand(10))
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


def run_snippet(heading: str, **given) -> dict:
    section = PAGE.read_text().split(f"\n## {heading}\n")[1]
    code = code_blocks(section)[0]
    namespace = {"torch": torch, "gcl_kernels": gcl_kernels, **given}
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace


def towers() -> torch.nn.Module:
    """Two matrices that embed two vectors."""

    class Towers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.image, self.text = torch.nn.Linear(12, 8), torch.nn.Linear(10, 8)

        def forward(self, image, text):
            return self.image(image), self.text(text)

    return Towers()


def vectors(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 12, generator=g), torch.randn(n, 10, generator=g)


def test_page_sentence_transformers(model, tmp_path):
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    data = Dataset.from_dict(pairs(8))
    got = run_snippet(
        "sentence-transformers", model=model, pairs=data, training_arguments=arguments
    )
    assert got["trainer"].state.global_step == 1


@pytest.mark.parametrize("steps", [1, 2])
def test_page_transformers(clip_folder, tmp_path, steps):
    """One step of SGD at rate 1 takes off the mean of the batches' gradients."""
    model = transformers.CLIPModel.from_pretrained(clip_folder).train()
    preprocess = transformers.CLIPProcessor.from_pretrained(clip_folder)
    given = pairs(16)
    rows = preprocess(
        images=given["image"], text=given["text"], return_tensors="pt", padding="max_length"
    )
    data = [{key: value[i] for key, value in rows.items()} for i in range(16)]
    for batch in torch.arange(16).chunk(steps):
        out = model(**{key: value[batch] for key, value in rows.items()})
        e = out.image_embeds, out.text_embeds
        dense(e, model.logit_scale.exp()).div(steps).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    train(run_snippet("transformers' `Trainer`")["GCLTrainer"], model, data, tmp_path, steps)
    found = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    assert_same((torch.tensor(0), found), (torch.tensor(0), expected), rtol=1e-3)


def test_page_accelerate():
    model = towers()
    batch = vectors(16)
    dense(model(*batch), 1 / 0.07).backward()
    expected = [p.detach() - p.grad for p in model.parameters()]
    model.zero_grad()
    run_snippet(
        "accelerate",
        accelerator=Accelerator(cpu=True),
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        loader=[batch],
    )
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-4, atol=1e-5)


def test_page_gradient_caching():
    model = towers()
    image, text = vectors(16)
    dense(model(image, text), 1 / 0.07).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    batches = list(zip(image.split(5), text.split(5), strict=True))
    run_snippet("GradCache and loops of your own", model=model, batches=batches)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
