"""Records of a matrix and of Track-B as the workflow leaves them, with made-up numbers."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import yaml
from project import ROOT

from kimi_recursive.evaluation.outcomes import Statistic
from kimi_recursive.evaluation.scores import summarize_scores
from kimi_recursive.files import file_digest
from kimi_recursive.layout import SIDECAR_NAME, Layout
from kimi_recursive.matrix.artefacts import model_of
from kimi_recursive.matrix.expected import evaluated_depths, for_tasks, upstream
from kimi_recursive.matrix.runs import (
    all_trainings,
    evaluations,
    settings_of,
    surgeries,
    task_runs,
    trainings,
    variant_evaluations,
)
from kimi_recursive.matrix.settings import GENERATION_KEYS, MODEL_KEYS, TRAINING_KEYS, Config
from kimi_recursive.track_b.evaluate import PRECISIONS
from kimi_recursive.track_b.metrics import NDCG, RECALL
from kimi_recursive.track_b.sheet import select_experiments
from kimi_recursive.training.arms import ARMS

VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}
LOSS = {
    "recursive": 3.90, "single_pass": 3.9002, "single_pass_flops": 3.88, "vanilla": 3.89,
    "vanilla_flops": 3.87,
}  # fmt: skip


def shipped_config(**changes) -> dict:
    """The config of the checkout, with the sheet's path from anywhere."""
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    config["track_b"]["sheet"] = str(ROOT / config["track_b"]["sheet"])
    return config | changes


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_parquet(path: Path, table: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(table).write_parquet(path)


def make_results(
    results: Path, config: dict, num_documents: int = 12, shifts: dict[str, float] | None = None
) -> Path:
    """Everything that the report reads of a matrix that is done.

    Args:
        shifts: By variant, what is added to the loss of its recursive arm.
    """
    rng, settings = np.random.default_rng(0), Config.from_mapping(config)
    by_key = all_trainings(settings)
    for run in [*evaluations(settings), *variant_evaluations(settings)]:
        arm = by_key[run.training].arm if run.training else None
        of_run = settings.variant(run.variant)
        last = last_step(arm, of_run.recursive.max_inner_steps) if run.seed is not None else 0
        depths = evaluated_depths(settings, run) or list(range(last + 1))
        after = LOSS[arm] if arm else 3.93
        after += (shifts or {}).get(run.variant, 0.0) if arm == "recursive" else 0.0
        documents = make_documents(rng, depths, after, num_documents)
        (results / "eval").mkdir(parents=True, exist_ok=True)
        documents.write_parquet(results / f"eval/{run.name}_documents.parquet")
        scores = summarize_scores(documents)
        at_last = next(row for row in scores if row["step"] == last)
        groups = (MODEL_KEYS, GENERATION_KEYS, TRAINING_KEYS)
        have = {} if run.seed is None else of_run.recursive_part(*groups)
        if arm:
            have |= of_run.phase_overrides(by_key[run.training].phase) | dict(ARMS[arm].parameters)
        halting = {"mean_inner_steps": 1.25, "perplexity": 50.0}
        halting["num_chunks_by_step"] = [30, 10, 0, 0][:last]
        write_json(results / f"eval/{run.name}_results.json", {
            "stage": run.stage, "split": "test", "inner_steps": last,
            "perplexity": {**at_last, "num_tokens": 100 * num_documents,
                           "num_documents": num_documents, "by_step": scores},
            "mean_inner_steps": float(last), "num_rounds_by_step": [0, 20, 0, 0][:last],
            "halting": halting if last else None, "forward_flops_per_token": 1e7,
            "throughput": {"evaluated_tokens_per_second": 4000.0,
                           "generated_tokens_per_second": 60.0},
            "num_parameters": {"base": 1_600_000, "sidecar": 800_000, "lora": 0},
            "config": {"chunk_width": config["recursive"]["chunk_width"], **have},
            "evaluation": config["evaluation"], "dtype": "float32",
            "upstream": json.loads(json.dumps(upstream(settings))), "versions": VERSIONS,
            "created": "2026-11-20T08:26:17+00:00",
        })  # fmt: skip
    for run in by_key.values():
        make_training(results / f"runs/{run.key}", config, run, rng)
    for cells in surgeries(settings):
        write_json(results / f"compare/{cells.proof}.json", {
            "passed": True, "perplexity_difference_percent": 0.0, "max_logit_difference": 0.0,
            "generations_identical": True, "inner_steps": 2,
            "checks": [{"name": "document_loss_difference", "value": 0.0, "limit": "<= 0",
                        "passed": True}],
        })  # fmt: skip
    first = trainings(settings)[0].key
    sidecar = results / f"runs/{first}/sidecar/sidecar.safetensors"
    sidecar.parent.mkdir()
    sidecar.write_bytes(b"weights")
    write_json(results / "compare/repeat.json", {
        "run": first, "identical": True, "num_steps": 100, "num_documents": num_documents,
        "sidecar_sha256": file_digest(sidecar), "max_differences": {},
    })  # fmt: skip
    validation = [8.0 if t % 50 == 0 else None for t in range(101)]
    losses = list(np.linspace(8, 4, 101))
    base = {"step": range(101), "loss": losses, "validation_loss": validation}
    write_parquet(results / "base/train_logs.parquet", base)
    return results


def make_tasks(results: Path, config: dict, num: int = 40) -> Path:
    """Answers to the tasks of a matrix that is done: a quiz with a metric that is no mean, and the
    likelihood of a page. The loop answers 30 of 40 samples, everything else 15."""
    settings, layout = Config.from_mapping(config), Layout(results)
    for run in task_runs(settings):
        files = layout.tasks(run.evaluation.name, run.step)
        right = 30 if "recursive" in run.evaluation.stage and run.step else 15
        names = [f"{n} abc" for n in range(num)]
        outcomes = {
            ("quiz", "acc"): ([1.0] * right + [0.0] * (num - right), [1.0] * num),
            ("page", "word_perplexity"): ([-300.0 - n % 3 for n in range(num)], [100.0] * num),
        }
        statistics = {"acc": Statistic.MEAN, "word_perplexity": Statistic.PERPLEXITY}
        scores = [{"task": "quiz", "metric": "f1.first", "value": 0.5, "stderr": None,
                   "num_samples": num, "higher_is_better": True, "statistic": None}]  # fmt: skip
        for (task, metric), (outcome, weights) in outcomes.items():
            value, stderr = statistics[metric].score(outcome, weights)
            scores.append({
                "task": task, "metric": metric, "value": value, "stderr": stderr,
                "num_samples": num, "higher_is_better": metric == "acc",
                "statistic": statistics[metric],
            })  # fmt: skip
        sidecar = model_of(settings, run.evaluation, layout) / SIDECAR_NAME
        write_json(files.results, {
            "stage": run.evaluation.stage, "step": run.step, "scores": scores,
            "sidecar_sha256": file_digest(sidecar) if sidecar.is_file() else None,
            **{one.part: dict(one.want) for one in for_tasks(settings, run.evaluation)},
        })  # fmt: skip
        tables = [
            {"task": task, "metric": metric, "sample": names, "outcome": outcome, "weight": weights}
            for (task, metric), (outcome, weights) in outcomes.items()
        ]
        pl.concat(pl.DataFrame(table) for table in tables).write_parquet(files.samples)
    return results


def last_step(arm: str | None, depth: int = 2) -> int:
    """The last inner step of an arm, or of untrained cells."""
    return ARMS[arm].parameters.get("max_inner_steps", depth) if arm else depth


def make_documents(rng, steps: list[int], after: float, num: int) -> pl.DataFrame:
    """Step 0 is the same for every run with cells, and what is not trained has nothing else."""

    def noise() -> float:
        return rng.normal(0, 0.1) if after != 3.93 else 0.0

    rows = [
        (f"document {i}", step, 100, 393 + 20 * np.sin(i), 27)
        if step == 0 and len(steps) > 1
        else (f"document {i}", step, 100, 100 * after + 20 * np.sin(i) + noise(), 27)
        for step in steps
        for i in range(num)
    ]
    names = ("document_id", "step", "num_tokens", "loss_sum", "num_correct")
    return pl.DataFrame(rows, schema=names, orient="row")


def make_training(folder: Path, config: dict, run, rng) -> None:
    settings = Config.from_mapping(config)
    trained, of_run = settings_of(settings, run), settings.variant(run.variant)
    steps = trained.num_steps
    have = of_run.trained_with(run.phase) | dict(ARMS[run.arm].parameters)
    write_json(folder / "train_summary.json", {
        "arm": run.arm, "phase": run.phase, "seed": run.seed, "num_steps": steps,
        "training_flops": 2.7e12, "training_tokens": 1024 * steps,
        "num_trainable_parameters": 848_706, "best_step": steps,
        "settings": trained.to_mapping(), "config": have, "versions": VERSIONS,
    })  # fmt: skip
    end = 3.93 if (run.arm, run.phase) == ("single_pass", "b") else 3.9
    validation = [{"step": t, "validation_loss_step_2": 3.93} for t in (0, steps)]
    write_json(folder / "work/experiment_metadata.json", {
        "experiment_name": run.key, "status": "completed",
        "started_at": "2026-11-20T08:00:00+00:00", "ended_at": "2026-11-20T08:01:00+00:00",
        "training_params": {"phase": run.phase, "arm": run.arm, "seed": run.seed},
        "final_results": {"best_validation_loss": end, "validation": validation},
    })  # fmt: skip
    last = f"validation_loss_step_{last_step(run.arm)}"
    write_parquet(folder / "train_logs.parquet", {
        "step": range(steps + 1), "tokens": [None, *(1024 * t for t in range(1, steps + 1))],
        "loss_final": [None, *(4 + rng.normal(0, 0.1, steps))],
        last: [3.9 if t % 20 == 0 else None for t in range(steps + 1)],
        "tokens_per_second": 500.0,
    })  # fmt: skip


def make_track_b(results: Path, config: dict, num_queries: int = 20) -> Path:
    """Students of the sheet and references, all done."""
    rng = np.random.default_rng(1)
    folder = results / "track_b"
    for experiment in select_experiments(config["track_b"]):
        steps = experiment.settings["steps"]
        for seed, key in experiment.keys.items():
            evaluated = [t for t in range(steps + 1) if t % max(1, steps // 5) == 0 or t == steps]
            write_parquet(folder / f"students/{key}/logs/train_logs.parquet", {
                "step": evaluated, RECALL: np.linspace(0.1, 0.7, len(evaluated)),
                NDCG: np.linspace(0.1, 0.8, len(evaluated)),
            })  # fmt: skip
            write_json(folder / f"students/{key}/logs/train_summary.json", {
                "seed": seed, "hyperparameters": experiment.settings, "versions": VERSIONS,
                "started_at": "2026-11-20T11:50:57+00:00", "status": "completed",
            })  # fmt: skip
            write_json(folder / f"students/{key}/work/experiment_metadata.json", {
                "experiment_name": key, "status": "completed",
                "started_at": "2026-11-20T11:50:57+00:00", "ended_at": "2026-11-20T11:51:00+00:00",
                "training_params": experiment.settings, "paths": {"teacher": "track_b/teacher"},
                "final_results": {"best_step": steps, "best_vs_teacher_recall@10": 0.7},
            })  # fmt: skip
            table = make_scores(rng, key, 0.7, num_queries)
            table.write_parquet(folder / f"students/{key}/evaluation.parquet")
    dim = select_experiments(config["track_b"])[0].settings["dim"]
    tables = []
    for name, recall, length in (
        (f"svd_{dim}", 0.8, dim), (f"truncation_{dim}", 0.5, dim), ("teacher", 1.0, 384)
    ):  # fmt: skip
        table = make_scores(rng, name, recall, num_queries)
        tables.append(table.with_columns(pl.lit(length).alias("dim")))
    pl.concat(tables).write_parquet(folder / "references.parquet")
    write_json(folder / "teacher/teacher.json", {
        "name": "models/teacher", "dim": 384, "num_train": 7000, "num_validation": 500,
        "num_test": 500,
    })  # fmt: skip
    return results


def make_scores(rng, method: str, recall: float, num_queries: int) -> pl.DataFrame:
    rows = [
        (method, precision, split, row, float(np.clip(recall + rng.normal(0, 0.05), 0, 1)), 0.5)
        for precision in PRECISIONS
        for split in ("validation", "test", "train")
        for row in range(num_queries)
    ]
    names = ("method", "precision", "split", "row", "recall@10", "ndcg@10")
    return pl.DataFrame(rows, schema=names, orient="row")
