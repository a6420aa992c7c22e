"""`summary.csv` and `summary.txt`, from whatever part of the matrix is there."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kimi_recursive.files import write_text
from kimi_recursive.matrix import Evaluation, evaluations, trainings, zero_init_name
from kimi_recursive.settings import (
    GENERATION_KEYS,
    MODEL_KEYS,
    TRAINING_KEYS,
    recursive_subset,
)

COLUMNS = (
    "name", "stage", "status", "seed", "training", "base_kind", "chunk_width", "max_inner_steps",
    "inner_steps", "layers_to_refine", "use_latent_token", "d_state", "num_base_parameters",
    "num_sidecar_parameters", "num_training_steps", "training_tokens", "lr", "best_step",
    "num_documents", "num_tokens", "loss", "perplexity", "perplexity_step_0",
    "difference_percent", "token_accuracy", "mean_inner_steps",
    "evaluated_tokens_per_second", "generated_tokens_per_second", "detail",
)  # fmt: skip


def summarize(
    config: Mapping[str, Any], results_dir: str | Path, csv_path: str | Path, txt_path: str | Path
) -> list[dict[str, Any]]:
    """Write both summaries; a run that is not there is a row that says so.

    Status: `ok`; `failed` when a file is damaged or its log ends in an error; else `missing`, also
    when results are there but were made with other settings than the config now has.

    Returns: the rows of `summary.csv`.
    """
    results_dir = Path(results_dir)
    rows = [_row(config, results_dir, evaluation) for evaluation in evaluations(config)]
    base = next((r for r in rows if r["stage"] == "baseline" and r["status"] == "ok"), None)
    for row in rows:
        if base and row["status"] == "ok":
            change = row["perplexity"] / base["perplexity"] - 1
            row["difference_percent"] = 100 * change
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(csv_path, table.getvalue())
    write_text(txt_path, _text(config, results_dir, rows))
    return rows


def _row(config: Mapping[str, Any], results: Path, evaluation: Evaluation) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": evaluation.name,
        "stage": evaluation.stage,
        "seed": "" if evaluation.seed is None else evaluation.seed,
        "training": evaluation.training or "",
        "base_kind": config["base"]["kind"],
    }
    found, problem = _read(results / "eval" / f"{evaluation.name}_results.json")
    trained: dict[str, Any] | None = {}
    if evaluation.training and found:
        trained, problem = _read(results / "runs" / evaluation.training / "train_summary.json")
    if not (found and trained is not None):
        problem = problem or _logged_error(results, evaluation)
        return row | {"status": "failed" if problem else "missing", "detail": problem}
    if other := _other_settings(config, evaluation, found, trained):
        return row | {"status": "missing", "detail": f"there with other {', '.join(other)}"}
    scores, recursive = found["perplexity"], found["config"]
    if evaluation.seed is not None:
        row |= {k: recursive[k] for k in ("max_inner_steps", "d_state", "use_latent_token")}
        row["layers_to_refine"] = json.dumps(recursive["layers_to_refine"])
    if trained:
        row |= {k: trained[k] for k in ("training_tokens", "best_step")}
        row |= {"num_training_steps": trained["num_steps"], "lr": trained["settings"]["lr"]}
    return row | {
        "status": "ok",
        "chunk_width": recursive["chunk_width"],
        "inner_steps": found["inner_steps"],
        "num_base_parameters": found["num_parameters"]["base"],
        "num_sidecar_parameters": found["num_parameters"]["sidecar"],
        **{k: scores[k] for k in ("num_documents", "num_tokens", "loss", "perplexity")},
        "perplexity_step_0": scores["by_step"][0]["perplexity"],
        "token_accuracy": scores["token_accuracy"],
        "mean_inner_steps": found["mean_inner_steps"],
        **found["throughput"],
        "by_step": scores["by_step"],
    }


def _other_settings(
    config: Mapping[str, Any],
    evaluation: Evaluation,
    found: Mapping[str, Any],
    trained: Mapping[str, Any],
) -> list[str]:
    """Keys in which results that are there differ from what the config asks for."""
    keys = ("chunk_width",)
    if evaluation.seed is not None:
        keys = (*MODEL_KEYS, *GENERATION_KEYS, *(TRAINING_KEYS if evaluation.training else ()))
    want = recursive_subset(config, keys)
    differ = [f"recursive.{k}" for k in keys if found["config"][k] != want[k]]
    differ += _changed("evaluation", config["evaluation"], found["evaluation"])
    if evaluation.training:
        phase = _phase(config, evaluation.training)
        differ += _changed(f"training.{phase}", config["training"][phase], trained["settings"])
    return differ


def _changed(where: str, want: Mapping[str, Any], have: Mapping[str, Any]) -> list[str]:
    return [f"{where}.{k}" for k in want if have.get(k) != want[k]]


def _phase(config: Mapping[str, Any], key: str) -> str:
    return next(t.phase for t in trainings(config) if t.key == key)


def _read(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The JSON object, or None and what is wrong with the file ("" when there is none)."""
    if not path.is_file():
        return None, ""
    try:
        return json.loads(path.read_text(encoding="utf-8")), ""
    except ValueError as error:
        return None, f"{path}: does not parse ({error})"


