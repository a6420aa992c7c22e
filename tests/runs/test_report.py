"""The report: what it shows of records that are whole, partial, damaged, hostile."""

import json
import re
from pathlib import Path

import polars as pl
import pytest
from html_page import Page, report
from matplotlib.figure import Figure
from records import make_results, make_track_b, shipped_config, write_json

from kimi_recursive.drawing import to_svg
from kimi_recursive.layout import Layout
from kimi_recursive.matrix.settings import Config
from kimi_recursive.report.curves import read_curves
from kimi_recursive.report.page import write_report
from kimi_recursive.report.summary import read_matrix

CONFIG = shipped_config()
# What is enough to be damaged.
SMALL = shipped_config(phases=["a"])
SMALL["track_b"]["experiments"] = ["v2"]
COMPARED = "Perplexity of each arm against its references"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("made") / "results"
    return make_track_b(make_results(results, CONFIG), CONFIG)


@pytest.fixture(scope="module")
def whole(made) -> Page:
    return report(made)


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> tuple[Path, Page]:
    """Of the small config: a run that is not finished and was evaluated before steps were counted,
    one of other settings, and one of another torch."""
    results = make_results(tmp_path_factory.mktemp("odd") / "results", SMALL)
    run = results / "runs/recursive_a_s0"
    facts = json.loads((run / "train_summary.json").read_text())
    write_json(run / "work/fingerprint.json", {k: facts[k] for k in ("config", "settings")})
    for step in (0, 10, 20):
        row = {"step": step, "tokens": 1024 * step, "loss_final": 4.0, "validation_loss_step_2": 4}
        write_json(run / f"work/metrics/step_{step:06d}.json", row)
    (run / "train_logs.parquet").unlink()
    path = results / "eval/finetuned_recursive_results.json"
    found = json.loads(path.read_text())
    del found["num_rounds_by_step"], found["halting"]["num_chunks_by_step"]
    write_json(path, found)
    facts["settings"]["lr"] = 1.0
    write_json(results / "runs/single_pass_a_s0/train_summary.json", facts)
    path = results / "eval/finetuned_single_pass_flops_results.json"
    found = json.loads(path.read_text())
    found["versions"]["torch"] = "2.12.1"
    write_json(path, found)
    return results, report(results, SMALL)


@pytest.fixture
def results(tmp_path) -> Path:
    """Of the small config."""
    return make_track_b(make_results(tmp_path / "results", SMALL), SMALL)


def problems(page: Page) -> dict[str, tuple[str, str]]:
    return {row[0]: (row[1].split()[-1], row[2]) for row in page.rows("Missing, failed or damaged")}


def test_verdicts_come_first_with_interval_and_word(whole, made):
    matrix = read_matrix(Config.from_mapping(CONFIG), Layout(made))
    assert len(matrix.comparisons) == 20
    for stage in ("finetuned_recursive", "finetuned_recursive_b", "finetuned_recursive_c"):
        pairs = [pair for pair in matrix.comparisons if pair.arm == stage]
        rows = [row[1:] for row in whole.rows(COMPARED) if row[0] == stage]
        assert [row[0] for row in rows] == [pair.reference for pair in pairs]
        for row, pair in zip(rows, pairs, strict=True):
            mean, low, high = pair.difference.percent
            assert row[2:4] == [f"{mean:+.3f} %", f"[{low:+.3f}, {high:+.3f}] %"]
            assert row[4].endswith(pair.verdict)
    verdicts = {pair.verdict for pair in matrix.comparisons}
    assert verdicts == {"helps", "hurts", "not distinguishable"}
    headings = [e["text"] for e in whole.all("h2")]
    assert headings[0] == "Answers" and "(0)" in headings[-2]
    assert "Zero-init proof (seed 0): PASSED" in whole.text


