"""Records of this project's runs, from experiment directories, evaluations and job logs.

A run is recorded once, when it has ended. Its run id is its name and the time at which its last
attempt began. An interrupted run is recorded when it has been resumed and has ended.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kimi_recursive.files import read_json_object
from kimi_recursive.layout import RESULTS_SUFFIX, Layout, WorkFolder
from kimi_recursive.model.config import CONFIG_NAME
from kimi_recursive.processes.logs import logged_error
from kimi_recursive.records.kinds import complete, get, number, parse_time
from kimi_recursive.records.log import append_records
from kimi_recursive.status import Status
from kimi_recursive.training.experiment import METADATA_NAME

BASELINES_PATH = Path("baselines.jsonl")
TRAINING_LOG_PATH = Path("experiments/training_log.jsonl")
ENDED = (Status.OK.in_experiment, Status.FAILED.in_experiment)


def record_runs(
    results_dir: str | Path,
    baselines: Path = BASELINES_PATH,
    training_log: Path = TRAINING_LOG_PATH,
) -> None:
    """Append the runs in `results_dir` that the logs do not have yet, and print how many.

    If a file cannot be read or written, a warning is printed: the results do not need the records.
    """
    layout = Layout(Path(results_dir))
    found = {
        training_log: [*_trainings(layout), *_failed_trainings(layout)],
        baselines: [*_evaluations(layout), *_failed_evaluations(layout)],
    }
    for path, records in found.items():
        records.sort(key=lambda record: record["timestamp"])
        try:
            done = append_records(path, records, skip_existing=True)
        except ValueError as error:
            print(f"warning: nothing was recorded: {error}", file=sys.stderr)
            continue
        if done.repaired:
            print(f"warning: {path}: {done.repaired}", file=sys.stderr)
        if done.num_appended:
            print(f"{path}: {done.num_appended} runs recorded", file=sys.stderr)


def record_of_experiment(directory: str | Path) -> dict[str, Any] | None:
    """The training record of an experiment directory; None if the run has not ended.

    Raises:
        ValueError: the directory has no readable metadata.
    """
    directory = Path(directory)
    meta = read_json_object(directory / METADATA_NAME)
    if meta.get("status") not in ENDED or "ended_at" not in meta:
        return None
    params, results = meta.get("training_params") or {}, meta.get("final_results") or {}
    type_ = _type(meta)
    domain = "embedding" if type_ == "embedding_distillation" else "language_modeling"
    history = results.get("validation") or []
    metrics = {**(meta.get("best_metrics") or {}), **results}
    metrics = {k: v for k, v in metrics.items() if number(v) is not None}
    best_loss = results.get("best_validation_loss", results.get("validation_loss"))
    if history and number(best_loss) is not None:
        start = list(history[0].values())[-1]  # of the last inner step
        metrics["validation_loss_change"] = best_loss - start
    started, ended = parse_time(meta["started_at"]), parse_time(meta["ended_at"])
    data = {
        "run_id": _run_id(meta["experiment_name"], started),
        "domain": domain,
        "status": meta["status"],
        "experiment_type": type_,
        "experiment_name": meta["experiment_name"],
        "description": meta.get("description"),
        "dataset_config": {
            "domain": domain,
            "split": "train",
            **(meta.get("dataset") or {}),
            "paths": meta.get("paths") or {},
        },
        "hyperparameters": {**params, "learning_rate": params.get("lr")},
        "architecture": _architecture(directory, params),
        "metrics_history": history,
        "best_val_loss": best_loss,
        "best_step": results.get("best_step"),
        "final_metrics": metrics or None,
        "training_time_seconds": (ended - started).total_seconds(),
        "start_time": started.isoformat(),
        "end_time": ended.isoformat(),
        "checkpoint_dir": str(directory / "checkpoints"),
        "error_message": meta.get("error"),
        "last_good_step": meta.get("last_good_step"),
        "failed_step": meta.get("failed_step"),
        "findings": _findings(meta, metrics),
        "branch": meta.get("git_branch"),
        "commit": meta.get("git_commit"),
        "uncommitted_changes": bool(meta.get("git_changes")),
        "host": meta.get("host"),
        "versions": meta.get("versions"),
    }
    return complete({"timestamp": ended.isoformat(), "run_data": data})


def record_of_evaluation(path: str | Path) -> dict[str, Any]:
    """The baseline record of an evaluation's results file.

    Raises:
        ValueError: the file cannot be read, or lacks a key that every evaluation has.
    """
    path, found = Path(path), read_json_object(path)
    try:
        name, time = path.name.removesuffix(RESULTS_SUFFIX), parse_time(found["created"])
        scores = found["perplexity"]
        metrics = {k: scores[k] for k in ("loss", "perplexity", "token_accuracy")}
        metrics |= {
            "accuracy": scores["token_accuracy"],
            "perplexity_step_0": scores["by_step"][0]["perplexity"],
            "mean_inner_steps": found["mean_inner_steps"],
            "forward_flops_per_token": found["forward_flops_per_token"],
            **found["throughput"],
        }
        config = {
            "experiment_type": _evaluation_type(found["stage"]),
            "variant": found["stage"],
            "split": found["split"],
            "inner_steps": found["inner_steps"],
            "num_documents": scores["num_documents"],
            "num_parameters": found["num_parameters"],
            "upstream": found.get("upstream"),
            **found["config"],
            **found["evaluation"],
        }
    except KeyError as error:
        raise ValueError(f"{path}: has no {error}") from None
    record = {
        "branch": found.get("git_branch"),
        "commit": (found.get("git_commit") or "")[:7] or None,
        "timestamp": time.isoformat(),
        "experiment": name,
        "run_id": _run_id(name, time),
        "status": "completed",
        "metrics": metrics,
        "config": config,
        "notes": f"perplexity {metrics['perplexity']:.4f} on {scores['num_documents']} "
        f"{found['split']} documents, {found['inner_steps']} inner steps",
        "versions": found["versions"],
    }
    return complete(record)


def _trainings(layout: Layout) -> Iterator[dict[str, Any]]:
    for work in layout.works():
        record = _or_warn(record_of_experiment, work.folder) if work.metadata.is_file() else None
        if record and not get(record, "run_data.hyperparameters.quick"):
            yield record


def _evaluations(layout: Layout) -> Iterator[dict[str, Any]]:
    for files in layout.evaluations():
        if record := _or_warn(record_of_evaluation, files.results):
            yield record


def _or_warn(read: Any, path: Path) -> dict[str, Any] | None:
    try:
        return read(path)
    except (ValueError, KeyError, TypeError) as error:
        print(f"warning: not recorded: {error}", file=sys.stderr)
        return None


def _failed_trainings(layout: Layout) -> Iterator[dict[str, Any]]:
    """Jobs that ended in an error that the run's own metadata do not have."""
    places = [(layout.log("train_base"), layout.base.work)]
    places += [(log, layout.run(log.stem).work) for log in layout.logs_of("train_phase")]
    students = layout.logs_of("train_student")
    places += [(log, layout.track_b.student(log.stem).work) for log in students]
    for log, work in places:
        error, time = logged_error(log)[0], _modified(log)
        if not error or _status(work) == "failed":
            continue
        student = log.parent.name == "train_student"
        type_ = "base_training" if log.stem == "train_base" else "refinement_training"
        data = {
            "run_id": _run_id(log.stem, time),
            "domain": "embedding" if student else "language_modeling",
            "status": "failed",
            "experiment_type": "embedding_distillation" if student else type_,
            "error_message": error,
            "log_path": str(log),
            "findings": "ended before the first step",
        }
        yield complete({"timestamp": time.isoformat(), "run_data": data})


