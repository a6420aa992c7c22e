"""What becomes of damaged runs, the evaluation of students, and the summaries."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from track_b import V1, V2, clustered_vectors, make_teacher, settings_of

from kimi_recursive.layout import Layout
from kimi_recursive.track_b import sanity
from kimi_recursive.track_b.answers import heading, summarize
from kimi_recursive.track_b.collect import collect_experiment
from kimi_recursive.track_b.evaluate import (
    PRECISIONS,
    bytes_per_vector,
    evaluate_references,
    quantize,
    references,
)
from kimi_recursive.track_b.metrics import NDCG, RECALL
from kimi_recursive.track_b.pairs import compare_pairs, pair_table
from kimi_recursive.track_b.sanity import check_sanity
from kimi_recursive.track_b.sheet import SheetRow
from kimi_recursive.track_b.status import RunStatus, read_status
from kimi_recursive.track_b.summary import COLUMNS, Result, read_results, score_methods
from kimi_recursive.track_b.teacher import load_vectors
from kimi_recursive.track_b.train import train_student
from kimi_recursive.track_b.truth import load_truth

GUIDE_COLUMNS = (
    "timestamp,run_id,experiment,steps,seeds,lr,warmup,tau,k,neg_m,queue_size,false_neg_mode,"
    "threshold,status,vs_teacher_recall10,vs_teacher_ndcg10"
)


# ---- statuses, on a run that was really made ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A teacher, references, and a finished run of each objective."""
    folder = make_teacher(tmp_path_factory.mktemp("track_b"))
    evaluate_references(folder / "teacher", folder / "neighbours.npz", [8], folder / "refs.parquet")
    for name, values in (("v1", V1), ("v2", V2)):
        for seed in (0, 1):
            experiment = SheetRow(name, (0, 1), settings_of(values))
            target = folder / "students" / experiment.keys[seed]
            inputs = (folder / "teacher", folder / "neighbours.npz")
            train_student(experiment.settings, seed, *inputs, target)
    return folder


EXPERIMENTS = [SheetRow("v1", (0, 1), settings_of(V1)), SheetRow("v2", (0, 1), settings_of(V2))]


@pytest.fixture
def damaged(finished, tmp_path) -> Path:
    """A copy of one run that a test may damage."""
    key = EXPERIMENTS[0].keys[0]
    return Path(shutil.copytree(finished / "students" / key, tmp_path / "run"))


def test_success_and_its_numbers_from_parquet_and_from_json_lines(damaged):
    rows = [json.loads(x) for x in (damaged / "logs/train_logs.jsonl").read_text().splitlines()]
    found = read_status(damaged, 12)
    evaluated = [row for row in rows if RECALL in row]
    assert found.status == "success"
    assert found.best_recall == max(row[RECALL] for row in evaluated)
    assert found.final_ndcg == evaluated[-1][NDCG] and len(evaluated) == 5
    (damaged / "logs/train_logs.parquet").unlink()
    assert read_status(damaged, 12) == found
    (damaged / "logs/train_logs.parquet").write_bytes(b"PAR1 torn")
    assert read_status(damaged, 12) == found, "the second log where the first cannot be read"


