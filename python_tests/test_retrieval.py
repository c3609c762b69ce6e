"""Retrieval: figures against a count of another kind, rules, faults, cache, command line."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from retrieval_trees import (
    COVR_CSV,
    DIM,
    MBEIR,
    TIDY_PROMPTS,
    Case,
    encode,
    text_embedding,
    tree,
    unit_embedding,
    write_coco,
    write_covr,
    write_image,
)
from small_models import replace_released_eva, save_small_vista

for package in ("PIL", "pyarrow", "pytrec_eval", "tqdm"):
    pytest.importorskip(package)

import pytrec_eval  # noqa: E402
from PIL import Image  # noqa: E402

from gcl_kernels import retrieval  # noqa: E402
from gcl_kernels.retrieval import (  # noqa: E402
    DataError,
    JointEncoder,
    OpenCLIPEncoder,
    RetrievalDataset,
    evaluate,
    load_coco,
    load_covr,
    load_mbeir,
    load_mmeb,
    search,
)
from gcl_kernels.retrieval.__main__ import main  # noqa: E402
from gcl_kernels.retrieval.text import covr_edit, tidy  # noqa: E402

ROOT = Path(__file__).parent.parent
CUTOFFS = (1, 5, 10, 20, 50)


# Figures: every format, every kind of task


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trees")


@pytest.fixture(scope="module")
def tasks(trees) -> dict[str, tuple[RetrievalDataset, Case]]:
    """By title, what the readers make of the trees and what the trees hold."""
    cases = {kind: tree(kind, trees / kind) for kind in ("mbeir", "mmeb", "covr", "coco")}
    pairs = [(load_mbeir(trees / "mbeir", *key), case) for key, case in cases["mbeir"].items()]
    pairs += [(load_mmeb(trees / "mmeb", subset), case) for subset, case in cases["mmeb"].items()]
    pairs += [(load_covr(trees / "covr"), cases["covr"])]
    json_path = trees / "coco/captions.json"
    for direction, case in cases["coco"].items():
        pairs.append((load_coco(json_path, trees / "coco", direction), case))
    return {dataset.title: (dataset, case) for dataset, case in pairs}


@pytest.fixture(scope="module")
def results(tasks) -> dict[str, retrieval.Result]:
    made = evaluate(encode, [dataset for dataset, _ in tasks.values()], CUTOFFS, progress=False)
    return dict(zip(tasks, made, strict=True))


TITLES = [f"{name} ({pool})" for name in MBEIR for pool in ("local", "union")]
TITLES += ["Answers", "Pictures", "Pairs", COVR_CSV.removesuffix(".csv")]
TITLES += [f"captions_{direction}" for direction in ("t2i", "i2t", "t2t", "t2it", "it2t")]


@pytest.mark.parametrize("title", TITLES)
def test_a_reader_finds_what_the_files_say(tasks, title):
    dataset, case = tasks[title]
    for items, contents in ((dataset.queries, case.queries), (dataset.candidates, case.candidates)):
        found = [items[i] for i in range(len(items))]
        assert {item["id"]: (item["text"], item["images"]) for item in found} == contents
    assert {qid: set(dids) for qid, dids in dataset.positives().items()} == case.positives
    for qid in case.queries:
        listed = (dataset.candidate_lists or {}).get(qid, dataset.candidates.ids)
        within = set(listed) - set(dataset.exclude.get(qid, ()))
        assert within == set(case.within.get(qid, case.candidates))


def counted(case: Case, embed=unit_embedding) -> dict[str, dict[str, float]]:
    """Each query's figures: all scores in float64, sorted as a list, positives last of equals."""
    sides = [{id: embed(content) for id, content in contents.items()}
             for contents in (case.queries, case.candidates)]  # fmt: skip
    figures = {}
    for qid, query in sides[0].items():
        positives = case.positives[qid]
        scored = [
            (-round(float(query @ sides[1][did]), 9), did in positives)
            for did in case.within.get(qid, case.candidates)
        ]
        hits = [positive for _, positive in sorted(scored)]
        figures[qid] = {"mrr": 1 / (hits.index(True) + 1) if any(hits[:50]) else 0.0}
        for k in CUTOFFS:
            figures[qid][f"hit@{k}"] = float(any(hits[:k]))
            figures[qid][f"recall@{k}"] = sum(hits[:k]) / len(positives)
    return figures


@pytest.mark.parametrize("title", TITLES)
def test_figures_are_those_of_a_dense_count(tasks, results, title):
    expected = counted(tasks[title][1])
    result = results[title]
    assert result.per_query.keys() == expected.keys()
    for qid, figures in expected.items():
        assert result.per_query[qid] == pytest.approx(figures, abs=1e-6)
    for name in figures:
        assert result[name] == pytest.approx(np.mean([f[name] for f in expected.values()]))


def test_the_trees_are_neither_trivial_nor_hopeless(results):
    """So that an error in a rule moves a figure."""
    for title, result in results.items():
        assert 0 < result["mrr"] < 1 or title == "captions_it2t", title
    assert len({result["mrr"] for result in results.values()}) > len(results) / 2


def test_tasks_and_cutoffs_are_the_benchmarks(tasks):
    task = {name: tasks[f"{name} (local)"][0].task for name in MBEIR}
    assert task["cirr_task7"] == "it->i" and task["mscoco_task3"] == "i->t"
    assert task["edis_task2"] == "t->it" and task["oven_task8"] == "it->it"
    cirr, union = (tasks[f"cirr_task7 ({pool})"][0] for pool in ("local", "union"))
    assert (cirr.cutoffs, cirr.main_cutoff, union.main_cutoff) == ((1, 5, 10), 5, 50)
    fashion = tasks["fashion200k_task0 (local)"][0]
    assert (fashion.cutoffs, fashion.main_cutoff) == ((10, 20, 50), 10)
    assert len(fashion.candidates) < fashion.main_cutoff  # searched whole
    assert tasks["oven_task6 (local)"][0].left_out["positives of other data sets"] == 3
    assert tasks["Answers"][0].task == "it->t" and tasks["Pictures"][0].task == "t->i"
    assert tasks[COVR_CSV.removesuffix(".csv")][0].cutoffs == (1, 5, 10, 50)


