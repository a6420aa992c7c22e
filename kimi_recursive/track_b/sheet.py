"""The sheet of experiments: a row for each, checked before anything runs.

A run trains one student: one set of hyperparameters and one seed. Its key names both, so two
experiments that need the same student share it.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kimi_recursive.schema import schema_errors, schema_of
from kimi_recursive.text import unknown_key_message

MINILM_DIM = 384
SCALED_KEYS = ("steps", "warmup", "save_every", "eval_every")
QUICK = {"steps": 10, "warmup": 2, "save_every": 5, "eval_every": 5}
NEUTRAL = ("save_every",)  # settings that change no number
_CASTS = {"integer": int, "number": float, "string": str}


@dataclass(frozen=True)
class SheetRow:
    """A row of the sheet.

    Attributes:
        settings: Hyperparameters by column, without the name and the seeds.
    """

    name: str
    seeds: tuple[int, ...]
    settings: dict[str, Any]

    @property
    def run_id(self) -> str:
        """Names the experiment, without the time at which it began."""
        s = self.settings
        seeds = ",".join(map(str, self.seeds))
        return (
            f"trackB_v1_{self.name}_s{s['steps']}_seeds{seeds}_tau{s['tau']:g}_m{s['neg_m']}"
            f"_q{s['queue_size']}"
        )

    @property
    def keys(self) -> dict[int, str]:
        """The key of each seed's run."""
        return {seed: student_key(self.settings, seed) for seed in self.seeds}


def student_key(settings: Mapping[str, Any], seed: int) -> str:
    """Name of a run, from what it computes."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{settings['objective']}_{settings['steps']}_tau{settings['tau']:g}_{digest}_s{seed}"


def is_quick(settings: Mapping[str, Any]) -> bool:
    """Whether these are the few steps of `track_b.quick`, which show only that a run works."""
    return all(settings[key] == value for key, value in QUICK.items())


def runs_of(experiments: list[SheetRow]) -> dict[str, tuple[dict[str, Any], int]]:
    """Settings and seed of every run, by key."""
    return {key: (e.settings, seed) for e in experiments for seed, key in e.keys.items()}


def neighbour_settings(experiments: list[SheetRow]) -> list[dict[str, Any]]:
    """The settings that finding neighbours needs, each combination once."""
    keys = ("dim", "k", "false_neg_mode", "threshold")
    found = [{key: e.settings[key] for key in keys} for e in experiments]
    return [one for i, one in enumerate(found) if one not in found[:i]]


def select_experiments(track_b: Mapping[str, Any]) -> list[SheetRow]:
    """The experiments of the config, at its scale.

    Args:
        track_b: The `track_b` subtree of the workflow config.

    Raises:
        ValueError: one line for each error in the sheet, or in the config's choice of rows.
    """
    if not track_b["enabled"]:
        return []
    found = {e.name: e for e in read_sheet(track_b["sheet"])}
    wanted = list(found) if track_b["experiments"] == "all" else track_b["experiments"]
    if unknown := [name for name in wanted if name not in found]:
        where = "track_b.experiments"
        raise ValueError("\n".join(unknown_key_message(name, found, where) for name in unknown))
    dim = {} if track_b["dim"] is None else {"dim": track_b["dim"]}
    chosen = [
        SheetRow(e.name, e.seeds, _scaled({**e.settings, **dim}, track_b))
        for e in (found[name] for name in wanted)
    ]
    if errors := list(_check_corpus(chosen, track_b)):
        raise ValueError("\n".join(errors))
    return chosen


@functools.cache
def read_schema() -> dict[str, Any]:
    """JSON Schema of a row."""
    return schema_of("kimi_recursive.track_b", "track_b.schema.yaml")


def read_sheet(path: str | Path) -> list[SheetRow]:
    """All experiments of a sheet: tab-separated, with a header; an empty cell means the default.

    Raises:
        ValueError: one line for each error, with line, column, value, and what is allowed.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file (track_b.sheet)")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 (track_b.sheet)") from error
    rows = list(csv.reader(text.splitlines(), delimiter="\t"))
    header = rows[0] if rows else []
    columns = read_schema()["properties"]
    errors = [
        unknown_key_message(name, columns, f"{path}: column")
        for name in header
        if name not in columns
    ]
    errors += [
        f"{path}: column '{n}' appears {c} times" for n, c in Counter(header).items() if c > 1
    ]
    if "experiment" not in header:
        errors.append(f"{path}: a header with a column 'experiment' is needed")
    if errors:
        raise ValueError("\n".join(errors))
    experiments = []
    for line, cells in enumerate(rows[1:], 2):
        where = f"{path}:{line}"
        if len(cells) > len(header):
            errors.append(f"{where}: {len(cells)} cells, the header has {len(header)}")
        elif any(cells):
            values = {n: v for n, v in zip(header, cells, strict=False) if v}
            try:
                experiments.append(parse_row(values, where))
            except ValueError as error:
                errors += str(error).splitlines()
    for name, count in Counter(e.name for e in experiments).items():
        if count > 1:
            errors.append(f"{path}: experiment '{name}' appears {count} times")
    if not errors and not experiments:
        errors = [f"{path}: no experiments"]
    if errors:
        raise ValueError("\n".join(errors))
    return experiments


