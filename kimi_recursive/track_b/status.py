"""The log of a run, and what became of it: its best and final scores, or what is wrong.

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
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from kimi_recursive.files import write_parquet, write_text
from kimi_recursive.track_b.metrics import NDCG, RECALL

# From worst to best: an experiment has the worst status of its seeds.
STATUSES = ("failed", "parse_error", "missing_logs", "no_eval", "incomplete", "success")


@dataclass(frozen=True)
class RunStatus:
    """Attributes:
    best_recall: Highest `vs_teacher_recall@10` of all evaluations.
    final_ndcg: `vs_teacher_ndcg@10` of the last one.
    detail: What is wrong, in words; empty for a success.
    summary: What `train_summary.json` holds.
    """

    status: str
    best_recall: float | None = None
    final_ndcg: float | None = None
    detail: str = ""
    summary: dict[str, Any] = field(default_factory=dict)


def read_status(run_dir: str | Path, num_steps: int) -> RunStatus:
    """Read a run: its log as parquet, else as JSON lines."""
    logs = Path(run_dir) / "logs"
    summary = _read_summary(logs / "train_summary.json")
    if summary.get("status") == "failed":
        return RunStatus("failed", detail=str(summary.get("error")), summary=summary)
    found = [p for p in (logs / "train_logs.parquet", logs / "train_logs.jsonl") if p.is_file()]
    if not found:
        started = (Path(run_dir) / "work").is_dir()
        detail = "started, no attempt has ended" if started else "not started"
        return RunStatus("missing_logs", detail=detail, summary=summary)
    errors = []
    for path in found:
        try:
            rows = _read_log(path)
            break
        except (ValueError, KeyError, TypeError, OSError, pl.exceptions.PolarsError) as error:
            errors.append(f"{path.name}: {(str(error).splitlines() or ['unreadable'])[0]}")
    else:
        return RunStatus("parse_error", detail="; ".join(errors), summary=summary)
    evaluations = [row for row in rows if row[RECALL] is not None]
    if not evaluations:
        return RunStatus("no_eval", detail=f"{path.name}: no {RECALL}", summary=summary)
    best = max(row[RECALL] for row in evaluations)
    scores = {"best_recall": best, "final_ndcg": evaluations[-1][NDCG], "summary": summary}
    last = rows[-1]["step"]
    if last != num_steps:
        return RunStatus("incomplete", detail=f"step {last} of {num_steps}", **scores)
    return RunStatus("success", **scores)


def write_logs(run_dir: Path, logs: pl.DataFrame) -> None:
    """Write `logs/train_logs.parquet` and `.jsonl`."""
    write_parquet(run_dir / "logs" / "train_logs.parquet", logs)
    lines = (json.dumps({k: v for k, v in row.items() if v is not None}) for row in logs.to_dicts())
    write_text(run_dir / "logs" / "train_logs.jsonl", "\n".join(lines) + "\n")


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Rows with `step` and the two scores, None where there was no evaluation."""
    if path.suffix == ".parquet":
        rows = pl.read_parquet(path).to_dicts()
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    if not rows:
        raise ValueError("empty")
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no JSON object")
    return [
        {"step": int(row["step"]), **{name: _score(row, name) for name in (RECALL, NDCG)}}
        for row in rows
    ]


def _score(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r} at step {row['step']}")
    return float(value)


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
