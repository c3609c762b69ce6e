"""The demo: no leaks, texts that share no words, trees that say what they should, a short run."""

from __future__ import annotations

import dataclasses
import json
import sys
import zlib
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

# The examples are not installed: a bare `pytest` would not find them.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.emoji_retrieval import __main__ as entry

for package in entry.NEEDED:
    pytest.importorskip(package)

from examples.emoji_retrieval import systems  # noqa: E402
from examples.emoji_retrieval.baselines import baseline_hits  # noqa: E402
from examples.emoji_retrieval.data import EmojiData, TrainingBatches, full_text, load_data  # noqa: E402
from examples.emoji_retrieval.drawings import drawing_paths, load_drawings  # noqa: E402
from examples.emoji_retrieval.evaluate import CUTOFFS, POOLS, load_tasks, nine_tasks  # noqa: E402
from examples.emoji_retrieval.export import SIDES, drawing, export, other_side  # noqa: E402
from examples.emoji_retrieval.inventory import alike, distinct_keywords, load_concepts, words  # noqa: E402
from examples.emoji_retrieval.report import MODELS  # noqa: E402
from examples.emoji_retrieval.run import parse, run, run_from_command_line  # noqa: E402
from examples.emoji_retrieval.split import NEAR_DUPLICATE, drawing_distances, name_rule  # noqa: E402
from examples.emoji_retrieval.train import LOSSES, begin  # noqa: E402
from gcl_kernels.retrieval import evaluate, load_mmeb  # noqa: E402
from gcl_kernels.retrieval.datasets import MODALITIES  # noqa: E402
from gcl_kernels.retrieval.mbeir import TASKS  # noqa: E402

FEW = 20
"""Concepts of the trees here."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache) -> EmojiData:
    return load_data(cache)


def drawings(data: EmojiData) -> np.ndarray:
    return (data.images * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()


def test_no_group_straddles_the_split(data):
    groups = {
        part: set(data.split.group[data.split.part == part]) for part in ("train", "val", "test")
    }
    assert sum(map(len, groups.values())) == data.split.group.max() + 1
    for first, second in combinations(groups.values(), 2):
        assert not first & second
    assert {data.split.group[member] for group in data.split.train for member in group} == groups[
        "train"
    ]
    for part, chosen in (("val", data.split.val), ("test", data.split.test)):
        assert sorted(data.split.group[chosen]) == sorted(groups[part])


def test_variants_of_a_concept_share_a_group(data):
    number = {c.name: g for c, g in zip(data.concepts, data.split.group, strict=True)}
    for names in (
        ("farmer", "man farmer", "woman farmer"),
        ("person running", "man running", "woman running facing right"),
        ("man bald", "man red hair", "woman white hair"),
        ("blue heart", "green heart", "broken heart"),
        ("family man boy", "family man man girl girl", "couple with heart"),
        ("one o\u2019clock", "nine-thirty"),
        ("keycap 1", "keycap 9"),
        ("full moon", "crescent moon"),
        ("right arrow", "down-left arrow", "left arrow curving right"),
        ("open mailbox with raised flag", "closed mailbox with lowered flag"),
    ):
        assert len({number[name] for name in names}) == 1, names
    assert number["dog"] != number["cat"] != number["wolf"]


def test_no_near_duplicate_drawings_straddle_the_split(data):
    distances = drawing_distances(drawings(data))
    part = data.split.part
    apart = part[:, None] != part[None]
    assert distances[apart].min() >= NEAR_DUPLICATE
    # The measure sees duplicates at all: a drawing and the same drawing with a little noise.
    noisy = drawings(data)[:2].copy()
    noisy[1] = np.clip(
        noisy[0].astype(int) + np.random.default_rng(0).integers(-9, 10, noisy[0].shape), 0, 255
    )
    assert drawing_distances(noisy)[0, 1] < NEAR_DUPLICATE


def test_no_name_rule_straddles_the_split(data):
    parts: dict[str, set[str]] = {}
    for concept, part in zip(data.concepts, data.split.part, strict=True):
        parts.setdefault(name_rule(concept.name), set()).add(str(part))
    assert all(len(found) == 1 for found in parts.values())


def test_country_flags_are_left_out(data):
    names = {concept.name for concept in data.concepts}
    assert not names & {"france", "japan", "scotland"}
    assert "pirate flag" in names


def test_the_two_texts_share_no_word(data):
    for concept in data.concepts:
        assert len(concept.keywords) >= 2
        for word in words(concept.name):
            assert not any(alike(word, keyword) for keyword in concept.keywords)


def test_keywords_that_repeat_the_name_are_dropped():
    raw = ["smiling", "sunflower_seed", "sun", "flower", "emoji", "joy", "joyful", "u5272"]
    assert distinct_keywords("smile sunflower", raw) == ("joy",)
    assert distinct_keywords("sun", ["sunny", "star"]) == ("star",)


def test_drawings_come_from_the_cache(data, cache, monkeypatch):
    keys = [concept.key for concept in load_concepts(set(drawing_paths()))]
    monkeypatch.setattr("examples.emoji_retrieval.drawings.render", lambda paths: 1 / 0)
    assert np.array_equal(load_drawings(keys, cache), drawings(data))
    assert [path.suffix for path in cache.iterdir()] == [".npy"]


def test_batches_repeat_with_the_seed_and_hold_no_group_twice(data):
    batches = TrainingBatches(data, batch_size=32, steps=3, seed=1)
    first, again = list(batches), list(batches)
    other = next(iter(TrainingBatches(data, batch_size=32, steps=3, seed=2)))
    for (images, texts), (images_again, texts_again) in zip(first, again, strict=True):
        assert torch.equal(images, images_again)
        assert texts == texts_again and len(texts) == len(images)
        assert all(text[0].isupper() and text.endswith(".") for text in texts)
    assert first[0][0].shape == (32, 3, 64, 64)
    assert not torch.equal(first[0][0], other[0]) and first[0][1] != other[1]
    with pytest.raises(ValueError, match="batch size"):
        TrainingBatches(data, batch_size=10**6, steps=1, seed=0)


@pytest.fixture(scope="module")
def trees(data, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trees")
    export(data, data.split.test[:FEW], root)
    return root


@pytest.fixture(scope="module")
def tasks(trees):
    return load_tasks(trees)


def vector(text: str | None, image) -> np.ndarray:
    """[3] small integers of an item's content: exact sums, and ties."""
    content = (text or "").encode() + (image.tobytes() if image is not None else b"")
    return np.random.default_rng(zlib.crc32(content)).integers(-1, 2, 3) + 0.0