def test_it_opens_with_a_sentence_for_each_question_and_one_picture(whole, tmp_path):
    questions = [e["text"] for e in whole.all("dt")]
    assert len(questions) == 5 and all(question.endswith("?") for question in questions)
    zero, helps, efficient, same, met = (e["text"] for e in whole.all("dd"))
    assert zero == "Yes: all 1 checks of the proof passed, for seed 0."
    assert helps.startswith("No: finetuned_recursive_c is better than baseline (-"), helps
    assert "worse than finetuned_single_pass_flops_c (+" in helps and helps.endswith(
        ", in perplexity."
    )
    assert efficient == (
        "The boundary head would stop finetuned_recursive_c after 1.25 inner steps (target 1 to "
        "2: cannot miss it, as K is 2); with all of them, a token costs 1.00x the baseline's FLOPs."
    )
    assert "trained and evaluated twice" in same
    assert "refinement_training: validation_loss, met by 12 of 13 runs" in met
    first = [e["tag"] for e in whole.elements if e["tag"] in ("dl", "svg", "table")][:3]
    assert first == ["dl", "svg", "table"], "the picture's numbers are behind it, folded"
    answers = [e["text"] for e in report(tmp_path / "results").all("dd")]
    assert [a.startswith("Not known: ") for a in answers] == [True, True, True, False, True]
    assert answers[3] == "Repeated run: missing"


def test_tables_that_repeat_a_figure_fold_away_beside_it(whole):
    folded = {e["text"].strip() for e in whole.all("caption") if "details" in e["inside"]}
    repeated = {COMPARED, "How many took so many inner steps"}
    assert repeated | {"Perplexity by inner step, against the baseline"} <= folded
    pairs = [e for e in whole.all("div") if e["attributes"].get("class") == "pair"]
    assert len(pairs) == 5, "each with its figure"


def test_every_stage_has_its_interval_against_the_baseline(whole, made):
    rows = whole.rows("Every stage against the baseline")
    matrix = read_matrix(Config.from_mapping(CONFIG), Layout(made))
    assert [row[0] for row in rows] == [row["name"] for row in matrix.rows]
    assert rows[0][3:6] == ["–", "–", "–"]
    pairs = {pair.arm: pair for pair in matrix.comparisons if pair.reference == "baseline"}
    for row in rows:
        if row[0] in pairs:
            mean, low, high = pairs[row[0]].difference.percent
            assert row[3:5] == [f"{mean:+.3f} %", f"[{low:+.3f}, {high:+.3f}] %"]
    assert rows[1][4] == "[+0.000, +0.000] %" and rows[1][5].endswith("not distinguishable")
    steps = whole.rows("Perplexity by inner step")
    mine = [row for row in steps if row[0] == "finetuned_recursive"]
    assert [row[1] for row in mine] == ["0", "1", "2", "3*", "4*"]
    assert "*: beyond the trained depth." in whole.text


def test_the_page_is_self_contained_and_every_figure_and_table_is_named(whole, made):
    source = (made.parent / "report.html").read_text()
    assert len(source) < 2_000_000
    assert not whole.all("script") and not whole.all("img") and "@import" not in source
    for element in whole.elements:
        for name, value in element["attributes"].items():
            if name.removeprefix("xlink:") in ("href", "src", "srcset"):
                assert value.startswith("#") or value == "data:,", value
            assert name in ("xmlns", "xmlns:xlink") or "://" not in (value or ""), (name, value)
    targets = re.findall(r"url\((.+?)\)", source)
    assert targets and all(target.startswith("#") for target in targets)
    ids = [e["attributes"]["id"] for e in whole.elements if "id" in e["attributes"]]
    assert len(ids) == len(set(ids))
    used = {t[1:] for t in targets}
    links = [e["attributes"] for e in whole.elements if e["tag"] in ("a", "use")]
    used |= {(link.get("href") or link["xlink:href"])[1:] for link in links}
    assert used <= set(ids), used - set(ids)
    assert len(whole.all("figure")) == len(whole.all("figcaption")) == 6
    for svg in whole.all("svg"):
        assert svg["attributes"]["role"] == "img" and len(svg["attributes"]["aria-label"]) > 20
    assert len(whole.all("table")) == len(whole.all("caption"))
    assert all(e["attributes"].get("scope") in ("row", "col") for e in whole.all("th"))


def test_figures_have_axes_units_and_legends(whole):
    texts = [[t.strip() for t in svg["text"].split("\n") if t.strip()] for svg in whole.all("svg")]
    verdicts, steps, training, base, taken, recall = texts
    assert {"helps", "hurts", "not distinguishable", "against its own step 1"} <= set(verdicts)
    assert "difference in perplexity, % of the reference's (left of 0 is better)" in verdicts
    for figure in (steps, training):
        assert {"phase a", "phase b", "phase c", "recursive", "single_pass_flops"} <= set(figure)
    assert "perplexity on held-out documents" in steps
    assert {"validation loss, nats per token", "target tokens of this phase"} <= set(training)
    assert {"optimizer step", "loss, nats per token", "training", "validation"} <= set(base)
    assert {"share, %", "inner steps", "finetuned_recursive_b"} <= set(taken)
    assert {"v2", "svd 128", "100", "optimizer step"} <= set(recall)
    assert not [t for figure in texts for t in figure if "mathdefault" in t]


