"""The DAG, run for real at a tiny size: what runs, what reruns, what a user's mistake says."""

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from project import (
    ARMS,
    EXPECTED,
    ONLY_A,
    PHASE_A,
    ROOT,
    SNAKEMAKE,
    STAGES,
    TINY,
    VANILLA,
    Project,
    shared_prefork,
)  # fmt: skip
from project import snakemake as run_snakemake
from runs import same_run
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.workflow


def test_all_makes_what_the_readme_says(project):
    for name in STAGES:
        results = json.loads(project.path(f"results/eval/{name}_results.json").read_text())
        assert results["perplexity"]["perplexity"] > 1
        assert project.path(f"results/eval/{name}_documents.parquet").is_file()
    assert json.loads(project.path("results/compare/zero_init.json").read_text())["passed"]
    logs = pl.read_parquet(project.path("results/runs/recursive_a_s0/train_logs.parquet"))
    assert logs["step"].max() == 6
    rows = list(csv.DictReader(project.path("results/summary.csv").open()))
    assert [(r["name"], r["status"]) for r in rows] == [(stage, "ok") for stage in STAGES]
    assert rows[0]["perplexity"] == rows[1]["perplexity"] and rows[1]["difference_percent"] == "0.0"
    text = project.path("results/summary.txt").read_text()
    assert text.startswith("Kimi Recursive, results: 10 of 10 expected evaluations are there\n")
    assert "Config: config/config.yaml, then tiny.yaml\n" in text
    assert "Zero-init proof (seed 0): PASSED" in text
    assert "recursive_a_s0 trained and evaluated twice: weights, the log of all 6 steps" in text
    repeat = json.loads(project.path("results/compare/repeat.json").read_text())
    assert repeat["identical"] and set(repeat["max_differences"].values()) == {0.0}
    assert max(map(len, text.splitlines())) <= 100
    unchanged = [row["name"] for row in rows if row["best_step"] == "0"]
    no_verdict = f"No verdict on {', '.join(unchanged)}: the training was not long enough"
    assert (no_verdict if unchanged else "Negative is better") in " ".join(text.split())
    splits = [
        set(pl.read_parquet(project.path(f"results/corpus/{s}.parquet"))["document_id"])
        for s in ("train", "validation", "test")
    ]
    assert [len(s) for s in splits] == [6, 2, 2] and not splits[0] & splits[1] | (
        splits[2] & (splits[0] | splits[1])
    )


def test_the_arms_are_comparable_and_the_verdict_names_each(project):
    rows = {r["name"]: r for r in csv.DictReader(project.path("results/summary.csv").open())}
    for phase, before in (("", None), ("_b", "")):
        arms = [rows[f"finetuned_{arm}{phase}"] for arm in ARMS]
        check_arms(*arms)
        for row, arm in zip(arms, ARMS, strict=True):
            earlier = rows[f"finetuned_{arm}{before}"] if before is not None else None
            for key in ("num_trainable_parameters", "training_tokens", "training_flops"):
                assert earlier is None or int(row[key]) > int(earlier[key]), "it adds up"
            assert float(row["trained_tokens_per_second"]) > 0
    plain, equal = (rows[f"finetuned_{arm}_b"] for arm in VANILLA)
    recursive = rows["finetuned_recursive_b"]
    assert plain["training_tokens"] == recursive["training_tokens"], "phases a and b together"
    assert int(plain["training_flops"]) < int(recursive["training_flops"])
    assert int(equal["training_flops"]) > 0.95 * int(recursive["training_flops"])
    verdicts = json.loads(project.path("results/verdicts.json").read_text())
    for phase in ("", "_b"):
        mine = [v["reference"] for v in verdicts if v["arm"] == f"finetuned_recursive{phase}"]
        stages = [f"finetuned_{arm}{phase}" for arm in ARMS[1:] + (VANILLA if phase else [])]
        before = ["finetuned_recursive"] if phase else []
        long_enough = [s for s in before + stages if rows[s]["best_step"] != "0"]
        own = ["its own step 1", *(["its own step 0"] if phase else [])]
        short = rows[f"finetuned_recursive{phase}"]["best_step"] == "0"
        assert mine == ([] if short else ["baseline", *long_enough, *own])
    for verdict in verdicts:
        mean, low, high = verdict["nats_per_token"]
        assert low <= mean <= high
        expected = "helps" if high < 0 else "hurts" if low > 0 else "not distinguishable"
        assert verdict["verdict"] == expected
    results = json.loads(project.path("results/eval/finetuned_recursive_results.json").read_text())
    steps = [row["step"] for row in results["perplexity"]["by_step"]]
    assert steps == [0, 1, 2, 3, 4] and results["inner_steps"] == 2
    assert results["perplexity"]["perplexity"] == results["perplexity"]["by_step"][2]["perplexity"]


