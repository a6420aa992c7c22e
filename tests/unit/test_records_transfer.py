"""Logs of other formats and other machines, and success criteria."""

import json

import fsspec
import pytest
import yaml
from commands import call, error_of
from guide_records import BASELINE, baseline, training
from project import ROOT

from kimi_recursive.records import append_records, read_records, validate
from kimi_recursive.records.criteria import check_records, read_criteria
from kimi_recursive.records.kinds import complete
from kimi_recursive.records.transfer import merge

OLD = [
    {
        "experiment_id": "a",
        "dataset": "planning",
        "accuracy": 0.5,
        "config": {"lr": 0.1},
        "gpu": 4,
    },
    {"experiment_id": "b", "dataset": "causal", "accuracy": None, "when": "2024-01-01T00:00:00"},
]
MAPPING = {
    "fields": {
        "timestamp": "when",
        "run_data.run_id": "experiment_id",
        "run_data.domain": "dataset",
        "run_data.best_val_accuracy": "accuracy",
        "run_data.hyperparameters.learning_rate": "config.lr",
    },
    "defaults": {"timestamp": "now", "run_data.status": "completed"},
}


@pytest.fixture
def old(tmp_path):
    (tmp_path / "old.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in OLD))
    (tmp_path / "map.yaml").write_text(yaml.safe_dump(MAPPING))
    return tmp_path / "old.jsonl"


def test_migration_maps_fields_and_keeps_the_original(old, monkeypatch, capsys):
    new, before = old.with_name("new.jsonl"), old.read_bytes()
    arguments = ("log", "migrate", old, "--mapping", old.with_name("map.yaml"), "--output", new)
    assert call(monkeypatch, *arguments, "--dry-run") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["run_data"]["run_id"] == "a" and not new.exists()
    assert "field 'gpu' of 1 records is dropped" in shown.err
    assert call(monkeypatch, *arguments) == 0
    assert old.read_bytes() == before and validate(new) == (2, [])
    first, second = read_records(new)
    assert first["run_data"]["hyperparameters"] == {"learning_rate": 0.1}
    assert first["run_data"]["best_val_accuracy"] == 0.5 and first["timestamp"] > "2026"
    assert second["timestamp"] == "2024-01-01T00:00:00+00:00"
    assert call(monkeypatch, *arguments) == 2  # never over what is there
    assert "already exists" in capsys.readouterr().err


def test_what_is_not_mapped_can_be_kept(old, monkeypatch):
    mapping = {**MAPPING, "keep": "run_data.old"}
    old.with_name("map.yaml").write_text(yaml.safe_dump(mapping))
    new = old.with_name("new.jsonl")
    arguments = ("log", "migrate", old, "--mapping", old.with_name("map.yaml"), "--output", new)
    assert call(monkeypatch, *arguments) == 0
    assert read_records(new)[0]["run_data"]["old"] == {"gpu": 4}


def test_migration_writes_nothing_when_a_line_does_not_fit(old, monkeypatch, capsys):
    old.write_text(old.read_text() + '{"experiment_id": "c"}\nno json\n')
    new = old.with_name("new.jsonl")
    arguments = ("log", "migrate", old, "--mapping", old.with_name("map.yaml"), "--output", new)
    assert call(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert "line 3: run_data.domain: is missing" in err and "line 4: is not JSON" in err
    assert sorted(p.name for p in old.parent.iterdir()) == ["map.yaml", "old.jsonl"]


@pytest.mark.parametrize(
    "mapping, expected",
    [
        ("[1]", "not a YAML mapping, but list"),
        ("kind: baselines", "must have 'fields'"),
        ("fields: {a: b}\nkindd: x", "unknown key 'kindd'; did you mean 'kind'?"),
        ("fields: {a: b}\nkind: x", "kind: must be one of training_log, baselines"),
        ("fields: {a: [", "not a YAML mapping"),
    ],
)
def test_a_bad_mapping_is_one_line(old, monkeypatch, capsys, mapping, expected):
    old.with_name("map.yaml").write_text(mapping)
    assert call(monkeypatch, "log", "migrate", old, "--mapping", old.with_name("map.yaml")) == 2
    err = capsys.readouterr().err
    assert expected in err and len(err.splitlines()) == 1


# ---- merge ----


def test_logs_are_merged_by_content(tmp_path, monkeypatch, capsys):
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    append_records(here, [training("same", x={"a": 1, "b": 2}), training("differs", loss=1.0)])
    append_records(here, [training("ran", status="running")])
    mine = here.read_bytes()
    lines = [
        '{"run_data": {"x": {"b": 2, "a": 1}, "status": "completed", "domain": "planning", '
        '"run_id": "same"}, "timestamp": "2025-10-21T02:00:00+02:00"}',
        json.dumps(training("differs", loss=2.0)),
        json.dumps(training("new")),
        json.dumps(training("new")),
        json.dumps(training("ran", best_val_loss=float("nan"))),
        "{torn",
    ]
    there.write_text("\n".join(lines))
    assert call(monkeypatch, "log", "merge", there, "--into", here, "--dry-run") == 1
    assert here.read_bytes() == mine and "2 would be added, 2 already in the log" in (
        capsys.readouterr().out
    )
    assert call(monkeypatch, "log", "merge", there, "--into", here) == 1
    shown = capsys.readouterr()
    assert "conflict: 'differs' differs in" in shown.out and "run_data.loss" in shown.out
    assert "line 6: is not JSON" in shown.err and "NaN" in shown.err
    assert here.read_bytes().startswith(mine)
    assert [r["run_data"]["run_id"] for r in read_records(here)][3:] == ["new", "ran"]
    assert validate(here) == (5, [])
    assert call(monkeypatch, "log", "merge", here, "--into", here) == 0  # nothing new in itself


def test_a_field_that_is_null_is_as_good_as_missing(tmp_path):
    """Logs of before have no null for what was not measured."""
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    append_records(here, [training("old")])
    append_records(there, [complete(training("old"))])
    merged = merge([str(there)], here)
    assert (merged.num_same, merged.new, merged.conflicts) == (1, [], [])


def test_a_log_is_merged_from_a_url(tmp_path, monkeypatch, capsys):
    append_records(tmp_path / "there.jsonl", [BASELINE, baseline("b")])
    with fsspec.open("memory://volume/baselines.jsonl", "wb") as file:
        file.write((tmp_path / "there.jsonl").read_bytes())
    into = tmp_path / "here.jsonl"
    assert call(monkeypatch, "log", "merge", "memory://volume/baselines.jsonl", "--into", into) == 0
    assert validate(into) == (2, [])
    capsys.readouterr()
    for url in ("memory://volume/no.jsonl", "nonsense://x/y"):
        assert call(monkeypatch, "log", "merge", url, "--into", into) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {url}: cannot be read") and len(err.splitlines()) == 1


def test_logs_of_two_kinds_are_not_merged(tmp_path, monkeypatch, capsys):
    append_records(tmp_path / "a.jsonl", [training("a")])
    append_records(tmp_path / "b.jsonl", [BASELINE])
    paths = (tmp_path / "b.jsonl", "--into", tmp_path / "a.jsonl")
    assert call(monkeypatch, "log", "merge", *paths) == 2
    assert "is a log of baselines, but the others are of training_log" in capsys.readouterr().err


# ---- criteria ----


def results(records, criteria) -> dict:
    return {(c.run_id, c.criterion): c.result for c in check_records(records, criteria)}


def test_criteria_pass_fail_or_were_not_measured():
    criteria = {
        "t": {
            "high": {"field": "best_val_accuracy", "above": 0.5},
            "low": {"field": "final_metrics.cycle_loss", "below": 0.5},
            "is": {"field": "state", "equals": "stable"},
            "falls": {"field": "loss", "decreasing": True},
        }
    }
    good = training(
        "good",
        experiment_type="t",
        best_val_accuracy=0.51,
        final_metrics={"cycle_loss": 0.49},
        state="stable",
        metrics_history=[{"loss": 3}, {"other": 1}, {"loss": 2}, {"loss": 2}],
    )
    bad = training(
        "bad",
        experiment_type="t",
        best_val_accuracy=0.5,
        final_metrics={"cycle_loss": 0.5},
        state="wild",
        metrics_history=[{"loss": 2}, {"loss": 3}],
    )
    blank = training("blank", experiment_type="t", metrics_history=None, best_val_accuracy=None)
    failed = training("failed", experiment_type="t", status="failed", error_message="no memory")
    running = training("running", experiment_type="t", status="running")
    found = results([good, bad, blank, failed, running, training("other")], criteria)
    assert {v for (run, _), v in found.items() if run == "good"} == {"passed"}
    assert {v for (run, _), v in found.items() if run == "bad"} == {"failed"}
    assert {v for (run, _), v in found.items() if run == "blank"} == {"not measured"}
    assert found[("failed", "status")] == "failed" and len(found) == 13


def test_a_run_is_held_against_the_best_before_it_that_is_comparable():
    criterion = {
        "field": "loss",
        "below_best_of": {"variant": "baseline"},
        "same": ["data"],
    }

    def run(name, day, loss, variant="new", data="x", **more):
        return training(
            name,
            f"2025-10-{day}T00:00:00Z",
            experiment_type="t",
            loss=loss,
            variant=variant,
            data=data,
            **more,
        )

    records = [
        run("base", 10, 3.0, "baseline"),
        run("elsewhere", 10, 1.0, "baseline", data="y"),
        run("broken", 10, 0.5, "baseline", status="failed"),
        run("later", 20, 0.1, "baseline"),
        run("better", 11, 2.9),
        run("equal", 11, 3.0),
        run("first", "09", 2.9),
        run("first_and_worse", "09", 3.1),
    ]
    found = results(records, {"t": {"loss": criterion}})
    assert found[("better", "loss")] == "passed" and found[("equal", "loss")] == "failed"
    # Jobs end in any order: nothing before it, so the first baseline behind it, not the best.
    assert found[("first", "loss")] == "passed" and found[("first_and_worse", "loss")] == "failed"
    assert found[("base", "loss")] == "not measured"  # the first of its own kind


@pytest.mark.parametrize(
    "text, expected",
    [
        ("t: {a: {above: 1}}", "t.a: must have a 'field'"),
        ("t: {a: {field: x}}", "t.a: must have one of above, below"),
        ("t: {a: {field: x, above: 1, below: 2}}", "t.a: must have one of"),
        ("t: {a: {field: x, above: best}}", "t.a: above must be a number, got 'best'"),
        ("t: {a: {field: x, abovee: 1}}", "t.a: unknown key 'abovee'"),
        ("t: {a: {field: x, above: 1, where_at_least: 3}}", "must map fields to numbers, got 3"),
        ("t: {a: {field: x, above: 1, where_at_least: {n: many}}}", "must map fields to numbers"),
        ("t: 3", "t.: must have a 'field'"),
        ("- t", "not a YAML mapping, but list"),
    ],
)
def test_bad_criteria_are_one_line(tmp_path, text, expected):
    (tmp_path / "criteria.yaml").write_text(text)
    assert expected in error_of(read_criteria, tmp_path / "criteria.yaml")


def test_a_criterion_is_asked_of_runs_that_are_long_enough():
    """A student with 1 % of the sheet's steps is not asked for the recall of the whole length."""
    criteria = read_criteria(ROOT / "config/criteria.yaml")
    records = [
        training(
            name,
            experiment_type="embedding_distillation",
            best_step=steps,
            hyperparameters={"steps": steps},
            final_metrics={"best_vs_teacher_recall@10": 0.84},
        )
        for name, steps in (("short", 80), ("long", 8000))
    ]
    assert results(records, criteria) == {
        ("short", "improves"): "passed",
        ("long", "improves"): "passed",
        ("long", "recall@10"): "failed",
    }


def test_the_projects_criteria_are_valid_and_have_the_guides_types():
    criteria = read_criteria(ROOT / "config/criteria.yaml")
    guide = {
        "domain_exploration",
        "dual_pass_validation",
        "hyperparam_search",
        "physics_validation",
    }
    ours = {"refinement_training", "refinement_evaluation", "embedding_distillation"}
    assert guide | ours == set(criteria)


def test_check_exits_with_one_when_a_criterion_fails(tmp_path, monkeypatch, capsys):
    log, criteria = tmp_path / "log.jsonl", tmp_path / "criteria.yaml"
    criteria.write_text("t: {low: {field: best_val_loss, below: 0.5}}")
    append_records(log, [training("a", experiment_type="t", best_val_loss=0.4)])
    assert call(monkeypatch, "log", "check", log, "--criteria", criteria) == 0
    append_records(log, [training("b", experiment_type="t", best_val_loss=0.6)])
    assert call(monkeypatch, "log", "check", log, "--criteria", criteria) == 1
    assert call(monkeypatch, "log", "check", log, "--criteria", criteria, "--id", "a") == 0
    assert call(monkeypatch, "log", "check", log, "--criteria", criteria, "--type", "z") == 2