def test_the_histogram_counts_and_says_what_has_no_counts(whole, odd):
    rows = whole.rows("How many took so many inner steps")
    assert rows[0] == ["finetuned_recursive, chunks", "30", "10"]
    assert rows[1] == ["finetuned_recursive, rounds", "0", "20"]
    page = odd[1]
    assert "Evaluated before the steps were counted" in page.text
    assert "only their mean is known: finetuned_recursive." in page.text
    assert not page.rows("How many took")


def test_students_stand_beside_the_references(whole):
    rows = {row[0]: row for row in whole.rows("All runs and references, in float32")}
    assert {"v2", "svd_128", "teacher"} <= set(rows)
    assert rows["v2"][2] == "3" and " ± " in rows["v2"][4]
    assert rows["v2"][-1].endswith("loses to SVD")
    stored = whole.rows("Runs and references stored in fewer bytes")
    assert {row[1] for row in stored} == {"int8", "binary", "binary_float_query"}


def test_nothing_there_is_a_report_that_says_so(tmp_path):
    page = report(tmp_path / "results")
    assert "0 of 15 expected evaluations are there" in page.text
    found = problems(page)
    assert len(found) == 1 + 15 + 1 + 12
    assert {status for status, _ in found.values()} == {"missing", "missing_logs"}
    assert not page.all("svg")


def test_a_partial_matrix_shows_what_is_there_and_the_logs_of_what_is_not(results):
    for path in results.glob("eval/finetuned_single_pass_flops*"):
        path.unlink()
    log = results / "logs/train_phase/single_pass_flops_a_s0.log"
    log.parent.mkdir(parents=True)
    lines = [f"line {i}" for i in range(40)]
    log.write_text("\n".join([*lines, "error: <script>alert('no')</script> & $memory$"]) + "\n")
    other = results / "logs/train_base.log"
    other.write_text("error: disk full\n")
    page = report(results, SMALL)
    assert "4 of 5 expected evaluations" in page.text
    found = problems(page)
    assert found["finetuned_single_pass_flops"] == (
        "failed",
        "<script>alert('no')</script> & $memory$",
    )
    assert found["train_base"] == ("failed", "disk full")
    shown = next(e["text"] for e in page.all("pre") if "line 39" in e["text"])
    assert shown.splitlines()[0] == "line 21" and len(shown.splitlines()) == 20
    assert not page.all("script")
    assert [row[1] for row in page.rows(COMPARED)] == [
        "baseline", "finetuned_single_pass", "its own step 1",
    ]  # fmt: skip


# In one report: no file's damage hides that of another.
DAMAGED = {
    "truncated": [
        "eval/after_surgery_results.json", "eval/finetuned_single_pass_documents.parquet",
        "runs/single_pass_flops_b_s0/train_summary.json",
        "runs/single_pass_a_s0/train_logs.parquet",
        "compare/zero_init.json", "compare/repeat.json", "base/train_logs.parquet",
        "track_b/references.parquet", "track_b/teacher/teacher.json",
        "track_b/students/*_s1/evaluation.parquet", "track_b/students/*_s2/logs/train_logs.parquet",
    ],
    "empty": ["eval/finetuned_recursive_b_results.json", "eval/baseline_documents.parquet"],
    "other": [
        "eval/finetuned_single_pass_b_results.json", "eval/finetuned_recursive_documents.parquet",
    ],
}  # fmt: skip


def test_each_damaged_file_is_a_line_in_the_report(tmp_path):
    config = shipped_config(phases=["a", "b"], track_b=SMALL["track_b"])
    results = make_track_b(make_results(tmp_path / "results", config), config)
    paths = []
    for damage, names in DAMAGED.items():
        for path in (sorted(results.glob(name))[0] for name in names):
            content, other = path.read_bytes(), b"[1, 2]"
            if path.suffix == ".parquet":
                pl.DataFrame({"x": [1]}).write_parquet(path)
                other = path.read_bytes()
            path.write_bytes({"truncated": content[:-20], "empty": b"", "other": other}[damage])
            paths.append(path)
    page = report(results, config)
    known = [detail for _, detail in problems(page).values()]
    for path in paths:
        if path.name == "teacher.json":
            assert "teacher.json: is not valid JSON" in page.text
        else:
            names = (str(path), f"{path.name}: ")  # a student's log is named without its folder
            assert any(detail.startswith(names) for detail in known), (path, known)


