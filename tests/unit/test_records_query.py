"""Questions to a log, through the functions and through `kimi-recursive log`."""

import json
import re
import shutil

import polars as pl
import pytest
from commands import call, error_of
from guide_records import BASELINE, TRAINING, baseline, training
from project import ROOT

from kimi_recursive.records import append_records, read_table
from kimi_recursive.records import table as table_module
from kimi_recursive.records.query import Filter, best, compare, is_lower_better, select

RUNS = [
    TRAINING,
    training(
        "equal_1", best_val_accuracy=0.60, hyperparameters={"fusion_mode": "equal", "lr": 1e-4}
    ),
    training("equal_2", best_val_accuracy=0.70, hyperparameters={"fusion_mode": "equal"}),
    training("learned", best_val_accuracy=0.65, hyperparameters={"fusion_mode": "learned"}),
    training("lost", status="failed", best_val_accuracy=0.99, error_message="out of memory"),
    training("now", status="running"),
    training("causal", domain="causal", best_val_loss=0.4, mine={"deep": 3}),
]


@pytest.fixture(params=["plain", "damaged"])
def log(request, tmp_path):
    """The same runs in a log that polars reads, and in one that is read by line."""
    path = tmp_path / "log.jsonl"
    append_records(path, RUNS)
    if request.param == "damaged":
        lines = path.read_text().splitlines()
        lines.insert(1, "{torn")
        lines.insert(3, "")
        bad = training("bad", best_val_accuracy="high", hyperparameters="none")
        path.write_text("\n".join([*lines, json.dumps(bad)]) + "\n")
    return path


def ids(table) -> list[str]:
    return [name for name in table.rows["run_id"].to_list() if name != "bad"]


def test_a_damaged_log_gives_the_same_answers_and_says_what_was_left_out(log):
    table = read_table(log, ["best_val_accuracy"], ["fusion_mode"])
    assert ids(table) == [record["run_data"]["run_id"] for record in RUNS]
    scores = table.rows.filter(pl.col("run_id") != "bad")
    assert scores["best_val_accuracy"].to_list() == [0.435, 0.6, 0.7, 0.65, 0.99, None, None]
    assert scores["fusion_mode"].to_list()[:4] == [None, "equal", "equal", "learned"]
    damaged = "{torn" in log.read_text()
    assert [problem[:7] for problem in table.problems] == (["line 2:"] if damaged else [])


def test_records_are_selected_by_every_condition(log):
    assert ids(select(log, Filter(domain="causal"))) == ["causal"]
    assert ids(select(log, Filter(status="failed"))) == ["lost"]
    assert ids(select(log, Filter(type="dual_pass_validation"))) == [RUNS[0]["run_data"]["run_id"]]
    above = Filter(metric="best_val_accuracy", above=0.6, below=0.99)
    assert ids(select(log, above)) == ["equal_2", "learned"]  # 0.6 itself is not above
    assert ids(select(log, Filter(where={"hyperparameters.lr": "1e-4"}))) == ["equal_1"]
    assert (
        ids(select(log, Filter(where={"use_dual_pass": "false"}))) == ids(select(log, Filter()))[:1]
    )
    assert ids(select(log, Filter(where={"mine.deep": "3"}, domain="causal"))) == ["causal"]
    assert ids(select(log, Filter(where={"mine.deep": "4"}))) == []


def test_the_best_run_has_not_failed_and_losses_are_lowest(log):
    assert ids(best(log, Filter(metric="best_val_accuracy"), lowest=False))[0] == "equal_2"
    assert ids(best(log, Filter(metric="best_val_loss"), lowest=True))[0] == "causal"
    assert is_lower_better("final_metrics.class_balance_delta") and is_lower_better("perplexity")
    assert not is_lower_better("best_val_accuracy") and not is_lower_better("recall@10")


def test_runs_are_compared_by_any_field(log):
    rows = compare(
        log, "hyperparameters.fusion_mode", ["best_val_accuracy"], Filter("planning")
    ).rows
    by = {row["hyperparameters.fusion_mode"]: row for row in rows.to_dicts()}
    equal = by["equal"]
    assert (equal["num_runs"], equal["best"], equal["best run"]) == (2, 0.7, "equal_2")
    assert equal["mean"] == pytest.approx(0.65) and equal["std"] == pytest.approx(0.1 / 2**0.5)
    assert by["learned"]["num_runs"] == 1 and by["none"]["num_runs"] >= 3
    by_status = compare(log, "status", ["best_val_accuracy"], Filter("planning")).rows.to_dicts()
    counts = {row["status"]: row["num_runs"] for row in by_status}
    assert counts["failed"] == counts["running"] == 1


def test_a_run_that_has_ended_no_longer_runs(tmp_path):
    path = tmp_path / "log.jsonl"
    append_records(path, [training("a", status="running"), training("b", status="running")])
    append_records(path, [training("a", best_val_loss=1.0)])
    rows = read_table(path).rows
    assert rows.select("run_id", "status").rows() == [("b", "running"), ("a", "completed")]
    assert rows[table_module.ROW].to_list() == [1, 2]