def _logged_error(results: Path, evaluation: Evaluation) -> str:
    """The last error line of the logs that lead to this evaluation."""
    logs = [results / "logs" / "evaluate" / f"{evaluation.name}.log"]
    if evaluation.training:
        logs.append(results / "logs" / "train_phase" / f"{evaluation.training}.log")
    for path in logs:
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            errors = [line for line in lines if line.startswith("error: ")]
            if errors:
                return errors[-1].removeprefix("error: ")
    return ""


def _text(config: Mapping[str, Any], results: Path, rows: list[dict[str, Any]]) -> str:
    done = [r for r in rows if r["status"] == "ok"]
    lines = [f"Kimi Recursive: {len(done)} of {len(rows)} expected evaluations are there", ""]
    lines += [*_zero_init(config, results), ""]
    header = f"{'evaluation':<26}{'step':>5}{'perplexity':>12}{'vs baseline':>13}{'accuracy':>10}"
    lines += ["Perplexity on held-out documents, by inner step", header]
    base = next((r for r in done if r["stage"] == "baseline"), None)
    for row in done:
        for step in row["by_step"]:
            change = ""
            if base:
                change = f"{100 * (step['perplexity'] / base['perplexity'] - 1):+.3f} %"
            label = row["name"] if step["step"] == 0 else ""
            lines.append(
                f"{label:<26}{step['step']:>5}{step['perplexity']:>12.4f}{change:>13}"
                f"{100 * step['token_accuracy']:>8.2f} %"
            )
    if done:
        lines.append(
            f"({done[0]['num_tokens']:,} tokens of {done[0]['num_documents']} documents; lower "
            "perplexity is better)"
        )
    if any(r["training"] for r in done):
        lines.append(
            "(no control arm yet: a difference may be that of more parameters and more training)"
        )
    lines += ["", "Cost"]
    lines.append(f"{'evaluation':<26}{'mean steps':>11}{'scored tok/s':>14}{'generated tok/s':>17}")
    for row in done:
        lines.append(
            f"{row['name']:<26}{row['mean_inner_steps']:>11.2f}"
            f"{row['evaluated_tokens_per_second']:>14.0f}"
            f"{row['generated_tokens_per_second']:>17.1f}"
        )
    absent = [r for r in rows if r["status"] != "ok"]
    if absent:
        lines += ["", "Not there"]
        lines += [f"{r['name']:<26}{r['status']}  {r['detail']}".rstrip() for r in absent]
    return "\n".join(lines) + "\n"


def _zero_init(config: Mapping[str, Any], results: Path) -> list[str]:
    lines = []
    for seed in config["seeds"]:
        name = zero_init_name(config, seed)
        found, problem = _read(results / "compare" / f"{name}.json")
        if found is None:
            lines.append(f"Zero-init proof (seed {seed}): {problem or 'missing'}")
            continue
        failed = [c for c in found["checks"] if not c["passed"]]
        verdict = "PASSED" if found["passed"] else "FAILED"
        lines.append(
            f"Zero-init proof (seed {seed}): {verdict}, "
            f"{len(found['checks']) - len(failed)} of {len(found['checks'])} checks"
        )
        lines.append(
            f"  perplexity differs by {found['perplexity_difference_percent']:.3g} %, "
            f"logits of steps 1..{found['inner_steps']} by {found['max_logit_difference']:.3g}, "
            f"generations {'identical' if found['generations_identical'] else 'DIFFER'}"
        )
        lines += [f"  failed: {c['name']} = {c['value']:.6g}, must be {c['limit']}" for c in failed]
    return lines
