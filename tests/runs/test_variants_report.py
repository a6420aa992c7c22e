"""The ranking of variants: order, intervals, what is missing, and where it is shown."""

import csv
import json
from pathlib import Path

import pytest
from html_page import report
from records import make_results, shipped_config

from kimi_recursive.hub.model_card import _answer
from kimi_recursive.hub.results import Scores, read_comparisons
from kimi_recursive.layout import Layout
from kimi_recursive.matrix.settings import Config
from kimi_recursive.report.answers import summarize
from kimi_recursive.report.summary import read_matrix
from kimi_recursive.report.variants import QUESTION, Ranking, variant_sentence, variant_table

VARIANTS = {
    "deep": {"recursive": {"max_inner_steps": 4}},
    "feedback": {"recursive": {"use_token_feedback": True}},
    "rate": {"training": {"b": {"lr": 1e-3}}},
}
CONFIG = shipped_config(phases=["a", "b"], variants=VARIANTS)
CONFIG["track_b"]["enabled"] = False
SHIFTS = {"deep": -0.05, "feedback": 0.05, "rate": 0.0}


@pytest.fixture
def layout(tmp_path) -> Layout:
    return Layout(make_results(tmp_path / "results", CONFIG, shifts=SHIFTS))


def ranking(layout: Layout, config: dict = CONFIG) -> Ranking:
    found = read_matrix(Config.from_mapping(config), layout).variants
    assert found is not None
    return found


def test_the_best_comes_first_with_intervals_that_know_how_many_were_tried(layout):
    found = ranking(layout)
    assert found.ranked[0].name == "deep" and found.ranked[-1].name == "feedback"
    assert found.phase == "b" and found.num_tried == 4 and not found.absent
    assert found.confidence == pytest.approx(1 - 0.05 / 4)
    by_name = {one.name: one for one in found.ranked}
    deep = by_name["deep"]
    assert deep.default.reference == "finetuned_recursive_b" and deep.default.arm_step == 4
    assert deep.default.verdict == "helps" and by_name["feedback"].default.verdict == "hurts"
    assert by_name["rate"].default.verdict == "not distinguishable"
    assert by_name["default"].default is None
    controls = {name: one.control.reference for name, one in by_name.items()}
    assert controls == {
        "deep": "finetuned_single_pass_flops_b-deep",
        "feedback": "finetuned_single_pass_flops_b-feedback",
        "rate": "finetuned_single_pass_flops_b-rate",
        "default": "finetuned_single_pass_flops_b",
    }
    assert by_name["feedback"].control.verdict == "hurts"
    table = variant_table(found)
    assert [c.heading for c in table.columns][-2:] == ["98.75 % interval", "verdict"]
    assert [row[3] for row in table.rows[:2]] == ["default", "its single_pass_flops"]
    assert "A best of 4 is not an effect" in table.notes[0]
    assert variant_sentence(found).startswith("deep has the lowest perplexity of 4 that were tried")


def test_an_interval_is_wider_than_one_of_95_percent(layout):
    matrix = read_matrix(Config.from_mapping(CONFIG), layout)
    mine = next(one for one in matrix.variants.ranked if one.name == "default").control.difference
    alone = next(
        pair.difference
        for pair in matrix.comparisons
        if (pair.arm, pair.reference) == ("finetuned_recursive_b", "finetuned_single_pass_flops_b")
    )
    assert mine.mean == alone.mean and mine.low < alone.low < alone.high < mine.high


def test_the_validation_says_which_one_it_would_choose(layout):
    for key, loss in (("rate", 3.1), ("deep", 3.3)):
        path = layout.run(f"recursive_b_s0-{key}").summary
        found = json.loads(path.read_text())
        path.write_text(json.dumps(found | {"best_validation_loss": loss}))
    assert "validation" not in " ".join(variant_table(ranking(layout)).notes), "two have none"
    for path in layout.folder.glob("runs/recursive_b_s0*/train_summary.json"):
        found = json.loads(path.read_text())
        path.write_text(json.dumps({"best_validation_loss": 3.5} | found))
    [_, note] = variant_table(ranking(layout)).notes
    assert note.startswith("The validation documents put rate first.")