def test_an_unknown_field_names_the_nearest(log):
    message = error_of(read_table, log, ["best_val_acuracy"])
    assert "no record has a field 'best_val_acuracy'; did you mean best_val_accuracy" in message
    assert read_table(log, ["mrr"]).rows["mrr"].null_count() >= len(RUNS)  # known, never measured
    assert "cannot be a metric as well" in error_of(read_table, log, ["mrr"], ["mrr"])


def test_baselines_are_found_by_short_names(tmp_path):
    path = tmp_path / "baselines.jsonl"
    other = baseline("3level", metrics={"accuracy": 0.6, "mine": 2.5}, config={"variant": "fusion"})
    append_records(path, [BASELINE, other])
    rows = read_table(path, ["accuracy", "mine"], ["variant", "commit"]).rows
    assert rows["accuracy"].to_list() == [0.5322, 0.6] and rows["mine"].to_list() == [None, 2.5]
    assert rows["variant"].to_list() == ["6level_full", "fusion"]
    assert rows["domain"].to_list() == ["6level_initial", "3level"]


# ---- the command ----


def test_query_gives_the_records_as_they_are(log, monkeypatch, capsys):
    code = call(monkeypatch, "log", "query", log, "--failed", "--format", "json")
    out = capsys.readouterr().out
    assert code == 0 and out.strip() in log.read_text().splitlines()
    assert json.loads(out)["run_data"]["error_message"] == "out of memory"


def test_tables_keep_run_ids_whole_and_fit(log, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    name = "a_run_with_a_very_long_name_that_somebody_has_to_copy_from_here"
    append_records(log, [training(name, experiment_type="x" * 90, best_val_accuracy=0.5)])
    assert call(monkeypatch, "log", "query", log, "--metric", "best_val_accuracy") == 0
    out = capsys.readouterr().out
    assert name in out and out.splitlines()[0].startswith("run_id")
    assert call(monkeypatch, "log", "compare", log, "--by", "experiment_type") == 0
    assert call(monkeypatch, "log", "best", log) == 0
    assert "equal_2" in capsys.readouterr().out


def test_show_gives_the_latest_or_one_run(log, monkeypatch, capsys):
    append_records(log, [training("latest")])
    assert call(monkeypatch, "log", "show", log) == 0
    assert json.loads(capsys.readouterr().out)["run_data"]["run_id"] == "latest"
    assert call(monkeypatch, "log", "show", log, "--id", "learned") == 0
    assert json.loads(capsys.readouterr().out)["run_data"]["best_val_accuracy"] == 0.65
    assert call(monkeypatch, "log", "show", log, "--id", "no") == 2


def test_append_takes_lines_or_an_object_and_refuses_a_run_that_is_there(
    tmp_path, monkeypatch, capsys
):
    log, record = tmp_path / "log.jsonl", tmp_path / "record.json"
    record.write_text(
        json.dumps(training("a"), indent=2) + "\n" + json.dumps(training("b")) + "\n\n"
    )
    assert call(monkeypatch, "log", "append", log, "--record", record) == 0
    before = log.read_bytes()
    assert call(monkeypatch, "log", "append", log, "--record", record) == 2
    assert capsys.readouterr().err.endswith("already has run 'a'\n")
    record.write_text('{"timestamp": "now"')
    assert call(monkeypatch, "log", "append", log, "--record", record) == 2
    assert "is not JSON" in capsys.readouterr().err and log.read_bytes() == before


def test_validate_exits_with_one_when_something_is_wrong(tmp_path, monkeypatch, capsys):
    log = tmp_path / "log.jsonl"
    append_records(log, [training("a")])
    assert call(monkeypatch, "log", "validate", log) == 0
    log.write_text(log.read_text() + "{}\n")
    assert call(monkeypatch, "log", "validate", log) == 1
    out = capsys.readouterr().out
    assert f"{log}: line 2: " in out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("query", "--above", "1"), "--above and --below need --metric"),
        (("query", "--where", "domain"), "--where: must be FIELD=VALUE"),
        (("query", "--format", "xml"), "--format: must be table or json"),
        (
            ("query", "--failed", "--status", "completed"),
            "--failed and --status exclude each other",
        ),
        (("best", "--metric", "mrr"), "no matching run has a number in 'mrr'"),
        (("compare", "--by", "hyperparameters.nonsense"), "no record has a field"),
    ],
)
def test_a_wrong_question_is_one_line(tmp_path, monkeypatch, capsys, arguments, expected):
    log = tmp_path / "log.jsonl"
    append_records(log, RUNS)
    command, *options = arguments
    assert call(monkeypatch, "log", command, log, *options) == 2
    err = capsys.readouterr().err
    assert expected in err and err.startswith("error: ") and len(err.splitlines()) == 1


