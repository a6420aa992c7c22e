"""Logs of another format (`migrate`) and of other machines (`merge`)."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kimi_recursive.files import read_yaml_mapping, replacing
from kimi_recursive.records.kinds import (
    KINDS,
    Kind,
    checked,
    complete,
    get,
    kind_of,
    run_state,
)
from kimi_recursive.records.log import append_records, kind_of_log, read_lines, read_records
from kimi_recursive.text import shown, unknown_key_message


@dataclass(frozen=True)
class FieldMapping:
    """How to convert records of another format.

    Attributes:
        kind: Kind of the new records.
        fields: The old field of each new one, both dotted.
        defaults: Values for new fields that the old record lacks; a time may be `now`.
        keep: New field that holds everything that is not mapped; None drops it.
    """

    kind: Kind
    fields: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keep: str | None = None


def read_mapping(path: str | Path) -> FieldMapping:
    """Read a mapping from YAML.

    Raises:
        ValueError: the file cannot be read, is not YAML, has an unknown key, or lacks `fields`.
    """
    found = read_yaml_mapping(path)
    allowed = ("kind", "fields", "defaults", "keep")
    if not isinstance(found.get("fields"), dict):
        raise ValueError(f"{path}: must have 'fields', a mapping of new fields to old ones")
    for key in found:
        if key not in allowed:
            raise ValueError(unknown_key_message(key, allowed, str(path)))
    kind = found.get("kind", "training_log")
    if kind not in KINDS:
        raise ValueError(f"{path}: kind: must be one of {', '.join(KINDS)}, got {shown(kind)}")
    return FieldMapping(
        KINDS[kind], found["fields"], found.get("defaults") or {}, found.get("keep")
    )


def migrate(
    old: Path, mapping: FieldMapping, new: Path | None = None
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Convert a log of another format. The old file is only read.

    Args:
        new: The file to write if every record is valid. It must not exist; None is a dry run.

    Returns: the new records; and for each field that is dropped, how many old records have it.

    Raises:
        ValueError: `new` exists; or lines do not give valid records (the message lists them all).
    """
    if new is not None and new.exists():
        raise ValueError(f"{new}: already exists; choose another name")
    records, errors = [], []
    left: Counter[str] = Counter()
    for line in read_lines(old):
        if line.record is None:
            errors.append(f"{old}: line {line.number}: {line.problem}")
            continue
        record, unmapped = _convert(line.record, mapping)
        left.update(unmapped if mapping.keep is None else ())
        record, found = checked(record, mapping.kind)
        errors += [f"{old}: line {line.number}: {problem}" for problem in found]
        records.append(record)
    if errors or not records:
        raise ValueError("\n".join(errors) or f"{old}: contains no record")
    if new is not None:
        with replacing(new) as temporary:
            append_records(temporary, records)
    return records, left


def _convert(old: Mapping[str, Any], mapping: FieldMapping) -> tuple[dict[str, Any], list[str]]:
    record: dict[str, Any] = {}
    for target, source in mapping.fields.items():
        if (value := get(old, source)) is not None:
            _set(record, target, value)
    for target, value in mapping.defaults.items():
        if get(record, target) is None:
            now = datetime.now(UTC).isoformat() if value == "now" else value
            _set(record, target, now if target in mapping.kind.times else value)
    used = {source.split(".")[0] for source in mapping.fields.values()}
    rest = {key: value for key, value in old.items() if key not in used}
    if mapping.keep and rest:
        _set(record, mapping.keep, rest)
    return record, list(rest)


def _set(record: dict[str, Any], target: str, value: Any) -> None:
    *path, leaf = target.split(".")
    for part in path:
        record = record.setdefault(part, {})
        if not isinstance(record, dict):
            raise ValueError(f"{target}: '{part}' already has a value")
    record[leaf] = value


@dataclass
class Merged:
    """What a merge did.

    Attributes:
        new: Records that the target did not have.
        num_same: How many records the target already had.
        conflicts: A line for each run whose records differ, with the fields that differ.
        problems: A line for each line of a source without a valid record.
        repaired: How the last line of the target was repaired; empty if it was whole.
    """

    new: list[dict[str, Any]] = field(default_factory=list)
    num_same: int = 0
    conflicts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    repaired: str = ""


def merge(sources: Sequence[str], target: Path, dry_run: bool = False) -> Merged:
    """Append to a log the records of other logs that it does not have.

    Records are the same if their content is; the order of keys does not matter, and a field that is
    null is as good as missing. If a run differs, the target keeps its own record, and the conflict
    is listed. A record `running` does not conflict with the record of how the run ended.

    Args:
        sources: Paths, or URLs that fsspec opens (`s3://...`, `https://...`, `sftp://...`).

    Raises:
        ValueError: a source is not a log or is of another kind; the target cannot be written.
    """
    merged = Merged()
    own = read_records(target) if target.exists() and target.stat().st_size else []
    kind = kind_of(own[0]) if own else None
    seen = {run_state(record): (record, str(target)) for record in own}
    contents = {_content(record) for record in own}
    for source in sources:
        with _local(source) as path:
            found = kind_of_log(path)
            kind = kind or found
            if found is not kind:
                raise ValueError(
                    f"{source}: is a log of {found.name}, but the others are of {kind.name}"
                )
            for line in read_lines(path):
                where = f"{source}: line {line.number}"
                if line.problem:
                    merged.problems.append(f"{where}: {line.problem}")
                if line.record is None:
                    continue
                record, errors = checked(line.record, kind)
                content, run = _content(record), run_state(record)
                if errors:
                    merged.problems += [f"{where}: {error}" for error in errors]
                elif content in contents:
                    merged.num_same += 1
                elif run in seen:
                    other, place = seen[run]
                    differ = _differences(complete(checked(other)[0]), complete(record))
                    fields = ", ".join(sorted(differ))
                    if fields:
                        conflict = f"'{run[0]}' differs in {where} and {place}: {fields}"
                        merged.conflicts.append(conflict)
                    else:
                        merged.num_same += 1
                else:
                    merged.new.append(record)
                    contents.add(content)
                    seen[run] = (record, where)
    if merged.new and not dry_run:
        merged.repaired = append_records(target, merged.new).repaired
    return merged


def _content(record: Mapping[str, Any]) -> str:
    return json.dumps(checked(record)[0], sort_keys=True)


def _differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            dot = f"{where}.{key}" if where else key
            yield from _differences(one.get(key), other.get(key), dot)
    elif one != other:
        yield where


@contextmanager
def _local(source: str) -> Iterator[Path]:
    """The source as a file on this machine."""
    if "://" not in source:
        yield Path(source)
        return
    import fsspec

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (source.rsplit("/", 1)[-1] or "log.jsonl")
        try:
            opened: Any = fsspec.open(source, "rb")
            with opened as remote, open(path, "wb") as local:
                shutil.copyfileobj(remote, local)
        except Exception as error:  # each file system of fsspec raises its own errors
            first = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"{source}: cannot be read ({type(error).__name__}: {first})"
            ) from error
        yield path
