"""The report as a rule, and Snakemake's own report, of the tiny project."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from project import STAGES

pytestmark = pytest.mark.workflow


def test_report_takes_what_is_there_without_training(copy):
    shutil.rmtree(copy.path("results/runs/recursive_b_s0"))
    copy.path("results/eval/finetuned_single_pass_results.json").write_text('{"stage": ')
    assert copy.planned("report") == ["report"]
    assert copy.snakemake("report").returncode == 0
    page = copy.path("results/report.html").read_text()
    assert "8 of 10 expected evaluations are there" in page
    assert "finetuned_single_pass_results.json: is not valid JSON" in page
    assert '<td class="verdict' in page
    assert "results/logs/train_phase/recursive_b_s0.log: last" in page
    assert copy.planned("report") == [], "and a second time there is nothing new"
    log = copy.path("results/logs/train_phase/recursive_b_s0.log")
    log.write_text("error: out of memory\n")
    assert copy.planned("report") == ["report"], "a log is shown as well"
    assert "report" in copy.planned("all")
    shutil.rmtree(copy.path("results"))
    assert copy.snakemake("report").returncode == 0
    assert "0 of 10 expected evaluations are there" in copy.path("results/report.html").read_text()


def test_snakemakes_own_report_has_captions_categories_and_labels(project, tmp_path):
    """Without a network: the wheel of Snakemake brings what its page needs."""
    path = tmp_path / "report.zip"
    done = project.snakemake("--report", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(path) as archive:
        page = archive.read("report/report.html").decode()
        raw = {Path(entry).name for entry in archive.namelist()}
    assert {"report.html", "perplexity_by_step.png", "summary.txt"} <= raw
    assert "control arms, and the same evaluation of each" in page, "workflow.rst"
    found, categories = (
        json.JSONDecoder().raw_decode(re.split(rf"<script id=.{what}.>\s+var \w+ = ", page)[1])[0]
        for what in ("results", "categories")
    )
    shown = {item["name"]: item for item in found.values()}
    marked = {
        "summary.txt", "summary.csv", "verdicts.json", "report.html", "perplexity_by_step.png",
        "zero_init.json", "repeat.json", "train_summary.json",
        *(f"{stage}_results.json" for stage in [*STAGES, "finetuned_recursive_repeat"]),
    }  # fmt: skip
    assert set(shown) == marked
    assert all(item["caption"] and item["labels"] for item in found.values())
    assert len([item for item in found.values() if item["name"] == "train_summary.json"]) == 9
    labels = shown["finetuned_single_pass_flops_b_results.json"]["labels"]
    assert labels == {"stage": "single_pass_flops", "phase": "b", "seed": "0"}
    assert set(categories) == {"Answers", "Evaluations", "Figures", "Proofs", "Trainings"}
    assert set(categories["Trainings"]) == {"phase a", "phase b"}