def test_a_run_file_is_what_trec_eval_reads(results, tmp_path):
    written = retrieval.save_runs([*results.values()], tmp_path / "all.trec")
    for path, result in zip(written, results.values(), strict=True):
        with open(path) as run, open(path.with_suffix(".qrels")) as qrels:
            parsed, judged = pytrec_eval.parse_run(run), pytrec_eval.parse_qrel(qrels)
        evaluator = pytrec_eval.RelevanceEvaluator(judged, {"success.5", "recall.10"})
        theirs = evaluator.evaluate(parsed)
        for ours, name in (("hit@5", "success_5"), ("recall@10", "recall_10")):
            assert np.mean([f[name] for f in theirs.values()]) == pytest.approx(result[ours])
        assert parsed == {qid: pytest.approx(scores) for qid, scores in result.run.items()}


# Rules


def test_mbeirs_texts_are_tidied():
    assert [tidy(text) for text in (None, "", ' "', "a", ' "b c!" ', "d\r e?", 'say "f"')] == [
        "", "", "", "A.", "B c!", "D e?", 'Say "f.',
    ]  # fmt: skip
    assert covr_edit('Make: "It"  (RED)!\n') == "make it red"
    assert covr_edit(" ".join(map(str, range(40)))) == " ".join(map(str, range(30)))


@pytest.mark.parametrize("instructions", ["first", 3, 4])
def test_an_instruction_goes_before_a_query(trees, tasks, instructions):
    drawn = set()
    for name in MBEIR:
        plain = tasks[f"{name} (local)"][1].queries
        dataset = load_mbeir(trees / "mbeir", name, "local", instructions)
        again = load_mbeir(trees / "mbeir", name, "union", instructions)
        for i in range(len(dataset.queries)):
            item = dataset.queries[i]
            assert item == again.queries[i]  # the draw is by the query, not by the pool
            text, images = plain[item["id"]]
            assert item["images"] == images  # with an image alone it is fused now
            prompt = next(p for p in TIDY_PROMPTS if item["text"].startswith(p))
            drawn.add(prompt)
            # Raw after the prompt: only the end of the text is tidied.
            rest = item["text"].removeprefix(prompt).replace('"', "").strip(" .").lower()
            assert rest == (text or "").strip(".").lower()
        assert dataset.candidates is tasks[f"{name} (local)"][0].candidates
    assert drawn == ({TIDY_PROMPTS[0]} if instructions == "first" else {*TIDY_PROMPTS})


def test_the_order_of_covrs_rows_changes_nothing(trees, results, tmp_path):
    expected = results[COVR_CSV.removesuffix(".csv")]
    for seed in range(3):
        case = write_covr(trees / "covr", seed, name=f"shuffled{seed}.csv")
        result = evaluate(encode, load_covr(trees / "covr", f"shuffled{seed}.csv"), progress=False)
        assert dict(result.metrics) == pytest.approx(dict(expected.metrics))
        assert result["hit@1"] == np.mean([f["hit@1"] for f in counted(case).values()])


