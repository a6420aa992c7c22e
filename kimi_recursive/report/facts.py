"""The settings and versions that every run was made with: those that all share, and the others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_recursive.files import read_json_object
from kimi_recursive.layout import Layout
from kimi_recursive.matrix.runs import all_trainings
from kimi_recursive.matrix.settings import Config
from kimi_recursive.report.summary import Matrix
from kimi_recursive.tables import NAME, Column, Table
from kimi_recursive.track_b.summary import Result

Facts = dict[str, str]
RESULT_FACTS = ("split", "inner_steps", "dtype", "config", "evaluation", "upstream", "created")
TRAINING_FACTS = ("arm", "phase", "seed", "num_steps", "best_step", "settings", "config")
STUDENT_FACTS = ("seed", "hyperparameters", "started_at", "ended_at")
BASE_FACTS = ("training_params", "git_commit", "host", "platform", "started_at", "ended_at")


@dataclass(frozen=True)
class Shared:
    """Two tables of the records of one kind: values that all of them share, and values that
    differ."""

    title: str
    shared: Table
    differing: Table | None


def read_facts(
    config: Config, layout: Layout, matrix: Matrix, students: Sequence[Result]
) -> dict[str, dict[str, dict[str, Any]]]:
    """The record of every run that has one, by kind and name; a damaged record is left out."""
    records = {
        "The base": {"base": (layout.base.work.metadata, BASE_FACTS)},
        "Trainings": {
            key: (layout.run(key).summary, TRAINING_FACTS) for key in all_trainings(config)
        },
        "Evaluations": {
            row["name"]: (layout.evaluation(row["name"]).results, RESULT_FACTS)
            for row in matrix.done
        },
    }
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, files in records.items():
        for name, (path, keys) in files.items():
            if record := _read(path):
                known = {key: record[key] for key in (*keys, "versions") if key in record}
                found.setdefault(kind, {})[name] = known
    for result in students:
        for seed, run in result.runs.items():
            assert result.experiment is not None
            known = {k: run.summary[k] for k in (*STUDENT_FACTS, "versions") if k in run.summary}
            if known:
                found.setdefault("Students", {})[result.experiment.keys[seed]] = known
    return found


def compare_facts(kind: str, records: Mapping[str, Mapping[str, Any]]) -> Shared:
    """The settings of one kind of runs, without versions."""
    flat = {
        name: dict(_flatten({k: v for k, v in record.items() if k != "versions"}))
        for name, record in records.items()
    }
    return _split(kind, flat)


def compare_versions(records: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Shared:
    """The versions that runs of every kind were made with."""
    flat = {
        name: {key: value for key, value in record.get("versions", {}).items() if value}
        for runs in records.values()
        for name, record in runs.items()
    }
    return _split("Versions", flat, recorded=True)


def _split(title: str, records: Mapping[str, Facts], recorded: bool = False) -> Shared:
    """Args:
    recorded: A record that lacks a key counts as equal to the others.
    """
    keys = list(dict.fromkeys(key for facts in records.values() for key in facts))
    values = {
        key: {facts.get(key) for facts in records.values() if not recorded or key in facts}
        for key in keys
    }
    shared = [[key, next(iter(values[key]))] for key in keys if len(values[key]) == 1]
    differ = [key for key in keys if len(values[key]) > 1]
    table = None
    if differ:
        rows = [[name, *(facts.get(k) for k in differ)] for name, facts in records.items()]
        columns = [Column("run", NAME), *map(Column, differ)]
        table = Table(f"{title}: what differs between them", columns, rows)
    number = f"all {len(records)} runs" + (" that record them" if recorded else "")
    caption = f"{title}: the same for {number}" if len(records) > 1 else title
    columns = [Column("setting", NAME), Column("value")]
    return Shared(title, Table(caption, columns, shared), table)


def _flatten(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Values by dotted key."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{where}.{key}" if where else str(key))
    else:
        yield where, value if isinstance(value, str) else json.dumps(value)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(path)
    except ValueError:
        return None