def integer_encoder(items) -> torch.Tensor:
    rows = np.stack([vector(item["text"], item["image"]) for item in items])
    return torch.from_numpy(rows)


def test_nine_tasks_against_brute_force(data, tasks):
    """Every side's query against every form of every concept, in float64, and ties lose."""
    held = data.split.test[:FEW]
    found = nine_tasks(integer_encoder, tasks)
    hits = {pool: np.zeros((3, 3, len(CUTOFFS))) for pool in POOLS}
    hits["any_form"] = np.zeros((3, len(CUTOFFS)))

    def unit(index: int, side: tuple[str, str], modality: str) -> np.ndarray:
        style, text = ("openmoji", "twemoji").index(side[0]), side[1]
        row = vector(
            full_text(data.concepts[index], text) if "t" in modality else None,
            drawing(data, index, style) if "i" in modality else None,
        )
        return row / max(np.linalg.norm(row), 1e-12)

    for side in SIDES:
        items = [(concept, form) for concept in range(FEW) for form in range(3)]
        pool = np.stack([unit(held[c], other_side(side), MODALITIES[form]) for c, form in items])
        for row, query in enumerate(MODALITIES):
            for concept in range(FEW):
                scores = (pool @ unit(held[concept], side, query)).round(9)
                ranks = []
                for column in range(3):
                    gold = scores[3 * concept + column]
                    beaten_by = {
                        pool_name: sum(
                            score >= gold
                            for (c, form), score in zip(items, scores, strict=True)
                            if (c, form) != (concept, column)
                            and (pool_name != "local" or form == column)
                            and (pool_name != "union_distinct" or c != concept)
                        )
                        for pool_name in POOLS
                    }
                    for pool_name, before in beaten_by.items():
                        hits[pool_name][row, column] += [before < k for k in CUTOFFS]
                    others = [s for (c, _), s in zip(items, scores, strict=True) if c != concept]
                    ranks.append(sum(score >= gold for score in others))
                hits["any_form"][row] += [min(ranks) < k for k in CUTOFFS]
    for name, count in hits.items():
        np.testing.assert_allclose(found[name], 100 * count / (len(SIDES) * FEW), err_msg=name)


