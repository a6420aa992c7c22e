"""Reading and appending JSON Lines logs that several processes write, and that a crash may tear."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

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

MAX_LINE = 2**26  # bytes


@dataclass(frozen=True)
class Line:
    """A line of a log that is not blank.

    Attributes:
        number: From 1, blank lines counted.
        record: None where the line holds no JSON object.
        problem: Why not; or that NaN or infinity, which JSON has not, stand in it.
    """

    number: int
    record: dict[str, Any] | None
    problem: str = ""


@dataclass(frozen=True)
class Appended:
    """Attributes:
    num_appended: Records written.
    skipped: Identities of those that were there already.
    repaired: What was done about a torn last line; empty when there was none.
    """

    num_appended: int
    skipped: tuple[str, ...] = ()
    repaired: str = ""


def check_log(path: str | Path) -> Path:
    """The path, if it is a text file with something in it.

    Raises:
        ValueError: it is missing, empty, no file, binary, or cannot be read.
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
    """Every line that is not blank, also those that hold no record.

    Raises:
        ValueError: as `check_log`.
    """
    for number, raw in raw_lines(check_log(path)):
        if len(raw) > MAX_LINE:
            yield Line(number, None, f"is longer than {MAX_LINE // 2**20} MiB")
        else:
            yield _parse(number, raw)


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not blank; the start of one that is too long."""
    with open(path, "rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE + 1):
            number += 1
            rest = raw
            while len(raw) > MAX_LINE and not rest.endswith(b"\n"):
                if not (rest := file.readline(MAX_LINE)):
                    break
            if not raw.isspace():
                yield number, raw


def _parse(number: int, raw: bytes) -> Line:
    try:
        record = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return Line(number, None, f"is not UTF-8 (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        torn = "" if raw.endswith(b"\n") else ", and the line has no end: torn by a crash?"
        return Line(number, None, f"is not JSON: {error.msg} at column {error.colno}{torn}")
    except (RecursionError, ValueError) as error:  # nested too deeply, an integer of 5,000 digits
        return Line(number, None, f"is not JSON that can be read: {error}")
    if not isinstance(record, dict):
        return Line(number, None, f"holds no JSON object, but {type(record).__name__}")
    if b"NaN" in raw or b"Infinity" in raw:
        clean = without_nan(record)
        names = sorted(set(clean.get("non_finite") or ()) - set(record.get("non_finite") or ()))
        if names:
            return Line(number, clean, f"NaN or infinity is not JSON: {', '.join(names)}")
    return Line(number, record)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log; lines that hold none are left out.

    Raises:
        ValueError: as `check_log`, or no line holds a record.
    """
    lines = list(read_lines(path))
    records = [line.record for line in lines if line.record is not None]
    if not records:
        raise _no_log(path, lines)
    return records


def kind_of_log(path: str | Path) -> Kind:
    """The kind of the first record.

    Raises:
        ValueError: as `read_records`.
    """
    lines = []
    for line in read_lines(path):
        if line.record is not None:
            return kind_of(line.record)
        lines = lines or [line]
    raise _no_log(path, lines)


def _no_log(path: str | Path, lines: list[Line]) -> ValueError:
    number, problem = (lines[0].number, lines[0].problem) if lines else (1, "is blank")
    return ValueError(f"{path}: is not a log: line {number} {problem}")


def validate(path: str | Path) -> tuple[int, list[str]]:
    """All that is wrong in a log: malformed lines, fields that the schema does not allow, run ids
    that come twice.

    A record `running` and one of how the run ended are no duplicates.

    Returns: the number of records that can be read, and a line `line 7: ...` for each problem.

    Raises:
        ValueError: as `check_log`.
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
        if errors or get(line.record, kind.status) == "running":
            continue
        name = identity(line.record)
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
    """Append records, all or none, after checking them; safe with other processes that append.

    NaN and infinity become null and are named under `non_finite`; times become UTC. The lock is on
    the log itself; a torn last line that a crash left is moved to `<log>.torn`, one that only lacks
    its line feed gets it.

    Args:
        path: Made when missing, with its folder.
        skip_existing: Leave out records of runs that are there, as `identity` tells them; one that
            says `running` and one of how the run ended are two.
        refuse_existing: Raise for them.

    Raises:
        ValueError: a record is not valid, or of another kind than the log, or refused; the log
            cannot be written. Nothing is appended then.
    """
    path = Path(path)
    checked = [_checked(record, number) for number, record in enumerate(records, start=1)]
    kinds = {kind_of(record).name for record in checked}
    if len(kinds) > 1:
        raise ValueError(f"records of {' and '.join(sorted(kinds))} belong in logs of their own")
    if not checked:
        return Appended(0)
    kind = KINDS[kinds.pop()]
    with _locked(path) as file:
        repaired = _repair(path, file)
        there = bool(file.seek(0, os.SEEK_END))
        if there and (found := kind_of_log(path)) is not kind:
            raise ValueError(f"{path}: is a log of {found.name}, not of {kind.name}")
        done: set[Any] = set()
        if there and (skip_existing or refuse_existing):
            done = {_state(record) for record in read_records(path)}
        skipped = tuple(str(identity(record)) for record in checked if _state(record) in done)
        if skipped and refuse_existing:
            raise ValueError(f"{path}: run '{skipped[0]}' is there already")
        checked = [record for record in checked if _state(record) not in done]
        _write(path, file, b"".join(_encode(record) for record in checked))
    return Appended(len(checked), skipped, repaired)


def _state(record: Mapping[str, Any]) -> tuple[str | None, bool]:
    return identity(record), get(record, kind_of(record).status) == "running"


def _checked(record: Mapping[str, Any], number: int) -> dict[str, Any]:
    try:
        clean = normalize(record)
        _encode(clean)
        errors = problems(clean, kind_of(clean))
    except (TypeError, ValueError) as error:
        errors = [str(error)]
    if errors:
        raise ValueError(f"record {number}: {'; '.join(errors)}")
    return clean


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
            try:  # another process may have put a new file in its place meanwhile
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
    """Give the last line its line feed, or move what a crash left of it to `<log>.torn`."""
    size = file.seek(0, os.SEEK_END)
    if not size or os.pread(file.fileno(), 1, size - 1) == b"\n":
        return ""
    start = _start_of_last_line(file, size)
    last = os.pread(file.fileno(), size - start, start)
    if start or not last.startswith(b"{"):  # never mend what is no log
        kind_of_log(path)
    try:
        whole = isinstance(json.loads(last), dict)
    except (ValueError, RecursionError):
        whole = False
    if whole:
        _write(path, file, b"\n")
        return "the last line had no line feed: added"
    torn = path.with_name(f"{path.name}.torn")
    with open(torn, "ab") as kept:
        kept.write(last + b"\n")
        kept.flush()
        os.fsync(kept.fileno())
    os.ftruncate(file.fileno(), start)
    return f"the last line was torn ({len(last)} bytes): moved to {torn}"


def _start_of_last_line(file: BinaryIO, size: int) -> int:
    end, block = size, 2**16
    while end:
        start = max(0, end - block)
        found = os.pread(file.fileno(), end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _write(path: Path, file: BinaryIO, data: bytes) -> None:
    """Append and sync; a disk that fills up on the way leaves the log as it was."""
    size = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    except OSError as error:
        os.ftruncate(file.fileno(), size)
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
