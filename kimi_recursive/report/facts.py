"""With which settings and versions every run was made: what all share, and what differs."""

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
from kimi_recursive.report.tables import NAME, NOTHING, TEXT, Table
from kimi_recursive.track_b.summary import Result

Facts = dict[str, str]
RESULT_FACTS = ("split", "inner_steps", "dtype", "config", "evaluation", "upstream", "created")
TRAINING_FACTS = ("arm", "phase", "seed", "num_steps", "best_step", "settings", "config")
STUDENT_FACTS = ("seed", "hyperparameters", "started_at", "ended_at")
BASE_FACTS = ("training_params", "git_commit", "host", "platform", "started_at", "ended_at")


@dataclass(frozen=True)
class Shared:
    """Records of one kind: a table of what all of them share, and one of what differs."""

    title: str
    shared: Table
    differing: Table | None


def read_facts(
    config: Config, layout: Layout, matrix: Matrix, students: Sequence[Result]
) -> dict[str, dict[str, dict[str, Any]]]:
    """The record of every run that is there, by kind and name; what is damaged is left out."""
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
            known = {k: run.summary[k] for k in (*STUDENT_FACTS, "versions") if k in run.summary}
            if known:
                found.setdefault("Students", {})[result.experiment.keys[seed]] = known
    return found


def compare_facts(kind: str, records: Mapping[str, Mapping[str, Any]]) -> Shared:
    """Settings of one kind of runs, without their versions."""
    flat = {
        name: dict(_flatten({k: v for k, v in record.items() if k != "versions"}))
        for name, record in records.items()
    }
    return _split(kind, flat)


def compare_versions(records: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Shared:
    """Versions of every run of every kind."""
    flat = {
        name: {key: value for key, value in record.get("versions", {}).items() if value}
        for runs in records.values()
        for name, record in runs.items()
    }
    return _split("Versions", flat, recorded=True)


def _split(title: str, records: Mapping[str, Facts], recorded: bool = False) -> Shared:
    """Args: with `recorded`, a record that lacks a key does not differ by that."""
    keys = list(dict.fromkeys(key for facts in records.values() for key in facts))
    values = {
        key: {facts.get(key, NOTHING) for facts in records.values() if not recorded or key in facts}
        for key in keys
    }
    shared = [[key, next(iter(values[key]))] for key in keys if len(values[key]) == 1]
    differ = [key for key in keys if len(values[key]) > 1]
    table = None
    if differ:
        rows = [[name, *(facts.get(k, NOTHING) for k in differ)] for name, facts in records.items()]
        columns = [("run", NAME), *((key, TEXT) for key in differ)]
        table = Table(f"{title}: what differs between them", columns, rows)
    number = f"all {len(records)} runs" + (" that record them" if recorded else "")
    caption = f"{title}: the same for {number}" if len(records) > 1 else title
    return Shared(title, Table(caption, [("setting", NAME), ("value", TEXT)], shared), table)


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
