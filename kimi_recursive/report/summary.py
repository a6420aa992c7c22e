"""The rows of `summary.csv`, from whatever part of the matrix exists."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from kimi_recursive.files import file_digest, read_json_object
from kimi_recursive.layout import SIDECAR_NAME, Layout
from kimi_recursive.matrix import expected
from kimi_recursive.matrix.comparison import Comparison
from kimi_recursive.matrix.runs import (
    Evaluation,
    Surgery,
    chain,
    evaluations,
    repeated_evaluation,
    surgeries,
    variant_evaluations,
)
from kimi_recursive.matrix.settings import Config
from kimi_recursive.processes.logs import logged_error
from kimi_recursive.report.comparisons import compare_arms, too_short
from kimi_recursive.report.variants import Ranking, rank_variants
from kimi_recursive.status import Status

COLUMNS = (
    "name", "stage", "status", "seed", "arm", "phase", "variant", "training", "base_kind",
    "chunk_width", "max_inner_steps", "inner_steps", "layers_to_refine", "use_latent_token",
    "d_state",
    "num_base_parameters", "num_trainable_parameters", "num_training_steps", "training_tokens",
    "training_flops", "lr", "best_step", "forward_flops_per_token", "num_documents",
    "num_tokens", "loss", "perplexity", "perplexity_step_0",
    "difference_percent", "token_accuracy", "mean_inner_steps",
    "halting_mean_inner_steps", "halting_perplexity",
    "trained_tokens_per_second", "evaluated_tokens_per_second", "generated_tokens_per_second",
    "detail",
)  # fmt: skip
# The keys that are read of each file; a file that lacks one is damaged.
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
    """What exists of the matrix.

    Attributes:
        rows: Of `summary.csv`, one for each expected evaluation; where it is `ok`, with `by_step`,
            `pairs`, the best validation loss, and how many chunks and rounds took 1, 2, ... inner
            steps.
        proofs: By untrained cells the zero-init proof, or None and what is wrong with the file.
        comparisons: Of `compare_arms`.
        repeat: `compare_repeat`'s result, or None and what is wrong with the file; None when no
            repeat is asked for.
        variants: Of `rank_variants`; None where there are none.
    """

    rows: list[dict[str, Any]]
    proofs: dict[Surgery, tuple[dict[str, Any] | None, str]]
    comparisons: list[Comparison]
    repeat: tuple[dict[str, Any] | None, str] | None
    variants: Ranking | None = None

    @property
    def done(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["status"] == Status.OK]

    @property
    def default(self) -> list[dict[str, Any]]:
        """The rows that are done of the config itself, without those of variants."""
        return [row for row in self.done if not row.get("variant")]

    @property
    def too_short(self) -> list[str]:
        """The stages of the config itself whose training was not long enough to be compared."""
        return too_short(self.default)

    @property
    def baseline(self) -> dict[str, Any] | None:
        return next((row for row in self.done if row["stage"] == "baseline"), None)


def read_matrix(config: Config, layout: Layout) -> Matrix:
    """Read whatever exists.

    Status of a row: `ok`; `failed` when a file is damaged or a log ends in an error; else
    `missing`, also when results exist but were made with other settings than the config's.
    """
    expected_ones = [*evaluations(config), *variant_evaluations(config)]
    rows = [_row(config, layout, evaluation) for evaluation in expected_ones]
    base = next((r for r in rows if r["stage"] == "baseline" and r["status"] == Status.OK), None)
    for row in rows:
        if base and row["status"] == Status.OK:
            change = row["perplexity"] / base["perplexity"] - 1
            row["difference_percent"] = 100 * change
    proofs = {
        cells: read_record(layout.proof(cells.proof), PROOF_KEYS) for cells in surgeries(config)
    }
    repeat = None
    if run := repeated_evaluation(config):
        repeat = _read_repeat(layout, rows)
        if repeat == (None, ""):
            repeat = None, _logged_error(layout, run)
    ranking = rank_variants(config, layout.folder, rows)
    return Matrix(rows, proofs, compare_arms(layout.folder, rows), repeat, ranking)


def _row(config: Config, layout: Layout, evaluation: Evaluation) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": evaluation.name,
        "stage": evaluation.stage,
        "seed": "" if evaluation.seed is None else evaluation.seed,
        "variant": evaluation.variant,
        "training": evaluation.training or "",
        "base_kind": config.base.kind,
    }
    found, problem = read_record(layout.evaluation(evaluation.name).results, RESULT_KEYS)
    runs = chain(config, evaluation.training)
    trained = []
    for run in runs if found else ():
        summary, damage = read_record(layout.run(run.key).summary, TRAINED_KEYS)
        trained += [summary] if summary else []
        problem = problem or damage
    if not found or len(trained) < len(runs):
        problem = problem or _logged_error(layout, evaluation)
        return row | {"status": Status.FAILED if problem else Status.MISSING, "detail": problem}
    others = expected.differing(expected.for_evaluation(config, evaluation), found)
    for run, summary in zip(runs, trained, strict=True):
        others += expected.differing(expected.for_training(config, run), summary)
    if others:
        detail = expected.made_with_others(list(dict.fromkeys(others)))
        return row | {"status": Status.MISSING, "detail": detail}
    scores, recursive = found["perplexity"], found["config"]
    if evaluation.seed is not None:
        keys = ("max_inner_steps", "d_state", "use_latent_token", "commit")
        row |= {k: recursive[k] for k in keys}
        row["halting"] = recursive.get("halting", "threshold")  # records of before have none
        row["layers_to_refine"] = json.dumps(recursive["layers_to_refine"])
    if trained:
        last = trained[-1]
        row |= {k: last[k] for k in ("arm", "phase", "best_step", "num_trainable_parameters")}
        row |= {"num_training_steps": last["num_steps"], "lr": last["settings"]["lr"]}
        row["best_validation_loss"] = last.get("best_validation_loss")
        for key in ("training_tokens", "training_flops"):  # of this phase and those before it
            row[key] = sum(summary[key] for summary in trained)
        row["trained_tokens_per_second"] = _training_speed(layout.run(runs[-1].key).logs)
    return row | {
        "status": Status.OK,
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
        "pairs": found.get("pairs"),
        "num_rounds_by_step": found.get("num_rounds_by_step"),
    }


def _training_speed(logs: Path) -> float | None:
    """Target tokens per second, validation included; None where the log cannot be read."""
    try:
        return pl.read_parquet(logs)["tokens_per_second"].drop_nulls()[-1]
    except (OSError, IndexError, pl.exceptions.PolarsError):
        return None


def read_record(path: Path, keys: tuple[str, ...]) -> tuple[dict[str, Any] | None, str]:
    """The JSON object, or None and what is wrong with the file ("" when it does not exist)."""
    if not path.is_file():
        return None, ""
    try:
        found = read_json_object(path)
    except ValueError as error:
        return None, str(error)
    missing = [key for key in keys if not _has(found, key.split("."))]
    return (None, f"{path}: has no {missing[0]!r}") if missing else (found, "")


def _has(value: Any, keys: list[str]) -> bool:
    """Whether these keys, one inside the other, lead to a value."""
    if not keys:
        return True
    return isinstance(value, dict) and keys[0] in value and _has(value[keys[0]], keys[1:])


def _read_repeat(layout: Layout, rows: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, str]:
    """The comparison of the repeated run, if it compared the run that exists now."""
    found, problem = read_record(layout.repeat, REPEAT_KEYS)
    if found is None:
        return None, problem
    sidecar = layout.run(found["run"]).sidecar / SIDECAR_NAME
    same = sidecar.is_file() and file_digest(sidecar) == found["sidecar_sha256"]
    if same and any(r["training"] == found["run"] and r["status"] == Status.OK for r in rows):
        return found, ""
    return None, "the comparison was made of another run"


def _logged_error(layout: Layout, evaluation: Evaluation) -> str:
    """The error that the evaluation, or the training before it, ended in; else ""."""
    logs = [layout.log("evaluate", evaluation.name)]
    if evaluation.training:
        logs.append(layout.log("train_phase", evaluation.training))
    return next((error for path in logs if (error := logged_error(path)[0])), "")
