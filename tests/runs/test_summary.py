"""The summaries: what they judge, and how they are laid out."""

import json
from pathlib import Path

import pytest
from html_page import report
from records import make_results, make_track_b, shipped_config

from kimi_recursive.layout import Layout
from kimi_recursive.matrix.settings import Config
from kimi_recursive.report.answers import summarize, summary_text
from kimi_recursive.report.matrix_tables import efficiency_table, halting_table
from kimi_recursive.report.success import success_table
from kimi_recursive.report.summary import Matrix, read_matrix
from kimi_recursive.report.tasks import Tasks
from kimi_recursive.track_b.publish import read_track_b, summarize_track_b

CONFIG = shipped_config()


def columns(path: Path) -> list[int]:
    return [len(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("depth", "stopped", "commit", "judged", "generated"), [
    (4, 1.25, "verified", "within", "4.00, fixed by the config"),
    (4, 2.5, "verified", "outside", "4.00, fixed by the config"),
    (2, 1.25, "verified", "cannot miss it, as K is 2", "2.00, fixed by the config"),
    (4, 1.25, "learned", "within", "4.00"),
])  # fmt: skip
def test_efficiency_judges_the_number_that_the_config_does_not_fix(
    depth, stopped, commit, judged, generated
):
    """`verified` runs all K inner steps in every round, so their mean says nothing."""
    found = efficiency_of(depth, stopped, commit=commit)
    expected = ["finetuned_recursive", f"{stopped:.2f}", judged, "50.0000", generated, "4.50x"]
    assert found.rows == [expected] and len(found.notes) == 1


@pytest.mark.parametrize(("ran", "stopped", "judged", "generated"), [
    (1.75, 2.5, "within", "1.75, judged"),
    (2.25, 1.5, "outside", "2.25, judged"),
    (0.0, 1.5, "within", "0.00"),  # without prompts
])  # fmt: skip
def test_where_tokens_stop_on_their_own_generation_is_judged(ran, stopped, judged, generated):
    found = efficiency_of(4, stopped, halting="expected", mean_inner_steps=ran)
    assert (found.rows[0][2], found.rows[0][4]) == (judged, generated) and len(found.notes) == 2


def test_the_pairs_whose_tokens_stop_have_a_table():
    group = {"group": "unseen, 3 hops", "num_pairs": 256, "exact_match": 0.5,
             "exact_match_interval": [0.4, 0.6]}  # fmt: skip
    counted = [{**group, "step": t, "mean_inner_steps": float(t)} for t in (1, 2)]
    row = {"status": "ok", "name": "finetuned_recursive", "inner_steps": 2}
    others = [row | {"pairs": [{**group, "step": 2}]}, row | {"pairs": None}]
    matrix = Matrix([*others, row | {"pairs": counted}], {}, [], None)
    assert halting_table(matrix).rows == [
        ["finetuned_recursive", "unseen, 3 hops", "256", "50.0 %", "[40.0, 60.0] %", "2.00"]
    ]


def efficiency_of(depth: int, stopped: float, **row):
    base = {"status": "ok", "stage": "baseline", "forward_flops_per_token": 2e6}
    row = {
        "status": "ok", "stage": "finetuned_recursive", "arm": "recursive", "inner_steps": depth,
        "mean_inner_steps": float(depth), "halting_mean_inner_steps": stopped,
        "commit": "verified", "halting_perplexity": 50.0, "forward_flops_per_token": 9e6, **row,
    }  # fmt: skip
    return efficiency_table(Matrix([base, row], {}, [], None))


def test_a_phase_that_did_not_improve_on_its_start_has_no_verdict(tmp_path):
    """Its evaluation is that of the phase before under a later name."""
    config, layout = shipped_config(phases=["a", "b"]), Layout(tmp_path / "results")
    make_results(layout.folder, config)

    def compared() -> list[tuple[str, str]]:
        matrix = read_matrix(Config.from_mapping(config), layout)
        return [(pair.arm, pair.reference) for pair in matrix.comparisons]

    loop, plain = "finetuned_recursive", "finetuned_vanilla_b"
    before = compared()
    assert (f"{loop}_b", loop) in before, "each phase against the one before"
    assert (f"{loop}_b", plain) in before and (loop, plain) not in before
    short: list[str] = []
    for key, stage in (("recursive_b_s0", f"{loop}_b"), ("vanilla_b_s0", plain)):
        path = layout.run(key).summary
        path.write_text(json.dumps({**json.loads(path.read_text()), "best_step": 0}))
        after = compared()
        assert after == [pair for pair in before if stage not in pair]
        before = after
        matrix = read_matrix(Config.from_mapping(config), layout)
        text = summary_text(matrix, Tasks([], [], []), Config.from_mapping(config), layout)
        short.append(stage)
        said = f"No verdict on {', '.join(short)}: the training was not long enough"
        assert said in " ".join(text.split())
    assert before and (loop, "baseline") in before


def test_it_says_which_runs_meet_their_criteria(tmp_path, monkeypatch):
    config, layout = shipped_config(phases=["a", "b"]), Layout(tmp_path / "results")
    make_track_b(make_results(layout.folder, config), config)
    matrix = read_matrix(Config.from_mapping(config), layout)
    table = success_table(matrix, layout)
    training, evaluation = table.rows
    assert training == ["refinement_training: validation_loss", "7 of 8 runs"]
    assert evaluation == ["refinement_evaluation: perplexity", "8 of 8 runs"]
    assert table.notes == [f"{training[0]} (below 0) is not met by single_pass_b_s0 (0)."]
    text = summary_text(matrix, Tasks([], [], []), Config.from_mapping(config), layout)
    assert table.to_text() in text
    [*shown, students] = report(layout.folder, config).rows(table.caption)
    assert [row[0] for row in shown] == [training[0], evaluation[0]]
    assert students[0] == "embedding_distillation: improves", "1 % of the steps: no more is asked"
    monkeypatch.chdir(tmp_path)
    table = success_table(matrix, layout)
    assert table.rows == [] and table.notes == [
        "config/criteria.yaml: cannot be read (No such file or directory)"
    ]


@pytest.mark.parametrize("diverged", [False, True])
def test_the_summary_fits_100_columns_with_long_names_and_problems(tmp_path, diverged):
    config = shipped_config(seeds=[2**31 - 1, 2**31 - 2])
    results = make_results(tmp_path / "a folder with a name that is rather long/results", config)
    for path in results.glob("eval/finetuned_recursive*_results.json"):
        found = json.loads(path.read_text())
        if diverged:
            for row in [found["perplexity"], *found["perplexity"]["by_step"]]:
                row["perplexity"] = 1.7e300
            found["halting"]["perplexity"] = 1e300
        path.write_text(json.dumps(found))
    (results / "eval/finetuned_single_pass_documents.parquet").write_bytes(b"PAR1")
    (results / "eval/finetuned_single_pass_c_s2147483646_results.json").write_text("{")
    log = results / "logs/evaluate/finetuned_single_pass_b.log"
    log.parent.mkdir(parents=True)
    log.write_text("error: " + "a rather long message " * 20 + "\n")
    (results / "eval/finetuned_single_pass_b_results.json").unlink()
    layout = Layout(results)
    summarize(Config.from_mapping(config), layout)
    assert max(columns(layout.text)) <= 100
    text = layout.text.read_text()
    assert "finetuned_single_pass_flops_c_s2147483646\n" in text, "the name is whole"
    assert "message" in text and "finetuned_single_pass_documents.parquet" in text


def test_the_summary_of_students_fits_100_columns_with_long_names(tmp_path):
    sheet = tmp_path / "sheet.tsv"
    lines = Path(CONFIG["track_b"]["sheet"]).read_text().splitlines()
    long = "a_rather_long_name_of_an_experiment_that_says_all_"
    lines[1:] = [f"{long}{i}_{line}" for i, line in enumerate(lines[1:])]
    sheet.write_text("\n".join(lines) + "\n")
    config = {**CONFIG, "track_b": {**CONFIG["track_b"], "sheet": str(sheet)}}
    results = make_track_b(tmp_path / "results", config)
    for path in sorted(results.glob("track_b/students/*_s1/logs/train_logs.parquet")):
        path.write_bytes(b"PAR1")
    sorted(results.glob("track_b/students/*_s0/evaluation.parquet"))[0].write_bytes(b"PAR1")
    outputs = [
        str(tmp_path / name) for name in ("s.csv", "s.txt", "c.csv", "p.csv", "runs", "f.png")
    ]
    summarize_track_b(config["track_b"], results, *outputs)
    text = (tmp_path / "s.txt").read_text()
    assert max(columns(tmp_path / "s.txt")) <= 100
    assert "parse_error" in text and "evaluation.parquet:truncated" in "".join(text.split())
    for result in read_track_b(config["track_b"], results):
        assert result.name.removeprefix("reference_") in text, "the name is whole"
