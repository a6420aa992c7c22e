"""The snippets and commands of the guides that this project began with, as a reader copies them.

They lie in `tests/support/snippets` and run in the folder of the tiny matrix. Only names, paths and
numbers of steps are adapted. Track-B's commands are in `test_track_b_workflow`. What talks to the
Hub or to Modal, and what has `...` where code should be, is left out.
"""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from commands import call
from project import ARMS, ROOT, VANILLA

pytestmark = pytest.mark.workflow

PAGES = sorted((ROOT / "tests/support/snippets").glob("*.md"))
BLOCK = re.compile(r"^## (.+?)\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPETS = {name: text for page in PAGES for name, text in BLOCK.findall(page.read_text())}
LOG = "experiments/training_log.jsonl"


@pytest.fixture(scope="module")
def folder(project, tmp_path_factory) -> Path:
    """A copy of the finished project, for all snippets: some append to its logs."""
    return project.copy(tmp_path_factory.mktemp("snippets") / "copy").folder


@pytest.fixture
def here(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder) -> dict:
    """A base and what the guide takes as given beside it."""
    with contextlib.chdir(folder):
        _, names = run("load the base")
    return {name: names[name] for name in ("base_model", "tokenizer", "input_ids")}


def run(name: str, renamed: dict[str, str] | None = None, **given) -> tuple[str, dict]:
    """What a snippet prints, and the names that it leaves.

    Args:
        renamed: Names to replace in it.
        given: Names that it takes as given.
    """
    text, names, printed = SNIPPETS[name], {"torch": torch, **given}, io.StringIO()
    for old, new in (renamed or {}).items():
        text = text.replace(old, new)
    with contextlib.redirect_stdout(printed):
        exec(text, names)
    return printed.getvalue(), names


@pytest.fixture
def command(monkeypatch):
    """Call a command of a guide; it has to succeed."""

    def run_command(name: str) -> None:
        [program, *arguments] = shlex.split(SNIPPETS[name].replace("\\\n", " "))
        assert program == "kimi-recursive"
        assert call(monkeypatch, *arguments) == 0

    return run_command


# ---- the recursive system -----------------------------------------------------------------------


def test_configs(here):
    _, names = run("write a config")
    assert names["loaded"] == names["config"] and not names["errors"]
    assert run("test configs")[0] == "Validation works\nSave/load works\n"
    assert run("make a custom config")[0] == "Config saved!\n"
    shown = re.findall(r"\w+$", run("compare configs")[0], re.MULTILINE)
    assert shown == ["False", "True", "128", "4"]
    missing = "path/to/config.json: cannot be read (No such file or directory)"
    assert run("diagnose a config")[0] == f"Load error: {missing}\n"


def test_a_wrapper_that_is_off_is_the_base(here, loaded):
    _, names = run("switch off", **loaded)
    assert torch.equal(names["output"], names["baseline_output"])
    assert run("diagnose switching off", **loaded)[0] == "Token differences: 0\n"


def test_fresh_cells_are_zero_and_old_parameters_are_taken(here, loaded):
    assert run("verify zero-init", **loaded)[0] == "Cell output weight norm: 0.0\n" * 4
    config = run("legacy parameters", **loaded)[1]["wrapper"].config
    assert config.recursive_enabled and config.d_state == 512


def test_loading(here):
    assert run("test the loader")[0] == "Disabled mode works\nEnabled mode works\n"
    printed, names = run("generate")
    assert printed == "Recursive enabled: False\nRecursive enabled: True\n"
    assert torch.equal(names["output"], names["baseline_output"])
    _, names = run("load by config or flag")
    assert names["config"].recursive_enabled and names["tokenizer"] is not None


def test_the_stages(here, command):
    command("evaluate the baseline")
    command("evaluate after surgery")
    printed, _ = run("compare the two")
    assert printed.endswith("Difference: 0.00%\nSUCCESS: Zero-init verified!\n")
    command("evaluate the old way")
    found = json.loads((here / "old_way/baseline_results.json").read_text())
    assert found["config"]["recursive_enabled"]
    command("evaluate a trained model")
    assert (here / "eval_results/finetuned_recursive_results.json").is_file()


# ---- experiments --------------------------------------------------------------------------------


def test_an_experiment(here, command, capsys):
    command("train phase A")
    command("run a baseline")
    folder = here / "experiments/baseline_phase_a_001"
    for name in (
        "experiment_metadata.json", "recursive_config.json", "logs", "metrics/step_000002.json",
        "notes/notes.txt", "notes/issues.txt", "notes/generation_samples.jsonl",
        *(f"checkpoints/step_000004/{part}" for part in (
            "model", "optimizer.pt", "scheduler.pt", "recursive_config.json",
            "checkpoint_metadata.json",
        )),
    ):  # fmt: skip
        assert (folder / name).exists(), name
    rates = [json.loads((folder / f"metrics/step_00000{i}.json").read_text()) for i in (2, 3, 4)]
    assert [row["lr_sidecar"] for row in rates] == pytest.approx([3e-4] * 3), "no decay"
    run("add notes")
    assert (folder / "notes/notes.txt").read_text().count("\n[") == 2
    assert run("load a checkpoint")[1]["model"].refine_cells is not None
    capsys.readouterr()
    command("upload")
    assert "notes/notes.txt" in capsys.readouterr().out


# ---- records ------------------------------------------------------------------------------------


def test_reading_the_logs(here):
    printed, names = run("read the log")
    assert printed.startswith("Run: ") and printed.endswith("Accuracy: None\n")
    assert len(names["experiments"]) >= 8
    printed, names = run("compare variants")
    assert re.search(r"^finetuned_recursive: acc=0\.\d+, perplexity=\d+", printed, re.MULTILINE)
    assert all(exp["metrics"]["balance_delta"] is None for exp in names["baselines"])
    assert run("find the best run")[0].startswith("Best planning run: ")


def test_comparing_and_plotting(here):
    assert run("compare fusion modes")[0] == "", "no run of ours has two passes"
    names = {
        "use_dual_pass": "arm", "fusion_mode": "arm", "best_val_accuracy": "best_val_loss",
        "class_balance_delta": "validation_loss_change",
    }  # fmt: skip
    printed, _ = run("compare fusion modes", names)
    modes = re.findall(r"^(\w+): acc=\d", printed, re.MULTILINE)
    assert sorted(modes) == sorted(ARMS + VANILLA)
    run("plot progress")
    assert (here / "refinement_training_progress.png").stat().st_size > 1000
    run("report")
    report = (here / "experiment_report.md").read_text()
    assert "## Language_Modeling Domain" in report and report.count("| recursive_a_s0") == 2


@pytest.mark.skipif(not shutil.which("jq"), reason="needs jq")
@pytest.mark.parametrize(("query", "shown"), [
    ("cat LOG | jq 'select(.run_data.domain == \"language_modeling\")'", "recursive_b_s0_"),
    ("cat LOG | jq 'select(.run_data.best_val_accuracy > 0.6)'", ""),
    ("cat LOG | jq '.run_data.status' | sort | uniq -c", "completed"),
    ("tail -n 1 LOG | jq .", "run_id"),
    ("cat LOG | jq 'select(.run_data.status == \"failed\")'", ""),
])  # fmt: skip
def test_queries(here, query, shown):
    query = query.replace("LOG", LOG)
    done = subprocess.run(query, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and shown in done.stdout, done.stderr
    assert bool(done.stdout) == bool(shown)


def test_adding_a_record_and_checking_the_log(here, monkeypatch):
    before = (here / LOG).read_text()
    run("add a record")
    assert (here / LOG).read_text().startswith(before)
    assert call(monkeypatch, "log", "validate", LOG) == 0
    assert run("check the log")[0] == ""
