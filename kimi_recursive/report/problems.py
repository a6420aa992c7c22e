"""What is missing, failed or damaged, with the last lines of its logs."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_recursive.matrix.runs import repeated_evaluation, zero_init_name
from kimi_recursive.report.summary import Matrix
from kimi_recursive.report.tables import NAME, NOTHING, TEXT, VERDICT, Table
from kimi_recursive.track_b.summary import Result

NUM_LINES = 20
LINE_LENGTH = 500


@dataclass(frozen=True)
class Log:
    """The last lines of a log; `num_lines` it has in all."""

    path: Path
    lines: list[str]
    num_lines: int


@dataclass(frozen=True)
class Problem:
    """An expected run, or a file, that is not as it should be."""

    name: str
    status: str
    detail: str
    logs: list[Log]


def find_problems(
    config: Mapping[str, Any],
    results: Path,
    matrix: Matrix,
    students: Sequence[Result],
    damaged: Mapping[str, str],
) -> list[Problem]:
    """Everything that is not `ok`: evaluations, proofs, the repeat, comparisons, students, and any
    other job whose log ends in an error.

    Args:
        students: Of Track-B; empty when it is not asked for.
        damaged: Other files that cannot be read: what they belong to, and what is wrong.
    """
    found = [*_matrix_problems(config, results, matrix), *_student_problems(results, students)]
    found += [Problem(name, "damaged", detail, []) for name, detail in damaged.items()]
    for pair in matrix.comparisons:
        if pair["verdict"] is None and pair["problem"] not in damaged.values():
            name = f"{pair['arm']} against {pair['reference']}"
            found.append(Problem(name, "damaged", pair["problem"], []))
    shown = {log.path for problem in found for log in problem.logs}
    for path in sorted((results / "logs").rglob("*.log")):
        log = read_log(path)
        if log and path not in shown and log.lines and log.lines[-1].startswith("error: "):
            name = str(path.relative_to(results / "logs").with_suffix(""))
            detail = log.lines[-1].removeprefix("error: ")
            found.append(Problem(name, "failed", detail, [log]))
    return found


def problem_table(problems: Sequence[Problem]) -> Table:
    """One row for each."""
    columns = [("run or file", NAME), ("status", VERDICT), ("what is known", TEXT)]
    rows = [[problem.name, problem.status, problem.detail or NOTHING] for problem in problems]
    return Table("What is not there, or not as it should be", columns, rows)


def _matrix_problems(config: Mapping[str, Any], results: Path, matrix: Matrix) -> list[Problem]:
    found = []
    for seed, (proof, detail) in matrix.proofs.items():
        name = zero_init_name(config, seed)
        if proof is None or not proof["passed"]:
            status = "damaged" if detail else "missing" if proof is None else "failed"
            log = results / f"logs/compare_zero_init/{name}.log"
            found.append(Problem(name, status, detail, _logs(log)))
    for row in matrix.rows:
        if row["status"] != "ok":
            logs = [results / f"logs/evaluate/{row['name']}.log"]
            if row["training"]:
                logs.insert(0, results / f"logs/train_phase/{row['training']}.log")
            found.append(Problem(row["name"], row["status"], row["detail"], _logs(*logs)))
    if matrix.repeat and matrix.repeat[0] is None:
        run = repeated_evaluation(config)
        logs = [
            results / f"logs/train_phase/{run.training}.log",
            results / f"logs/evaluate/{run.name}.log",
            results / "logs/compare_repeat.log",
        ]
        status = "failed" if matrix.repeat[1] else "missing"
        found.append(Problem(run.name, status, matrix.repeat[1], _logs(*logs)))
    return found


def _student_problems(results: Path, students: Sequence[Result]) -> list[Problem]:
    found = []
    for result in students:
        for seed, run in result.runs.items():
            if run.status != "success":
                name = f"Track-B {result.name}, seed {seed}"
                log = results / f"logs/train_student/{result.experiment.keys[seed]}.log"
                found.append(Problem(name, run.status, run.detail, _logs(log)))
        for detail in result.problems:
            found.append(Problem(f"Track-B {result.name}", "damaged", detail, []))
    return found


def _logs(*paths: Path) -> list[Log]:
    return [log for log in map(read_log, paths) if log]


def read_log(path: Path) -> Log | None:
    """The end of a log; None when there is none."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            tail: deque[str] = deque(maxlen=NUM_LINES)
            number = 0
            for line in file:
                number += 1
                tail.append(line.rstrip("\n")[:LINE_LENGTH])
    except OSError:
        return None
    return Log(path, list(tail), number)
