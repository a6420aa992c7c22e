"""Tasks of lm-evaluation-harness as jobs of the matrix."""

import csv
import json

import pytest
from project import ROOT, TINY

pytestmark = pytest.mark.workflow

TASKS = {
    "names": ["sotu_perplexity"], "include_path": str(ROOT / "examples/lm_eval"),
    "limit": 2, "max_length": 32, "steps": [2],
}  # fmt: skip


def test_tasks_are_asked_summed_up_and_compared(copy):
    copy.write({**TINY, "evaluation": {**TINY["evaluation"], "tasks": TASKS}})
    kept = [*copy.path("results").glob("eval/*.*"), *copy.path("results").glob("runs/*/*.*")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    names = ("baseline_step_0", "finetuned_recursive_step_2")
    targets = [f"results/eval/tasks/{name}.json" for name in names]
    done = copy.snakemake("--", *targets)
    assert done.returncode == 0, done.stderr[-3000:]
    assert copy.snakemake("summarize").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == before, "nothing else ran"
    rows = {row["name"]: row for row in csv.DictReader(copy.path("results/summary.csv").open())}
    for name in ("baseline", "finetuned_recursive"):
        assert float(rows[name]["sotu_perplexity.byte_perplexity"]) > 1
        assert float(rows[name]["sotu_perplexity.byte_perplexity_stderr"]) > 0
    entries = [e for e in json.loads(copy.path("results/verdicts.json").read_text()) if "task" in e]
    assert [(entry["metric"], entry["arm"], entry["reference"]) for entry in entries] == [
        (metric, "finetuned_recursive", "baseline")
        for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")
    ]
    problem = "2 samples are too few for a verdict, 20 is the least."
    assert all((entry["verdict"], entry["problem"]) == (None, problem) for entry in entries)
    text = copy.path("results/summary.txt").read_text()
    assert "finetuned_recursive_b, tasks at inner step 2" in text, "missing, and said so"
    assert copy.planned(*targets) == [], "nothing is left to do"


def test_tasks_that_cannot_be_asked_are_refused_before_anything_runs(copy):
    """Where names are looked up: here without the harness, as to read all its names takes long."""
    copy.write({**TINY, "evaluation": {**TINY["evaluation"], "tasks": TASKS}, "seeds": [7]})
    copy.path("lm_eval.py").write_text("raise ImportError('not here', name='lm_eval')")
    done = copy.snakemake("all")
    assert done.returncode == 2
    message = "evaluation.tasks needs pip install 'kimi-recursive[eval]' (not here)"
    assert f"error: {message}" in done.stderr.splitlines()
    assert not copy.path("results/surgery/s7").exists()
