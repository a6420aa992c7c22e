"""A variant beside the tiny matrix: what it adds, and what an edit of it runs again."""

import csv
import json
import re

import pytest
from golden import collect
from project import TINY

pytestmark = pytest.mark.workflow


def planned(project) -> set[str]:
    """The cells, proofs, trainings and evaluations that a dry run would make."""
    done = project.snakemake("--dry-run", "all")
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^    output: (.*)$", done.stdout + done.stderr, re.MULTILINE)
    names = re.findall(r"results/(?:surgery|compare|runs|eval)/([\w-]+)", " ".join(lines))
    return {name.removesuffix("_results").removesuffix("_documents") for name in names}


def test_a_variant_is_trained_beside_the_matrix_and_an_edit_of_it_redoes_it_alone(copy):
    def write(**variants) -> None:
        copy.write({**TINY, "phases": ["a"], "variants": variants})

    before, results = collect(copy.path("results")), copy.path("results")
    write(deep={"recursive": {"max_inner_steps": 3}})
    names = {
        "s0", "zero_init", "recursive_a_s0", "single_pass_flops_a_s0", "finetuned_recursive",
        "finetuned_single_pass_flops",
    }  # fmt: skip
    assert planned(copy) == {f"{name}-deep" for name in names}
    made = copy.snakemake("all")
    assert made.returncode == 0, made.stderr[-4000:]
    after = collect(results)
    kept = {k: v for k, v in before["digests"].items() if "/" in k}
    assert kept.items() < after["digests"].items(), "the matrix keeps its files"

    rows = list(csv.DictReader((results / "summary.csv").open()))
    deep = [row for row in rows if row["variant"]]
    assert [(r["name"], r["variant"], r["status"]) for r in deep] == [
        ("finetuned_recursive-deep", "deep", "ok"),
        ("finetuned_single_pass_flops-deep", "deep", "ok"),
    ]
    assert [row["max_inner_steps"] for row in deep] == ["3", "1"]
    loop, control = deep
    nearest = float(control["training_flops"]) / float(loop["training_flops"])
    assert nearest == pytest.approx(1, abs=0.2), "its own budget, not that of the default"
    found = json.loads((results / "eval/finetuned_recursive-deep_results.json").read_text())
    assert found["inner_steps"] == 3 and found["stage"] == "finetuned_recursive-deep"
    text = (results / "summary.txt").read_text()
    assert "Which variant is best?" in text and "2 were tried" in text
    assert "Zero-init proof (seed 0 of deep): PASSED" in text
    assert "Which variant is best?" in (results / "report.html").read_text()
    assert planned(copy) == set()

    write(deep={"recursive": {"max_inner_steps": 4}})
    assert planned(copy) == {f"{name}-deep" for name in names}
    write(
        deep={"recursive": {"max_inner_steps": 3}},
        rate={"training": {"a": {"lr": 1e-3, "log_interval": 7}}},
    )
    arms = ("recursive", "single_pass", "single_pass_flops")
    redone = {f"{arm}_a_s0-rate" for arm in arms} | {f"finetuned_{arm}-rate" for arm in arms}
    assert planned(copy) == redone, "cells and proof are those of the config"
    write(deep={"recursive": {"max_inner_stpes": 3}})
    refused = copy.snakemake("--dry-run", "all")
    assert refused.returncode == 2
    assert (
        "error: variants.deep.recursive: unknown key 'max_inner_stpes'; did you" in refused.stderr
    )
