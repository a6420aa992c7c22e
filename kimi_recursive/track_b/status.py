"""The log of a run, and its status: best and final scores, or what is wrong.

Status of a run:

    success       all steps are logged, with evaluations
    failed        the last attempt ended in an error
    incomplete    the log stops before the last step (interrupted, or still running)
    no_eval       the log has no evaluation
    parse_error   the log cannot be read
    missing_logs  there is no log: not started, or killed before the first attempt ended
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from kimi_recursive.files import read_json_object, write_parquet, write_text
from kimi_recursive.layout import StudentFolder
from kimi_recursive.status import Status
from kimi_recursive.track_b.metrics import NDCG, RECALL

# From worst to best. The status of an experiment is the worst of its seeds.
STATUSES = tuple(
    status.in_track_b
    for status in (
        Status.FAILED,
        Status.DAMAGED,
        Status.MISSING,
        Status.UNSCORED,
        Status.INTERRUPTED,
        Status.OK,
    )
)

SUCCESS = Status.OK.in_track_b
SCORED = (SUCCESS, Status.INTERRUPTED.in_track_b)


@dataclass(frozen=True)
class RunStatus:
    """Status of one run, and its scores.

    Attributes:
        status: One of `STATUSES`.
        best_recall: Highest `vs_teacher_recall@10` of all evaluations.
        final_ndcg: `vs_teacher_ndcg@10` of the last evaluation.
        detail: What is wrong, in words; empty for a success.
        summary: Content of `train_summary.json`.
    """

    status: str
    best_recall: float | None = None
    final_ndcg: float | None = None
    detail: str = ""
    summary: dict[str, Any] = field(default_factory=dict)


def read_status(run_dir: str | Path, num_steps: int) -> RunStatus:
    """The status of a run, from its summary and its log."""
    folder = StudentFolder(Path(run_dir))
    summary = _read_summary(folder.summary)
    if summary.get("status") == Status.FAILED.in_experiment:
        return RunStatus(
            Status.FAILED.in_track_b, detail=str(summary.get("error")), summary=summary
        )
    try:
        table = read_logs(run_dir)
    except ValueError as error:
        return RunStatus(Status.DAMAGED.in_track_b, detail=str(error), summary=summary)
    if table is None:
        started = folder.work.folder.is_dir()
        detail = "started, no attempt has ended" if started else "not started"
        return RunStatus(Status.MISSING.in_track_b, detail=detail, summary=summary)
    evaluations = table.drop_nulls(RECALL)
    if evaluations.is_empty():
        return RunStatus(Status.UNSCORED.in_track_b, detail=f"no {RECALL}", summary=summary)
    last = table["step"][-1]
    status, detail = SUCCESS, ""
    if last != num_steps:
        status, detail = Status.INTERRUPTED.in_track_b, f"step {last} of {num_steps}"
    recall, ndcg = max(evaluations[RECALL].to_list()), evaluations[NDCG][-1]
    return RunStatus(status, recall, ndcg, detail, summary)


def write_logs(run_dir: Path, logs: pl.DataFrame) -> None:
    """Write `logs/train_logs.parquet` and `.jsonl`."""
    write_parquet(StudentFolder(run_dir).logs, logs)
    lines = (json.dumps({k: v for k, v in row.items() if v is not None}) for row in logs.to_dicts())
    write_text(StudentFolder(run_dir).log_lines, "\n".join(lines) + "\n")


def read_logs(run_dir: str | Path) -> pl.DataFrame | None:
    """The log of a run, from parquet, else from JSON lines; None if it has neither.

    Raises:
        ValueError: no file can be read; the message says what is wrong with each.
    """
    errors, folder = [], StudentFolder(Path(run_dir))
    read_lines = partial(pl.read_ndjson, infer_schema_length=None)
    for path, read in {folder.logs: pl.read_parquet, folder.log_lines: read_lines}.items():
        if path.is_file():
            try:
                return _checked(read(path))
            except (ValueError, OSError, pl.exceptions.PolarsError) as error:
                errors.append(f"{path.name}: {(str(error).splitlines() or ['unreadable'])[0]}")
    if errors:
        raise ValueError("; ".join(errors))
    return None


def _checked(table: pl.DataFrame) -> pl.DataFrame:
    """A log with `step` and finite scores; a missing column of scores is added, with nulls."""
    if table.is_empty():
        raise ValueError("empty")
    if "step" not in table.columns or not table["step"].dtype.is_integer():
        raise ValueError("no whole numbers in a column 'step'")
    for name in (RECALL, NDCG):
        column = pl.col(name) if name in table.columns else pl.lit(None)
        table = table.with_columns(column.cast(pl.Float64).alias(name))
        if not table[name].drop_nulls().is_finite().all():
            raise ValueError(f"{name} is not finite")
    return table


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except ValueError:
        return {}