def check_arms(recursive, single_pass, flops):
    assert recursive["num_trainable_parameters"] == single_pass["num_trainable_parameters"]
    assert recursive["training_tokens"] == single_pass["training_tokens"]
    assert int(single_pass["training_flops"]) < int(recursive["training_flops"])
    ratio = int(flops["training_flops"]) / int(recursive["training_flops"])
    one_step = int(flops["training_flops"]) / int(flops["num_training_steps"])
    assert abs(ratio - 1) <= one_step / int(recursive["training_flops"])
    assert int(flops["num_training_steps"]) > int(recursive["num_training_steps"])
    assert float(recursive["forward_flops_per_token"]) > float(
        single_pass["forward_flops_per_token"]
    )


def test_a_second_run_does_nothing(project):
    assert "Nothing to be done" in project.snakemake("all").stderr


PHASE_B_ON = ["evaluate", "plot_perplexity_by_step", "report", "summarize", "train_phase"]
TRAINING_ON = [*PHASE_B_ON, "compare_repeat"]
SURGERY_ON = [*TRAINING_ON, "compare_zero_init", "insert_cells"]


@pytest.mark.parametrize(
    ("artefacts", "reruns"),
    [
        (["results/tokens/train.parquet"],
         [r for r in EXPECTED if r not in ("prepare_corpus", "train_tokenizer")]),
        (["results/base/model"],
         [r for r in EXPECTED if r not in (
             "prepare_corpus", "train_tokenizer", "tokenize_corpus")]),
        (["results/compare/zero_init.json"], ["compare_zero_init", *TRAINING_ON]),
        (["results/runs/recursive_a_s0/sidecar"], TRAINING_ON),
        (["results/runs/single_pass_b_s0/sidecar"], PHASE_B_ON),
        (["results/compare/repeat.json"], ["compare_repeat", "report", "summarize"]),
        (["results/figures/perplexity_by_step.png", "results/report.html", "results/summary.txt"],
         ["plot_perplexity_by_step", "report", "summarize"]),
    ],
)  # fmt: skip
def test_deleting_an_artefact_redoes_it_and_what_follows(copy, artefacts, reruns):
    for path in map(copy.path, artefacts):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert copy.planned() == sorted(reruns)


def test_training_does_not_start_when_the_proof_fails(copy):
    """Cells that are not zero: everything runs up to the gate, which names check and amount."""
    sidecar = copy.path("results/surgery/s0/sidecar.safetensors")
    tensors = load_file(sidecar)
    from safetensors import safe_open

    with safe_open(sidecar, "pt") as file:
        metadata = file.metadata()
    tensors["refine_cells.0.out.weight"] += 0.05 * torch.randn(128, 128)[:32, :].contiguous()
    save_file(tensors, sidecar, metadata=metadata)
    shutil.rmtree(copy.path("results/runs"))
    copy.path("results/compare/zero_init.json").unlink()
    evaluation = "results/eval/after_surgery_results.json"
    copy.path(evaluation).unlink()
    done = copy.snakemake(evaluation, "results/runs/recursive_a_s0/sidecar")
    assert done.returncode != 0 and copy.path(evaluation).is_file()
    error = re.search(r"^error: (zero-init proof failed.*)$", done.stderr, re.MULTILINE).group(1)
    assert "training does not start" in error
    assert re.search(r"logit_difference_between_steps is [\d.e-]+, must be <= 0", error)
    assert not json.loads(copy.path("results/compare/zero_init.json").read_text())["passed"]
    assert not copy.path("results/runs/recursive_a_s0/train_logs.parquet").exists()
    assert copy.snakemake("summarize").returncode == 0
    rows = list(csv.DictReader(copy.path("results/summary.csv").open()))
    text = copy.path("results/summary.txt").read_text()
    failed = {r["name"]: r["detail"] for r in rows if r["status"] == "failed"}
    assert list(failed) == ["finetuned_recursive"], "of those that were started"
    assert failed["finetuned_recursive"].startswith("zero-init proof failed")
    assert "FAILED" in text