def test_a_target_clip_may_be_its_middle_frame(trees, tasks):
    case = tasks[COVR_CSV.removesuffix(".csv")][1]
    middle = {d: (t, (f[len(f) // 2],)) for d, (t, f) in case.candidates.items()}
    result = evaluate(encode, load_covr(trees / "covr", frames="middle"), progress=False)
    expected = counted(Case(case.queries, middle, case.positives, case.within))
    assert result["mrr"] == pytest.approx(np.mean([f["mrr"] for f in expected.values()]))


def test_cocos_official_form_is_karpathys(trees, results, tmp_path):
    write_coco(tmp_path, official=True)
    for direction in ("t->i", "it->t"):
        dataset = load_coco(tmp_path / "captions.json", tmp_path, direction)
        result = evaluate(encode, dataset, progress=False)
        expected = results[f"captions_{direction.replace('->', '2')}"]
        assert result.per_query == expected.per_query


def constant(items: list[dict]) -> torch.Tensor:
    """What a collapsed model gives; a direction whose float32 products are not exact."""
    return torch.linspace(0.1, 0.7, 37).expand(len(items), -1)


def test_equal_scores_lose(tasks, monkeypatch):
    """Of n equal candidates the positive is the last."""
    monkeypatch.setattr(search, "CHUNK", 13)
    monkeypatch.setattr(search, "QUERIES", 3)
    for method in methods():
        made = evaluate(
            constant, [d for d, _ in tasks.values()], progress=False, dtype=torch.float16,
            search=method,
        )  # fmt: skip
        for result, (dataset, case) in zip(made, tasks.values(), strict=True):
            for qid, figures in result.per_query.items():
                n = len(case.within.get(qid, case.candidates))
                others = n - len(case.positives[qid])
                for k in (1, 5, 10):
                    assert figures[f"hit@{k}"] == (others < k), (dataset.title, qid)
                if dataset.candidate_lists is not None:  # MMEB: the gold comes last of n
                    assert figures["mrr"] == pytest.approx(1 / n)
                    assert figures["hit@1"] == (n == 1)


def test_a_candidate_like_the_positive_stands_before_it():
    texts = {"a": "one", "b": "one", "c": "two", "q": "one or two"}
    items = {id: {"id": id, "text": text} for id, text in texts.items()}
    for positive in ("a", "b"):
        dataset = RetrievalDataset(
            "twins", "t->t", [items["q"]], [items[id] for id in "abc"], {"q": {positive: 1}}
        )
        result = evaluate(encode, dataset, progress=False)
        assert result.ranking["q"].index(positive) == 1 + result.ranking["q"].index(
            "b" if positive == "a" else "a"
        )


def test_search_is_exact(device, monkeypatch):
    """Of many chunks, with pairs left out, and more dimensions than candidates."""
    monkeypatch.setattr(search, "CHUNK", 31)
    monkeypatch.setattr(search, "QUERIES", 7)
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((230, 40)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    places = generator.permutation(230)
    queries, candidates = search.Side(rows, places[:30]), search.Side(rows, places[20:])
    scores = rows[places[:30]].astype(float) @ rows[places[20:]].astype(float).T
    barred = np.nonzero(generator.random(scores.shape) < 0.2)
    scores[barred] = -np.inf
    expected = np.argsort(-scores, axis=1)[:, : 10 + search.MARGIN]
    for method in methods():
        found = search.nearest(queries, candidates, barred, 10, device, method)
        pairs = set(zip(*(side.tolist() for side in found), strict=True))
        assert pairs == {(q, c) for q, row in enumerate(expected.tolist()) for c in row}
        exact = search.scores_of(queries, candidates, found)
        np.testing.assert_allclose(exact, scores[found], rtol=1e-12)
        order = search.ranked(found, exact, np.zeros(len(exact), bool), 10)
        np.testing.assert_array_equal(np.stack(order), expected[:, :10])


def test_scores_nearer_than_float32_tells_apart_are_ordered(device):
    """Ten candidates before the positive and ten behind it, by less than a rounding."""
    base = np.random.default_rng(1).standard_normal(40).astype(np.float32)
    base /= np.linalg.norm(base)
    rows = np.stack([base] * 23)
    for i in range(20):
        away = np.inf if (i < 10) == (base[i] > 0) else -np.inf
        rows[i, i] = np.nextafter(base[i], np.float32(away))
    rows[22] = -base
    exact = rows[:21].astype(float) @ base.astype(float)
    assert exact[:10].min() > exact[20] > exact[10:20].max() and np.ptp(exact) < 1e-7
    query, candidates = search.Side(rows, np.array([21])), search.Side(rows, np.r_[:21, 22])
    positive = np.array([0]), np.array([20])
    for method in methods():
        others = search.nearest(query, candidates, positive, 10, device, method)
        pairs = tuple(np.concatenate(both) for both in zip(others, positive, strict=True))
        is_positive = np.arange(len(pairs[0])) == len(others[0])
        (order,) = search.ranked(pairs, search.scores_of(query, candidates, pairs), is_positive, 20)
        assert order.tolist().index(20) == 10 and set(order[:10].tolist()) == {*range(10)}


def methods() -> list[str]:
    with contextlib.suppress(ImportError):
        import faiss  # noqa: F401

        return ["torch", "faiss"]
    return ["torch"]


def test_faiss_finds_the_same(tasks, results):
    pytest.importorskip("faiss")
    title = "oven_task6 (union)"
    result = evaluate(encode, tasks[title][0], progress=False, search="faiss")
    assert result.ranking == results[title].ranking


# Faults


def edit(path: str, old: str, new: str, count: int = 1):
    """A change of a file of a tree."""

    def change(root: Path) -> None:
        text = (root / path).read_text()
        assert old in text
        (root / path).write_text(text.replace(old, new, count))

    return change


def remove(path: str):
    def change(root: Path) -> None:
        target = root / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return change


def parquet(column: str, value):
    """Another value in the third row of the subset with text targets."""

    def change(root: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        path = root / "Answers/test/0000.parquet"
        rows = pyarrow.parquet.read_table(path).to_pylist()
        rows[2][column] = value
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    return change


QUERY = "query/test/mbeir_cirr_task7_test.jsonl"
QRELS = "qrels/test/mbeir_cirr_task7_test_qrels.txt"
POOL = "cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl"
TSV = "instructions/query_instructions.tsv"
FAULTS = {
    "no query file": ("mbeir", remove(QUERY), f"{QUERY}: No such file"),
    "no qrels": ("mbeir", remove(QRELS), f"{QRELS}: No such file"),
    "no pool": ("mbeir", remove(POOL), f"{POOL}: No such file"),
    "no instructions": ("mbeir", remove(TSV), f"{TSV}: No such file"),
    "a query's image": (
        "mbeir",
        remove("mbeir_images/cirr_task7/2_12.png"),
        rf"{QUERY}:3: missing or empty image .*2_12.png",
    ),
    "a candidate's image": (
        "mbeir",
        remove("mbeir_images/cirr_task7/1_0.png"),
        rf"{POOL}:4: missing or empty image .*1_0.png",
    ),
    "cut JSON": ("mbeir", edit(POOL, ', "src_content": null}', "", 2), f"{POOL}:1: "),
    "no object": ("mbeir", edit(QUERY, "\n", "\n7\n"), rf"{QUERY}:2: expected an object, got 7"),
    "no id": ("mbeir", edit(POOL, '"8:2"', "null"), f"{POOL}:2: expected an id .* got None"),
    "an id twice": ("mbeir", edit(POOL, '"8:2"', '"8:1"'), rf"{POOL}:2: 8:1 again, after .*:1$"),
    "a modality": ("mbeir", edit(POOL, '"image"', '"video"'), f"{POOL}:1: expected a modality"),
    "nothing to encode": (
        "mbeir",
        edit(POOL, '"mbeir_images/cirr_task7/0_2.png"', "null"),
        f"{POOL}:3: 8:3 has neither",
    ),
    "positives": (
        "mbeir",
        edit(QUERY, '{"did": "8:', '{"id": "8:'),
        f"{QUERY}:1: expected ids in pos_cand_list",
    ),
    "four columns": ("mbeir", edit(QRELS, " 7\n", "\n"), f"{QRELS}:1: expected 'qid 0 did rele"),
    "no number": ("mbeir", edit(QRELS, " 1 7\n", " yes 7\n"), rf"{QRELS}:\d: expected 'qid 0 did"),
    "an unknown candidate": ("mbeir", edit(QRELS, "8:5\t", "8:99\t"), rf"{QRELS}:\d+: 8:99 is not"),
    "an unknown query": (
        "mbeir",
        edit(QRELS, "8:1 0 8:", "8:77 0 8:1 1 7\n8:1 0 8:"),
        f"{QRELS}:1: query 8:77 is not in .*{QUERY}",
    ),
    "a query without a positive": (
        "mbeir",
        edit(QRELS, " 1 7\n", " 0 7\n"),
        f"{QUERY}:1: query 8:1 has no positive",
    ),
    "another task in the qrels": (
        "mbeir",
        edit(QRELS, " 1 7\n", " 1 6\n"),
        "expected task 7, got 6",
    ),
    "another task in the queries": (
        "mbeir",
        edit(QUERY, '"task_id": 7', '"task_id": 3'),
        f"{QUERY}:2: expected task 7, got 3",
    ),
    "the header": ("mbeir", edit(TSV, "dataset_name", "name"), f"{TSV}:1: expected columns"),
    "a kind of query": (
        "mbeir",
        edit(TSV, "cirr\t8", "cirr\t88"),
        f"{TSV}: no prompt for data set 8, query image,text, candidate image of .*{QUERY}:1",
    ),
    "no subset": ("mmeb", remove("Answers"), "Answers/test: no parquet files"),
    "no parquet": (
        "mmeb",
        lambda root: (root / "Answers/test/0000.parquet").write_text("no"),
        "0000.parquet: ",
    ),
    "lengths": (
        "mmeb",
        parquet("tgt_img_path", ["", ""]),
        "0000.parquet, row 3: 6 entries in tgt_text, 2 in tgt_img_path",
    ),
    "a picture": (
        "mmeb",
        parquet("qry_img_path", "x.png"),
        "row 3: missing or empty image .*x.png",
    ),
    "a number": ("mmeb", parquet("tgt_text", None), "row 3: c.* neither a text nor an image"),
    "no csv": ("covr", remove(COVR_CSV), f"{COVR_CSV}: No such file"),
    "a column": ("covr", edit(COVR_CSV, "pth2", "path2"), f"{COVR_CSV}:1: no column pth2"),
    "a value": ("covr", edit(COVR_CSV, "003/997", ""), f"{COVR_CSV}:.: expected one value"),
    "a clip": ("covr", remove("003/997"), rf"{COVR_CSV}:3: no frames in .*003.997"),
    "own target": (
        "covr",
        edit(COVR_CSV, "000/1000,001/999", "000/1000,000/1000"),
        f"{COVR_CSV}:2: clip 000/1000 is its own",
    ),
    "no captions": ("coco", remove("captions.json"), "captions.json: No such file"),
    "broken captions": ("coco", edit("captions.json", "[{", "[{,"), "captions.json:1: Expecting"),
    "a caption": (
        "coco",
        edit("captions.json", '"c1 shown 0 times"', "7"),
        "captions.json, entry 2: expected an image's path and captions",
    ),
    "an image": (
        "coco",
        remove("val/image 4.png"),
        "captions.json, entry 5: missing or empty image .*image 4.png",
    ),
    "an annotation": (
        "official",
        edit("captions.json", '"image_id": 101', '"image_id": 7'),
        "captions.json, annotation 7: unknown image 7",
    ),
}


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("official")
    write_coco(root, official=True)
    return root


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_file_and_line(trees, tasks, official, tmp_path, fault):
    kind, change, message = FAULTS[fault]
    root = tmp_path / "tree"
    shutil.copytree(official if kind == "official" else trees / kind, root)
    change(root)
    with pytest.raises(DataError, match=message):
        if kind == "mbeir":
            load_mbeir(root, "cirr_task7", "local", "first")
        elif kind == "mmeb":
            load_mmeb(root, "Answers")
        elif kind == "covr":
            load_covr(root)
        else:
            load_coco(root / "captions.json", root)


def test_what_is_missing_can_be_left_out(trees, tasks, tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(trees, root)
    images = root / "mbeir/mbeir_images/cirr_task7"
    (images / "2_12.png").unlink()  # a query's
    (images / "1_0.png").unlink()
    for drawing in range(3):
        (images / f"0_{drawing}.png").unlink()  # all that the first query could find
    dataset = load_mbeir(root / "mbeir", "cirr_task7", skip_missing=True)
    assert len(dataset.queries) == 5 and len(dataset.candidates) == 17
    assert dataset.left_out["candidates"] == 4 and dataset.left_out["queries"] == 1
    assert dataset.left_out["queries without a positive"] == 1
    assert dataset.left_out["positives"] >= 1
    result = evaluate(encode, dataset, progress=False)
    assert "cirr_task7 (local): left out 4 candidates" in retrieval.report_tables([result])

    (root / "mmeb/images/1_2.png").unlink()  # the gold of one row, a candidate of three
    dataset = load_mmeb(root / "mmeb", "Pictures", skip_missing=True)
    assert dataset.left_out == {"queries without a positive": 1, "candidates": 1}
    assert sorted(map(len, dataset.candidate_lists.values())) == [3, 3, 3, 4, 4]

    shutil.rmtree(root / "covr/003/997")
    dataset = load_covr(root / "covr", skip_missing=True)
    assert dataset.left_out["rows"] == 9 - len(dataset.queries) == 2

    (root / "coco/val/image 4.png").unlink()
    for direction, queries in (("t->i", 11), ("i->t", 5), ("t->it", 6), ("it->t", 3)):
        dataset = load_coco(root / "coco/captions.json", root / "coco", direction, True)
        assert dataset.left_out["images"] == 1 and len(dataset.queries) == queries
        assert not any("image%204" in did for did in dataset.candidates.ids)


def test_a_dataset_by_hand_is_checked(trees, tasks):
    image = write_image(trees / "by_hand.png", 1, 2)
    queries = [{"id": "q", "text": "what?"}]
    candidates = [{"id": "a", "image": image}, {"id": "b", "image": [image, image], "text": "two"}]
    qrels = {"q": {"a": 1, "b": 0}}
    result = evaluate(encode, RetrievalDataset("hand", "t->it", queries, candidates, qrels))
    assert result["recall@5"] == 1
    for changes, message in (
        ({"task": "t->video"}, "hand: expected a task"),
        ({"queries": []}, "hand queries: no queries"),
        ({"queries": queries * 2}, "hand queries, item 2: q again"),
        ({"qrels": {}}, "hand queries, item 1: query q has no positive"),
        ({"qrels": {"q": {"a": 0}}}, "query q has no positive"),
        ({"qrels": {"q": {"c": 1}}}, "unknown candidate c"),
        ({"qrels": {**qrels, "p": {"a": 1}}}, "qrels name an unknown query p"),
        ({"exclude": {"q": ["a"]}}, "is not searched in its positive a"),
        ({"candidate_lists": {"q": ["b"]}}, "is not searched in its positive a"),
        ({"candidate_lists": {"q": ["a", "a"]}}, "lists a candidate twice"),
        ({"candidates": [{"id": "a b", "text": "x"}]}, "expected an id without white space"),
        ({"candidates": [{"id": "a", "text": 3}]}, "expected a text, got 3"),
    ):
        given = dict(name="hand", task="t->it", queries=queries, candidates=candidates, qrels=qrels)
        with pytest.raises(DataError, match=re.escape(message)):
            RetrievalDataset(**{**given, **changes})


def test_bad_embeddings_are_errors(tasks):
    dataset, _ = tasks["cirr_task7 (local)"]
    for value in (torch.nan, torch.inf):

        def broken(items, value=value):
            rows = encode(items)
            rows[-1, 0] = value
            return rows

        with pytest.raises(DataError, match=r"_cand_pool.jsonl:4: the embedding of 8:4 is not fin"):
            evaluate(broken, dataset, batch_size=4, progress=False)
    for wrong in (lambda items: encode(items)[:-1], lambda items: encode(items).numpy()):
        with pytest.raises(DataError, match=r"encoder: expected a tensor of shape \(4, D\), got"):
            evaluate(wrong, dataset, batch_size=4, progress=False)
    huge = evaluate(lambda items: encode(items).float() * 1e30, dataset, progress=False)
    assert huge["mrr"] == evaluate(encode, dataset, progress=False)["mrr"]
    for options, name in (
        ({"k": []}, "k"),
        ({"batch_size": 0}, "batch_size"),
        ({"workers": 0}, "workers"),
        ({"dtype": torch.int8}, "dtype"),
        ({"search": "ann"}, "search"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            evaluate(encode, dataset, **options)
    for loader, given in (
        (load_mbeir, ("x", "y", "global")),
        (load_mbeir, ("x", "y", "local", "2")),
        (load_covr, ("x", "y", "last")),
        (load_coco, ("x", "y", "i->i")),
    ):
        with pytest.raises(ValueError, match="expected"):
            loader(*given)


def test_an_unreadable_image_is_named(tmp_path):
    path = write_image(tmp_path / "a.png", 1, 2)
    Path(path).write_bytes(Path(path).read_bytes()[:50])
    sides = [[{"id": "q", "text": "x"}], [{"id": "a", "image": path}]]
    dataset = RetrievalDataset("broken", "t->i", *sides, {"q": {"a": 1}})
    with pytest.raises(DataError, match=r"broken candidates, item 1: cannot read image .*a.png"):
        evaluate(encode, dataset, progress=False)


# The cache


class Counting:
    """Counts what it embeds, and in how many calls."""

    def __init__(self, shift: float = 0.0) -> None:
        self.items = 0
        self.calls = 0
        self.shift = shift

    def __call__(self, items):
        self.calls += 1
        self.items += len(items)
        return encode(items) + self.shift


PROBES = 6
"""Items that are embedded to tell encoders apart: three, twice."""


def contents(datasets) -> int:
    """How many different ones there are."""
    found = set()
    for dataset in datasets:
        for items in (dataset.queries, dataset.candidates):
            each = map(items.__getitem__, range(len(items)))
            found |= {(item["text"], item["images"]) for item in each}
    return len(found)


def test_what_pools_and_tasks_share_is_embedded_once(tasks):
    datasets = [tasks[f"{name} ({pool})"][0] for name in MBEIR for pool in ("local", "union")]
    union = {id(d.candidates) for d in datasets if d.pool == "union"}
    assert len(union) == 1  # and is in memory once
    encoder = Counting()
    evaluate(encoder, datasets, batch_size=16, progress=False)
    distinct = contents(datasets)
    assert encoder.items == distinct < sum(len(d.queries) + len(d.candidates) for d in datasets) / 3
    assert encoder.calls == -(-distinct // 16)


def test_a_killed_run_goes_on(trees, tasks, results, tmp_path):
    script = f"""
import os, sys, retrieval_trees
from gcl_kernels.retrieval import evaluate, load_mbeir

class Counting:
    calls = 0
    def __call__(self, items):
        self.calls += 1
        if self.calls > {PROBES} + 3:
            os._exit(9)
        return retrieval_trees.encode(items)

datasets = [load_mbeir(sys.argv[1], name) for name in ("cirr_task7", "oven_task6")]
evaluate(Counting(), datasets, batch_size=8, embeddings=sys.argv[2], progress=False)
"""
    store = tmp_path / "store"
    done = subprocess.run(
        [sys.executable, "-c", script, str(trees / "mbeir"), str(store)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python_tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 9, done.stderr
    (folder,) = store.iterdir()
    assert (folder / "keys.bin").stat().st_size == 3 * 8 * 16
    # A row without its key, and half a key.
    for name, rest in (("embeddings.bin", bytes(DIM * 4 + 5)), ("keys.bin", b"half")):
        with open(folder / name, "ab") as file:
            file.write(rest)
    titles = ["cirr_task7 (local)", "oven_task6 (local)"]
    datasets = [tasks[title][0] for title in titles]
    first, second = Counting(), Counting()
    for encoder, expected in ((first, contents(datasets) - 3 * 8), (second, 0)):
        made = evaluate(encoder, datasets, batch_size=8, embeddings=store, progress=False)
        assert encoder.items - PROBES == expected
        for title, result in zip(titles, made, strict=True):
            assert result.ranking == results[title].ranking
    assert [path.name for path in store.iterdir()] == [folder.name]


def test_a_stale_cache_is_not_used(tasks, tmp_path):
    image = tmp_path / "x.png"
    write_image(image, 1, 1)
    sides = [[{"id": "q", "text": "c1"}, {"id": "r", "text": "c2"}], [{"id": "a", "image": image}]]

    def embedded(encoder, **options) -> int:
        dataset = RetrievalDataset("one", "t->i", *sides, {"q": {"a": 1}, "r": {"a": 1}})
        evaluate(encoder, dataset, embeddings=tmp_path / "store", progress=False, **options)
        return encoder.items - PROBES

    assert embedded(Counting()) == 3
    assert embedded(Counting()) == 0
    assert embedded(Counting(shift=1e-3)) == 3  # other weights
    assert embedded(Counting(shift=1e-3)) == 0
    assert embedded(Counting(), dtype=torch.float16) == 3
    named = Counting()
    named.fingerprint = "epoch 2"
    assert embedded(named) == 3
    write_image(image, 2, 1)  # another image under the same name
    os.utime(image, ns=(1, 1))
    assert embedded(Counting()) == 1
    assert embedded(Counting()) == 0


def test_encoders_have_to_be_told_apart(tasks, tmp_path):
    dataset, _ = tasks["webqa_task1 (local)"]

    def texts_only(items):
        return torch.stack([torch.from_numpy(text_embedding(item["text"])) for item in items])

    def known_only(items):
        return encode([{**item, "text": KNOWN[item["text"]]} for item in items])

    KNOWN = {dataset.queries[i]["text"]: "x" for i in range(len(dataset.queries))}
    KNOWN |= {dataset.candidates[i]["text"]: "y" for i in range(len(dataset.candidates))}

    def random(items):
        return torch.randn(len(items), 8)

    evaluate(texts_only, dataset, embeddings=tmp_path, progress=False)
    with pytest.raises(ValueError, match="expected an attribute `fingerprint`"):
        evaluate(known_only, dataset, embeddings=tmp_path, progress=False)
    known_only.fingerprint = "1"
    evaluate(known_only, dataset, embeddings=tmp_path, progress=False)
    with pytest.raises(ValueError, match="two embeddings of one item differ"):
        evaluate(random, dataset, embeddings=tmp_path, progress=False)


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
def test_two_processes_do_not_write_to_one_folder(tasks, tmp_path):
    dataset, _ = tasks["webqa_task1 (local)"]
    evaluate(encode, dataset, embeddings=tmp_path, progress=False)
    (folder,) = tmp_path.iterdir()
    import fcntl

    with open(folder / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process is writing"):
            evaluate(encode, dataset, embeddings=tmp_path, progress=False)
    evaluate(encode, dataset, embeddings=tmp_path, progress=False)


def test_workers_prepare_images_while_the_encoder_runs(tasks):
    class Prepared:
        def __init__(self):
            self.threads = set()

        def prepare(self, image):
            import threading

            self.threads.add(threading.get_ident())
            return image.copy(), "prepared"

        def __call__(self, items):
            assert all(item["image"] is None or item["image"][1] == "prepared" for item in items)
            return encode([{**i, "image": i["image"] and i["image"][0]} for i in items])

    import threading

    encoder = Prepared()
    result = evaluate(encoder, tasks["nights_task4 (local)"][0], workers=2, progress=False)
    assert result["mrr"] == pytest.approx(
        np.mean([f["mrr"] for f in counted(tasks["nights_task4 (local)"][1]).values()])
    )
    assert threading.get_ident() not in encoder.threads
    assert encoder.prepare and 1 <= len(encoder.threads) <= 2


# Encoders

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """Path of a config, path of weights, and the model, its transform and its tokenizer."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("open_clip")
    config = folder / "tiny.json"
    config.write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny")
    torch.save(model.state_dict(), folder / "tiny.pt")
    return config, folder / "tiny.pt", model, preprocess, open_clip.get_tokenizer("tiny")


@pytest.fixture(scope="module")
def tiny_clip_model(tmp_path_factory):
    """A folder of a random `transformers.CLIPModel` and its processor, and both."""
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,?! "]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer({w: i for i, w in enumerate(words)}, [])
    size = {"height": 16, "width": 16}
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size), tokenizer
    )
    text = dict(vocab_size=len(words), max_position_embeddings=12, eos_token_id=len(words) - 1)
    config = transformers.CLIPConfig(
        text_config={**small, **text},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


def mixed_items() -> list[dict]:
    images = [Image.new("RGB", (20, 30), color) for color in ("red", "green", "blue")]
    return [
        {"text": "a red thing", "image": None},
        {"text": None, "image": images[0]},
        {"text": "c2 seen", "image": images[1]},
        {"text": "", "image": images[2]},
        {"text": "x y z " * 9, "image": images[0]},
    ]


def check_fusion(encoder, image_of, text_of, fuse) -> None:
    """`[D]` raw embeddings by the model itself, added by hand."""
    items = mixed_items()
    rows = encoder(items)
    prepared = encoder([
        {**item, "image": item["image"] and encoder.prepare(item["image"])} for item in items
    ])  # fmt: skip
    torch.testing.assert_close(prepared, rows)
    with torch.inference_mode():
        for item, row in zip(items, rows, strict=True):
            parts = [image_of(item["image"])] if item["image"] else []
            parts += [text_of(item["text"])] if item["text"] else []
            if fuse == "sum_unit" and len(parts) == 2:
                parts = [part / part.norm() for part in parts]
            torch.testing.assert_close(row, sum(parts), rtol=1e-4, atol=1e-5)
    lengths = [image_of(items[1]["image"]).norm(), text_of("").norm()]
    assert min(lengths) > 0 and abs(lengths[0] - 1) > 1e-3  # raw, and an empty text is not zero


@pytest.mark.parametrize("fuse", ["sum_raw", "sum_unit"])
def test_open_clip_encoder(tiny_clip, fuse):
    *_, model, preprocess, tokenizer = tiny_clip
    model.train()
    model.visual.eval()
    encoder = OpenCLIPEncoder(model, preprocess, tokenizer, fuse)
    check_fusion(
        encoder,
        lambda image: model.encode_image(preprocess(image)[None])[0],
        lambda text: model.encode_text(tokenizer([text]))[0],
        fuse,
    )
    assert model.training and not model.visual.training  # as they were
    with pytest.raises(ValueError, match="item 0: expected a text or an image"):
        encoder([{"text": "", "image": None}])
    with pytest.raises(ValueError, match="fuse: expected"):
        OpenCLIPEncoder(model, preprocess, tokenizer, "mean")
    digest = encoder.fingerprint
    with torch.no_grad():
        model.logit_scale += 1
    assert encoder.fingerprint != digest


def test_a_fused_models_weights_count(tiny_clip):
    *_, model, preprocess, tokenizer = tiny_clip
    from gcl_kernels.integrations.open_clip import FusedCLIP

    fused = FusedCLIP.from_clip(model, (0.5, 2.0)).eval()
    item = mixed_items()[2]
    with torch.inference_mode():
        expected = fused.encode_fused(preprocess(item["image"])[None], tokenizer([item["text"]]))
    torch.testing.assert_close(OpenCLIPEncoder(fused, preprocess, tokenizer)([item]), expected)


@pytest.mark.parametrize("fuse", ["sum_raw", "sum_unit"])
def test_clip_model_encoder(tiny_clip_model, fuse):
    _, model, processor = tiny_clip_model

    def image_of(image):
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        return model.visual_projection(model.vision_model(pixels).pooler_output)[0]

    def text_of(text):
        ids = processor.tokenizer([text], truncation=True, max_length=12, return_tensors="pt")
        return model.text_projection(model.text_model(**ids).pooler_output)[0]

    encoder = retrieval.CLIPModelEncoder(model, processor, fuse)
    check_fusion(encoder, image_of, text_of, fuse)
    assert encoder.fingerprint


def test_joint_encoder():
    class Joint(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)
            self.scale = torch.nn.Parameter(torch.ones(()))

        def encode_image(self, images):
            return self.drop(encode([{"text": None, "image": image} for image in images]))

        def encode_text(self, texts):
            return encode([{"text": text, "image": None} for text in texts]) * self.scale

        def encode_mm(self, images, texts):
            return self.encode_image(images) * 3 - self.encode_text(texts)

    model = Joint()
    functions = model.encode_mm, model.encode_image, model.encode_text
    items = mixed_items()
    model.eval()
    with torch.inference_mode():
        image = model.encode_image([items[2]["image"]])[0].float()
        text = model.encode_text([items[2]["text"]])[0].float()
    model.train()
    joint, added = JointEncoder(*functions), JointEncoder(*functions, fuse="sum")
    torch.testing.assert_close(joint(items)[2], 3 * image - text)
    unit = image / image.norm() + text / text.norm()  # VISTA's own functions normalise
    torch.testing.assert_close(added(items)[2], unit)
    torch.testing.assert_close(
        joint(items)[[0, 1, 3]], encode([items[i] for i in (0, 1, 3)]).float()
    )
    assert model.training and joint.fingerprint == added.fingerprint != ""
    assert JointEncoder(*(lambda *sides: sides[0],) * 3).fingerprint == ""
    with pytest.raises(ValueError, match="fuse: expected"):
        JointEncoder(*functions, fuse="sum_raw")


# The command line


def command(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


@pytest.mark.parametrize("kind", ["mbeir", "mmeb", "covr", "coco"])
def test_command_line(trees, tasks, results, tmp_path, capsys, kind):
    extra = {
        "mbeir": ["--pool", "local", "union"],
        "coco": ["--json", trees / "coco/captions.json"],
    }
    out = tmp_path / "results.json"
    pytest.importorskip("matplotlib")
    command(
        kind, trees / kind, "--encoder", "retrieval_trees:encode", "--output", out, "--run",
        tmp_path / "run.trec", "--heat-map", tmp_path / "map.png", *extra.get(kind, []),
    )  # fmt: skip
    printed = capsys.readouterr()
    assert "item/s" in printed.err  # rates
    content = json.loads(out.read_text())
    titles = [r["name"] + (f" ({r['pool']})" if r["pool"] else "") for r in content["results"]]
    assert len(titles) == {"mbeir": 20, "mmeb": 3, "covr": 1, "coco": 2}[kind]
    for title, record in zip(titles, content["results"], strict=True):
        assert record["metrics"] == pytest.approx(dict(results[title].metrics))
        row = next(line for line in printed.out.splitlines() if line.startswith(f"| {title} "))
        assert f"{record['main']} {100 * results[title][record['main']]:.1f}" in row
    runs = sorted(path.name for path in tmp_path.glob("*.trec"))
    assert len(runs) == len(titles) and (tmp_path / "map.png").stat().st_size > 1000
    assert "run.cirr_task7.union.trec" in runs or kind != "mbeir"


def test_the_nine_tasks_are_a_table(results):
    chosen = [result for result in results.values() if result.pool == "union"]
    mean = np.mean([results[f"{name} (union)"]["hit@50"] for name in MBEIR if name[-1] == "0"])
    rows = [line.split("|") for line in retrieval.report_tables(chosen).splitlines()[:5]]
    assert rows[0][1].strip() == "union hit@50" and [c.strip() for c in rows[0][2:5]] == [
        "i",
        "t",
        "it",
    ]
    assert rows[3][1].strip() == "t \u2192" and rows[3][2].strip() == f"{100 * mean:.1f}"
    assert rows[2][4].strip() == ""  # i->it has no data


def test_command_line_of_models(trees, tasks, tiny_clip, tiny_clip_model, tmp_path, capsys):
    config, weights, model, preprocess, tokenizer = tiny_clip
    folder, clip_model, processor = tiny_clip_model
    model.load_state_dict(torch.load(weights))
    for given, encoder in (
        (
            ["--open-clip", config, "--weights", weights],
            OpenCLIPEncoder(model, preprocess, tokenizer),
        ),
        (["--clip", folder], retrieval.CLIPModelEncoder(clip_model, processor)),
    ):
        for fuse in ("sum_raw", "sum_unit"):
            out = tmp_path / "results.json"
            command(
                "mbeir", trees / "mbeir", *given, "--fuse", fuse, "--datasets", "oven_task8",
                "--instructions", 7, "--output", out, "--quiet", "--embeddings", tmp_path / "store",
            )  # fmt: skip
            encoder.fuse = fuse
            dataset = load_mbeir(trees / "mbeir", "oven_task8", instructions=7)
            expected = evaluate(encoder, dataset, progress=False)
            assert json.loads(out.read_text())["results"][0]["metrics"] == dict(expected.metrics)
    assert len([*(tmp_path / "store").iterdir()]) == 4
    assert "item/s" not in capsys.readouterr().err


def test_command_line_errors(trees, tasks, tmp_path):
    root = trees / "mbeir"
    for arguments, message in (
        (["mbeir", root, "--encoder", "retrieval_trees"], "error: expected an encoder as module:f"),
        (["mbeir", root, "--encoder", "retrieval_trees:DIM"], "error: expected an encoder"),
        (
            ["mbeir", root, "--encoder", "no_such_module:f"],
            "error: No module named 'no_such_module",
        ),
        (
            ["mbeir", root, "--encoder", "x:y", "--datasets", "z"],
            "mbeir_z_cand_pool.jsonl: No such",
        ),
        (["mmeb", tmp_path, "--encoder", "x:y"], f"error: {tmp_path}: no data sets of mmeb"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            command(*arguments)


# mteb


def test_mteb_counts_the_same(tasks, results, tmp_path):
    mteb = pytest.importorskip("mteb")
    model = retrieval.as_mteb_model(encode)
    titles = [f"{name} (local)" for name in MBEIR] + ["oven_task6 (union)", "Answers", "Pairs"]
    titles += ["captions_t2i", "captions_t2t"]
    made = [retrieval.as_mteb_task(tasks[title][0]) for title in titles]
    scores = mteb.evaluate(model, made, cache=None, co2_tracker=False, show_progress_bar=False)
    for title, theirs in zip(titles, scores.task_results, strict=True):
        (figures,) = theirs.scores["test"]
        for k in tasks[title][0].cutoffs:
            for ours, name in (("hit", "hit_rate"), ("recall", "recall")):
                assert figures[f"{name}_at_{k}"] == pytest.approx(
                    results[title][f"{ours}@{k}"], abs=1e-4
                )
    with pytest.raises(ValueError, match="mteb knows no clips"):
        retrieval.as_mteb_task(tasks[COVR_CSV.removesuffix(".csv")][0])


def test_what_is_missing_is_named(trees, tasks, monkeypatch):
    """As if no extra had been installed."""

    def heat_map():
        retrieval.save_heat_map([], "map.png")

    def by_faiss():
        evaluate(encode, tasks["webqa_task1 (local)"][0], search="faiss", progress=False)

    for package, use in (
        ("pytrec_eval", lambda: importlib.reload(retrieval)),
        ("pyarrow", lambda: load_mmeb(trees / "mmeb", "Answers")),
        ("matplotlib.figure", heat_map),
        ("faiss", by_faiss),
        ("mteb", lambda: retrieval.as_mteb_model(encode)),
    ):
        with monkeypatch.context() as context, pytest.raises(ImportError) as error:
            context.setitem(sys.modules, package, None)
            use()
        assert re.search(rf"needs {package.partition('.')[0]}: pip install ", str(error.value))


# The page


@pytest.fixture
def page(tmp_path, monkeypatch, trees, tasks, tiny_clip, tiny_clip_model) -> str:
    """Text of docs/retrieval.md, and around us what it speaks of."""
    import open_clip

    for kind, name in (
        ("mbeir", "M-BEIR"),
        ("mmeb", "MMEB"),
        ("covr", "WebVid-CoVR"),
        ("coco", "COCO"),
    ):
        shutil.copytree(trees / kind, tmp_path / name)
    shutil.copytree(tiny_clip_model[0], tmp_path / "TinyCLIP")
    save_small_vista(tmp_path / "VISTA")
    replace_released_eva(monkeypatch)
    shutil.copy(tiny_clip[1], tmp_path / "clip_sf.pt")
    shutil.copy(tiny_clip[0], tmp_path / "ViT-B-32.json")
    (tmp_path / "my_model.py").write_text("from retrieval_trees import encode\n")
    for color in ("red", "blue"):
        Image.new("RGB", (9, 9), color).save(tmp_path / f"{color}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("_MODEL_CONFIG_PATHS", "_MODEL_CONFIGS"):
        known = getattr(open_clip.factory, name)
        monkeypatch.setattr(open_clip.factory, name, type(known)(known))
    open_clip.add_model_config(tmp_path / "ViT-B-32.json")  # a small one by that name
    return (ROOT / "docs/retrieval.md").read_text()


def test_the_pages_commands_run(page, capsys):
    lines = re.findall(r"^    python -m gcl_kernels.retrieval (.*)$", page, re.M)
    assert len(lines) == 6
    for line in lines:
        command(*line.split(), "--quiet")
        assert "| data set" in capsys.readouterr().out
    for line in re.findall(r"\| `((?:mbeir|mmeb|covr|coco) .*?)` \|", page):
        root = {"mbeir": "M-BEIR", "mmeb": "MMEB", "covr": "WebVid-CoVR", "coco": "COCO"}
        given = line.replace("ROOT", root[line.split()[0]]).replace(" captions", " COCO/captions")
        command(*given.split(), "--encoder", "my_model:encode", "--quiet")
        assert "| data set" in capsys.readouterr().out
    assert all(Path(name).is_file() for name in ("covr.json", "coco.png", "coco.captions_t2i.trec"))
    names = ["mscoco_task0", "oven_task6", "cirr_task7"]
    command(
        "mbeir", "M-BEIR", "--encoder", "my_model:encode", "--pool", "union", "--datasets", *names,
        "--k", 1, 5, 50, "--quiet",
    )  # fmt: skip
    assert capsys.readouterr().out.strip() in page


def test_the_pages_code_runs(page):
    space = {"torch": torch, "embed": lambda text, image: torch.ones(3)}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(block, "docs/retrieval.md", "exec"), space)
    assert space["result"].queries == 1 and space["union"].pool == "union"
    assert space["encode"]([{"text": "x", "image": None}]).shape == (1, 3)
