"""A log as a polars table: a row for each record, a column for each field asked for."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from kimi_recursive.records.kinds import Kind, get, number
from kimi_recursive.records.log import check_log, kind_of_log, raw_lines, read_lines

ROW = "record"  # number of the line, from 0; blank lines do not count


@dataclass(frozen=True)
class Table:
    """Records, and what was wrong with the log.

    Attributes:
        rows: A row for each record, without records `running` of runs that have a later record.
            Columns: `record`, and each field under the name by which it was asked for.
        problems: Lines that were left out or changed, and why.
    """

    rows: pl.DataFrame
    problems: tuple[str, ...] = ()


def read_table(path: str | Path, numbers: Sequence[str] = (), texts: Sequence[str] = ()) -> Table:
    """Read run_id, domain, status, type and timestamp of every record, and the fields asked for.

    Polars reads a log in one pass. If lines are damaged, or values have another type than the
    schema says, the log is read line by line: slower, but all readable records are found.

    Args:
        numbers: Fields to read as float64; null if the value is not a finite number.
        texts: Fields to read as text; other values become JSON.
            A field has its full name (`run_data.best_val_loss`) or a short one (`best_val_loss`,
            `hyperparameters.seed`): see `Kind.parts`.

    Raises:
        ValueError: the file is not a log; no record has the field (the message names similar ones);
            a field is asked for both as number and as text.
    """
    path = check_log(path)
    kind = kind_of_log(path)
    usual = {"run_id": kind.run_id, "domain": kind.domain, "status": kind.status}
    usual |= {"type": kind.type, "timestamp": "timestamp"}
    numbers = list(dict.fromkeys(numbers))
    texts = [name for name in dict.fromkeys(texts) if name not in usual]
    if text := {*numbers} & {*texts, *usual}:
        raise ValueError(f"'{text.pop()}' is asked for as text, so it cannot be a metric as well")
    wanted = {name: (name,) for name in usual.values()}
    wanted |= {name: _candidates(kind, name) for name in (*numbers, *texts)}
    columns = {field: pl.String for fields in wanted.values() for field in fields}
    columns |= {f: pl.Float64 for name in numbers for f in wanted[name] if kind.fields.get(f)}
    try:
        flat, problems = _read_plain(path, columns), []
    except pl.exceptions.PolarsError:
        flat, problems = _read_by_line(path, columns)
    rows = flat.select(
        ROW,
        *(pl.col(field).alias(name) for name, field in usual.items()),
        *(_pick(flat, kind, path, name, wanted[name], pl.Float64) for name in numbers),
        *(_pick(flat, kind, path, name, wanted[name], pl.String) for name in texts),
    )
    return Table(_without_starts(rows), tuple(problems))


def matching_lines(path: str | Path, rows: Sequence[int]) -> Iterator[str]:
    """The lines of a log, unchanged, by the `record` numbers of its table."""
    wanted = set(rows)
    for row, (_, raw) in enumerate(raw_lines(Path(path))):
        if row in wanted:
            yield raw.decode("utf-8-sig").rstrip("\r\n")


def _candidates(kind: Kind, name: str) -> list[str]:
    """The fields that a short name may mean: those of the schema, else all possible ones."""
    fields = [part + name for part in kind.parts]
    return [field for field in fields if field in kind.fields] or fields


def _read_plain(path: Path, columns: Mapping[str, Any]) -> pl.DataFrame:
    schema, unnest = _nested(columns)
    table = pl.scan_ndjson(path, schema=schema, row_index_name=ROW).collect()
    return table.select(pl.col(ROW).cast(pl.Int64), *unnest)


def _nested(columns: Mapping[str, Any]) -> tuple[dict[str, Any], list[pl.Expr]]:
    """A polars schema with these dotted fields, and an expression that extracts each."""
    tree: dict[str, Any] = {}
    for field, dtype in columns.items():
        *path, leaf = field.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise pl.exceptions.SchemaError(f"{field} is inside a field that is read itself")
        if isinstance(node.get(leaf), dict):
            raise pl.exceptions.SchemaError(f"{field} contains a field that is read itself")
        node[leaf] = dtype

    def struct(node: dict[str, Any]) -> dict[str, Any]:
        return {k: pl.Struct(struct(v)) if isinstance(v, dict) else v for k, v in node.items()}

    def column(field: str) -> pl.Expr:
        first, *rest = field.split(".")
        expression = pl.col(first)
        for part in rest:
            expression = expression.struct.field(part)
        return expression.alias(field)

    return struct(tree), [column(field) for field in columns]


def _read_by_line(path: Path, columns: Mapping[str, Any]) -> tuple[pl.DataFrame, list[str]]:
    values: dict[str, list[Any]] = {ROW: [], **{field: [] for field in columns}}
    problems = []
    for row, line in enumerate(read_lines(path)):
        if line.problem:
            problems.append(f"line {line.number}: {line.problem}")
        if line.record is None:
            continue
        values[ROW].append(row)
        for field, dtype in columns.items():
            value = get(line.record, field)
            values[field].append(number(value) if dtype == pl.Float64 else _text(value))
    return pl.DataFrame(values, schema={ROW: pl.Int64, **columns}), problems


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _pick(
    flat: pl.DataFrame, kind: Kind, path: Path, name: str, fields: Sequence[str], dtype: Any
) -> pl.Expr:
    """The first of the fields that has a value; a field of the schema may have only nulls."""
    filled = [field for field in fields if flat[field].null_count() < flat.height]
    if not filled and fields[0] not in kind.fields:
        raise ValueError(f"{path}: no record has a field '{name}'{_hint(path, kind, name)}")
    column = pl.col((filled or fields)[0]).cast(dtype, strict=False)
    if dtype == pl.Float64:
        column = pl.when(column.is_finite()).then(column)
    return column.alias(name)


def _hint(path: Path, kind: Kind, name: str) -> str:
    names = set(kind.fields)
    for line in islice(read_lines(path), 200):
        names.update(_leaves(line.record or {}, ""))
    short = {field.removeprefix(part) for field in names for part in kind.parts}
    near = difflib.get_close_matches(name, sorted(short), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _leaves(record: Mapping[str, Any], where: str) -> Iterator[str]:
    for key, value in record.items():
        yield f"{where}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{where}{key}.")


def _without_starts(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows without records `running` of runs that have a later record."""
    running = pl.col("status") == "running"
    if not rows.select(running.any()).item():
        return rows
    last = pl.col(ROW) == pl.col(ROW).max().over("run_id")
    return rows.filter(~running.fill_null(False) | last | pl.col("run_id").is_null())
