"""The rows of `summary.csv`, from whatever part of the matrix is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from kimi_recursive.files import file_digest, read_json_object, write_csv, write_json, write_text
from kimi_recursive.matrix.runs import (
    Evaluation,
    Training,
    evaluations,
    repeated_evaluation,
    trainings,
    zero_init_name,
)
from kimi_recursive.matrix.settings import (
    GENERATION_KEYS,
    MODEL_KEYS,
    TRAINING_KEYS,
    phase_overrides,
    recursive_subset,
    upstream_settings,
)
from kimi_recursive.model.sidecar import SIDECAR_NAME
from kimi_recursive.processes.logs import logged_error
from kimi_recursive.report.comparisons import compare_arms
from kimi_recursive.report.summary_text import summary_text
from kimi_recursive.training.arms import ARMS

COLUMNS = (
    "name", "stage", "status", "seed", "arm", "phase", "training", "base_kind", "chunk_width",
    "max_inner_steps", "inner_steps", "layers_to_refine", "use_latent_token", "d_state",
    "num_base_parameters", "num_trainable_parameters", "num_training_steps", "training_tokens",
    "training_flops", "lr", "best_step", "forward_flops_per_token", "num_documents",
    "num_tokens", "loss", "perplexity", "perplexity_step_0",
    "difference_percent", "token_accuracy", "mean_inner_steps",
    "halting_mean_inner_steps", "halting_perplexity",
    "trained_tokens_per_second", "evaluated_tokens_per_second", "generated_tokens_per_second",
    "detail",
)  # fmt: skip
# What is read of each file; one without it is damaged.
RESULT_KEYS = (
    "config.chunk_width", "upstream", "evaluation", "inner_steps", "num_parameters.base",
    "forward_flops_per_token", "mean_inner_steps", "halting", "perplexity.num_documents",
    "perplexity.num_tokens", "perplexity.loss", "perplexity.perplexity", "perplexity.by_step",
    "perplexity.token_accuracy", "throughput.evaluated_tokens_per_second",
    "throughput.generated_tokens_per_second",
)  # fmt: skip
TRAINED_KEYS = (
    "arm", "phase", "best_step", "num_trainable_parameters", "num_steps", "settings.lr",
    "training_tokens", "training_flops",
)  # fmt: skip
PROOF_KEYS = (
    "passed", "checks", "perplexity_difference_percent", "max_logit_difference",
    "generations_identical", "inner_steps",
)  # fmt: skip
REPEAT_KEYS = (
    "run", "sidecar_sha256", "identical", "num_steps", "num_documents", "max_differences",
)  # fmt: skip


@dataclass(frozen=True)
class Matrix:
    """What is there of the matrix.

    Attributes:
        rows: Of `summary.csv`, one for each expected evaluation; with `by_step`, and how many
            chunks and rounds took 1, 2, ... inner steps, where it is `ok`.
        proofs: By seed the zero-init proof, or None and what is wrong with it.
        comparisons: Of `compare_arms`.
        repeat: `compare_repeat`'s result or what is wrong with it; None when not asked for.
    """

    rows: list[dict[str, Any]]
    proofs: dict[int, tuple[dict[str, Any] | None, str]]
    comparisons: list[dict[str, Any]]
    repeat: tuple[dict[str, Any] | None, str] | None

    @property
    def done(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["status"] == "ok"]

    @property
    def baseline(self) -> dict[str, Any] | None:
        return next((row for row in self.done if row["stage"] == "baseline"), None)


def summarize(
    config: Mapping[str, Any],
    results_dir: str | Path,
    csv_path: str | Path,
    txt_path: str | Path,
    verdicts_path: str | Path,
) -> list[dict[str, Any]]:
    """Write the summaries; a run that is not there is a row that says so.

    Returns: the rows of `summary.csv`.
    """
    matrix = read_matrix(config, results_dir)
    text = summary_text(matrix.rows, matrix.proofs, matrix.comparisons, matrix.repeat)
    write_csv(csv_path, COLUMNS, matrix.rows)
    write_json(verdicts_path, matrix.comparisons)
    write_text(txt_path, text)
    return matrix.rows


def read_matrix(config: Mapping[str, Any], results_dir: str | Path) -> Matrix:
    """Read whatever is in `results_dir`.

    Status of a row: `ok`; `failed` when a file is damaged or its log ends in an error; else
    `missing`, also when results are there but were made with other settings than the config has.
    """
    results_dir = Path(results_dir)
    rows = [_row(config, results_dir, evaluation) for evaluation in evaluations(config)]
    base = next((r for r in rows if r["stage"] == "baseline" and r["status"] == "ok"), None)
    for row in rows:
        if base and row["status"] == "ok":
            change = row["perplexity"] / base["perplexity"] - 1
            row["difference_percent"] = 100 * change
    proofs = {}
    for seed in config["seeds"]:
        path = results_dir / "compare" / f"{zero_init_name(config, seed)}.json"
        proofs[seed] = _read(path, PROOF_KEYS)
    repeat = None
    if run := repeated_evaluation(config):
        repeat = _read_repeat(results_dir, rows)
        if repeat == (None, ""):
            repeat = None, _logged_error(results_dir, run)
    return Matrix(rows, proofs, compare_arms(results_dir, rows), repeat)


def _row(config: Mapping[str, Any], results: Path, evaluation: Evaluation) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": evaluation.name,
        "stage": evaluation.stage,
        "seed": "" if evaluation.seed is None else evaluation.seed,
        "training": evaluation.training or "",
        "base_kind": config["base"]["kind"],
    }
    found, problem = _read(results / "eval" / f"{evaluation.name}_results.json", RESULT_KEYS)
    chain = _chain(config, evaluation.training)
    trained = []
    for run in chain if found else ():
        path = results / "runs" / run.key / "train_summary.json"
        summary, damage = _read(path, TRAINED_KEYS)
        trained += [summary] if summary else []
        problem = problem or damage
    if not found or len(trained) < len(chain):
        problem = problem or _logged_error(results, evaluation)
        return row | {"status": "failed" if problem else "missing", "detail": problem}
    if other := _other_settings(config, evaluation, found, chain, trained):
        return row | {"status": "missing", "detail": f"there with other {', '.join(other)}"}
    scores, recursive = found["perplexity"], found["config"]
    if evaluation.seed is not None:
        row |= {k: recursive[k] for k in ("max_inner_steps", "d_state", "use_latent_token")}
        row["layers_to_refine"] = json.dumps(recursive["layers_to_refine"])
    if trained:
        last = trained[-1]
        row |= {k: last[k] for k in ("arm", "phase", "best_step", "num_trainable_parameters")}
        row |= {"num_training_steps": last["num_steps"], "lr": last["settings"]["lr"]}
        for key in ("training_tokens", "training_flops"):  # of this phase and those before it
            row[key] = sum(summary[key] for summary in trained)
        row["trained_tokens_per_second"] = _training_speed(results, chain[-1])
    return row | {
        "status": "ok",
        "chunk_width": recursive["chunk_width"],
        "inner_steps": found["inner_steps"],
        "num_base_parameters": found["num_parameters"]["base"],
        "forward_flops_per_token": found["forward_flops_per_token"],
        **{k: scores[k] for k in ("num_documents", "num_tokens", "loss", "perplexity")},
        "perplexity_step_0": scores["by_step"][0]["perplexity"],
        "token_accuracy": scores["token_accuracy"],
        "mean_inner_steps": found["mean_inner_steps"],
        **{f"halting_{k}": v for k, v in (found["halting"] or {}).items()},
        **found["throughput"],
        "by_step": scores["by_step"],
        "num_rounds_by_step": found.get("num_rounds_by_step"),
    }


def _other_settings(
    config: Mapping[str, Any],
    evaluation: Evaluation,
    found: Mapping[str, Any],
    chain: list[Training],
    trained: list[dict[str, Any]],
) -> list[str]:
    """Keys in which results that are there differ from what the config asks for."""
    keys = ("chunk_width",)
    if evaluation.seed is not None:
        keys = (*MODEL_KEYS, *GENERATION_KEYS, *(TRAINING_KEYS if evaluation.training else ()))
    want = recursive_subset(config, keys)
    if chain:
        want |= phase_overrides(config, chain[-1].phase) | ARMS[chain[-1].arm]
    differ = [f"recursive.{k}" for k in keys if found["config"].get(k) != want[k]]
    have = found["upstream"] or {}
    for part, settings in upstream_settings(config).items():
        differ += [part] if have.get(part) != settings else []
    differ += _changed("evaluation", config["evaluation"], found["evaluation"])
    for run, summary in zip(chain, trained, strict=True):
        settings = config["training"][run.phase]
        differ += _changed(f"training.{run.phase}", settings, summary["settings"])
    return differ


def _changed(where: str, want: Mapping[str, Any], have: Mapping[str, Any]) -> list[str]:
    return [f"{where}.{k}" for k in want if have.get(k) != want[k]]


def _chain(config: Mapping[str, Any], key: str | None) -> list[Training]:
    """A training run behind those that it starts from."""
    runs = {run.key: run for run in trainings(config)}
    chain = []
    while key:
        chain.insert(0, runs[key])
        key = runs[key].parent
    return chain


def _training_speed(results: Path, run: Training) -> float | None:
    """Target tokens per second, validation included; None where the log cannot be read."""
    try:
        logs = pl.read_parquet(results / "runs" / run.key / "train_logs.parquet")
        return logs["tokens_per_second"].drop_nulls()[-1]
    except (OSError, IndexError, pl.exceptions.PolarsError):
        return None


def _read(path: Path, keys: tuple[str, ...]) -> tuple[dict[str, Any] | None, str]:
    """The JSON object, or None and what is wrong with the file ("" when there is none)."""
    if not path.is_file():
        return None, ""
    try:
        found = read_json_object(path)
    except ValueError as error:
        return None, str(error)
    missing = [key for key in keys if not _has(found, key.split("."))]
    return (None, f"{path}: has no {missing[0]!r}") if missing else (found, "")


def _has(value: Any, keys: list[str]) -> bool:
    """Whether there is a value below these keys, one inside the other."""
    if not keys:
        return True
    return isinstance(value, dict) and keys[0] in value and _has(value[keys[0]], keys[1:])


def _read_repeat(results: Path, rows: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, str]:
    """The comparison of the repeated run, if it is of the run that is there now."""
    found, problem = _read(results / "compare" / "repeat.json", REPEAT_KEYS)
    if found is None:
        return None, problem
    sidecar = results / "runs" / found["run"] / "sidecar" / SIDECAR_NAME
    there = sidecar.is_file() and file_digest(sidecar) == found["sidecar_sha256"]
    rows = [row for row in rows if row["training"] == found["run"] and row["status"] == "ok"]
    if not (there and rows):
        return None, "there for another run"
    return found, ""


def _logged_error(results: Path, evaluation: Evaluation) -> str:
    """The last error line of the logs that lead to this evaluation."""
    logs = [results / "logs" / "evaluate" / f"{evaluation.name}.log"]
    if evaluation.training:
        logs.append(results / "logs" / "train_phase" / f"{evaluation.training}.log")
    return next((error for path in logs if (error := logged_error(path)[0])), "")