def test_sigkill_of_everything_changes_no_artefact(copy):
    """Snakemake and its training are killed while a checkpoint is written, and at a random time
    after the rerun's first; `--unlock` and another rerun end in the same files."""
    longer = json.loads(json.dumps(ONLY_A))
    longer["training"]["a"] |= {"num_steps": 30, "eval_interval": 30, "save_interval": 5}
    copy.write(longer)
    run = copy.path("results/runs/recursive_a_s0")
    target = "results/runs/recursive_a_s0/train_summary.json"
    assert copy.snakemake(target).returncode == 0
    straight = copy.path("results/straight/recursive_a_s0")
    straight.parent.mkdir()
    shutil.move(run, straight)

    def checkpoints() -> set[Path]:
        return set(run.glob("work/checkpoints/step_*"))

    for moment in ("writing a checkpoint", "random"):
        before = checkpoints()
        killed = subprocess.Popen(
            [*SNAKEMAKE, "--configfile", "tiny.yaml", "--cores", "2", target],
            cwd=copy.folder,
            env={**os.environ, "PYTHONPATH": str(copy.folder), **shared_prefork()},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(lambda before=before: checkpoints() - before)
        if moment == "random":
            time.sleep(random.random() / 4)
        else:
            wait_for(lambda: list(run.glob("work/checkpoints/.step_*.tmp")))
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        assert not (run / "train_summary.json").exists(), "it was not killed in training"
        assert copy.snakemake("--unlock").returncode == 0
    done = copy.snakemake(target)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"train recursive a seed 0: resumed at step \d+", done.stderr)
    same_run(straight, run)


