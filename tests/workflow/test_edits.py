"""What an edit redoes, what is published again, and summaries of what is there."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from project import EXPECTED, ROOT, TINY

pytestmark = pytest.mark.workflow

# By a key of the table in config/README.md, an edit. What each edit changes is asked of the
# functions that make the parameters, in tests/unit; here, that each rule takes its parameters from
# them.
EDITS = {
    "corpus": ("corpus.seed", 1),
    "tokenizer": ("tokenizer.vocab_size", 330),
    "base": ("base.training.lr", 1e-3),
    "recursive": ("recursive.d_state", 4),
    "recursive.lambda_*": ("recursive.lambda_halt", 0.1),
    "recursive.commit": ("recursive.commit", "learned"),
    "recursive.commit_threshold": ("recursive.commit_threshold", 0.9),
    "evaluation": ("evaluation.context_length", 16),
    "evaluation.tasks": (
        "evaluation.tasks",
        {"names": ["sotu"], "include_path": str(ROOT / "examples/lm_eval")},
    ),
    "evaluation.prompts": ("evaluation.prompts", ["another"]),
    "evaluation.max_new_tokens": ("evaluation.max_new_tokens", 9),
    "training.a": ("training.a.lr", 1e-3),
    "training.b": ("training.b.recursive", {"corruption_rate": 0.2}),
    "save_interval": ("training.a.save_interval", 5),
    "resources": ("resources.gpus_per_run", 2),
    "phases": ("phases", ["a"]),
    "variants": ("variants", {"deep": {"recursive": {"max_inner_steps": 3}}}),
}


def table_of_edits() -> dict[str, set[str]]:
    """By key the rules that config/README.md says an edit runs again."""
    text = (ROOT / "config/README.md").read_text().partition("## What an edit redoes")[2]
    rows = [line.split("|")[1:3] for line in text.partition("\n## ")[0].splitlines()]
    cells = [[re.findall(r"`([^`]+)`", cell) for cell in row] for row in rows if len(row) == 2]
    return {key: set(rules) for keys, rules in cells for key in keys}


def test_the_table_names_every_edit():
    assert table_of_edits().keys() == EDITS.keys()


@pytest.mark.parametrize("key", EDITS)
def test_an_edit_redoes_what_the_table_says(copy, key):
    path, value = EDITS[key]
    config = json.loads(json.dumps(TINY))
    *parents, last = path.split(".")
    node = config
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    copy.write(config)
    summaries = {"plot_perplexity_by_step", "summarize", "report"}
    planned = set(copy.planned())
    assert planned - summaries == table_of_edits()[key]
    assert planned >= {"summarize", "report"} or not planned


def test_what_is_published_is_neither_trained_nor_scored_again(copy):
    """Without `work/`, everything is made again that has another cause than its inputs."""
    results, log = copy.path("results"), copy.path("experiments/training_log.jsonl")
    for work in [*results.glob("runs/*/work"), results / "base/work"]:
        shutil.rmtree(work)
    kept = [
        *results.glob("runs/recursive_*/sidecar/*.safetensors"), *results.glob("eval/*.parquet"),
        *results.glob("runs/recursive_*/train_logs.parquet"),
    ]  # fmt: skip
    before, records = {path: path.read_bytes() for path in kept}, log.read_bytes()
    evaluations = copy.path("baselines.jsonl").read_bytes()
    copy.write({**TINY, "evaluation": {**TINY["evaluation"], "prompts": ["another"]}})
    runs = [str(path.relative_to(copy.folder)) for path in before if path.suffix == ".safetensors"]
    again = [str(Path(path).parent) for path in runs]
    scored = [f"results/eval/finetuned_recursive{x}_results.json" for x in ("", "_b")]
    done = copy.snakemake("--forcerun", "train_base", *again, "--", *scored, *again)
    assert done.returncode == 0, done.stderr[-3000:]
    assert copy.snakemake("summarize").returncode == 0
    assert {path: path.read_bytes() for path in kept} == before
    assert "step 0: validation" not in done.stderr, "nothing was trained"
    assert done.stderr.count("was trained before with the same settings") >= 3
    assert "evaluate: the scores are taken from" in done.stderr
    found = json.loads((results / "eval/finetuned_recursive_results.json").read_text())
    assert [sample["prompt"] for sample in found["generations"]] == ["another"]
    assert found["evaluation"]["prompts"] == ["another"]
    assert log.read_bytes() == records and copy.path("baselines.jsonl").read_bytes() == evaluations


def test_an_edited_text_is_read_again(copy):
    copy.path("docs/3.txt").write_text("another text " * 30)
    assert copy.planned() == sorted(EXPECTED)


def test_summarize_takes_what_is_there_without_training(copy):
    copy.path("results/eval/finetuned_recursive_results.json").unlink()
    shutil.rmtree(copy.path("results/runs"))
    copy.path("results/compare/zero_init.json").unlink()
    assert copy.planned("summarize") == ["summarize"]
    assert copy.snakemake("summarize").returncode == 0
    rows = list(csv.DictReader(copy.path("results/summary.csv").open()))
    assert [r["status"] for r in rows] == ["ok", "ok"] + ["missing"] * 8
    copy.path("results/eval/after_surgery_results.json").write_text('{"stage": ')
    assert copy.snakemake("summarize").returncode == 0
    text = copy.path("results/summary.txt").read_text()
    assert re.search(r"after_surgery +failed +results/eval/.*is not valid JSON", text)
    assert "1 of 10 expected" in text and "Zero-init proof (seed 0): missing" in text
    assert re.search(r"finetuned_recursive +missing", text)
    assert copy.planned("summarize") == [], "and a second time there is nothing new"


def test_a_summary_survives_damaged_documents(copy):
    copy.path("results/eval/finetuned_single_pass_documents.parquet").unlink()
    copy.path("results/eval/finetuned_single_pass_flops_documents.parquet").write_bytes(b"PAR1")
    assert copy.snakemake("summarize").returncode == 0
    verdicts = json.loads(copy.path("results/verdicts.json").read_text())
    assert [v["verdict"] is None for v in verdicts][:4] == [False, True, True, False]
    assert "finetuned_single_pass_documents.parquet" in verdicts[1]["problem"]
    assert verdicts[1]["problem"] in copy.path("results/summary.txt").read_text()


def test_results_of_another_base_are_not_shown_as_those_of_this_config(copy):
    changed = json.loads(json.dumps(TINY))
    changed["base"]["seed"] = 5
    copy.write(changed)
    before = copy.path("results/summary.txt").read_bytes()
    refused = copy.snakemake("summarize")
    assert refused.returncode == 2 and copy.path("results/summary.txt").read_bytes() == before
    assert "error: results: holds the results of another config; name that one" in refused.stderr
    assert "were made with a different base.seed." in refused.stderr
    copy.write({**changed, "results_dir": "other"})
    assert copy.snakemake("summarize").returncode == 0, "a folder of its own"
    assert "0 of 10 expected" in copy.path("other/summary.txt").read_text()


def test_results_of_other_settings_are_not_shown_as_those_of_this_config(copy):
    changed = json.loads(json.dumps(TINY))
    changed["training"]["a"]["lr"] = 1e-3
    copy.write(changed)
    assert copy.snakemake("summarize").returncode == 0
    rows = list(csv.DictReader(copy.path("results/summary.csv").open()))
    assert [r["status"] for r in rows] == ["ok", "ok"] + ["missing"] * 6 + ["ok", "ok"]
    assert rows[2]["detail"] == "Results exist, but were made with a different training.a.lr."
    assert not rows[2]["perplexity"]
    assert json.loads(copy.path("results/verdicts.json").read_text()) == []
