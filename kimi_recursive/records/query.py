"""Questions to a log: which runs, the best one, how they differ by a field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import polars as pl

from kimi_recursive.records.kinds import find, number
from kimi_recursive.records.log import kind_of_log, read_lines
from kimi_recursive.records.table import Table, read_table

# The first that has a value is shown where none is asked for.
DEFAULT_METRICS = {
    "training_log": ("best_val_accuracy", "best_val_loss"),
    "baselines": ("accuracy", "perplexity"),
}
LOWER_IS_BETTER = ("loss", "perplexity", "delta", "error", "seconds")


@dataclass(frozen=True)
class Filter:
    """What a record has to be; None is anything.

    Attributes:
        domain: Of a baseline: its experiment.
        where: Texts by field, dotted or short; a number or a flag as JSON has it (`true`).
        metric: Must be there; with `above` and `below`, exclusive.
    """

    domain: str | None = None
    status: str | None = None
    type: str | None = None
    where: Mapping[str, str] | None = None
    metric: str | None = None
    above: float | None = None
    below: float | None = None


def select(
    path: str | Path, wanted: Filter, texts: Sequence[str] = (), numbers: Sequence[str] = ()
) -> Table:
    """The records that a filter lets through, in the order of the log.

    Args:
        texts, numbers: Further fields to read.

    Raises:
        ValueError: no log, or an unknown field.
    """
    where = dict(wanted.where or {})
    numbers = [*([wanted.metric] if wanted.metric else []), *numbers]
    table = read_table(path, numbers, [*where, *texts])
    usual = {"domain": wanted.domain, "status": wanted.status, "type": wanted.type}
    tests = [_is(name, value) for name, value in {**usual, **where}.items() if value is not None]
    if wanted.metric:
        tests.append(pl.col(wanted.metric).is_not_null())
        tests += [pl.col(wanted.metric) > wanted.above] if wanted.above is not None else []
        tests += [pl.col(wanted.metric) < wanted.below] if wanted.below is not None else []
    return Table(table.rows.filter(*tests), table.problems)


def _is(name: str, value: str) -> pl.Expr:
    """Whether a text column holds a value; 1e-4 is 0.0001."""
    same = pl.col(name) == value
    try:
        return same | (pl.col(name).cast(pl.Float64, strict=False) == float(value))
    except ValueError:
        return same


def default_metric(path: str | Path) -> str:
    """The first of its kind's default metrics that one of the first 1,000 records has."""
    records = [line.record for line in islice(read_lines(path), 1000) if line.record]
    names = DEFAULT_METRICS[kind_of_log(path).name]
    has = (name for name in names if any(number(find(r, name)) is not None for r in records))
    return next(has, names[0])


def is_lower_better(metric: str) -> bool:
    """Of losses and their like; by the field's name."""
    return any(word in metric.rsplit(".", 1)[-1] for word in LOWER_IS_BETTER)


def best(path: str | Path, wanted: Filter, lowest: bool) -> Table:
    """The records of runs that did not fail, the best by `wanted.metric` first."""
    table = select(path, wanted)
    assert wanted.metric is not None
    ended = table.rows.filter(pl.col("status").fill_null("") != "failed")
    rows = ended.sort(wanted.metric, descending=not lowest, maintain_order=True)
    return Table(rows, table.problems)


def compare(
    path: str | Path, by: str, metrics: Sequence[str], wanted: Filter = Filter()
) -> pl.DataFrame:
    """Runs grouped by a field, for each metric.

    Returns: a row for each value of the field (`none` where a record lacks it) and metric: the
        field, metric, num_runs, and over the runs that have the metric mean, std (of a sample),
        best, and the run of the best.
    """
    parts = []
    for metric in metrics:
        rows = select(path, wanted, [by], [metric]).rows
        pick = pl.col(metric).arg_min() if is_lower_better(metric) else pl.col(metric).arg_max()
        parts.append(
            rows.group_by(pl.col(by).fill_null("none")).agg(
                pl.lit(metric).first().alias("metric"),
                pl.len().alias("num_runs"),
                pl.mean(metric).alias("mean"),
                pl.std(metric).alias("std"),
                pl.col(metric).get(pick).alias("best"),
                pl.col("run_id").get(pick).alias("best run"),
            )
        )
    return pl.concat(parts).sort(by, "metric")
