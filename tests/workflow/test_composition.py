"""The positive control: a second matrix over the same rules, with its own config and folder."""

import json

import yaml
from project import ROOT, TINY, Project


def test_the_control_is_a_matrix_of_its_own_over_the_same_rules(tmp_path):
    project = Project.make(tmp_path)
    control = yaml.safe_load((ROOT / "config/composition.yaml").read_text())
    few = {"num_steps": 4, "warmup_steps": 1, "eval_interval": 2, "num_validation_windows": 8}
    control["corpus"]["task"] |= {"num_entities": 48, "num_test": 8}
    control["base"]["training"] |= few | {"batch_size": 8}
    control["base"]["architecture"] |= TINY["base"]["architecture"]
    control["training"]["a"] |= few | {"batch_size": 4, "feedback_only_steps": 2}
    project.path("control.yaml").write_text(yaml.safe_dump(control))
    project.write({**TINY, "composition": "control.yaml"})
    planned = project.planned("composition")
    assert "compare_composition" in planned and "composition_summarize" in planned
    assert all("composition" in rule for rule in planned), "it needs nothing of the text matrix"
    done = project.snakemake("results/composition/eval/finetuned_recursive_results.json")
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(
        project.path("results/composition/eval/finetuned_recursive_results.json").read_text()
    )
    assert found["config"]["use_token_feedback"] and found["inner_steps"] == 1
    groups = {(row["group"], row["step"]) for row in found["pairs"]}
    assert {("unseen, 2 hops", 1), ("seen, 4 hops", 3)} <= groups
    assert not project.path("results/eval").exists()
    # The text matrix and its control redo nothing for each other.
    edited = {**TINY, "composition": "control.yaml", "evaluation": {"max_new_tokens": 3}}
    project.write(edited)
    assert not {"composition_train_phase", "composition_train_base"} & set(
        project.planned("results/composition/eval/finetuned_recursive_results.json")
    )
    # The control has the seeds of the text matrix, unless its config has its own.
    project.write({**edited, "seeds": [0, 3]})
    more = project.planned("composition")
    assert more.count("composition_train_base") == 0
    seeds = "results/composition/eval/finetuned_recursive_s3_results.json"
    assert "composition_train_phase" in project.planned(seeds)
    project.path("control.yaml").write_text(yaml.safe_dump({**control, "seeds": [0]}))
    assert project.snakemake("--dry-run", seeds).returncode != 0
    project.path("control.yaml").write_text(yaml.safe_dump(control))
    project.write(edited)
    control["training"]["a"]["lr"] = 2e-3
    project.path("control.yaml").write_text(yaml.safe_dump(control))
    again = project.planned("results/composition/eval/finetuned_recursive_results.json")
    assert "composition_train_phase" in again and "composition_train_base" not in again
    project.path("control.yaml").write_text("nonsense: 1\n")
    failed = project.snakemake("--dry-run", "all")
    assert failed.returncode == 2
    assert "error: composition: control.yaml: config: unknown key 'nonsense'" in failed.stderr
