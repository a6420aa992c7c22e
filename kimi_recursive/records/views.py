"""What people read of a log: a report in markdown, a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl

from kimi_recursive.files import replacing
from kimi_recursive.records import table
from kimi_recursive.records.kinds import TRAINING_LOG, Kind, find, get, number, parse_time
from kimi_recursive.records.query import Filter, is_lower_better, select
from kimi_recursive.tables import Column, Table
from kimi_recursive.text import cut

# Always shown; then the columns that are shown if a run of the domain has a value.
GUIDE_COLUMNS = {
    "Accuracy": ("best_val_accuracy", "accuracy"),
    "Balance": ("class_balance_delta", "balance_delta"),
    "Cycle Loss": ("cycle_loss",),
}
OUR_COLUMNS = {
    "Validation Loss": ("best_val_loss",),
    "Perplexity": ("perplexity",),
    "Recall@10": ("best_vs_teacher_recall@10",),
}


def times() -> pl.Expr:
    """The column `timestamp` in UTC; null if it is not a time."""

    def utc(text: str) -> datetime | None:
        try:
            return parse_time(text).replace(tzinfo=None)
        except ValueError:
            return None

    return pl.col("timestamp").map_elements(utc, return_dtype=pl.Datetime)


def report_text(records: Sequence[Mapping[str, Any]], kind: Kind) -> str:
    """A markdown report with a table for each domain; `N/A` if a run has no such number."""
    lines = ["# Experiment Report", "", f"Total Experiments: {len(records)}", ""]
    domains: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        domains.setdefault(str(get(record, kind.domain) or "unknown"), []).append(record)
    for domain, members in domains.items():
        heading = f"{domain.replace('_', ' ').title()} Domain" if kind is TRAINING_LOG else domain
        ours = {
            title: names
            for title, names in OUR_COLUMNS.items()
            if any(_metric(record, names) is not None for record in members)
        }
        columns = {**GUIDE_COLUMNS, **ours}
        rows = []
        for record in members:
            values = [_metric(record, names) for names in columns.values()]
            cells = ["N/A" if value is None else f"{value:.3f}" for value in values]
            status = get(record, kind.status) or "N/A"
            name = get(record, kind.run_id) or get(record, kind.domain) or "N/A"
            rows.append([name, status, *cells, _notes(record)])
        headings = [Column(title) for title in ("Run ID", "Status", *columns, "Notes")]
        lines += [f"## {heading}", "", Table("", headings, rows).to_markdown(), ""]
    return "\n".join(lines)


def _metric(record: Mapping[str, Any], names: Sequence[str]) -> float | None:
    values = (number(find(record, name)) for name in names)
    return next((value for value in values if value is not None), None)


def _notes(record: Mapping[str, Any]) -> str:
    text = find(record, "findings") or find(record, "notes") or find(record, "error_message") or ""
    return cut(" ".join(str(text).split()), 53)


def plot_progress(path: str | Path, metric: str, wanted: Filter, output: Path) -> table.Table:
    """Plot a metric over time: a line for each experiment type, and dashed the best so far.

    Returns: the runs in the figure.

    Raises:
        ValueError: the file is not a log, the field is unknown, or no run has a number and a time.
    """
    found = select(path, replace(wanted, metric=metric))
    rows = found.rows
    rows = rows.with_columns(time=times()).drop_nulls("time").sort("time", maintain_order=True)
    if rows.is_empty():
        why = "; ".join(found.problems) or f"no record has both a number in '{metric}' and a time"
        raise ValueError(f"{path}: {why}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.dates import ConciseDateFormatter

    from kimi_recursive.drawing import COLOURS, MARKERS

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for index, (key, group) in enumerate(rows.group_by("type", maintain_order=True)):
        look: dict[str, Any] = {"color": COLOURS[1:][index % 5], "marker": MARKERS[1:][index % 5]}
        label = str(key[0] or "no type").replace("_", " ")
        axes.plot(group["time"], group[metric], **look, linewidth=1, label=label)
    lowest = is_lower_better(metric)
    best = rows[metric].cum_min() if lowest else rows[metric].cum_max()
    look = {"color": COLOURS[0], "linestyle": "--", "linewidth": 1, "zorder": 1}
    axes.step(rows["time"], best, where="post", **look, label="best so far")
    axes.set_xlabel("end of the run (UTC)")
    axes.set_ylabel(f"{metric} ({'lower' if lowest else 'higher'} is better)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(axes.xaxis.get_major_locator()))
    with replacing(output) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
    return table.Table(rows, found.problems)
