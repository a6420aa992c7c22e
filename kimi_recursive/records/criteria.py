"""Success criteria by experiment type, which the user writes in YAML, applied to runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from kimi_recursive.files import read_yaml_mapping
from kimi_recursive.records.kinds import find, get, identity, kind_of, number, parse_time
from kimi_recursive.text import shown

CRITERIA_PATH = Path("config/criteria.yaml")
# Each criterion has one of these.
TESTS = ("above", "below", "equals", "above_best_of", "below_best_of", "decreasing")
PASSED, FAILED, NOT_MEASURED = "passed", "failed", "not measured"


@dataclass(frozen=True)
class Check:
    """A criterion applied to a run. The result is `passed`, `failed` or `not measured`."""

    run_id: str
    type: str
    criterion: str
    value: Any
    wanted: str
    result: str


def read_criteria(path: str | Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Criteria by experiment type and name.

    Raises:
        ValueError: the file is not a YAML mapping, or a criterion is not valid.
    """
    found = read_yaml_mapping(path)
    for type_, criteria in found.items():
        for name, criterion in criteria.items() if isinstance(criteria, dict) else [("", None)]:
            if problem := _problem(criterion):
                raise ValueError(f"{path}: {type_}.{name}: {problem}")
    return found


def _problem(criterion: Any) -> str:
    if not isinstance(criterion, dict) or not isinstance(criterion.get("field"), str):
        return "must have a 'field'"
    tests = [key for key in criterion if key in TESTS]
    allowed = ("field", "same", "where_at_least", *TESTS)
    if unknown := sorted(set(criterion) - set(allowed)):
        return f"unknown key '{unknown[0]}'; allowed: {', '.join(allowed)}"
    if len(tests) != 1:
        return f"must have one of {', '.join(TESTS)}"
    least = criterion.get("where_at_least", {})
    if not isinstance(least, dict) or None in map(number, least.values()):
        return f"where_at_least must map fields to numbers, got {shown(least)}"
    value = criterion[tests[0]]
    if tests[0] in ("above", "below") and number(value) is None:
        return f"{tests[0]} must be a number, got {shown(value)}"
    if tests[0].endswith("best_of") and not isinstance(value, dict):
        return f"{tests[0]} must map fields to values, got {shown(value)}"
    if tests[0] == "decreasing" and value is not True:
        return f"decreasing must be true, got {shown(value)}"
    return ""


def check_records(
    records: Sequence[Mapping[str, Any]],
    criteria: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> list[Check]:
    """Check every run that has ended against the criteria of its type; a failed run fails. With
    `where_at_least` a criterion is asked only of runs whose fields have at least these numbers.

    `above_best_of` and `below_best_of` compare with the best value of earlier, completed runs. Only
    runs count that have the given values, and that equal this run in the fields under `same`. A run
    without the given values, and with none before it, is compared with the first after it: jobs
    that run side by side may end before their baseline does.
    """
    checks = []
    for record in records:
        kind = kind_of(record)
        type_, status = get(record, kind.type), get(record, kind.status)
        if type_ not in criteria or status == "running":
            continue
        name = identity(record) or "unnamed"
        if status == "failed":
            error = find(record, "error_message")
            checks.append(Check(name, type_, "status", error, "completed", FAILED))
            continue
        for criterion, settings in criteria[type_].items():
            if _is_asked(record, settings):
                checks.append(Check(name, type_, criterion, *_apply(record, settings, records)))
    return checks


def _is_asked(record: Mapping[str, Any], criterion: Mapping[str, Any]) -> bool:
    least = criterion.get("where_at_least", {})
    found = {field: number(find(record, field)) for field in least}
    return all(value is not None and value >= least[field] for field, value in found.items())


def _apply(
    record: Mapping[str, Any], criterion: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> tuple[Any, str, str]:
    """The value, what is wanted, and the result of one criterion."""
    field = criterion["field"]
    test = next(key for key in TESTS if key in criterion)
    limit = criterion[test]
    if test == "equals":
        value = find(record, field)
        result = NOT_MEASURED if value is None else PASSED if value == limit else FAILED
        return value, f"equals {limit}", result
    if test == "decreasing":
        history = find(record, "metrics_history") or []
        values = [v for row in history if (v := number(get(row, field))) is not None]
        falls = all(b <= a for a, b in pairwise(values))
        result = NOT_MEASURED if len(values) < 2 else PASSED if falls else FAILED
        return values[-1] if values else None, "never rises", result
    value, wanted = number(find(record, field)), f"{test.split('_')[0]} {limit}"
    if test.endswith("best_of"):
        others = _references(record, limit, criterion.get("same") or (), records)
        found = [v for other in others if (v := number(find(other, field))) is not None]
        limit = (max if test == "above_best_of" else min)(found, default=None)
        of = ", ".join(f"{k} = {v}" for k, v in criterion[test].items()) or "earlier runs"
        best = "none" if limit is None else f"{limit:.6g}"
        wanted = f"{test.split('_')[0]} {best}, the best of {of}"
    if value is None or limit is None:
        return value, wanted, NOT_MEASURED
    passed = value > limit if test.startswith("above") else value < limit
    return value, wanted, PASSED if passed else FAILED


def _references(
    record: Mapping[str, Any],
    fields: Mapping[str, Any],
    same: Sequence[str],
    records: Sequence[Mapping[str, Any]],
) -> list[Mapping[str, Any]]:
    """Completed runs with these values that ended before this one; if there is none, and this run
    has other values, the first that ended after it."""

    def has(run: Mapping[str, Any]) -> bool:
        return all(find(run, key) == value for key, value in fields.items())

    if (mine := _time(record)) is None:
        return []
    found = [
        (then, other)
        for other in records
        if other is not record
        and get(other, kind_of(other).status) in ("completed", None)
        and (then := _time(other)) is not None
        and has(other)
        and all(find(other, key) == find(record, key) for key in same)
    ]
    earlier = [other for then, other in found if then <= mine]
    if earlier or not found or has(record):
        return earlier
    return [min(found, key=lambda run: run[0])[1]]


def _time(record: Mapping[str, Any]) -> datetime | None:
    try:
        return parse_time(record["timestamp"])
    except (KeyError, TypeError, ValueError):
        return None
