"""Runs and files that are missing, failed or damaged, with the last lines of their logs."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_recursive.layout import Layout
from kimi_recursive.matrix.runs import repeated_evaluation
from kimi_recursive.matrix.settings import Config
from kimi_recursive.processes.logs import logged_error
from kimi_recursive.report.summary import Matrix
from kimi_recursive.report.tasks import Tasks
from kimi_recursive.status import Status
from kimi_recursive.track_b.summary import Result

NUM_LINES = 20
LINE_LENGTH = 500


@dataclass(frozen=True)
class Log:
    """The last lines of a log, which has `num_lines` in all."""

    path: Path
    lines: list[str]
    num_lines: int


@dataclass(frozen=True)
class Problem:
    """An expected run, or a file, that is missing, failed or damaged."""

    name: str
    status: str
    detail: str
    logs: list[Log]


def find_problems(
    config: Config,
    layout: Layout,
    matrix: Matrix,
    tasks: Tasks,
    students: Sequence[Result],
    damaged: Mapping[str, str],
) -> list[Problem]:
    """Evaluations, tasks, proofs, the repeat, comparisons and students that are not `ok`, and any
    other job whose log ends in an error.

    Args:
        students: Of Track-B; empty when the config does not ask for Track-B.
        damaged: Further files that cannot be read: by what they belong to, the reason.
    """
    found = [*_matrix_problems(config, layout, matrix), *_student_problems(layout, students)]
    for (run, *_), (name, status, detail) in zip(tasks.absent, tasks.problems, strict=True):
        log = layout.log("evaluate_tasks", f"{run.evaluation.name}_step_{run.step}")
        found.append(Problem(name, status, detail, _logs(log)))
    found += [Problem(name, Status.DAMAGED, detail, []) for name, detail in damaged.items()]
    for pair in matrix.comparisons:
        if pair.difference is None and pair.problem not in damaged.values():
            name = f"{pair.arm} against {pair.reference}"
            found.append(Problem(name, Status.DAMAGED, pair.problem, []))
    shown = {log.path for problem in found for log in problem.logs}
    for path in sorted(layout.logs.rglob("*.log")):
        error = logged_error(path)[0]
        if error and path not in shown:
            name = str(path.relative_to(layout.logs).with_suffix(""))
            found.append(Problem(name, Status.FAILED, error, _logs(path)))
    return found


def _matrix_problems(config: Config, layout: Layout, matrix: Matrix) -> list[Problem]:
    found = []
    for cells, (proof, detail) in matrix.proofs.items():
        name = cells.proof
        if proof is None or not proof["passed"]:
            status = (
                Status.DAMAGED if detail else Status.MISSING if proof is None else Status.FAILED
            )
            log = layout.log("compare_zero_init", name)
            found.append(Problem(name, status, detail, _logs(log)))
    for row in matrix.rows:
        if row["status"] != Status.OK:
            logs = [layout.log("evaluate", row["name"])]
            if row["training"]:
                logs.insert(0, layout.log("train_phase", row["training"]))
            found.append(Problem(row["name"], row["status"], row["detail"], _logs(*logs)))
    if matrix.repeat and matrix.repeat[0] is None:
        run = repeated_evaluation(config)
        assert run is not None
        logs = [
            layout.log("train_phase", run.training),
            layout.log("evaluate", run.name),
            layout.log("compare_repeat"),
        ]
        status = Status.FAILED if matrix.repeat[1] else Status.MISSING
        found.append(Problem(run.name, status, matrix.repeat[1], _logs(*logs)))
    return found


def _student_problems(layout: Layout, students: Sequence[Result]) -> list[Problem]:
    found = []
    for result in students:
        for seed, run in result.runs.items():
            if run.status != Status.OK.in_track_b:
                assert result.experiment is not None
                name = f"Track-B {result.name}, seed {seed}"
                log = layout.log("train_student", result.experiment.keys[seed])
                found.append(Problem(name, run.status, run.detail, _logs(log)))
        for detail in result.problems:
            found.append(Problem(f"Track-B {result.name}", Status.DAMAGED, detail, []))
    return found


def _logs(*paths: Path) -> list[Log]:
    return [log for log in map(read_log, paths) if log]


def read_log(path: Path) -> Log | None:
    """The end of a log; None where there is no log."""
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