def test_the_report_has_a_table_for_each_domain_and_survives_nulls(tmp_path, monkeypatch):
    log, output = tmp_path / "log.jsonl", tmp_path / "report.md"
    odd = training("a|b", findings="two\nlines | " + "x" * 80, final_metrics=None)
    append_records(log, [*RUNS, odd])
    assert call(monkeypatch, "log", "report", log, "--output", output) == 0
    lines = output.read_text().splitlines()
    assert lines[0] == "# Experiment Report" and lines[2] == f"Total Experiments: {len(RUNS) + 1}"
    assert "## Planning Domain" in lines and "## Causal Domain" in lines
    widths = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
    assert widths == {8}  # both have a validation loss
    first = next(line for line in lines if "baseline_single_pass" in line)
    assert "| 0.435 | 0.990 | 0.794 |" in first
    assert any("| a\\|b | completed | N/A | N/A | N/A |" in line for line in lines)


@pytest.mark.long
def test_progress_is_plotted_for_the_runs_that_fit(log, tmp_path, monkeypatch, capsys):
    output = tmp_path / "plots/progress.png"
    assert call(monkeypatch, "log", "plot", log, "--output", output, "--domain", "planning") == 0
    assert "best_val_accuracy of 5 runs" in capsys.readouterr().out
    assert output.read_bytes().startswith(b"\x89PNG")
    assert call(monkeypatch, "log", "plot", log, "--metric", "mrr") == 2


def test_the_recipes_of_the_docs_run(tmp_path, monkeypatch):
    commands = re.findall(r"`kimi-recursive log (.+?)`", (ROOT / "docs/records.md").read_text())
    assert len(commands) > 14
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "config", tmp_path / "config")
    for path, record in (("baselines.jsonl", BASELINE), ("experiments/training_log.jsonl", None)):
        append_records(path, [record] if record else RUNS)
    dual = training("dual", hyperparameters={"use_dual_pass": True}, best_val_accuracy=0.8)
    append_records("theirs.jsonl", [dual])
    (tmp_path / "record.json").write_text(json.dumps(training("mine")))
    (tmp_path / "old.jsonl").write_text(json.dumps({"experiment_id": "x", "dataset": "d"}) + "\n")
    mapping = (ROOT / "docs/records.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "mapping.yaml").write_text(mapping)
    for command in commands:
        if "s3://" in command or "NAME" in command:
            continue
        arguments = command.replace("LOG", "experiments/training_log.jsonl").split()
        code = call(monkeypatch, "log", *arguments)
        assert code == (1 if arguments[0] == "check" else 0), command  # one of RUNS fails


def test_a_value_that_no_record_has_is_said_with_the_nearest(tmp_path, monkeypatch, capsys):
    log = tmp_path / "log.jsonl"
    append_records(log, RUNS)
    for option, value, said in (
        ("--domain", "plannin", "no record has the domain 'plannin'; did you mean 'planning'?"),
        (
            "--where",
            "fusion_mode=x",
            "no record has the fusion_mode 'x'; there are: equal, learned",
        ),
        ("--status", "complete", "no record has the status 'complete'; did you mean 'completed'?"),
    ):
        commands = ("query", "compare") if option != "--status" else ("query",)
        for command in commands:
            assert call(monkeypatch, "log", command, log, option, value) == 0
            assert said in capsys.readouterr().err
        if option == "--domain":
            assert call(monkeypatch, "log", "plot", log, option, value) == 2
            assert said in capsys.readouterr().err
    append_records(log, [training("none", domain="causal")])
    assert call(monkeypatch, "log", "query", log, "--domain", "causal", "--failed") == 0
    assert "no record has" not in capsys.readouterr().err, "nothing is misspelt"


@pytest.mark.parametrize(
    "arguments, keys",
    [
        (("query",), {"run_data", "timestamp"}),
        (("best", "--top", 2), {"run_id", "domain", "status", "end (UTC)", "best_val_accuracy"}),
        (("compare",), {"status", "metric", "num_runs", "mean", "std", "best", "best run"}),
        (("check", "--criteria", ROOT / "config/criteria.yaml"), {"run_id", "criterion", "value"}),
    ],
)
def test_every_table_is_to_be_had_as_json(tmp_path, monkeypatch, capsys, arguments, keys):
    log = tmp_path / "log.jsonl"
    append_records(log, RUNS)
    command, *options = arguments
    assert call(monkeypatch, "log", command, log, *options, "--json") in (0, 1)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows and all(row.keys() >= keys for row in rows)


def test_a_table_is_cut_on_a_terminal_alone(tmp_path, monkeypatch, capsys):
    log, name = tmp_path / "log.jsonl", "a_run_with_a_name_of_thirty_nine_letters"
    append_records(log, [training(name, domain="a domain of many words, which gives way first")])
    monkeypatch.setenv("COLUMNS", "80")
    assert call(monkeypatch, "log", "query", log) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) > 80
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert call(monkeypatch, "log", "query", log) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert len(line) <= 80 and name in line and "…" in line
