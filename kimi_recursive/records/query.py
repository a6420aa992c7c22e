"""Queries of a log: runs that match, the best run, runs grouped by a field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import polars as pl

from kimi_recursive.records.kinds import find, number
from kimi_recursive.records.log import kind_of_log, read_lines
from kimi_recursive.records.table import Table, read_table
from kimi_recursive.status import Status
from kimi_recursive.text import did_you_mean

# Shown by default: the first of these that has a value.
DEFAULT_METRICS = {
    "training_log": ("best_val_accuracy", "best_val_loss"),
    "baselines": ("accuracy", "perplexity"),
}
STATUSES = tuple(s.in_experiment for s in (Status.OK, Status.RUNNING, Status.FAILED))
MOST_VALUES = 1000  # of a field, among which a similar one is looked for
LOWER_IS_BETTER = ("loss", "perplexity", "delta", "error", "seconds")


@dataclass(frozen=True)
class Filter:
    """What a record must match; None matches all.

    Attributes:
        domain: For a baseline, its experiment.
        where: Texts by dotted or short field; a number or a flag is written as in JSON (`true`).
        metric: A number that the record must have.
        above, below: Bounds of the metric, exclusive.
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
    """The records that match, in the order of the log. A value that no record has is among the
    problems of the table.

    Args:
        texts, numbers: More fields to read.

    Raises:
        ValueError: the file is not a log, or a field is unknown.
    """
    where = dict(wanted.where or {})
    numbers = [*([wanted.metric] if wanted.metric else []), *numbers]
    table = read_table(path, numbers, [*where, *texts])
    usual = {"domain": wanted.domain, "status": wanted.status, "type": wanted.type}
    asked = {name: value for name, value in {**usual, **where}.items() if value is not None}
    tests = [_is(name, value) for name, value in asked.items()]
    if wanted.metric:
        tests.append(pl.col(wanted.metric).is_not_null())
        tests += [pl.col(wanted.metric) > wanted.above] if wanted.above is not None else []
        tests += [pl.col(wanted.metric) < wanted.below] if wanted.below is not None else []
    unknown = [x for name, value in asked.items() for x in _unknown(table.rows, name, value)]
    return Table(table.rows.filter(*tests), (*table.problems, *unknown))


def _unknown(rows: pl.DataFrame, name: str, value: str) -> list[str]:
    """What to say where no record at all has this value: as a rule it is misspelt."""
    if (name == "status" and value in STATUSES) or rows.filter(_is(name, value)).height:
        return []
    there = rows[name].drop_nulls().unique().cast(pl.String).sort().head(MOST_VALUES)
    hint = did_you_mean(value, there, "there are") if len(there) else "no record has any"
    return [f"no record has the {name} '{value}'; {hint}"]


def _is(name: str, value: str) -> pl.Expr:
    """Whether a text column equals a value, as a text or as a number: 1e-4 equals 0.0001."""
    same = pl.col(name) == value
    try:
        return same | (pl.col(name).cast(pl.Float64, strict=False) == float(value))
    except ValueError:
        return same


def default_metric(path: str | Path) -> str:
    """The first default metric of the log's kind that one of the first 1,000 records has."""
    records = [line.record for line in islice(read_lines(path), 1000) if line.record]
    names = DEFAULT_METRICS[kind_of_log(path).name]
    has = (name for name in names if any(number(find(r, name)) is not None for r in records))
    return next(has, names[0])


def is_lower_better(metric: str) -> bool:
    """Whether a lower value is better, by the field's name: so for losses and the like."""
    return any(word in metric.rsplit(".", 1)[-1] for word in LOWER_IS_BETTER)


def best(path: str | Path, wanted: Filter, lowest: bool) -> Table:
    """The matching runs that did not fail, the best by `wanted.metric` first."""
    table = select(path, wanted)
    assert wanted.metric is not None
    ended = table.rows.filter(pl.col("status").fill_null("") != "failed")
    rows = ended.sort(wanted.metric, descending=not lowest, maintain_order=True)
    return Table(rows, table.problems)


def compare(path: str | Path, by: str, metrics: Sequence[str], wanted: Filter = Filter()) -> Table:
    """Statistics of each metric over the runs grouped by a field.

    Returns: a row for each value of the field (`none` for records without it) and metric. Columns:
        the field, metric, num_runs, and of the runs that have the metric mean, std (of a sample),
        best, and best run.
    """
    parts, problems = [], []
    for metric in metrics:
        found = select(path, wanted, [by], [metric])
        rows, problems = found.rows, [*problems, *found.problems]
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
    return Table(pl.concat(parts).sort(by, "metric"), tuple(dict.fromkeys(problems)))
