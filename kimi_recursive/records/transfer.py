"""Logs from elsewhere: other formats (`migrate`), other machines (`merge`)."""

from __future__ import annotations

import json
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
    get,
    identity,
    kind_of,
    normalize,
    problems,
    without_nan,
)
from kimi_recursive.records.log import append_records, kind_of_log, read_lines, read_records
from kimi_recursive.text import unknown_key_message


@dataclass(frozen=True)
class FieldMapping:
    """How the records of another format become ours.

    Attributes:
        kind: What they become.
        fields: Dotted field of the old record by that of the new one.
        defaults: Values by field of the new record, where the old one has none; the time of a
            record may be `now`.
        keep: Field of the new record under which all that is not mapped is kept; None to leave it.
    """

    kind: Kind
    fields: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keep: str | None = None


def read_mapping(path: str | Path) -> FieldMapping:
    """Read a mapping from YAML.

    Raises:
        ValueError: no such file, no YAML, an unknown key, or no mapping of fields.
    """
    found = read_yaml_mapping(path)
    allowed = ("kind", "fields", "defaults", "keep")
    if not isinstance(found.get("fields"), dict):
        raise ValueError(f"{path}: must have 'fields', the old field by the new one")
    for key in found:
        if key not in allowed:
            raise ValueError(unknown_key_message(key, allowed, str(path)))
    kind = found.get("kind", "training_log")
    if kind not in KINDS:
        raise ValueError(f"{path}: kind: must be one of {', '.join(KINDS)}, got '{kind}'")
    return FieldMapping(
        KINDS[kind], found["fields"], found.get("defaults") or {}, found.get("keep")
    )


def migrate(
    old: Path, mapping: FieldMapping, new: Path | None = None
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Turn a log of another format into ours; the old file is only read.

    Args:
        new: Written when every record is valid, and must not be there; None is a dry run.

    Returns: the new records, and how many old ones have each field that is not taken over.

    Raises:
        ValueError: `new` is there, or a line that cannot be turned into a valid record; every one.
    """
    if new is not None and new.exists():
        raise ValueError(f"{new}: is there already; choose another name")
    records, errors = [], []
    left: Counter[str] = Counter()
    for line in read_lines(old):
        if line.record is None:
            errors.append(f"{old}: line {line.number}: {line.problem}")
            continue
        record, unmapped = _convert(line.record, mapping)
        left.update(unmapped if mapping.keep is None else ())
        try:
            record = normalize(record)
            found = problems(record, mapping.kind)
        except (TypeError, ValueError) as error:
            found = [str(error)]
        errors += [f"{old}: line {line.number}: {problem}" for problem in found]
        records.append(record)
    if errors or not records:
        raise ValueError("\n".join(errors) or f"{old}: holds no record")
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
            raise ValueError(f"{target}: '{part}' holds a value already")
    record[leaf] = value


@dataclass
class Merged:
    """Attributes:
    new: Records that the target did not have.
    num_same: Records that it had already, equal in content.
    conflicts: A line for each run of which both have different records: where they differ.
    problems: Lines of the sources that hold no valid record.
    repaired: What was done about a torn last line of the target.
    """

    new: list[dict[str, Any]] = field(default_factory=list)
    num_same: int = 0
    conflicts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    repaired: str = ""


def merge(sources: Sequence[str], target: Path, dry_run: bool = False) -> Merged:
    """Append to a log what other logs have and it has not.

    Records that are equal in content (whatever the order of their keys) are one. Of a run with
    different content in both, the target's stays, and the conflict is listed; a record `running`
    does not conflict with one of how the run ended.

    Args:
        sources: Paths, or URLs that fsspec opens (`s3://...`, `https://...`, `sftp://...`).

    Raises:
        ValueError: a source is no log or of another kind, or the target cannot be written.
    """
    merged = Merged()
    there = read_records(target) if target.exists() and target.stat().st_size else []
    kind = kind_of(there[0]) if there else None
    contents = {_content(record) for record in there}
    runs = {(identity(r), _status(r)): (r, str(target)) for r in there}
    for source in sources:
        with _local(source) as path:
            found = kind_of_log(path)
            kind = kind or found
            if found is not kind:
                raise ValueError(f"{source}: is a log of {found.name}, the others of {kind.name}")
            for line in read_lines(path):
                where = f"{source}: line {line.number}"
                if line.problem:
                    merged.problems.append(f"{where}: {line.problem}")
                if line.record is None:
                    continue
                _take(line.record, where, kind, merged, contents, runs)
    if merged.new and not dry_run:
        merged.repaired = append_records(target, merged.new).repaired
    return merged


def _take(
    record: dict[str, Any],
    where: str,
    kind: Kind,
    merged: Merged,
    contents: set[str],
    runs: dict[Any, tuple[dict[str, Any], str]],
) -> None:
    try:
        record = normalize(record)
        found = problems(record, kind)
    except (TypeError, ValueError) as error:
        found = [str(error)]
    if found:
        merged.problems += [f"{where}: {problem}" for problem in found]
        return
    content, run = _content(record), (identity(record), _status(record))
    if content in contents:
        merged.num_same += 1
    elif run in runs:
        other, there = runs[run]
        fields = sorted(_differences(_normal(other), record))
        merged.conflicts.append(
            f"'{run[0]}' is different in {where} and {there}: {', '.join(fields)}"
        )
    else:
        merged.new.append(record)
        contents.add(content)
        runs[run] = (record, where)


def _status(record: Mapping[str, Any]) -> bool:
    return get(record, kind_of(record).status) == "running"


def _content(record: Mapping[str, Any]) -> str:
    return json.dumps(_normal(record), sort_keys=True)


def _normal(record: Mapping[str, Any]) -> dict[str, Any]:
    """As it would be written; the target may hold times that are none."""
    try:
        return normalize(record)
    except ValueError:
        return without_nan(record)


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
            with fsspec.open(source, "rb") as remote, open(path, "wb") as local:
                while block := remote.read(2**20):
                    local.write(block)
        except Exception as error:  # each file system of fsspec has errors of its own
            first = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"{source}: cannot be read ({type(error).__name__}: {first})"
            ) from error
        yield path
