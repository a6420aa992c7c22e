"""Reading and appending logs of JSON lines, which several processes write and a crash may cut."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kimi_recursive.records.kinds import (
    KINDS,
    Kind,
    checked,
    identity,
    kind_of,
    problems,
    run_state,
    without_nan,
)


@dataclass(frozen=True)
class Line:
    """A line of a log that is not blank.

    Attributes:
        number: Counted from 1; blank lines count.
        record: None if the line is not a JSON object.
        problem: Why not; or which fields hold NaN or infinity, which JSON does not have.
    """

    number: int
    record: dict[str, Any] | None
    problem: str = ""


@dataclass(frozen=True)
class Appended:
    """What an append did.

    Attributes:
        num_appended: How many records it wrote.
        repaired: How it repaired a last line that was cut off; empty if none was.
    """

    num_appended: int
    repaired: str = ""


def check_log(path: str | Path) -> Path:
    """The path, if it is a text file that is not empty.

    Raises:
        ValueError: it is missing, empty, not a file, binary, or cannot be read.
    """
    path = Path(path)
    _check_regular(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if not start:
        raise ValueError(f"{path}: is empty")
    if b"\0" in start:
        raise ValueError(f"{path}: is not a log of JSON lines in UTF-8, but binary or UTF-16")
    return path


def _check_regular(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path}: is a directory, not a log")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a regular file")


def read_lines(path: str | Path) -> Iterator[Line]:
    """Every line that is not blank, with or without a record.

    Raises:
        ValueError: see `check_log`.
    """
    return (_parse(number, raw) for number, raw in raw_lines(check_log(path)))


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not blank."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.isspace():
                yield number, raw


def _parse(number: int, raw: bytes) -> Line:
    try:
        record = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return Line(number, None, f"is not UTF-8 (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        torn = "" if raw.endswith(b"\n") else ", and the line has no end: cut off by a crash?"
        return Line(number, None, f"is not JSON: {error.msg} at column {error.colno}{torn}")
    except (RecursionError, ValueError) as error:  # nested too deeply, an integer of 5,000 digits
        return Line(number, None, f"is not JSON that can be read: {error}")
    if not isinstance(record, dict):
        return Line(number, None, f"is not a JSON object, but {type(record).__name__}")
    if b"NaN" in raw or b"Infinity" in raw:
        clean = without_nan(record)
        names = sorted(set(clean.get("non_finite") or ()) - set(record.get("non_finite") or ()))
        if names:
            return Line(number, clean, f"NaN or infinity is not JSON: {', '.join(names)}")
    return Line(number, record)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log, without the lines that hold none.

    Raises:
        ValueError: see `check_log`; or no line holds a record.
    """
    lines = list(read_lines(path))
    records = [line.record for line in lines if line.record is not None]
    if not records:
        raise _not_a_log(path, lines)
    return records


def kind_of_log(path: str | Path) -> Kind:
    """The kind of the first record.

    Raises:
        ValueError: see `read_records`.
    """
    lines = []
    for line in read_lines(path):
        if line.record is not None:
            return kind_of(line.record)
        lines = lines or [line]
    raise _not_a_log(path, lines)


def _not_a_log(path: str | Path, lines: list[Line]) -> ValueError:
    number, problem = (lines[0].number, lines[0].problem) if lines else (1, "is blank")
    return ValueError(f"{path}: is not a log: line {number} {problem}")


def validate(path: str | Path) -> tuple[int, list[str]]:
    """Check a log: malformed lines, fields that the schema does not allow, duplicate run ids.

    A record with status `running` and the record of how that run ended are not duplicates.

    Returns: the number of readable records, and a line `line 7: ...` for each problem.

    Raises:
        ValueError: see `check_log`.
    """
    num_records, found = 0, []
    kind: Kind | None = None
    ended: dict[str | None, int] = {}
    for line in read_lines(path):
        if line.problem:
            found.append(f"line {line.number}: {line.problem}")
        if line.record is None:
            continue
        num_records += 1
        kind = kind or kind_of(line.record)
        errors = problems(line.record, kind)
        found += [f"line {line.number}: {error}" for error in errors]
        name, running = run_state(line.record)
        if errors or running:
            continue
        if name in ended:
            found.append(
                f"line {line.number}: duplicate {kind.run_id} '{name}' (line {ended[name]})"
            )
        else:
            ended[name] = line.number
    return num_records, found