def parse_row(values: Mapping[str, Any], where: str) -> SheetRow:
    """An experiment from texts by column; a missing column takes the schema's default.

    Raises:
        ValueError: one line for each error.
    """
    row = {
        name: _cast(values.get(name, column.get("default")), column)
        for name, column in read_schema()["properties"].items()
        if name in values or "default" in column
    }
    errors = schema_errors(row, read_schema()) or list(_check_row(row))
    if errors:
        raise ValueError("\n".join(f"{where}: {error}" for error in errors))
    name, seeds = row.pop("experiment"), row.pop("seeds")
    return SheetRow(name, tuple(seeds), row)


def _cast(value: Any, column: Mapping[str, Any]) -> Any:
    """A text as a value of its column's type; unchanged if it is not one."""
    if not isinstance(value, str):
        return value
    try:
        if column["type"] == "array":
            return [int(item) for item in value.split(",")]
        return _CASTS[column["type"]](value)
    except ValueError:
        return value


def _check_row(row: Mapping[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name}: must be finite, got {value}"
    if row["warmup"] > row["steps"]:
        yield f"warmup: must be at most steps ({row['steps']}), got {row['warmup']}"
    if row["objective"] == "infonce" and row["queue_size"] < row["neg_m"]:
        yield f"queue_size: must be at least neg_m ({row['neg_m']}), got {row['queue_size']}"
    if row["objective"] == "infonce" and row["num_positives"] != 1:
        yield f"num_positives: infonce takes 1, got {row['num_positives']}"
    if row["num_positives"] > row["k"]:
        yield f"num_positives: must be at most k ({row['k']}), got {row['num_positives']}"
    if row["student"] == "mlp" and not row["hidden"]:
        yield "hidden: an mlp needs at least 1"
    if row["student"] == "mlp" and row["init"] == "svd":
        yield "init: svd needs student residual"


def check_against_teacher(
    settings: Mapping[str, Any], teacher_dim: float, num_train: float
) -> None:
    """Raises ValueError if a student does not fit its teacher."""
    if settings["dim"] > teacher_dim:
        raise ValueError(
            f"dim: must be at most the teacher's ({teacher_dim}), got {settings['dim']}"
        )
    if settings["k"] >= num_train:
        raise ValueError(
            f"k: must be below the number of training sentences ({num_train}), got {settings['k']}"
        )


def _check_corpus(experiments: list[SheetRow], track_b: Mapping[str, Any]) -> Iterator[str]:
    """Errors that would otherwise appear only after the teacher has encoded."""
    teacher = track_b["teacher"]
    if teacher["kind"] == "vectors" and not Path(teacher["path"]).is_file():
        yield f"track_b.teacher.path: {teacher['path']}: no such file"
        return
    num_vectors, dim = _known_shape(teacher)
    wanted = track_b["num_sentences"]
    if num_vectors is not None and wanted is not None and wanted > num_vectors:
        yield (
            f"track_b.num_sentences: {wanted} are wanted, and {teacher['path']} has {num_vectors} "
            "rows; null takes all"
        )
        return
    longer = [e.name for e in experiments if e.settings["dim"] > dim]
    if longer and teacher["kind"] == "vectors":
        most = max(e.settings["dim"] for e in experiments)
        yield (
            f"{track_b['sheet']}: dim is up to {most} in {', '.join(longer)}, and the vectors of "
            f"{teacher['path']} have {dim} numbers; set track_b.dim to less than {dim}"
        )
        return
    total = wanted or num_vectors
    queries = track_b["num_validation_queries"] + track_b["num_test_queries"]
    num_train = math.inf if total is None else total - queries
    extra = track_b["num_extra_sentences"]
    extra = math.inf if extra is None else extra
    if num_train < 2:
        yield f"track_b.num_sentences: must exceed the {queries} queries by 2 or more, got {total}"
        return
    for experiment in experiments:
        try:
            check_against_teacher(experiment.settings, dim, num_train + extra)
        except ValueError as error:
            yield f"{track_b['sheet']}: {experiment.name}: {error}"


def _known_shape(teacher: Mapping[str, Any]) -> tuple[int | None, float]:
    """Number and length of the teacher's vectors, if known without loading the teacher."""
    if teacher["kind"] == "minilm":
        return None, MINILM_DIM
    path = str(teacher["path"])
    if teacher["kind"] == "vectors" and path.endswith(".npy"):
        try:
            shape = np.load(path, mmap_mode="r").shape
        except (OSError, ValueError):  # import_vectors says what is wrong
            return None, math.inf
        if len(shape) == 2:
            return int(shape[0]), int(shape[1])
    return None, math.inf


def _scaled(settings: Mapping[str, Any], track_b: Mapping[str, Any]) -> dict[str, Any]:
    if track_b["quick"]:
        return {**settings, **QUICK}
    scale = track_b["scale"]
    scaled = {key: max(1, round(settings[key] * scale)) for key in SCALED_KEYS if settings[key]}
    return {**settings, **scaled}
