"""Which runs meet the success criteria of their experiment type: what `log check` says of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from kimi_recursive.layout import Layout
from kimi_recursive.records.criteria import (
    CRITERIA_PATH,
    NOT_MEASURED,
    PASSED,
    Check,
    check_records,
    read_criteria,
)
from kimi_recursive.records.kinds import get, identity
from kimi_recursive.records.runs import record_of_evaluation, record_of_experiment
from kimi_recursive.report.summary import Matrix
from kimi_recursive.tables import NAME, NUMBER, Column, Table

if TYPE_CHECKING:  # it imports torch
    from kimi_recursive.track_b.summary import Result


def success_table(matrix: Matrix, layout: Layout, students: Sequence[Result] = ()) -> Table:
    """For each criterion, how many of the runs that are done meet it; notes say which do not.

    Criteria are those of `config/criteria.yaml` where Snakemake runs. A note says what is wrong
    with that file.
    """
    notes, found = [], dict(_records(matrix, layout, students))
    criteria: dict[str, Any] = {}
    try:
        criteria = read_criteria(CRITERIA_PATH)
    except ValueError as error:
        notes.append(str(error))
    names = {identity(record): name for name, record in found.items()}
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in check_records(list(found.values()), criteria):
        groups.setdefault((check.type, check.criterion), []).append(check)
    rows = []
    for (type_, criterion), checks in groups.items():
        others = [
            f"{names[c.run_id]} ({c.result if c.result == NOT_MEASURED else _shown(c.value)})"
            for c in checks
            if c.result != PASSED
        ]
        name, num = f"{type_}: {criterion}", len(checks) - len(others)
        rows.append([name, f"{num} of {len(checks)} runs"])
        if others:
            notes.append(f"{name} ({checks[0].wanted}) is not met by {', '.join(others)}.")
    columns = [Column("criterion", NAME), Column("met by", NUMBER)]
    return Table(f"Runs that meet the criteria of {CRITERIA_PATH}", columns, rows, notes)


def _records(
    matrix: Matrix, layout: Layout, students: Sequence[Result]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and records of the runs that are done; one that is damaged is left out."""
    reading = {}
    for row in matrix.done:
        if key := row["training"]:
            reading[key] = partial(record_of_experiment, layout.run(key).work.folder)
    for row in matrix.done:
        files = layout.evaluation(row["name"])
        reading[row["name"]] = partial(record_of_evaluation, files.results)
    for result in students:
        for key in result.experiment.keys.values() if result.experiment else ():
            reading[key] = partial(record_of_experiment, layout.track_b.student(key).work.folder)
    for name, read in reading.items():
        with suppress(ValueError, KeyError, TypeError):
            record = read()
            if record and not get(record, "run_data.hyperparameters.quick"):
                yield name, record


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
