"""The two kinds of record, their schemas, and how a record is checked.

A line of `training_log.jsonl` is a training run, a line of `baselines.jsonl` an evaluation. The
JSON Schemas in `schemas/` are the reference for every field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jsonschema_rs

from kimi_recursive.text import shown

SCHEMAS = Path(__file__).parent / "schemas"


@dataclass(frozen=True)
class Kind:
    """A kind of record.

    Attributes:
        name: Stem of the schema's file and, by convention, of the log.
        parts: Prefixes that complete a short field name, in the order of the search.
        run_id, domain, status, type: Dotted names of these fields. The domain of a baseline is its
            experiment.
        times: Fields that hold a time.
    """

    name: str
    parts: tuple[str, ...]
    run_id: str
    domain: str
    status: str
    type: str
    times: tuple[str, ...]

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema."""
        return json.loads((SCHEMAS / f"{self.name}.schema.json").read_text(encoding="utf-8"))

    @cached_property
    def fields(self) -> dict[str, bool]:
        """Dotted names of the schema's fields; True for a number."""
        return dict(_fields(self.schema, ""))

    @cached_property
    def validator(self) -> Any:
        """A validator of the schema."""
        return jsonschema_rs.validator_for(self.schema)


TRAINING_LOG = Kind(
    "training_log",
    ("run_data.", "run_data.final_metrics.", "run_data.hyperparameters.", ""),
    *(f"run_data.{name}" for name in ("run_id", "domain", "status", "experiment_type")),
    times=("timestamp", "run_data.start_time", "run_data.end_time"),
)
BASELINES = Kind(
    "baselines",
    ("", "metrics.", "config."),
    "run_id",
    "experiment",
    "status",
    "config.experiment_type",
    times=("timestamp",),
)
KINDS = {kind.name: kind for kind in (TRAINING_LOG, BASELINES)}


def kind_of(record: Mapping[str, Any]) -> Kind:
    """The kind of a record: with `run_data` a training run, else a baseline."""
    return TRAINING_LOG if "run_data" in record else BASELINES


def get(record: Any, field: str) -> Any:
    """The value of a dotted field; None if the field or one of its parents is missing."""
    for part in field.split("."):
        if not isinstance(record, dict):
            return None
        record = record.get(part)
    return record


def find(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field by its short or dotted name: the first that is not null."""
    found = (get(record, part + name) for part in kind_of(record).parts)
    return next((value for value in found if value is not None), None)


def number(value: Any) -> float | None:
    """The value as a float if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def parse_time(text: str) -> datetime:
    """An ISO 8601 time in UTC; a time without a zone is UTC.

    Raises:
        ValueError: the text is not a time.
    """
    time = datetime.fromisoformat(text)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def identity(record: Mapping[str, Any]) -> str | None:
    """Names the run of a record: the run id, or for a baseline without one its experiment, commit
    and time."""
    kind = kind_of(record)
    run_id = get(record, kind.run_id)
    if run_id is None and kind is BASELINES:
        parts = [record.get(key) for key in ("experiment", "commit", "timestamp")]
        return None if None in (parts[0], parts[2]) else " ".join(map(str, parts))
    return None if run_id is None else str(run_id)


def run_state(record: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Identity of a record's run, and whether the record says that it is still running."""
    return identity(record), get(record, kind_of(record).status) == "running"


def checked(
    record: Mapping[str, Any], kind: Kind | None = None
) -> tuple[dict[str, Any], list[str]]:
    """A record as a log holds it (see `normalize`), and what is wrong with it, a line each.

    Args:
        kind: What the record has to be; by default its own kind.
    """
    try:
        clean = normalize(record)
        json.dumps(clean)
        return clean, problems(clean, kind or kind_of(clean))
    except (TypeError, ValueError) as error:
        return dict(record), [str(error)]


def problems(record: Mapping[str, Any], kind: Kind) -> list[str]:
    """A line for each thing that the schema does not allow in a record; empty if it is valid."""
    if kind_of(record) is not kind:
        return [f"a record of {kind_of(record).name} in a log of {kind.name}"]
    if not kind.validator.is_valid(record):
        return [_explain(error) for error in kind.validator.iter_errors(record)]
    found = []
    for field in kind.times:
        value = get(record, field)
        try:
            if value is not None:
                datetime.fromisoformat(value)
        except ValueError as error:
            found.append(f"{field}: {error}, got {shown(value)}")
    return found


def normalize(record: Mapping[str, Any]) -> dict[str, Any]:
    """A copy as a log holds it: without NaN (see `without_nan`) and with times in UTC.

    Raises:
        ValueError: a field is not a time.
    """
    clean = without_nan(record)
    for field in kind_of(clean).times:
        *path, leaf = field.split(".")
        owner = get(clean, ".".join(path)) if path else clean
        if isinstance(owner, dict) and isinstance(owner.get(leaf), str):
            try:
                owner[leaf] = parse_time(owner[leaf]).isoformat()
            except ValueError as error:
                raise ValueError(f"{field}: {error}, got {shown(owner[leaf])}") from None
    return clean


def complete(record: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with every field of the schema, null where it was missing, so that whoever reads a log
    can name any of them. Mappings are there even if all their fields are null."""
    return _complete(record, kind_of(record).schema)


def _complete(value: Mapping[str, Any] | None, schema: Mapping[str, Any]) -> dict[str, Any]:
    full = dict(value or {})
    for name, child in schema["properties"].items():
        found = full.get(name)
        inner = "properties" in child and isinstance(found, Mapping | None)
        full[name] = _complete(found, child) if inner else found
    return full


def without_nan(record: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with null for NaN and infinity; the field `non_finite` lists their dotted names."""
    bad: list[str] = []
    clean = _finite(dict(record), "", bad)
    if bad:
        clean["non_finite"] = sorted({*(clean.get("non_finite") or ()), *bad})
    return clean


def _finite(value: Any, where: str, bad: list[str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        bad.append(where)
        return None
    if isinstance(value, dict):
        dot = f"{where}." if where else ""
        return {key: _finite(item, f"{dot}{key}", bad) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{where}.{i}", bad) for i, item in enumerate(value)]
    return value


def _explain(error: Any) -> str:
    where = ".".join(map(str, error.instance_path))
    if error.kind.name == "required":
        field = f"{where}.{error.kind.property}" if where else error.kind.property
        return f"{field}: is missing"
    if error.kind.name in ("pattern", "anyOf"):
        found = shown(error.instance)
        return f"{where}: must be an ISO 8601 time (2025-10-21T00:00:00Z), got {found}"
    message = error.message
    if len(message) > 160:
        message = f"{message[:60]} ... {message[-90:]}"
    return f"{where or 'the record'}: {message}"


def _fields(schema: Mapping[str, Any], where: str) -> Iterator[tuple[str, bool]]:
    for name, child in schema.get("properties", {}).items():
        field = f"{where}{name}"
        yield field, child.get("$ref", "").endswith(("/number", "/integer"))
        yield from _fields(child, f"{field}.")