def append_records(
    path: str | Path,
    records: Iterable[Mapping[str, Any]],
    skip_existing: bool = False,
    refuse_existing: bool = False,
) -> Appended:
    """Check records and append them, all or none. Other processes may append at the same time.

    NaN and infinity become null, and the field `non_finite` lists them; times become UTC. The lock
    is on the log itself. A last line that a crash cut off is moved to `<log>.torn`; one that only
    lacks its line feed gets it.

    Args:
        path: The log; created if missing, with its folder.
        skip_existing: Leave out records of runs that the log already has. A run that is running and
            the same run when it has ended count as two.
        refuse_existing: Raise for them.

    Raises:
        ValueError: a record is not valid, of another kind than the log, or refused; or the log
            cannot be written. Nothing is appended then.
    """
    path = Path(path)
    new = []
    for number, record in enumerate(records, start=1):
        clean, errors = checked(record)
        if errors:
            raise ValueError(f"record {number}: {'; '.join(errors)}")
        new.append(clean)
    kinds = {kind_of(record).name for record in new}
    if len(kinds) > 1:
        raise ValueError(f"records of {' and '.join(sorted(kinds))} belong in separate logs")
    if not new:
        return Appended(0)
    kind = KINDS[kinds.pop()]
    with _locked(path) as file:
        repaired = _repair(path, file)
        exists = bool(file.seek(0, os.SEEK_END))
        if exists and (found := kind_of_log(path)) is not kind:
            raise ValueError(f"{path}: is a log of {found.name}, not of {kind.name}")
        done: set[tuple[str | None, bool]] = set()
        if exists and (skip_existing or refuse_existing):
            done = {run_state(record) for record in read_records(path)}
        existing = [identity(record) for record in new if run_state(record) in done]
        if existing and refuse_existing:
            raise ValueError(f"{path}: already has run '{existing[0]}'")
        new = [record for record in new if run_state(record) not in done]
        _write(path, file, b"".join(_encode(record) for record in new))
    return Appended(len(new), repaired)


def _encode(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The log, open for reading and appending, with an exclusive lock on it."""
    _check_regular(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(path, "a+b", buffering=0)  # noqa: SIM115
            fcntl.flock(file, fcntl.LOCK_EX)
            try:  # another process may have replaced the file while this one waited
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
            except FileNotFoundError:
                pass
            file.close()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
    with file:
        yield file


def _repair(path: Path, file: BinaryIO) -> str:
    """Add the line feed that the last line lacks, or move a line that was cut off to `<log>.torn`.

    Returns: what was done, in words; empty if nothing had to be.
    """
    size = file.seek(0, os.SEEK_END)
    if not size or os.pread(file.fileno(), 1, size - 1) == b"\n":
        return ""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.rfind(b"\n") + 1
        last = data[start:]
    if start or not last.startswith(b"{"):  # a file that is not a log stays as it is
        kind_of_log(path)
    try:
        whole = isinstance(json.loads(last), dict)
    except (ValueError, RecursionError):
        whole = False
    if whole:
        _write(path, file, b"\n")
        return "added the line feed that the last line lacked"
    torn = path.with_name(f"{path.name}.torn")
    with open(torn, "ab") as kept:
        kept.write(last + b"\n")
        kept.flush()
        os.fsync(kept.fileno())
    os.ftruncate(file.fileno(), start)
    return f"the last line was cut off ({len(last)} bytes): moved to {torn}"


def _write(path: Path, file: BinaryIO, data: bytes) -> None:
    """Append and sync. If the disk is full, the log stays as it was."""
    size = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    except OSError as error:
        os.ftruncate(file.fileno(), size)
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