def test_constant_embeddings_score_zero(tasks):
    few = nine_tasks(lambda items: torch.ones(len(items), 4), tasks)
    for name, values in few.items():
        assert not values[..., :2].any(), name


def test_the_mmeb_tree_is_the_first_sides_local_pools(trees, tasks):
    first = [task for task in tasks if task.pool == "local"][: len(TASKS)]
    theirs = [load_mmeb(trees / "mmeb", f"task{task}") for task in TASKS]
    assert [d.task for d in theirs] == [d.task for d in first] == list(TASKS.values())
    for mine, other in zip(
        evaluate(integer_encoder, first, progress=False),
        evaluate(integer_encoder, theirs, progress=False),
        strict=True,
    ):
        assert (mine["hit@1"], mine["mrr"]) == (other["hit@1"], other["mrr"]), mine.task


def test_text_and_pixels_alone_do_not_solve_the_tasks(data, tmp_path):
    export(data, data.split.test, tmp_path)
    hits = baseline_hits(data, data.split.test, load_tasks(tmp_path, ["local"]))
    assert hits["t->t, shared words"][0] < 5
    assert hits["t->t, shared letter trigrams"][0] < 10
    assert hits["i->i, pixels"][0] < 20


def test_transformers_tokenizer_of_clips_vocabulary():
    theirs = systems.clip_tokenizer()
    ours = systems.SimpleTokenizer(context_length=20)
    for text in ("Grinning face.", "A cat's 3 tears, joy?", "Pi\u00f1ata fiesta."):
        ids = theirs([text])["input_ids"][0]
        assert ids == ours([text])[0].tolist()[: len(ids)] and ids[-1] == 49407


def test_a_seed_is_a_start(data):
    for system in systems.SYSTEMS.values():
        small = dataclasses.replace(
            system, batch_size=4, alignment_steps=min(system.alignment_steps, 1)
        )
        first, again, other = (begin(small, s, data, "cpu").state_dict() for s in (3, 3, 4))
        assert all(torch.equal(first[key], again[key]) for key in first), system.title
        assert any(not torch.equal(first[key], other[key]) for key in first), system.title


def test_short_run_writes_everything(data, tmp_path, capsys, monkeypatch):
    few = dataclasses.replace(data.split, val=data.split.val[:6], test=data.split.test[:6])
    monkeypatch.setattr(
        "examples.emoji_retrieval.run.load_data", lambda cache: dataclasses.replace(data, split=few)
    )
    for name in ("VALIDATIONS", "TIMED_STEPS"):
        monkeypatch.setattr(f"examples.emoji_retrieval.train.{name}", 1)
    arguments = "--systems all --steps 2 --batch-size 8 --seeds 0 1 --device cpu".split()
    results = run(parse([*arguments, "--out", str(tmp_path / "out")]))
    assert set(results["systems"]) == set(systems.SYSTEMS)
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    printed = capsys.readouterr().out
    for name, system in systems.SYSTEMS.items():
        written = {path.name for path in (tmp_path / "out" / name).iterdir()}
        assert written == {
            "tables.md",
            *(f"{f}.png" for f in ("heatmaps", "pca", "similarity", "curves")),
        }
        assert "GCL \u2212 CL" in (tmp_path / "out" / name / "tables.md").read_text()
        hits = saved["systems"][name]["hits"]
        for model in MODELS:
            assert np.shape(hits[model]["local"]["per_seed"]) == (2, 3, 3, len(CUTOFFS))
            assert f"| {system.title:<8} | {model:<6} |" in printed
        for loss in LOSSES:
            assert len(saved["systems"][name]["histories"][loss][1]["loss"]) == 2
            assert 0 < saved["systems"][name]["loss share of a step"][loss]["share"] < 1


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(entry, "NEEDED", ("torch", "no_such_package"))
    with pytest.raises(SystemExit, match=r"no_such_package.*pip install -e .*\[demo\]"):
        entry.main()


def test_bad_options_are_refused(capsys):
    for wrong in (["--steps", "0"], ["--batch-size", "-1"]):
        with pytest.raises(SystemExit):
            run_from_command_line(wrong)
        assert "must be" in capsys.readouterr().err