def test_a_partial_matrix_ranks_what_is_there_after_the_phase_that_most_have_reached(layout):
    layout.evaluation("finetuned_recursive_b-feedback").results.unlink()
    found = ranking(layout)
    assert (found.phase, found.absent) == ("b", ["feedback"]) and found.num_tried == 4
    layout.evaluation("finetuned_recursive_b").results.unlink()
    found = ranking(layout)
    assert found.phase == "a" and found.absent == ["rate"], "rate differs in phase b alone"
    assert "lowest perplexity of 3 (of 4 that were tried): better" in variant_sentence(found)
    layout.evaluation("finetuned_single_pass_flops-deep").documents.write_bytes(b"PAR1")
    found = ranking(layout)
    assert found.ranked[0].control.verdict is None and "damaged" in variant_table(found).to_text()
    for path in layout.folder.glob("eval/finetuned_recursive*_results.json"):
        path.unlink()
    found = ranking(layout)
    assert variant_sentence(found) == "Not known: no variant is there."
    assert variant_table(found).to_text().splitlines()[1] == "(none)"


def test_a_training_that_was_too_short_is_not_ranked(layout):
    path = layout.run("recursive_b_s0-deep").summary
    path.write_text(json.dumps(json.loads(path.read_text()) | {"best_step": 0}))
    found = ranking(layout)
    assert found.too_short == ["deep"] and not found.absent
    assert "deep" not in [one.name for one in found.ranked]
    assert "Not ranked, since the training was not long enough: deep." in variant_table(found).notes


def test_summary_report_and_card_show_it_and_the_default_is_as_without_variants(tmp_path, layout):
    config = Config.from_mapping(CONFIG)
    summarize(config, layout)
    text = layout.text.read_text()
    assert text.index(QUESTION) > text.index("Does recursion help?")
    assert variant_table(ranking(layout)).to_text() in text
    assert max(map(len, text.splitlines())) <= 100
    rows = list(csv.DictReader(layout.table.open()))
    assert {row["variant"] for row in rows} == {"", *VARIANTS}
    assert all(row["name"].endswith(f"-{row['variant']}") for row in rows if row["variant"])
    page = report(layout.folder, CONFIG)
    assert page.rows(variant_table(ranking(layout)).caption)[0][0] == "deep"

    plain = {**CONFIG, "variants": {}}
    alone = Layout(make_results(tmp_path / "plain/results", plain))
    summarize(Config.from_mapping(plain), alone)
    assert QUESTION not in alone.text.read_text()
    entries, before = (json.loads(x.verdicts.read_text()) for x in (layout, alone))
    assert entries[: len(before)] == before and all("confidence" not in e for e in before)
    added = entries[len(before) :]
    assert len(added) == 6 and {entry["confidence"] for entry in added} == {0.9875}
    matrix, same = (
        read_matrix(Config.from_mapping(c), x) for c, x in ((CONFIG, layout), (plain, alone))
    )
    assert [row["name"] for row in matrix.default] == [row["name"] for row in same.rows]

    stage = "finetuned_recursive_b-deep"
    scores = Scores(stage, stage, "text", "test", {}, {}, 4, "")
    pairs = read_comparisons(layout.folder, [scores], 0)
    assert [pair.reference for pair in pairs] == [
        "finetuned_recursive_b", "finetuned_single_pass_flops_b-deep",
    ]  # fmt: skip
    card = _answer(pairs)
    assert "98.75 % interval" in card
    assert "- `finetuned_single_pass_flops_b-deep`: the same cells in a single pass, at eq" in card


def test_a_folder_without_variants_has_no_ranking(tmp_path):
    plain = {**CONFIG, "variants": {}}
    layout = Layout(Path(tmp_path))
    assert read_matrix(Config.from_mapping(plain), layout).variants is None
