"""Training logs of the runs that the config asks for, unfinished runs included."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from kimi_recursive.files import read_json_object, read_parquet
from kimi_recursive.layout import Layout
from kimi_recursive.matrix import expected
from kimi_recursive.matrix.runs import Training, trainings
from kimi_recursive.matrix.settings import Config

LOG_COLUMNS = ("step", "tokens", "loss_final")
VALIDATION = "validation_loss_step_"


@dataclass(frozen=True)
class Curve:
    """The log of a run. An unfinished run has the steps that were recorded so far."""

    run: Training
    logs: pl.DataFrame
    finished: bool


def read_curves(config: Config, layout: Layout) -> tuple[list[Curve], dict[str, str]]:
    """The logs that exist of runs with the settings of the config.

    Returns: the curves, and by key of the run what is wrong with a log that cannot be read.
    """
    curves, problems = [], {}
    for run in trainings(config):
        files = layout.run(run.key)
        finished = files.logs.is_file()
        facts = files.summary if finished else files.work.fingerprint
        if not (finished or facts.is_file()):
            continue
        try:
            if expected.differing(expected.for_training(config, run), read_json_object(facts)):
                continue
            if finished:
                logs = read_parquet(files.logs, LOG_COLUMNS)
            else:
                logs = _read_metrics(files.work.metrics)
        except ValueError as error:
            problems[run.key] = str(error)
            continue
        if logs.height > 1:
            logs = logs.sort("step").with_columns(pl.col("tokens").fill_null(0))
            curves.append(Curve(run, logs, finished))
    return curves, problems


def validation_column(logs: pl.DataFrame) -> str | None:
    """The column of the last inner step's validation loss; None where nothing was validated."""
    found = [name for name in logs.columns if name.startswith(VALIDATION)]
    return max(found, key=lambda name: int(name.removeprefix(VALIDATION)), default=None)


def _read_metrics(folder: Path) -> pl.DataFrame:
    """The steps that were recorded so far, a row each."""
    rows = [read_json_object(path) for path in sorted(folder.glob("step_*.json"))]
    rows = [row for row in rows if "step" in row]
    table = pl.DataFrame(rows, infer_schema_length=None)
    absent = {name: pl.lit(None, pl.Float64) for name in LOG_COLUMNS if name not in table.columns}
    return table.with_columns(**absent)