def test_damaged_runs_are_told_apart(damaged):
    logs = damaged / "logs"
    table = pl.read_parquet(logs / "train_logs.parquet")
    text = (logs / "train_logs.jsonl").read_text()

    def status(parquet=None, jsonl=None) -> tuple[str, str]:
        (logs / "train_logs.parquet").unlink(missing_ok=True)
        (logs / "train_logs.jsonl").unlink(missing_ok=True)
        if parquet is not None:
            parquet.write_parquet(logs / "train_logs.parquet")
        if jsonl is not None:
            (logs / "train_logs.jsonl").write_text(jsonl)
        found = read_status(damaged, 12)
        return found.status, found.detail

    assert status() == ("missing_logs", "started, no attempt has ended")
    assert read_status(damaged / "nowhere", 12).detail == "not started"
    assert status(table.drop(RECALL, NDCG))[0] == "no_eval"
    assert status(table.with_columns(pl.lit(None).alias(RECALL)))[0] == "no_eval"
    assert status(table.drop("step"))[0] == "parse_error"
    assert status(table.head(0)) == ("parse_error", "train_logs.parquet: empty")
    assert status(table.with_columns(pl.lit(float("nan")).alias(RECALL)))[0] == "parse_error"
    assert status(table.head(8)) == ("incomplete", "step 7 of 12")
    assert status(jsonl=text[: len(text) // 2])[0] == "parse_error", "torn in the middle of a line"
    assert status(jsonl="[1]\n")[0] == "parse_error"
    assert status(jsonl="".join(text.splitlines(keepends=True)[:5]))[0] == "incomplete"
    (logs / "train_logs.jsonl").write_bytes(b"\xff\xfe")
    assert read_status(damaged, 12).status == "parse_error"
    assert status(table)[0] == "success"
    summary = json.loads((logs / "train_summary.json").read_text())
    failed = {**summary, "status": "failed", "error": "Diverged: loss nan"}
    (logs / "train_summary.json").write_text(json.dumps(failed))
    assert status(table) == ("failed", "Diverged: loss nan")
    (logs / "train_summary.json").write_text("{torn")
    assert status(table)[0] == "success", "the log decides"


# ---- evaluation ----


def test_bytes_and_values_of_stored_vectors():
    assert [bytes_per_vector(128, p) for p in PRECISIONS] == [512, 128, 16, 16]
    assert bytes_per_vector(9, "binary") == 2
    vectors = np.array([[0.5, -0.25, 0.0, 1.0]], np.float32)
    whole = np.array([64, -32, 0, 127])
    assert quantize(vectors, "int8")[0] == pytest.approx(whole / np.linalg.norm(whole), abs=1e-6)
    assert np.allclose(quantize(vectors / 7, "int8"), quantize(vectors, "int8"))
    assert quantize(vectors, "binary").tolist() == [[1, -1, 1, 1]]
    assert quantize(vectors, "float32") is vectors


def test_binary_ranks_like_the_packed_bits_of_sentence_transformers():
    from sentence_transformers.util.quantization import quantize_embeddings

    vectors = clustered_vectors(60, 16)
    bits = np.unpackbits(quantize_embeddings(vectors, "ubinary"), axis=1)
    ours = quantize(vectors, "binary")
    hamming = (bits[:, None] != bits[None]).sum(2)
    assert np.array_equal(ours @ ours.T, 16 - 2 * hamming)


def test_references(finished):
    vectors = load_vectors(finished / "teacher")
    found = references(vectors["train"], 8)
    assert list(found) == ["svd", "pca", "truncation", "random_projection"]
    x = np.array(vectors["test"])
    assert all(shorten(x).shape == (50, 8) for shorten in found.values())
    assert np.array_equal(found["truncation"](x), x[:, :8])
    assert np.abs(found["pca"](np.array(vectors["train"])).mean(0)).max() < 1e-5
    table = pl.read_parquet(finished / "refs.parquet")
    mean = {
        name: part.filter(split="test", precision="float32")["recall@10"].mean()
        for (name,), part in table.group_by("method")
    }
    assert mean["teacher"] == 1 and mean["svd_8"] > mean["truncation_8"] > 0.1
    assert set(table["split"]) == {"validation", "test", "train"}


def test_sanity_warns_and_does_not_stop(finished, tmp_path, capsys, monkeypatch):
    inputs = (finished / "teacher", finished / "neighbours.npz", tmp_path / "sanity.json")
    checks = check_sanity(*inputs)
    assert len(checks) == 5 and all(check["passed"] for check in checks), checks
    assert json.loads(inputs[2].read_text()) == {"passed": True, "checks": checks}

    def failing(name, broken):
        with monkeypatch.context() as patch:
            patch.setattr(sanity, name, broken)
            capsys.readouterr()
            found = [check["check"] for check in check_sanity(*inputs) if not check["passed"]]
        printed = capsys.readouterr().err
        assert all(f"warning: sanity check failed: {check}" in printed for check in found)
        assert not json.loads(inputs[2].read_text())["passed"]
        return found

    def raises(*_arguments):
        raise RuntimeError("broken")

    assert failing("build_objective", raises) == [
        "20 steps of infonce lower the loss",
        "20 steps of listwise lower the loss",
    ]
    twice = load_vectors(finished / "teacher")
    twice = {name: 2 * part for name, part in twice.items()}
    assert "vectors have unit length" in failing("load_vectors", lambda _: twice)
    wrong = load_truth(finished / "neighbours.npz")
    wrong.relevant["validation"] = wrong.relevant["validation"][::-1]
    assert "the teacher's own vectors score 1" in failing("load_truth", lambda _: wrong)


# ---- summaries ----


def summarized(folder: Path, students: Path, tmp_path: Path):
    results = read_results(EXPERIMENTS, students, folder / "refs.parquet")
    paths = [
        tmp_path / name for name in ("summary.csv", "summary.txt", "comparison.csv", "pairs.csv")
    ]
    summarize(results, "Heading", *paths)
    text = paths[1].read_text()
    assert max(map(len, text.splitlines())) <= 100
    with open(paths[0], newline="") as file:
        rows = {row["experiment"]: row for row in csv.DictReader(file)}
    assert paths[0].read_text().splitlines()[0] == GUIDE_COLUMNS == ",".join(COLUMNS)
    return results, rows, text, pl.read_csv(paths[2])


def test_the_summary_of_a_whole_matrix(finished, tmp_path):
    results, rows, text, compared = summarized(finished, finished / "students", tmp_path)
    for title in ("Top 3 runs by vs_teacher_recall@10", "Average of the 2 successful runs",
                  "Failed or incomplete runs\n(none)", "All runs"):  # fmt: skip
        assert title in text
    runs = [read_status(finished / "students" / key, 12) for key in EXPERIMENTS[1].keys.values()]
    assert float(rows["v2"]["vs_teacher_recall10"]) == pytest.approx(
        np.mean([run.best_recall for run in runs]), rel=1e-5
    )
    assert float(rows["v2"]["vs_teacher_ndcg10"]) == pytest.approx(
        np.mean([run.final_ndcg for run in runs]), rel=1e-5
    )
    assert rows["v2"]["seeds"] == "0,1" and rows["v2"]["status"] == "success"
    started = runs[0].summary["started_at"][:10].replace("-", "")
    assert rows["v1"]["run_id"].startswith(f"{EXPERIMENTS[0].run_id}_{started}_")
    assert list(rows) == ["v1", "v2"], "references and stored versions are in comparison.csv"
    names = set(compared.select("name", "precision").rows())
    assert names >= {("reference_svd_8", "float32"), ("v2", "int8"), ("reference_pca_8", "binary")}
    best = max(results[:2], key=lambda result: result.recall).name
    assert f"1. {best} " in text
    by_name = {(r["name"], r["precision"]): r for r in compared.to_dicts()}
    own = by_name["v2", "float32"]
    tables = [pl.read_parquet(finished / "students" / key / "evaluation.parquet")
              for key in EXPERIMENTS[1].keys.values()]  # fmt: skip
    tests = [t.filter(split="test", precision="float32")["recall@10"].mean() for t in tables]
    assert own["test_recall@10"] == pytest.approx(np.mean(tests), rel=1e-5)
    assert own["test_recall@10_std"] == pytest.approx(np.std(tests, ddof=1), rel=1e-4)
    svd = by_name["reference_svd_8", "float32"]
    assert svd["difference_to_svd"] is None and svd["num_parameters"] is None
    difference = own["test_recall@10"] - svd["test_recall@10"]
    assert own["difference_to_svd"] == pytest.approx(difference, abs=1e-5)
    assert own["low"] <= own["difference_to_svd"] <= own["high"]
    verdict = by_name["reference_truncation_8", "float32"]
    assert verdict["verdict"] == "loses to SVD" and verdict["high"] < 0
    assert by_name["reference_random_projection_8", "int8"]["bytes_per_vector"] == 8


def result_of(name: str, recalls: dict[int, list[float]], **settings) -> Result:
    """A finished experiment whose students have these recalls on ten test queries."""

    def table(recall):
        facts = {"method": "student", "precision": "float32", "split": "test"}
        return pl.DataFrame({**facts, "row": range(10), "recall@10": recall, "ndcg@10": recall})

    experiment = SheetRow(name, tuple(recalls), settings_of(V1, **settings))
    runs = {s: RunStatus("success", best_recall=0.5, final_ndcg=0.5) for s in recalls}
    return Result(name, 8, experiment, runs, {s: table(r) for s, r in recalls.items()})


def test_experiments_that_differ_in_one_setting_are_paired_by_query_and_seed():
    low, high = [0.1, 0.2] * 5, [0.4, 0.6] * 5
    results = [
        result_of("one_seed", {0: low}),
        result_of("three_seeds", {0: low, 1: low, 2: low}),
        result_of("warm", {0: high, 1: [0.0] * 10}, tau=0.1),
        result_of("warm_and_long", {0: high}, tau=0.1, steps=20),
        result_of("saved_often", {0: high}, save_every=1),
        result_of("failed", {0: high}, tau=0.2),
    ]
    results[-1].runs[0] = RunStatus("failed")
    results[2].runs[1] = RunStatus("success", best_recall=0.1, final_ndcg=0.1)
    pairs = compare_pairs(results)
    found = {(p.first.name, p.second.name): p.row for p in pairs}
    assert set(found) == {("warm", "three_seeds"), ("warm_and_long", "warm")}
    row = found["warm", "three_seeds"]
    assert (row["setting"], row["value"], row["reference_value"]) == ("tau", 0.1, 0.07)
    assert row["seeds"] == "0,1" and row["num_queries"] == 10
    assert row["difference"] == pytest.approx((0.35 - 0.15) / 2)
    row = found["warm_and_long", "warm"]
    assert row["setting"] == "steps" and row["seeds"] == "0" and row["verdict"] == "same"
    (row,) = (p.row for p in compare_pairs([results[0], result_of("w", {0: high}, tau=0.1)]))
    assert row["difference"] == pytest.approx(0.35) and row["verdict"] == "better"
    assert 0.3 <= row["low"] <= 0.35 <= row["high"] <= 0.4
    text = pair_table(pairs).to_text()
    assert "tau 0.1 / 0.07" in text and "warm_and_long" in text


def test_the_summary_of_a_part_of_it(finished, tmp_path):
    students = Path(shutil.copytree(finished / "students", tmp_path / "students"))
    shutil.rmtree(students / EXPERIMENTS[0].keys[1])
    key = EXPERIMENTS[1].keys[0]
    summary = json.loads((students / key / "logs/train_summary.json").read_text())
    (students / key / "logs/train_summary.json").write_text(
        json.dumps({**summary, "status": "failed", "error": "Diverged: loss nan"})
    )
    _, rows, text, _ = summarized(finished, students, tmp_path)
    assert rows["v1"]["status"] == "missing_logs" and rows["v1"]["vs_teacher_recall10"] == ""
    assert rows["v2"]["status"] == "failed"
    assert re.search("v1, seed 1 +missing_logs +not started", text)
    assert re.search("v2, seed 0 +failed +Diverged: loss nan", text)
    assert "Average of the 0 successful runs" in text
    _, rows, text, _ = summarized(tmp_path / "no", tmp_path / "nothing", tmp_path)
    assert {row["status"] for row in rows.values()} == {"missing_logs"} and len(rows) == 2


def test_the_folder_of_an_experiment_shows_the_student_of_its_best_seed(finished, tmp_path):
    result = read_results(EXPERIMENTS[1:], finished / "students", finished / "refs.parquet")[0]
    for best in (0, 1):
        runs = {
            seed: replace(run, best_recall=float(seed == best)) for seed, run in result.runs.items()
        }
        shown = replace(result, runs=runs)
        collect_experiment(shown, finished / "students", {}, tmp_path / "run")
        folder = tmp_path / "run/checkpoints"
        links = {path.name: path.resolve() for path in folder.iterdir()}
        own = finished / "students" / EXPERIMENTS[1].keys[best] / "checkpoints"
        assert links["student_best.safetensors"] == (own / "student_best.safetensors").resolve()
        assert links["student_step_12.safetensors"].parent == own.resolve()
        assert {"seed0", "seed1"} <= set(links)


def test_a_damaged_parquet_is_no_loss_to_the_folder_where_json_lines_are_whole(finished, tmp_path):
    students = Path(shutil.copytree(finished / "students", tmp_path / "students"))
    logs = students / EXPERIMENTS[1].keys[0] / "logs/train_logs.parquet"
    whole = read_results(EXPERIMENTS[1:], students)[0]
    collect_experiment(whole, students, {}, tmp_path / "whole")
    logs.write_bytes(b"PAR1 torn")
    torn = read_results(EXPERIMENTS[1:], students)[0]
    assert torn.status == "success"
    collect_experiment(torn, students, {}, tmp_path / "torn")
    a, b = (pl.read_parquet(tmp_path / x / "logs/train_logs.parquet") for x in ("whole", "torn"))
    assert a.equals(b.select(a.columns)) and a.height == 26


def test_a_student_that_is_the_svd_does_not_beat_it(finished):
    results = read_results(EXPERIMENTS[1:], finished / "students", finished / "refs.parquet")
    svd = next(r for r in results if r.name == "reference_svd_8")
    results[0].tables = dict.fromkeys((0, 1), svd.tables[0].with_columns(method=pl.lit("student")))
    row = score_methods(results)[0]
    assert (row["difference_to_svd"], row["low"], row["high"]) == (0, 0, 0)
    assert row["verdict"] == "same as SVD"


@pytest.mark.parametrize(
    ("quick", "scale", "said"),
    [(False, 0.01, "1 % of the sheet's steps"), (False, 1.0, "100 % of"), (True, 1.0, "10 steps")],
)
def test_the_heading_says_how_long_students_were_trained(tmp_path, quick, scale, said):
    facts = {"name": "a/teacher", "dim": 8, "num_train": 3, "num_validation": 2, "num_test": 1}
    path = Layout(tmp_path).track_b.teacher_facts
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(facts))
    last = heading({"quick": quick, "scale": scale}, tmp_path).splitlines()[-1]
    assert last.startswith("Teacher teacher (8-d); ") and said in last