def _failed_evaluations(layout: Layout) -> Iterator[dict[str, Any]]:
    for log in layout.logs_of("evaluate"):
        if error := logged_error(log)[0]:
            time = _modified(log)
            yield complete({
                "timestamp": time.isoformat(),
                "experiment": log.stem,
                "run_id": _run_id(log.stem, time),
                "status": "failed",
                "error_message": error,
                "config": {"experiment_type": _evaluation_type(log.stem)},
            })  # fmt: skip


def _modified(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime if path.is_file() else 0, UTC)


def _status(work: WorkFolder) -> str | None:
    try:
        return read_json_object(work.metadata).get("status")
    except ValueError:
        return None


def _run_id(name: str, time: datetime) -> str:
    return f"{name}_{time:%Y%m%dT%H%M%S}"


def _type(meta: Mapping[str, Any]) -> str:
    params = meta.get("training_params") or {}
    if "teacher" in (meta.get("paths") or {}):
        return "embedding_distillation"
    if "phase" in params:
        return "refinement_training" if params["phase"] else "baseline"
    return "base_training"


def _evaluation_type(stage: str) -> str:
    kinds = {"baseline": "baseline_evaluation", "after_surgery": "surgery_evaluation"}
    return next((v for k, v in kinds.items() if stage.startswith(k)), "refinement_evaluation")


def _architecture(directory: Path, params: Mapping[str, Any]) -> dict[str, Any] | None:
    if not (directory / CONFIG_NAME).is_file():
        return {"variant": params["student"]} if "student" in params else None
    config = read_json_object(directory / CONFIG_NAME)
    return {"variant": params.get("arm"), "passes": config.get("max_inner_steps"), **config}


def _findings(meta: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    if meta["status"] == "failed":
        return f"failed at step {meta.get('failed_step')}: {meta.get('error')}"
    shown = ("validation_loss_change", "best_validation_loss", "best_vs_teacher_recall@10")
    parts = [f"{name.replace('_', ' ')} {metrics[name]:.6g}" for name in shown if name in metrics]
    step = meta.get("best_checkpoint_step")
    return ", ".join([*parts, *([f"best at step {step}"] if step is not None else [])])