def test_a_record_that_lacks_what_is_read_of_it_is_damaged(results):
    for name, part, values in (
        ("eval/baseline_results.json", "inner_steps", [None]),
        ("compare/zero_init.json", "inner_steps", [None]),
        *(
            ("eval/finetuned_recursive_results.json", part, [None, {"of": {}}, {"of": None}])
            for part in ("perplexity", "config", "throughput")
        ),
    ):
        whole = json.loads((results / name).read_text())
        for value in values:  # None takes the part out
            rest = {key: kept for key, kept in whole.items() if key != part}
            write_json(results / name, rest | ({part: value["of"]} if value else {}))
            matrix = read_matrix(Config.from_mapping(SMALL), Layout(results))
            found = {f"eval/{row['name']}_results.json": row for row in matrix.rows}
            row = found.get(
                name, {"status": "failed", "detail": next(iter(matrix.proofs.values()))[1]}
            )
            assert row["status"] == "failed", (name, part)
            assert row["detail"].startswith(f"{results / name}: has no '{part}"), row["detail"]
        write_json(results / name, whole)


def test_seeds_are_shown_together_and_one_by_one(tmp_path):
    config = shipped_config(seeds=[0, 1, 2], phases=["a"])
    page = report(make_results(tmp_path / "results", config), config)
    rows = [row[0] for row in page.rows("Every stage against the baseline")]
    assert rows[5:9] == [
        "finetuned_recursive, all 3 seeds", "finetuned_recursive", "finetuned_recursive_s1",
        "finetuned_recursive_s2",
    ]  # fmt: skip
    assert page.rows(COMPARED)[0][2] == "0, 1, 2"
    assert "Paired bootstrap over 12 documents and 3 seeds." in page.text


def test_an_unfinished_run_has_a_curve_and_one_of_other_settings_has_none(odd):
    results, page = odd
    curves, unreadable = read_curves(Config.from_mapping(SMALL), Layout(results))
    assert not unreadable and [c.run.key for c in curves if not c.finished] == ["recursive_a_s0"]
    assert next(c.logs for c in curves if not c.finished)["step"].to_list() == [0, 10, 20]
    assert "single_pass_a_s0" not in [c.run.key for c in curves] and len(curves) == 2
    assert "Dotted, not finished: recursive_a_s0." in page.text


def test_what_differs_between_runs_is_visible(whole, odd):
    trainings = whole.rows("Trainings: what differs")
    assert [row[0] for row in trainings][:2] == ["recursive_a_s0", "single_pass_a_s0"]
    shared = dict(whole.rows("Trainings: the same for all 14 runs"))
    assert shared["settings.lr_schedule"] == "linear" and "settings.lr" not in shared
    assert dict(whole.rows("Versions: the same"))["torch"] == "2.13.0"
    assert not whole.rows("Versions: what differs")
    rows = dict(odd[1].rows("Versions: what differs"))
    assert rows["finetuned_single_pass_flops"] == "2.12.1" and rows["baseline"] == "2.13.0"
    assert "sheet: " in whole.all("pre")[-1]["text"]


def test_the_same_records_give_the_same_page(odd):
    results, _ = odd
    write_report(SMALL, results, results / "again.html")
    assert (results / "again.html").read_bytes() == (results.parent / "report.html").read_bytes()


def test_names_in_a_figure_are_text_whatever_they_hold():
    figure = Figure()
    figure.subplots().set_title(r"$\frac{a}{b}$ <b>& c")
    svg = to_svg(figure, "x", 'say "hi" <now>')
    page = Page(f"<body>{svg}</body>")
    assert r"$\frac{a}{b}$ <b>& c" in page.text and not page.all("b")
    assert page.all("svg")[0]["attributes"]["aria-label"] == 'say "hi" <now>'
    ids = [e["attributes"]["id"] for e in page.elements if "id" in e["attributes"]]
    assert ids and all(name.startswith("x-") for name in ids)
