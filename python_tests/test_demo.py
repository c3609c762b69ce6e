"""The demo: no leaks, two texts that share no words, exact metrics, a short run end to end."""

from __future__ import annotations

import dataclasses
import json
import sys
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

from examples.emoji_retrieval.baselines import baseline_recalls  # noqa: E402
from examples.emoji_retrieval.data import EmojiData, TrainingBatches, load_data  # noqa: E402
from examples.emoji_retrieval.drawings import drawing_paths, load_drawings  # noqa: E402
from examples.emoji_retrieval.evaluate import CUTOFFS, MODALITIES, ranks, task_recalls  # noqa: E402
from examples.emoji_retrieval.inventory import alike, distinct_keywords, load_concepts, words  # noqa: E402
from examples.emoji_retrieval.model import create_model, create_tokenizer  # noqa: E402
from examples.emoji_retrieval.run import TIMED, parse, run, run_from_command_line  # noqa: E402
from examples.emoji_retrieval.split import NEAR_DUPLICATE, drawing_distances, name_rule  # noqa: E402
from examples.emoji_retrieval.train import train  # noqa: E402


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


def test_text_and_pixels_alone_do_not_solve_the_tasks(data):
    recalls = baseline_recalls(data, data.split.test)
    assert recalls["t->t, shared words"][0] < 5
    assert recalls["t->t, shared letter trigrams"][0] < 10
    assert recalls["i->i, pixels"][0] < 20


def test_drawings_come_from_the_cache(data, cache, monkeypatch):
    keys = [concept.key for concept in load_concepts(set(drawing_paths()))]
    monkeypatch.setattr("examples.emoji_retrieval.drawings.render", lambda paths: 1 / 0)
    assert np.array_equal(load_drawings(keys, cache), drawings(data))
    assert [path.suffix for path in cache.iterdir()] == [".npy"]


