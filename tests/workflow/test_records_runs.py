"""What the workflow ran is in the logs, each run once."""

import functools
import json
import os
import re

import pytest
from commands import call, error_of
from project import ONLY_A

from kimi_recursive.files import git_state
from kimi_recursive.records import read_records, validate
from kimi_recursive.records.kinds import BASELINES, TRAINING_LOG
from kimi_recursive.records.runs import record_of_experiment, record_runs
from kimi_recursive.training.experiment import ExperimentTracker


def ids(path) -> list[str]:
    data = [record.get("run_data", record) for record in read_records(path)]
    return [re.sub(r"_\d{8}T\d{6}$", "", record["run_id"]) for record in data]


def logs(folder):
    return folder / "baselines.jsonl", folder / "experiments/training_log.jsonl"


@pytest.mark.workflow
def test_summarize_records_every_run_of_the_matrix_once(copy):
    baselines, training_log = logs(copy.folder)
    results = copy.folder / "results"
    evaluations = [p.name.removesuffix("_results.json") for p in results.glob("eval/*.json")]
    assert sorted(ids(baselines)) == sorted(evaluations)
    runs = [path.name for path in results.glob("runs/*")]
    assert sorted(ids(training_log)) == sorted([*runs, "train_base"])
    assert validate(baselines)[1] == validate(training_log)[1] == []
    by_name = {r["run_data"]["experiment_name"]: r["run_data"] for r in read_records(training_log)}
    run = by_name["recursive_a_s0"]
    summary = json.loads((results / "runs/recursive_a_s0/train_summary.json").read_text())
    assert run["best_val_loss"] == summary["best_validation_loss"]
    history = [summary["validation"][0]["validation_loss_step_2"], summary["best_validation_loss"]]
    assert run["final_metrics"]["validation_loss_change"] == history[1] - history[0]
    assert run["hyperparameters"]["seed"] == 0 and run["hyperparameters"]["learning_rate"] > 0
    state = git_state()
    assert (run["commit"], run["branch"]) == (state["git_commit"], state["git_branch"])
    scores = {r["experiment"]: r for r in read_records(baselines)}
    found = json.loads((results / "eval/finetuned_recursive_results.json").read_text())
    record = scores["finetuned_recursive"]
    assert record["metrics"]["perplexity"] == found["perplexity"]["perplexity"]
    assert record["branch"] == found["git_branch"] == state["git_branch"]
    assert (found["git_commit"] or "").startswith(record["commit"] or "")
    before = [path.read_bytes() for path in (baselines, training_log)]
    done = copy.snakemake("--force", "summarize")
    assert done.returncode == 0, done.stderr
    assert [path.read_bytes() for path in (baselines, training_log)] == before


@pytest.mark.workflow
def test_every_field_of_the_schema_is_there(copy):
    """The guide's snippets name fields that language models have no number for."""
    for path, kind in zip(logs(copy.folder), (BASELINES, TRAINING_LOG), strict=True):
        for record in read_records(path):
            for field in kind.fields:
                *parents, name = field.split(".")
                assert name in functools.reduce(dict.__getitem__, parents, record), field


@pytest.mark.workflow
def test_a_failed_training_is_recorded_with_its_error(copy):
    _, training_log = logs(copy.folder)
    broken = {**ONLY_A, "training": {**ONLY_A["training"]}}
    broken["training"]["a"] = {**broken["training"]["a"], "lr": 1e30, "lr_heads": 1e30}
    copy.write(broken)
    runs = [f"results/runs/{arm}_a_s0/train_summary.json" for arm in ("recursive", "single_pass")]
    assert copy.snakemake("--keep-going", *runs).returncode == 1
    done = copy.snakemake("summarize")
    assert done.returncode == 0, done.stderr
    failed = [r["run_data"] for r in read_records(training_log)]
    failed = {r["experiment_name"]: r for r in failed if r["status"] == "failed"}
    assert set(failed) == {"recursive_a_s0", "single_pass_a_s0"}
    run = failed["recursive_a_s0"]
    assert run["error_message"].startswith("Diverged: ") and run["failed_step"] == 2
    assert run["last_good_step"] == 0 and run["findings"].startswith("failed at step")
    before = training_log.read_bytes()
    assert copy.snakemake("--force", "summarize").returncode == 0
    assert training_log.read_bytes() == before
    assert validate(training_log)[1] == []


def test_jobs_that_failed_without_a_record_of_their_own_are_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for rule, name in (("evaluate", "baseline"), ("train_phase", "single_pass_b_s0")):
        log = tmp_path / f"results/logs/{rule}/{name}.log"
        log.parent.mkdir(parents=True)
        log.write_text("starting\nerror: first\nmore\nerror: no such layer\n")
        os.utime(log, (1.7e9, 1.7e9))
    (tmp_path / "results/logs/evaluate/fine.log").write_text("all is well\n")
    for _ in range(2):
        record_runs("results")
    baselines, training_log = logs(tmp_path)
    [evaluation] = read_records(baselines)
    assert evaluation["status"] == "failed" and evaluation["error_message"] == "no such layer"
    assert evaluation["timestamp"] == "2023-11-14T22:13:20+00:00"
    assert evaluation["metrics"]["balance_delta"] is evaluation["notes"] is None
    [run] = read_records(training_log)
    assert run["run_data"]["final_metrics"]["accuracy"] is run["run_data"]["pid"] is None
    assert run["run_data"]["run_id"] == "single_pass_b_s0_20231114T221320"
    assert run["run_data"]["error_message"] == "no such layer"


def test_an_experiment_is_recorded_when_it_has_ended(tmp_path, monkeypatch, capsys):
    folder, log = tmp_path / "mine", tmp_path / "log.jsonl"
    with pytest.raises(RuntimeError), ExperimentTracker(folder, training_params={"phase": "a"}):
        assert record_of_experiment(folder) is None
        arguments = ("log", "append", log, "--experiment", folder)
        assert call(monkeypatch, *arguments) == 2
        assert "has not ended" in capsys.readouterr().err
        raise RuntimeError("out of memory")
    record = record_of_experiment(folder)
    assert record["run_data"]["status"] == "failed"
    assert record["run_data"]["error_message"] == "RuntimeError: out of memory"
    assert call(monkeypatch, *arguments) == 0 and validate(log) == (1, [])
    assert call(monkeypatch, *arguments) == 2
    assert "experiment_metadata.json" in error_of(record_of_experiment, tmp_path)


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "results/logs/evaluate/baseline.log"
    log.parent.mkdir(parents=True)
    log.write_text("error: oh\n")
    (tmp_path / "baselines.jsonl").write_text("my notes\n")
    record_runs("results")
    assert "nothing was recorded" in capsys.readouterr().err
    assert (tmp_path / "baselines.jsonl").read_text() == "my notes\n"


def test_a_run_that_is_published_again_is_one_record(tmp_path):
    """An attempt that measures nothing; one that trains is another run."""
    folder = tmp_path / "mine"

    def attempt(*steps: int) -> dict:
        with ExperimentTracker(folder, training_params={"phase": "a", "tried": len(steps)}) as run:
            run.metadata["started_at"] = f"2026-01-0{1 + len(steps)}T00:00:00+00:00"
            for step in steps:
                run.save_metrics(step, {"loss": 1.0})
            run.finish({"validation": []})
        return record_of_experiment(folder)

    first = attempt(1)
    assert attempt() == first
    assert attempt(1, 2)["run_data"]["run_id"] != first["run_data"]["run_id"]
