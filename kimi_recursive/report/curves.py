"""Training logs of the runs that the config asks for, also of those that are not finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from kimi_recursive.files import read_json_object, read_parquet
from kimi_recursive.matrix.runs import Training, trainings
from kimi_recursive.matrix.settings import (
    MODEL_KEYS,
    TRAINING_KEYS,
    phase_overrides,
    recursive_subset,
)
from kimi_recursive.training.arms import ARMS

LOG_COLUMNS = ("step", "tokens", "loss_final")
VALIDATION = "validation_loss_step_"


@dataclass(frozen=True)
class Curve:
    """The log of a run: of all its steps, or of an unfinished one those that were recorded."""

    run: Training
    logs: pl.DataFrame
    finished: bool


def read_curves(config: Mapping[str, Any], results: Path) -> tuple[list[Curve], dict[str, str]]:
    """Logs of the runs that are there with the settings of the config.

    Returns: the curves, and by key of the run what is wrong with a log that cannot be read.
    """
    curves, problems = [], {}
    for run in trainings(config):
        folder = results / "runs" / run.key
        finished = (folder / "train_logs.parquet").is_file()
        facts = folder / ("train_summary.json" if finished else "work/fingerprint.json")
        if not (finished or facts.is_file()):
            continue
        try:
            if not _as_configured(config, run, read_json_object(facts)):
                continue
            if finished:
                logs = read_parquet(folder / "train_logs.parquet", LOG_COLUMNS)
            else:
                logs = _read_metrics(folder / "work/metrics")
        except ValueError as error:
            problems[run.key] = str(error)
            continue
        if logs.height > 1:
            logs = logs.sort("step").with_columns(pl.col("tokens").fill_null(0))
            curves.append(Curve(run, logs, finished))
    return curves, problems


def validation_column(logs: pl.DataFrame) -> str | None:
    """That of the last inner step; None where nothing was validated."""
    found = [name for name in logs.columns if name.startswith(VALIDATION)]
    return max(found, key=lambda name: int(name.removeprefix(VALIDATION)), default=None)


def _as_configured(config: Mapping[str, Any], run: Training, facts: Mapping[str, Any]) -> bool:
    want = recursive_subset(config, (*MODEL_KEYS, *TRAINING_KEYS))
    want |= phase_overrides(config, run.phase) | ARMS[run.arm]
    settings = config["training"][run.phase]
    have, have_settings = facts.get("config", {}), facts.get("settings", {})
    return all(have.get(k) == v for k, v in want.items()) and all(
        settings.get(k) == v for k, v in have_settings.items()
    )


def _read_metrics(folder: Path) -> pl.DataFrame:
    """Rows of the steps that were recorded on the way."""
    rows = [read_json_object(path) for path in sorted(folder.glob("step_*.json"))]
    rows = [row for row in rows if "step" in row]
    table = pl.DataFrame(rows, infer_schema_length=None)
    absent = {name: pl.lit(None, pl.Float64) for name in LOG_COLUMNS if name not in table.columns}
    return table.with_columns(**absent)
