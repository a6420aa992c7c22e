"""`kimi-recursive log`: query, check and merge the records of all runs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Query, check and merge the records of runs: baselines.jsonl and training_log.jsonl.\n\n"
    "A field has its full name (run_data.hyperparameters.seed) or a short one "
    "(hyperparameters.seed, seed).",
)
DEFAULT_LOG = Path("experiments/training_log.jsonl")

Log = Annotated[Path, typer.Argument(help="A log of either kind.")]
Domain = Annotated[
    str | None, typer.Option(help="Only this domain (for baselines: this experiment).")
]
Type = Annotated[str | None, typer.Option("--type", help="Only this experiment type.")]
Metric = Annotated[str | None, typer.Option(help="A field that holds a number.")]
Json = Annotated[bool, typer.Option("--json", help="A JSON object for each row.")]
Where = Annotated[list[str] | None, typer.Option(help="FIELD=VALUE; repeatable: all must hold.")]


@app.command()
def validate(
    logs: Annotated[list[Path], typer.Argument(help="One or more logs.")],
) -> None:
    """List every malformed line, missing field, wrong type and duplicate run.

    Exit code 1 if there is a problem.
    """
    from kimi_recursive.records.log import validate

    num_problems = 0
    for path in logs:
        num_records, problems = validate(path)
        for problem in problems:
            typer.echo(f"{path}: {problem}")
        typer.echo(f"{path}: {num_records} records, {len(problems)} problems", err=True)
        num_problems += len(problems)
    raise SystemExit(1 if num_problems else 0)


@app.command()
def append(
    log: Log = DEFAULT_LOG,
    record: Annotated[
        Path | None,
        typer.Option(help="A JSON object, or JSON lines; - for standard input (default)."),
    ] = None,
    experiment: Annotated[
        Path | None, typer.Option(help="Instead: an experiment directory; its run must have ended.")
    ] = None,
) -> None:
    """Check records and append them, all or none. A run that the log already has is refused.

    Several processes may append at the same time. A last line that a crash cut off is moved to
    LOG.torn.
    """
    from kimi_recursive.records.log import append_records
    from kimi_recursive.records.runs import record_of_experiment

    if experiment is not None:
        if record is not None:
            raise ValueError("--record and --experiment exclude each other")
        found = record_of_experiment(experiment)
        if found is None:
            raise ValueError(f"{experiment}: the run has not ended")
        records = [found]
    else:
        records = _parse_records(record)
    done = append_records(log, records, refuse_existing=True)
    _say_repaired(log, done.repaired)
    typer.echo(f"{log}: {done.num_appended} appended")


@app.command()
def show(
    log: Log = DEFAULT_LOG,
    run_id: Annotated[
        str | None, typer.Option("--id", help="Run id. Default: the last record.")
    ] = None,
) -> None:
    """Print the latest record, or all records of one run, as indented JSON."""
    from kimi_recursive.records.kinds import identity
    from kimi_recursive.records.log import read_records

    records = read_records(log)
    chosen = records[-1:] if run_id is None else [r for r in records if identity(r) == run_id]
    if not chosen:
        raise ValueError(f"{log}: no run '{run_id}'")
    for found in chosen:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))


@app.command()
def query(
    log: Log = DEFAULT_LOG,
    domain: Domain = None,
    status: Annotated[str | None, typer.Option(help="running, completed or failed.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Short for --status failed.")] = False,
    type_: Type = None,
    metric: Metric = None,
    above: Annotated[float | None, typer.Option(help="The metric exceeds this.")] = None,
    below: Annotated[float | None, typer.Option(help="The metric is below this.")] = None,
    where: Where = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the last so many.")] = None,
    format_: Annotated[
        str, typer.Option("--format", help="table, or json: the records, one per line.")
    ] = "table",
    as_json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
) -> None:
    """List the records that match, in the order of the log."""
    from kimi_recursive.records import query, table

    if format_ not in ("table", "json"):
        raise ValueError(f"--format: must be table or json, got '{format_}'")
    if (above is not None or below is not None) and metric is None:
        raise ValueError("--above and --below need --metric")
    if failed and status not in (None, "failed"):
        raise ValueError("--failed and --status exclude each other")
    shown = metric or query.default_metric(log)
    wanted = query.Filter(
        domain, "failed" if failed else status, type_, _where(where), metric, above, below
    )
    found = query.select(log, wanted, numbers=[shown])
    _warn(log, found.problems)
    rows = found.rows if limit is None else found.rows.tail(limit)
    if as_json or format_ == "json":
        for line in table.matching_lines(log, rows[table.ROW].to_list()):
            typer.echo(line)
    else:
        _print_runs(rows, shown)
        typer.echo(f"{rows.height} records", err=True)


@app.command()
def best(
    log: Log = DEFAULT_LOG,
    domain: Domain = None,
    metric: Metric = None,
    type_: Type = None,
    where: Where = None,
    lowest: Annotated[
        bool | None,
        typer.Option(
            "--lowest/--highest",
            help="What is better. Default: lowest for losses, perplexity, delta, error, seconds.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many to show.")] = 1,
    as_json: Json = False,
) -> None:
    """Show the best run by a metric. Failed runs do not count."""
    from kimi_recursive.records import query

    metric = metric or query.default_metric(log)
    lowest = query.is_lower_better(metric) if lowest is None else lowest
    wanted = query.Filter(domain=domain, type=type_, where=_where(where), metric=metric)
    found = query.best(log, wanted, lowest)
    _warn(log, found.problems)
    if found.rows.is_empty():
        raise ValueError(f"{log}: no matching run has a number in '{metric}'")
    typer.echo(f"{'lowest' if lowest else 'highest'} {metric} of {found.rows.height}", err=True)
    _print_runs(found.rows.head(top), metric, as_json)


@app.command()
def compare(
    log: Log = DEFAULT_LOG,
    by: Annotated[
        str, typer.Option(help="Any field, such as hyperparameters.fusion_mode or status.")
    ] = "status",
    metric: Annotated[list[str] | None, typer.Option(help="A number; repeatable.")] = None,
    domain: Domain = None,
    type_: Type = None,
    where: Where = None,
    as_json: Json = False,
) -> None:
    """Group runs by a field: count, and mean, spread and best of each metric."""
    from kimi_recursive.records import query

    wanted = query.Filter(domain=domain, type=type_, where=_where(where))
    found = query.compare(log, by, metric or [query.default_metric(log)], wanted)
    _warn(log, found.problems)
    _print_table(found.rows.columns, 1, found.rows.iter_rows(), as_json)


@app.command()
def report(
    log: Log = DEFAULT_LOG,
    output: Annotated[Path, typer.Option(help="A markdown file.")] = Path("experiment_report.md"),
) -> None:
    """Write a markdown table of all runs for each domain."""
    from kimi_recursive.files import write_text
    from kimi_recursive.records.log import kind_of_log, read_records
    from kimi_recursive.records.views import report_text

    write_text(output, report_text(read_records(log), kind_of_log(log)))
    typer.echo(f"wrote {output}")


@app.command()
def plot(
    log: Log = DEFAULT_LOG,
    metric: Metric = None,
    type_: Type = None,
    domain: Domain = None,
    where: Where = None,
    output: Annotated[Path, typer.Option(help="A PNG file.")] = Path("progress.png"),
) -> None:
    """Plot a metric over time: a line for each experiment type, and the best so far."""
    from kimi_recursive.records import query, views

    metric = metric or query.default_metric(log)
    wanted = query.Filter(domain=domain, type=type_, where=_where(where))
    shown = views.plot_progress(log, metric, wanted, output)
    _warn(log, shown.problems)
    typer.echo(f"wrote {output}: {metric} of {shown.rows.height} runs")


@app.command()
def check(
    log: Log = DEFAULT_LOG,
    criteria: Annotated[
        Path, typer.Option(help="YAML with criteria by experiment type; edit it as you like.")
    ] = Path("config/criteria.yaml"),
    type_: Type = None,
    run_id: Annotated[str | None, typer.Option("--id", help="Only this run.")] = None,
    as_json: Json = False,
) -> None:
    """Check runs against the success criteria of their experiment type.

    Exit code 1 if a criterion fails. A criterion that was not measured neither passes nor fails.
    """
    from kimi_recursive.records.criteria import FAILED, check_records, read_criteria
    from kimi_recursive.records.log import read_records

    checks = [
        found
        for found in check_records(read_records(log), read_criteria(criteria))
        if type_ in (None, found.type) and run_id in (None, found.run_id)
    ]
    if not checks:
        raise ValueError(f"{log}: no matching run has ended and is of a type in {criteria}")
    columns = ("run_id", "criterion", "result", "value", "wanted")
    rows = [[getattr(found, name) for name in columns] for found in checks]
    _print_table(columns, 2, rows, as_json)
    num_failed = sum(c.result == FAILED for c in checks)
    typer.echo(f"{len(checks)} criteria, {num_failed} failed", err=True)
    raise SystemExit(1 if num_failed else 0)


@app.command()
def migrate(
    old: Annotated[Path, typer.Argument(help="Records of another format, as JSON lines.")],
    mapping: Annotated[Path, typer.Option(help="YAML that maps each new field to an old one.")],
    output: Annotated[
        Path | None, typer.Option(help="The new log, which must not exist. Default: dry run.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the first record; write nothing.")
    ] = False,
) -> None:
    """Convert a log of another format. OLD is only read.

    If a record is not valid, all problems are listed and nothing is written.
    """
    from kimi_recursive.records.transfer import migrate, read_mapping

    target = None if dry_run else output
    records, left = migrate(old, read_mapping(mapping), target)
    for name, num in sorted(left.items()):
        typer.echo(f"warning: field '{name}' of {num} records is dropped", err=True)
    if target is None:
        typer.echo(json.dumps(records[0], indent=2, ensure_ascii=False))
        typer.echo(f"dry run: {len(records)} records would be written", err=True)
    else:
        typer.echo(f"wrote {target}: {len(records)} records; {old} is unchanged")


@app.command()
def merge(
    sources: Annotated[
        list[str], typer.Argument(help="Logs: paths, or URLs that fsspec opens (s3://, https://).")
    ],
    into: Annotated[Path, typer.Option(help="The log that gets the new records.")] = DEFAULT_LOG,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing.")] = False,
) -> None:
    """Merge logs of other machines.

    Records with the same content are merged into one. If a run differs between logs, --into keeps
    its own record, the conflict is listed, and the exit code is 1.
    """
    from kimi_recursive.records.transfer import merge

    merged = merge(sources, into, dry_run)
    _say_repaired(into, merged.repaired)
    for problem in merged.problems:
        typer.echo(f"warning: skipped: {problem}", err=True)
    for conflict in merged.conflicts:
        typer.echo(f"conflict: {conflict}")
    what = "would be added" if dry_run else "added"
    typer.echo(
        f"{into}: {len(merged.new)} {what}, {merged.num_same} already in the log, "
        f"{len(merged.conflicts)} conflicts"
    )
    raise SystemExit(1 if merged.conflicts else 0)


def _parse_records(path: Path | None) -> list[dict[str, Any]]:
    file = None if path == Path("-") else path
    name = str(file or "standard input")
    try:
        text = file.read_text(encoding="utf-8") if file else sys.stdin.read()
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{name}: is not UTF-8 text") from None
    decoder, records, start = json.JSONDecoder(), [], 0
    text = text.strip()
    while start < len(text):
        try:
            record, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno} column {error.colno}"
            raise ValueError(f"{name}: is not JSON: {error.msg} at {where}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{name}: must contain JSON objects, not {type(record).__name__}")
        records.append(record)
        start = end + len(text[end:]) - len(text[end:].lstrip())
    if not records:
        raise ValueError(f"{name}: contains no record")
    return records


def _where(conditions: list[str] | None) -> dict[str, str]:
    found = {}
    for condition in conditions or ():
        field, equals, value = condition.partition("=")
        if not (field and equals):
            raise ValueError(f"--where: must be FIELD=VALUE, got '{condition}'")
        found[field] = value
    return found


def _say_repaired(log: Path, repaired: str) -> None:
    if repaired:
        typer.echo(f"warning: {log}: {repaired}", err=True)


def _warn(log: Path, problems: tuple[str, ...]) -> None:
    for problem in problems:
        typer.echo(f"warning: {log}: {problem}", err=True)


def _print_runs(rows: Any, metric: str, as_json: bool = False) -> None:
    from kimi_recursive.records.views import times

    columns = ("run_id", "domain", "status", "end (UTC)", metric)
    rows = rows.with_columns(times().alias("end (UTC)")).select(columns)
    _print_table(columns, 1, rows.iter_rows(), as_json)


def _print_table(
    columns: Sequence[str], names: int, rows: Iterable[Sequence[Any]], as_json: bool = False
) -> None:
    """The first `names` columns tell rows apart; a narrow terminal cuts them last."""
    if as_json:
        for row in rows:
            found = dict(zip(columns, row, strict=True))
            typer.echo(json.dumps(found, ensure_ascii=False, default=str))
        return
    from kimi_recursive.tables import NAME, TEXT, Column, Table

    kinds = [NAME if number < names else TEXT for number in range(len(columns))]
    table = Table("", list(map(Column, columns, kinds)), list(rows))
    width = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else None
    typer.echo(table.to_terminal(width))