def test_batches_repeat_with_the_seed_and_hold_no_group_twice(data):
    tokenizer = create_tokenizer()
    batches = TrainingBatches(data, tokenizer, batch_size=32, steps=3, seed=1)
    first, again = list(batches), list(batches)
    other = list(TrainingBatches(data, tokenizer, batch_size=32, steps=3, seed=2))
    assert all(
        torch.equal(a, b)
        for x, y in zip(first, again, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert not torch.equal(first[0][0], other[0][0])
    assert first[0][0].shape == (32, 3, 64, 64)
    with pytest.raises(ValueError, match="batch size"):
        TrainingBatches(data, tokenizer, batch_size=10**6, steps=1, seed=0)


def test_both_losses_start_from_the_same_weights():
    first, again, other = (create_model(seed, 0.07).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["text_projection"], other["text_projection"])


def test_gcl_trains_by_score_fusion_as_by_fused_features(data, monkeypatch):
    """Three steps have the losses that they have where the model fuses."""
    config = parse(["--steps", "3", "--batch-size", "16", "--device", "cpu"]).train["GCL"]
    config = dataclasses.replace(config, validations=1)
    few = dataclasses.replace(data, split=dataclasses.replace(data.split, val=data.split.val[:12]))
    by_score_fusion, history = train("GCL", 0, config, few, create_tokenizer())
    assert by_score_fusion.fuse_in_loss
    monkeypatch.setattr(
        "examples.emoji_retrieval.train.create_model",
        lambda seed, temperature, learnt, fuse_in_loss: create_model(seed, temperature, learnt),
    )
    by_model, expected = train("GCL", 0, config, few, create_tokenizer())
    assert not by_model.fuse_in_loss
    np.testing.assert_allclose(history.loss, expected.loss, rtol=1e-4)


def brute_force_rank(scores: list[float], positive: int, excluded: list[bool]) -> int:
    rank = 1
    for candidate, score in enumerate(scores):
        if candidate != positive and not excluded[candidate] and score >= scores[positive]:
            rank += 1
    return rank


def test_ranks_against_brute_force_with_ties_and_exclusion():
    generator = torch.Generator().manual_seed(0)
    # Few distinct values: most rows have ties.
    similarity = torch.randint(0, 5, (40, 12), generator=generator).float()
    positive = torch.randint(0, 12, (40,), generator=generator)
    excluded = torch.rand(40, 12, generator=generator) < 0.3
    excluded[torch.arange(40), positive] = False
    for mask in (torch.zeros_like(excluded), excluded):
        expected = [
            brute_force_rank(similarity[row].tolist(), int(positive[row]), mask[row].tolist())
            for row in range(40)
        ]
        assert ranks(similarity, positive, mask).tolist() == expected
    assert (
        ranks(similarity, positive).tolist()
        == ranks(similarity, positive, excluded * False).tolist()
    )


def test_constant_embeddings_score_zero():
    same = torch.ones(30, 4) / 2
    sides = {modality: same for modality in MODALITIES}
    for name, values in task_recalls(sides, sides).items():
        assert not values.any(), name


def test_ranks_refuse_what_would_rank_first_by_accident():
    with pytest.raises(ValueError, match="finite"):
        ranks(torch.tensor([[float("nan"), 1.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="in its pool"):
        ranks(torch.ones(1, 2), torch.tensor([0]), torch.tensor([[True, False]]))


def test_nine_tasks_against_brute_force():
    generator = torch.Generator().manual_seed(1)
    count = 15

    def side() -> dict[str, torch.Tensor]:
        # Small integers: exact sums, and ties.
        return {
            m: torch.randint(-1, 2, (count, 3), generator=generator).float() for m in MODALITIES
        }

    queries, candidates = side(), side()
    found = task_recalls(queries, candidates)
    items = [(modality, concept) for modality in MODALITIES for concept in range(count)]
    for row, query in enumerate(MODALITIES):
        best = [len(items) + 1] * count
        for column, target in enumerate(MODALITIES):
            rank: dict[str, list[int]] = {"local": [], "global": [], "global_distinct": []}
            for concept in range(count):
                scores = {
                    item: float(queries[query][concept] @ candidates[item[0]][item[1]])
                    for item in items
                }
                pools = {
                    "local": [item for item in items if item[0] == target],
                    "global": items,
                    "global_distinct": [
                        item for item in items if item[1] != concept or item[0] == target
                    ],
                }
                for pool, members in pools.items():
                    rank[pool].append(
                        1
                        + sum(
                            scores[item] >= scores[target, concept]
                            for item in members
                            if item != (target, concept)
                        )
                    )
                best[concept] = min(best[concept], rank["global"][-1])
            for pool, values in rank.items():
                expected = [100 * np.mean(np.array(values) <= k) for k in CUTOFFS]
                np.testing.assert_allclose(found[pool][row, column], expected)
        expected = [100 * np.mean(np.array(best) <= k) for k in CUTOFFS]
        np.testing.assert_allclose(found["any_modality"][row], expected)


def test_short_run_writes_everything(data, tmp_path, capsys, monkeypatch):
    few = dataclasses.replace(data.split, val=data.split.val[:12], test=data.split.test[:12])
    monkeypatch.setattr(
        "examples.emoji_retrieval.run.load_data", lambda cache: dataclasses.replace(data, split=few)
    )
    options = parse(
        ["--steps", "3", "--seeds", "0", "1", "--batch-size", "16", "--device", "cpu"]
        + ["--out", str(tmp_path / "out")]
    )
    once = {loss: dataclasses.replace(c, validations=1) for loss, c in options.train.items()}
    options = dataclasses.replace(options, train=once)
    results = run(options)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    names = ("heatmaps", "pca", "similarity", "curves")
    assert written == {"results.json", "tables.md", *(f"demo_{name}.png" for name in names)}
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["recall"]["GCL"]["global"]["mean"] == results["recall"]["GCL"]["global"]["mean"]
    assert np.shape(saved["recall"]["CL"]["local"]["per_seed"]) == (2, 3, 3, len(CUTOFFS))
    assert len(saved["histories"]["CL"][1]["loss"]) == 3
    printed = capsys.readouterr().out
    assert "GCL \u2212 CL" in printed
    assert set(saved["loss share of a step"]) == set(TIMED)
    for name, share in saved["loss share of a step"].items():
        assert 0 < share["share"] < 1
        assert f"{name}: {1e3 * share['loss_seconds']:.1f} ms" in printed


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(entry, "NEEDED", ("torch", "no_such_package"))
    with pytest.raises(SystemExit, match=r"no_such_package.*pip install -e .*\[demo\]"):
        entry.main()


def test_bad_options_are_refused(capsys):
    for wrong in (["--steps", "0"], ["--temperature", "-1"]):
        with pytest.raises(SystemExit):
            run_from_command_line(wrong)
        assert "must be" in capsys.readouterr().err