def test_ctrl_c_says_how_to_go_on(copy):
    """What a terminal does: SIGINT for Snakemake and for its jobs, which are in a group of their
    own here (`forks.py`)."""
    longer = json.loads(json.dumps(ONLY_A))
    longer["training"]["a"] |= {"num_steps": 400, "eval_interval": 200, "save_interval": 5}
    copy.write(longer)
    run, target = copy.path("results/runs/recursive_a_s0"), "results/runs/recursive_a_s0/sidecar"
    shutil.rmtree(run)
    process = subprocess.Popen(
        [*SNAKEMAKE, "--configfile", "tiny.yaml", "--cores", "2", "--", target],
        cwd=copy.folder,
        env={**os.environ, "PYTHONPATH": str(copy.folder), **shared_prefork()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: list(run.glob("work/checkpoints/step_*5")))
    jobs = [pid for pid in working_in(copy.folder) if os.getpgid(pid) != process.pid]
    assert len(jobs) == 1
    os.kill(jobs[0], signal.SIGINT)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in said
    assert "interrupted; the same command goes on where it was" in said
    assert not (run / "train_summary.json").exists() and list(run.glob("work/checkpoints/step_*"))


def working_in(folder: Path) -> list[int]:
    """The processes whose folder this is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if (process / "cwd").resolve(strict=True) == folder.resolve():
                found.append(int(process.name))
    return found


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)


def test_seeds_multiply_the_rows_and_share_the_base(copy):
    copy.write({**ONLY_A, "seeds": [0, 3]})
    planned = copy.snakemake("--dry-run", "all")
    assert planned.returncode == 0, planned.stderr
    jobs = Counter(re.findall(r"^(?:local)?rule (\w+):", planned.stdout, re.MULTILINE))
    once = ["insert_cells", "compare_zero_init", "plot_perplexity_by_step", "summarize", "report"]
    assert jobs == {"all": 1, **dict.fromkeys(once, 1), "train_phase": 3, "evaluate": 4}
    names = ("finetuned_recursive_s3", "finetuned_single_pass_s3")
    for targets in ([f"results/eval/{name}_results.json" for name in names], ["summarize"]):
        done = copy.snakemake(*targets)
        assert done.returncode == 0, done.stderr[-2000:]
    rows = list(csv.DictReader(copy.path("results/summary.csv").open()))
    assert [r["name"] for r in rows] == [
        "baseline", *(f"{stage}{seed}" for stage in PHASE_A[1:] for seed in ("", "_s3")),
    ]  # fmt: skip
    missing = [r["name"] for r in rows if r["status"] != "ok"]
    assert missing == ["after_surgery_s3", "finetuned_single_pass_flops_s3"]
    verdicts = json.loads(copy.path("results/verdicts.json").read_text())
    seeds = {v["reference"]: v.get("seeds") for v in verdicts}
    for reference in ("baseline", "finetuned_single_pass", "its own step 1"):
        assert seeds[reference] == [0, 3]
    assert copy.path("results/compare/zero_init_s3.json").is_file()
    first, second = (
        load_file(copy.path(f"results/surgery/s{seed}/sidecar.safetensors")) for seed in (0, 3)
    )
    assert any(not torch.equal(first[k], second[k]) for k in first)


def test_a_pretrained_directory_takes_the_place_of_the_base(copy):
    """`base.kind: pretrained`: the tiny base of the run itself, as a user's own model."""
    shutil.move(copy.path("results/base/model"), copy.path("mine"))
    shutil.rmtree(copy.path("results"))
    copy.write({**ONLY_A, "base": {"kind": "pretrained", "path": "mine"}})
    planned = set(EXPECTED) - {"train_tokenizer", "train_base", "compare_repeat"}
    assert copy.planned() == sorted([*planned, "fetch_base"])
    part = copy.snakemake("--until", "fetch_base", "--", "all")
    assert part.returncode == 0, "a run that was cut short has no summary to print"
    names = ("baseline", "finetuned_recursive")
    for target in ([f"results/eval/{name}_results.json" for name in names], ["summarize"]):
        done = copy.snakemake(*target)
        assert done.returncode == 0, done.stderr[-2000:]
    rows = {r["name"]: r for r in csv.DictReader(copy.path("results/summary.csv").open())}
    assert {r["base_kind"] for r in rows.values()} == {"pretrained"}
    assert {rows[name]["status"] for name in names} == {"ok"}


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"recursive": {"chunk_widht": 8}}, "'chunk_widht'; did you mean 'chunk_width'?"),
        ({"corpus": {"source": "docs/none.txt"}}, "docs/none.txt: no such file"),
    ],
)
def test_a_wrong_config_is_one_line_before_anything_runs(tmp_path, config, error):
    project = Project.make(tmp_path)
    merged = json.loads(json.dumps(TINY))
    for key, values in config.items():
        merged[key] = {**merged.get(key, {}), **values}
    project.write(merged)
    done = project.snakemake("all")
    assert done.returncode == 2
    lines = [x for x in done.stderr.splitlines() if not x.startswith(("Using", "Config file"))]
    assert len(lines) == 1 and lines[0].startswith("error: ") and error in lines[0], done.stderr
    assert not project.path("results").exists()


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        (["", "  \n"], "2 documents, none with text"),
        ([f"short text {i}" for i in range(5)], "no document has 33 tokens"),
    ],
)
def test_a_corpus_that_cannot_be_used(tmp_path, texts, error):
    project = Project.make(tmp_path)
    for path in project.path("docs").iterdir():
        path.unlink()
    for i, text in enumerate(texts):
        project.path(f"docs/{i}.txt").write_text(text)
    done = project.snakemake("all")
    assert done.returncode != 0
    lines = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert lines and error in lines[0], done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert not any(project.path("results").glob("corpus/*.parquet")) or len(texts) == 5
    assert not project.path("results/base/model").exists()


def test_dry_runs_of_the_shipped_configs_are_clean():
    full = ["--configfile", "config/full.yaml", "--cores", "1", "--dry-run", "all"]
    for arguments in (["--dry-run", "all"], full):
        done = run_snakemake(ROOT, *arguments)
        assert done.returncode == 0, done.stderr
